"""Memory of a training step from the configuration alone: what each tensor kept for backward costs.

T tokens of a micro-batch, D hidden, E experts, K top-k, F expert width, V vocabulary, b bytes per element.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import nn

from moe_layer.config.model import MoEConfig
from moe_layer.config.train import TrainConfig
from moe_layer.ops.stash import packed_columns


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank, balanced routing assumed.

    Attributes:
        weights: parameters and buffers. gradients, optimizer: one and two tensors per parameter; under
            `optimizer.master_weights` the latter are fp32 and a third is the parameter's fp32 copy.
        activations: kept by autograd for one micro-batch's backward. temporary: the largest working set beside them.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        """Everything at once: the peak of a step with gradient accumulation, a little above it without."""
        return self.weights + self.gradients + self.optimizer + self.activations + self.temporary


def estimate_memory(
    config: TrainConfig, model: nn.Module, *, vocab: int, cpu: bool, quack: bool = False
) -> MemoryEstimate:
    """Estimate for one rank.

    Args:
        model: the whole (unsharded) decoder, on meta.
        cpu: on CPU torch's RMSNorm keeps fp32 intermediates that its fused CUDA kernel does not.
        quack: QuACK runs the experts, whose activation needs no fp32 tensors.
    """
    share = 1 / config.parallel.ep
    trained = sum(
        round(p.numel() * p.element_size() * (share if ".experts." in name else 1))
        for name, p in model.named_parameters()
    )
    buffers = sum(b.numel() * b.element_size() for b in model.buffers())
    width = {"bf16": 2, "fp32": 4, "fp64": 8}[config.train.dtype]
    tokens = config.train.micro_batch * config.data.sequence_length
    block = sum(_block_bytes(config, tokens, width, cpu=cpu).values())
    dense = sum(_dense_block_bytes(config, tokens, width, cpu=cpu).values())
    dense_layers = config.model.dense_layers
    moe_layers = config.model.num_layers - dense_layers
    stream = tokens * config.moe.hidden_size * width
    head = _norm_bytes(config, tokens, width, cpu=cpu) + stream + tokens * (max(4, width) * vocab + 16)
    temporary = tokens * vocab * (4 + width if width < 4 else width)
    temporary = max(temporary, _experts_temporary(config, tokens, width, cpu=cpu, quack=quack))
    if config.train.activation_checkpointing == "none":
        kept = moe_layers * block + dense_layers * dense
    else:  # each block keeps its input; one block at a time is recomputed in full
        kept = config.model.num_layers * stream + max(block if moe_layers else 0, dense if dense_layers else 0)
    optimizer = 2 * trained
    if width < 4 and config.optimizer.master_weights:
        wide = trained * 4 // width
        optimizer = 3 * wide
        temporary = max(temporary, wide - kept - head)  # the step's fp32 gradients, after the activations are gone
    return MemoryEstimate(
        weights=trained + buffers,
        gradients=trained,
        optimizer=optimizer,
        activations=kept + head,
        temporary=temporary,
    )


def _experts_temporary(config: TrainConfig, tokens: int, b: int, *, cpu: bool, quack: bool) -> int:
    """Backward of one layer's experts.

    With torch's GEMMs about ten fp32 tensors of width F per slot in the activation, beside d(output); on an H200 2,688
    MiB at T 32768, K 4, D 1024, F 512. CPU holds one expert's rows. With QuACK d(rows), d(h) and a of every slot, the
    weights' gradients before they are added to others, and four tensors of the stream's size.
    """
    moe, hidden, width = config.moe, config.moe.hidden_size, config.moe.experts.intermediate_size
    slots = tokens * moe.router.top_k // moe.dispatch.chunks // (moe.router.num_experts if cpu else 1)
    if quack:
        weights = 3 * moe.router.num_experts // config.parallel.ep * hidden * width
        return (slots * (hidden + 3 * width) + weights + 4 * tokens * hidden) * b
    return slots * (hidden * b + 10 * width * max(4, b))


def _norm_bytes(config: TrainConfig, tokens: int, b: int, *, cpu: bool) -> int:
    """RMSNorm keeps its input and 1/rms; on CPU the input and the normalised input, both in fp32."""
    return tokens * (config.moe.hidden_size * (2 * max(4, b) if cpu else b) + 4)


def _attention_bytes(config: TrainConfig, tokens: int, b: int, *, cpu: bool) -> dict[str, int]:
    hidden, heads = config.moe.hidden_size, config.model.num_heads
    kv_width = hidden // heads * (config.model.num_kv_heads or heads)
    return {
        "both norms": 2 * _norm_bytes(config, tokens, b, cpu=cpu),
        "attention norm's output": tokens * hidden * b,
        "q, k, v": tokens * (hidden + 2 * kv_width) * b,
        # SDPA writes heads before positions, so that the output projection needs a copy
        "attention output, its copy, log-sum-exp": tokens * (2 * hidden * b + heads * 4),
    }


def _block_bytes(config: TrainConfig, tokens: int, b: int, *, cpu: bool) -> Mapping[str, int]:
    return {**_attention_bytes(config, tokens, b, cpu=cpu), **moe_bytes(config.moe, tokens, b, cpu=cpu)}


def _dense_block_bytes(config: TrainConfig, tokens: int, b: int, *, cpu: bool) -> Mapping[str, int]:
    hidden, width = config.moe.hidden_size, config.model.dense_intermediate_size or 0
    # gate and up (one tensor), silu(gate), and the product
    return {**_attention_bytes(config, tokens, b, cpu=cpu), "dense MLP": tokens * (hidden + 4 * width) * b}


def moe_bytes(config: MoEConfig, tokens: int, b: int, *, cpu: bool) -> Mapping[str, int]:
    """What one MoE layer keeps for backward, its input included: name -> bytes."""
    hidden, width = config.hidden_size, config.experts.intermediate_size
    slots = tokens * config.router.top_k
    gate = config.router.gate_dtype
    gate_copies = b < 4 and (gate == "fp32" or (gate == "fp32_out" and cpu))
    input_kept = not gate_copies or config.dispatch.rows == "compact" or config.shared_expert is not None
    kept = {
        "input": tokens * hidden * (b * input_kept + 4 * gate_copies),
        "router logits": tokens * config.router.num_experts * (b if gate == "input" else max(4, b)),
        "routing maps": 32 * slots,
    }
    if config.dispatch.rows == "expert_major":
        kept["dispatched rows"] = slots * hidden * b
    if config.experts.recompute == "none":
        kept["experts' gate and up"] = 2 * slots * width * b
    elif config.experts.recompute == "fp8_h":
        kept["experts' gate and up"] = slots * packed_columns(2 * width)
    if config.dispatch.apply_probs != "activation":
        kept["experts' outputs"] = slots * hidden * b
    if config.shared_expert is not None:
        kept["shared expert"] = 4 * tokens * config.shared_expert.intermediate_size * b
        kept["shared expert's gated output"] = tokens * hidden * b * config.shared_expert.gate
    return kept
