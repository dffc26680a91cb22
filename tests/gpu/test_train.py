"""Training on a GPU: resume is bit-exact, and the dry run's memory is what the step takes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from moe_layer.cli import main
from moe_layer.train.data import VOCAB
from moe_layer.train.dryrun import estimate
from moe_layer.train.model import Decoder, token_losses, torch_dtype
from moe_layer.train.optim import Optimizer
from tests.e2e.micro import micro_config, micro_yaml

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_resume_is_bit_exact(tmp_path: Path, dtype: str) -> None:
    options = ["train.device=cuda", "moe.router.jitter_eps=0.1", f"train.dtype={dtype}", "train.keep_checkpoints=9"]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert main(["train", str(micro_yaml(tmp_path)), "--out", str(whole), *options]) == 0
    middle = whole / "checkpoints" / "step_00000003"
    assert main(["train", str(micro_yaml(tmp_path)), "--out", str(resumed), "--resume", str(middle), *options]) == 0
    states = []
    for run in (whole, resumed):
        files = sorted((run / "checkpoints" / "step_00000006").rglob("*.safetensors"))
        states.append({f"{file.name}:{key}": tensor for file in files for key, tensor in load_file(file).items()})
    assert not [key for key, tensor in states[0].items() if not torch.equal(tensor, states[1][key])]


@pytest.mark.parametrize("backend", ["auto", "grouped_mm"])
@pytest.mark.parametrize("recompute", ["none", "non_reentrant"])
def test_dry_run_memory_is_within_ten_percent_of_the_allocator(tmp_path: Path, recompute: str, backend: str) -> None:
    before = torch.cuda.memory_allocated()  # of other tests
    sizes = ["model.num_layers=8", "model.num_heads=8", "moe.hidden_size=512", "moe.experts.intermediate_size=256"]
    sizes += ["moe.router.num_experts=16", "moe.router.top_k=4", "data.sequence_length=1024", "data.max_bytes=1000000"]
    sizes += ["train.micro_batch=8", "train.global_batch=16", "train.dtype=bf16", "train.device=cuda"]
    config = micro_config(
        tmp_path, *sizes, f"train.activation_checkpointing={recompute}", f"moe.experts.backend={backend}"
    )
    found = estimate(config).memory
    cuda = torch.device("cuda")
    model = Decoder(
        config.model, config.moe, device=cuda, dtype=torch_dtype("bf16"), activation_checkpointing=recompute
    )
    optimizer = Optimizer(model, config.optimizer, device=cuda)
    tokens = torch.randint(0, VOCAB, (8, 1025), device=cuda)
    for step in range(3):
        if step == 2:
            torch.cuda.reset_peak_memory_stats()
        optimizer.zero_grad()
        for _ in range(2):  # two micro-batches: the second forward meets the first one's gradients
            token_losses(model(tokens[:, :-1]).logits, tokens[:, 1:]).mean().backward()
        optimizer.step(1e-3)
    assert found.total == pytest.approx(torch.cuda.max_memory_allocated() - before, rel=0.1)
