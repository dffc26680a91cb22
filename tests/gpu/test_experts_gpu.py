"""The expert MLP on a GPU: precision in bf16, no host synchronisation, capture, tails, bits."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from experts_inputs import make_received, received_rows
from oracle_experts import oracle_experts
from torch import Tensor

from moe_layer.config.model import ExpertsConfig
from moe_layer.experts import Experts
from moe_layer.types import Received

T, D, F, E, K = 96, 64, 32, 8, 2
BF16 = torch.bfloat16


def _experts(activation: str = "swiglu", bias: bool = False, dtype: torch.dtype = BF16, **config) -> Experts:
    settings = ExpertsConfig(intermediate_size=F, activation=activation, bias=bias, **config)
    experts = Experts(settings, hidden_size=D, num_experts=E, device="cuda", dtype=dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def _inputs() -> tuple[Tensor, Tensor, Tensor]:
    """CPU x, ids (the last expert idle) and weights."""
    ids = torch.stack([torch.randperm(E - 1)[:K] for _ in range(T)]).int()
    return torch.randn(T, D).to(BF16), ids, torch.rand(T, K)


def _to_cuda(received: Received, dtype: torch.dtype = BF16) -> Received:
    moved = {
        field.name: value.cuda()
        for field in dataclasses.fields(received)
        if isinstance(value := getattr(received, field.name), Tensor)
    }
    moved["rows"] = moved["rows"].to(dtype).requires_grad_()
    moved["act_probs_N"] = moved["probs_N"].clone().requires_grad_()
    return dataclasses.replace(received, **moved)


def _gradients(experts: Experts, received: Received, rows: Tensor, upstream: Tensor) -> list[Tensor]:
    leaves = [received.rows, received.act_probs_N, *experts.parameters()]
    return list(torch.autograd.grad(rows, leaves, upstream))


@pytest.mark.parametrize("activation", ["swiglu", "swiglu_clamped", "geglu"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("compact", [False, True])
def test_bf16_is_within_twice_the_plain_path(activation: str, bias: bool, compact: bool) -> None:
    experts = _experts(activation, bias)
    x, ids, weights = _inputs()
    received = _to_cuda(make_received(x, ids, weights, num_experts=E, compact=compact, tail=40, poison=not compact))
    rows = experts(received)
    count = T * K
    upstream = torch.full_like(rows, float("nan"))
    upstream[:count] = torch.randn(count, D, device="cuda").to(BF16)
    d_rows, d_probs, *rest = _gradients(experts, received, rows, upstream)
    got = [rows[:count], d_rows if compact else d_rows[:count], d_probs[:count], *rest]
    results = []
    for wide in (BF16, torch.float64):
        source = x.to(wide).cuda().requires_grad_()
        probs = weights.to(wide).cuda().requires_grad_()
        parameters = {name: p.detach().to(wide).requires_grad_() for name, p in experts.named_parameters()}
        order = received_rows(ids, range(E))
        out = oracle_experts(order, source, probs, parameters, activation=activation)
        d_x, d_w, *d_parameters = torch.autograd.grad(
            out, [source, probs, *parameters.values()], upstream[:count].to(wide)
        )
        tokens = torch.tensor([token for _, token, _ in order], device="cuda")
        slots = torch.tensor([slot for _, _, slot in order], device="cuda")
        results.append([out, d_x, d_w[tokens, slots], *d_parameters])
    if not compact:  # the loop's gradient is per token: add our rows up
        got[1] = torch.zeros(T, D, device="cuda").index_add_(0, received.src_N3[:count, 1], got[1].float())
    for mine, plain, truth in zip(got, *results, strict=True):
        assert mine.isfinite().all()
        floor = torch.finfo(BF16).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + floor


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_no_host_synchronisation(compact: bool, bias: bool) -> None:
    experts = _experts(bias=bias)
    received = _to_cuda(make_received(*_inputs(), num_experts=E, compact=compact))
    upstream = torch.randn(T * K, D, device="cuda").to(BF16)
    _gradients(experts, received, experts(received), upstream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        _gradients(experts, received, experts(received), upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_capture_replays_with_another_routing() -> None:
    experts = _experts()
    first, second = (_to_cuda(make_received(*_inputs(), num_experts=E)) for _ in range(2))
    upstream = torch.randn(T * K, D, device="cuda").to(BF16)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            _gradients(experts, first, experts(first), upstream)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        rows = experts(first)
        got = [rows.detach(), *_gradients(experts, first, rows, upstream)]
    with torch.no_grad():
        for field in dataclasses.fields(first):
            if isinstance(getattr(first, field.name), Tensor):
                getattr(first, field.name).copy_(getattr(second, field.name))
    graph.replay()
    torch.cuda.synchronize()
    rows = experts(second)
    want = [rows, *_gradients(experts, second, rows, upstream)]
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def test_grouped_mm_repeats_its_bits() -> None:
    one, twin = _experts(backend="grouped_mm"), _experts(backend="grouped_mm")
    twin.load_state_dict(one.state_dict())
    received = _to_cuda(make_received(*_inputs(), num_experts=E, compact=True))
    upstream = torch.randn(T * K, D, device="cuda").to(BF16)
    results = [
        [rows := experts(received), *_gradients(experts, received, rows, upstream)] for experts in (one, twin, one)
    ]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_loop_and_fullgraph_compile() -> None:
    grouped, loop = _experts(backend="grouped_mm"), _experts(backend="reference")
    loop.load_state_dict(grouped.state_dict())
    received = _to_cuda(make_received(*_inputs(), num_experts=E))
    eager = grouped(received)
    torch.testing.assert_close(loop(received), eager, rtol=2e-2, atol=2e-2)
    compiled = torch.compile(grouped, fullgraph=True, backend="aot_eager")(received)
    assert torch.equal(compiled, eager)


def test_fp32_on_a_gpu_falls_back_with_one_warning() -> None:
    experts = _experts(dtype=torch.float32)
    received = _to_cuda(make_received(*_inputs(), num_experts=E), torch.float32)
    with pytest.warns(UserWarning, match="auto uses the per-expert loop.*use bfloat16"):
        rows = experts(received)
    assert rows.isfinite().all()
