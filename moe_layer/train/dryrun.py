"""`moe-layer train --dry-run`: parameters, FLOPs and memory of a configuration, built on the meta device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_layer.config.train import TrainConfig
from moe_layer.experts.quack import obstacle
from moe_layer.observe.flops import ParameterCount, count_parameters, train_flops_per_token
from moe_layer.observe.memory import MemoryEstimate, estimate_memory
from moe_layer.observe.metrics import short_number
from moe_layer.train.data import VOCAB
from moe_layer.train.model import Decoder, torch_dtype
from moe_layer.train.world import pick_device


@dataclass(frozen=True)
class Estimate:
    """Sizes of a run; `flops_per_token` counts forward and backward."""

    parameters: ParameterCount
    flops_per_token: float
    memory: MemoryEstimate


def estimate(config: TrainConfig) -> Estimate:
    """Build the decoder without memory and count. `experts.backend: auto` is what it would be on this machine."""
    device, dtype = pick_device(config.train.device), torch_dtype(config.train.dtype)
    model = Decoder(config.model, config.moe, device=torch.device("meta"), dtype=dtype)
    experts = config.moe.experts
    quack = experts.backend == "quack"
    if experts.backend == "auto":
        sizes = {"hidden_size": config.moe.hidden_size, "width": experts.intermediate_size}
        options = {"activation": experts.activation, "bias": experts.bias}
        quack = obstacle(device, dtype, **options, **sizes) is None
    return Estimate(
        parameters=count_parameters(model, config.moe),
        flops_per_token=train_flops_per_token(config, vocab=VOCAB),
        memory=estimate_memory(config, model, vocab=VOCAB, cpu=device.type == "cpu", quack=quack),
    )


def describe(config: TrainConfig, found: Estimate) -> str:
    """The dry run's report."""
    count, memory = found.parameters, found.memory
    tokens = config.train.global_batch * config.data.sequence_length
    ranks = config.parallel.ep * (config.parallel.dp or 1)
    rows = [
        ("weights", memory.weights),
        ("gradients", memory.gradients),
        ("optimizer", memory.optimizer),
        ("activations", memory.activations),
        ("temporary", memory.temporary),
        ("total", memory.total),
    ]
    step_flops = found.flops_per_token * tokens
    lines = [
        f"{config.name}: dry run, nothing is trained",
        f"parameters   {count.total:,} ({count.active:,} active per token, {count.experts:,} in routed experts)",
        f"FLOPs        {short_number(found.flops_per_token)} per token, {short_number(step_flops)} per step "
        f"of {tokens:,} tokens, {step_flops * config.train.steps:.2e} in {config.train.steps} steps",
        f"memory of a rank (ep {config.parallel.ep}, {ranks} rank(s) planned, {config.train.dtype}, micro-batch "
        f"{config.train.micro_batch} x {config.data.sequence_length}, balanced routing):",
        *(f"  {name:<11} {size / 2**20:12,.1f} MiB" for name, size in rows),
    ]
    return "\n".join(lines)
