"""The decoder and what is counted about it: FLOPs, parameters and memory against torch's own counters and real
tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from moe_layer.config.train import TrainConfig
from moe_layer.observe.flops import count_parameters, peak_tflops, train_flops_per_token
from moe_layer.train import dryrun
from moe_layer.train.data import VOCAB
from moe_layer.train.dryrun import describe, estimate
from moe_layer.train.model import Decoder, token_losses, torch_dtype
from moe_layer.train.optim import Optimizer
from tests.e2e.micro import micro_config


def _decoder(config: TrainConfig, **options: str) -> Decoder:
    torch.manual_seed(0)
    return Decoder(config.model, config.moe, dtype=torch_dtype(config.train.dtype), **options)


def _tokens(config: TrainConfig) -> Tensor:
    shape = (config.train.micro_batch, config.data.sequence_length + 1)
    return torch.randint(0, VOCAB, shape, generator=torch.Generator().manual_seed(1))


def _loss(model: Decoder, tokens: Tensor) -> Tensor:
    return token_losses(model(tokens[:, :-1]).logits, tokens[:, 1:]).mean()


def test_initialisation(tmp_path: Path) -> None:
    """Attention's output projections are smaller by sqrt(2 * layers); embedding_std is the embedding's alone."""
    sizes = ["model.num_layers=8", "moe.hidden_size=64", "moe.shared_expert.intermediate_size=32"]
    model = _decoder(micro_config(tmp_path, *sizes, "model.tie_embeddings=false", "model.embedding_std=1"))
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            std = {"embedding.weight": 1.0}.get(name, 0.005 if "o_proj" in name else 0.02)
            assert float(parameter.detach().std()) == pytest.approx(std, rel=0.1), name


def test_attention_is_causal(tmp_path: Path) -> None:
    model, tokens = _decoder(micro_config(tmp_path)).eval(), _tokens(micro_config(tmp_path))
    with torch.no_grad():
        one = model(tokens).logits
        tokens[:, 20:] = 7
        two = model(tokens).logits
    torch.testing.assert_close(one[:, :20], two[:, :20])
    assert (one[:, 20:] - two[:, 20:]).abs().max() > 1e-3


def test_rotary_scores_depend_on_distance_only(tmp_path: Path) -> None:
    from moe_layer.train.model import _rotary, _rotate

    model = _decoder(micro_config(tmp_path))
    cos, sin = _rotary(30, model, dtype=torch.float32)
    q, k = torch.randn(16), torch.randn(16)
    rotated_q = _rotate(q.expand(30, 16), cos, sin)
    rotated_k = _rotate(k.expand(30, 16), cos, sin)
    scores = rotated_q @ rotated_k.T
    for distance in (0, 3, 11):
        line = scores.diagonal(offset=-distance)
        torch.testing.assert_close(line, line[:1].expand_as(line), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("recompute", ["non_reentrant", "reentrant"])
def test_activation_checkpointing_changes_no_gradient_and_counts_once(tmp_path: Path, recompute: str) -> None:
    config = micro_config(tmp_path)
    tokens = _tokens(config)
    plain, again = _decoder(config), _decoder(config, activation_checkpointing=recompute)
    for model in (plain, again):
        _loss(model, tokens).backward()
    for (name, a), b in zip(plain.named_parameters(), again.parameters(), strict=True):
        assert a.grad is not None and torch.equal(a.grad, b.grad), name
    for a, b in zip(plain.moe_layers(), again.moe_layers(), strict=True):
        one, two = a.collect_stats(), b.collect_stats()
        assert one["load"].sum() == tokens[:, 1:].numel() * config.moe.router.top_k
        assert one.keys() == two.keys() and all(torch.equal(one[key], two[key]) for key in one)


@pytest.mark.parametrize(
    "overrides", [[], ["model.dense_layers=1", "model.dense_intermediate_size=48", "model.num_kv_heads=1"]]
)
def test_flops_agree_with_torch_counter(tmp_path: Path, overrides: list[str]) -> None:
    config = micro_config(tmp_path, "moe.shared_expert.intermediate_size=16", *overrides)
    model, tokens = _decoder(config), _tokens(config)
    # torch does not count CPU's fused attention kernel
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(tokens[:, :-1])
    expected = 3 * counter.get_total_flops() / tokens[:, 1:].numel()
    assert train_flops_per_token(config, vocab=VOCAB) == pytest.approx(expected, rel=0.01)


def test_parameter_count(tmp_path: Path) -> None:
    config = micro_config(tmp_path)
    count = count_parameters(_decoder(config), config.moe)
    experts = 2 * 4 * 3 * 32 * 32
    dense = 256 * 32 + 2 * (4 * 32 * 32 + 2 * 32 + 4 * 32) + 32
    assert (count.total, count.experts, count.active) == (experts + dense, experts, experts // 2 + dense)


CASES = [
    [],
    ["train.dtype=bf16"],
    ["train.dtype=bf16", "optimizer.master_weights=false"],
    ["train.dtype=fp64"],
    ["moe.dispatch.rows=compact"],
    ["model.num_kv_heads=1", "moe.experts.recompute=h"],
    ["model.dense_layers=1", "model.dense_intermediate_size=64"],
    ["moe.shared_expert.intermediate_size=32", "moe.shared_expert.gate=true"],
]


@pytest.mark.parametrize("overrides", CASES, ids=lambda case: ",".join(case) or "base")
def test_dry_run_memory_is_within_ten_percent_of_real_tensors(tmp_path: Path, overrides: list[str]) -> None:
    config = micro_config(tmp_path, "moe.hidden_size=64", "data.sequence_length=64", *overrides)
    found = estimate(config).memory
    model = _decoder(config)
    optimizer = Optimizer(model, config.optimizer, device=torch.device("cpu"))
    persistent = [*model.parameters(), *model.buffers()]
    fixed = {t.untyped_storage().data_ptr() for t in persistent}
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.untyped_storage().data_ptr() not in fixed:
            kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = _loss(model, _tokens(config))
    activations = sum(t.untyped_storage().nbytes() for t in kept.values())
    loss.backward()
    optimizer.step(1e-3)
    gradients = sum(p.grad.untyped_storage().nbytes() for p in model.parameters() if p.grad is not None)
    state = optimizer.state_tensors(1).values()
    weights = sum(t.untyped_storage().nbytes() for t in persistent)
    assert found.activations == pytest.approx(activations, rel=0.1)
    assert (found.gradients, found.optimizer) == (gradients, sum(t.untyped_storage().nbytes() for t in state))
    assert found.weights == pytest.approx(weights, rel=0.01)
    assert "activations" in describe(config, estimate(config))


def test_dry_run_knows_what_the_experts_take_on_a_gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 tokens, 128 slots, 4 experts, D 32, F 512: torch's activation in fp32; QuACK; what this machine has."""
    monkeypatch.setattr(dryrun, "pick_device", lambda _: torch.device("cuda"))
    sizes = ["train.dtype=bf16", "optimizer.master_weights=false", "data.sequence_length=32", "train.micro_batch=2"]

    def temporary(backend: str) -> int:
        experts = ["moe.experts.intermediate_size=512", f"moe.experts.backend={backend}"]
        return estimate(micro_config(tmp_path, *sizes, *experts)).memory.temporary

    assert temporary("grouped_mm") == 128 * (32 * 2 + 10 * 512 * 4)
    assert temporary("quack") == (128 * (32 + 3 * 512) + 3 * 4 * 32 * 512 + 4 * 64 * 32) * 2
    monkeypatch.setattr(dryrun, "obstacle", lambda *_, **__: None)
    assert temporary("auto") == temporary("quack")
    monkeypatch.setattr(dryrun, "obstacle", lambda *_, **__: "not here")
    assert temporary("auto") == temporary("grouped_mm")


def test_known_peaks() -> None:
    assert peak_tflops("NVIDIA H200") == peak_tflops("NVIDIA H100 80GB HBM3") == 989.0
    assert peak_tflops("NVIDIA H100 PCIe") == 756.0
    assert peak_tflops("Radeon") is None
