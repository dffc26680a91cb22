"""The fused gate GEMM and router (csrc/router_gate.cuh): logits against fp64, the rest against `route_topk`.

The op's own logits, routed by the unfused kernels, must give the same bits: then every id that differs from the unfused
path's has its cause in the logits, whose error is bounded by twice that of cuBLAS.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer import router as module
from moe_layer.config.model import ExpertsConfig, LossesConfig, MoEConfig, RouterConfig
from moe_layer.ops import _ext
from moe_layer.ops.gate_topk import gate_topk
from moe_layer.ops.route_topk import RouteTopk, route_topk
from moe_layer.router import Router
from tests.gpu.router_cases import DEEPSEEK, LOSSES

pytestmark = pytest.mark.gpu
CASES: dict[str, tuple[int, int, dict[str, Any], bool]] = {  # experts, hidden, options, with a bias of the selection
    "e64-k8": (64, 1024, {"top_k": 8}, False),
    "e56-pre": (56, 72, {"top_k": 3, "softmax_order": "pre", "renormalize": False}, False),
    "e128-k8": (128, 2048, {"top_k": 8}, False),
    "e128-k16-long": (128, 7168, {"top_k": 16}, False),
    "e128-k8-pre": (128, 136, {"top_k": 8, "softmax_order": "pre"}, False),
    "e120-k6-bias": (120, 512, {"top_k": 6, "score_function": "sigmoid"}, True),
    "e128-k8-groups": (128, 1024, {"top_k": 8, **DEEPSEEK}, True),
    "e16-k2": (16, 64, {"top_k": 2}, False),
}
EXACT = ("ids", "counts", "aux_counts", "events")
CLOSE = (
    "weights",
    "score_sum",
    "z_sum",
    "losses",
    "scaled_losses",
)  # the sum over a row's experts is taken over other lanes


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    status = _ext.status()
    assert status.loaded, status.sentence()


def operands(experts: int, hidden: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)
    x_TD = torch.randn(tokens, hidden, device="cuda", generator=generator)
    weight = torch.randn(experts, hidden, device="cuda", generator=generator) * (2 / hidden**0.5)
    return x_TD.bfloat16(), weight.bfloat16()


def expert_bias(experts: int, wanted: bool) -> Tensor | None:
    return (
        torch.randn(experts, device="cuda", generator=torch.Generator("cuda").manual_seed(1)) * 0.1 if wanted else None
    )


def check_logits(logits: Tensor, x_TD: Tensor, weight: Tensor, gate_bias: Tensor | None = None) -> None:
    exact = x_TD.double() @ weight.double().t()
    cublas = torch.mm(x_TD, weight.t(), out_dtype=torch.float32)
    if gate_bias is not None:
        exact, cublas = exact + gate_bias.double(), cublas + gate_bias.float()
    allowed = 2 * (cublas - exact).abs().max() + 1e-6 * exact.abs().max()
    error = (logits - exact).abs().max()
    assert error <= allowed, f"error {error:.3e}, cuBLAS {allowed / 2:.3e}"


def check_routing(ours: RouteTopk, theirs: RouteTopk) -> None:
    for name in EXACT:
        assert torch.equal(getattr(ours, name).nan_to_num(), getattr(theirs, name).nan_to_num()), name
    for name in CLOSE:
        torch.testing.assert_close(getattr(ours, name), getattr(theirs, name), rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("tokens", [1, 33, 1031, 4300, 16400])
@pytest.mark.parametrize("name", CASES)
def test_values(name: str, tokens: int) -> None:
    experts, hidden, options, with_bias = CASES[name]
    x_TD, weight = operands(experts, hidden, tokens)
    bias = expert_bias(experts, with_bias)
    losses = LOSSES | {"loss_coeffs": (0.02, 0.001)}
    logits, ours = gate_topk(x_TD, weight, None, bias, **options, **losses, want_logits=True)
    check_logits(logits, x_TD, weight)
    check_routing(ours, route_topk(logits, bias, **options, **losses))
    empty, unseen = gate_topk(x_TD, weight, None, bias, **options, **losses)
    assert empty.shape == (0, experts)
    check_routing(ours, unseen)


@pytest.mark.parametrize("name", ["e128-k8", "e128-k8-groups"])
def test_ids_are_the_unfused_ones_but_for_near_ties(name: str) -> None:
    experts, hidden, options, with_bias = CASES[name]
    x_TD, weight = operands(experts, hidden, 8192)
    bias = expert_bias(experts, with_bias)
    exact = x_TD.double() @ weight.double().t()
    key = exact if bias is None else exact.sigmoid() + bias.double()
    _, ours = gate_topk(x_TD, weight, None, bias, **options)
    theirs = route_topk(torch.mm(x_TD, weight.t(), out_dtype=torch.float32), bias, **options)
    rows = (ours.ids != theirs.ids).any(1).nonzero().flatten()
    assert rows.numel() < 8192 // 100
    if options.get("num_groups"):
        return  # a near tie of two groups' sums changes several ids
    gap = (key.gather(1, ours.ids.long()) - key.gather(1, theirs.ids.long())).abs()
    assert gap.max() <= 64 * torch.finfo(torch.float32).eps * key.abs().max()


@pytest.mark.parametrize("tokens", [77, 9000])
def test_inputs_and_options(tokens: int) -> None:
    """Biases, replay with missing slots, masked rows, recorded weights, strides; NaN stays in its row."""
    x_TD, weight = operands(128, 256, tokens)
    wide = torch.cat([x_TD, x_TD], dim=1)[:, 128:384]
    assert not wide.is_contiguous()
    gate_bias = torch.randn(128, device="cuda")
    options = {"top_k": 8, **LOSSES}
    valid = torch.rand(tokens, device="cuda") < 0.8
    logits, ours = gate_topk(wide, weight, gate_bias, **options, valid=valid, want_logits=True)
    check_logits(logits, wide, weight, gate_bias)
    check_routing(ours, route_topk(logits, **options, valid=valid))
    shifted = torch.empty(x_TD.numel() + 1, device="cuda", dtype=torch.bfloat16)[1:].view_as(x_TD).copy_(x_TD)
    assert shifted.data_ptr() % 16
    assert torch.equal(gate_topk(shifted, weight, top_k=8)[1].ids, gate_topk(x_TD, weight, top_k=8)[1].ids)
    half = gate_bias.bfloat16()
    logits, ours = gate_topk(x_TD, weight, half, **options, want_logits=True)
    check_logits(logits, x_TD, weight, half)
    forced = ours.ids.roll(1, 0).masked_fill(torch.rand(tokens, 8, device="cuda") < 0.1, -1)
    recorded = torch.rand(tokens, 8, device="cuda")
    for more in ({}, {"replay_weights": recorded, "weights_mode": "recorded"}):
        given = {"replay_ids": forced, **options, **more}
        logits, ours = gate_topk(x_TD, weight, **given, want_logits=True)
        check_routing(ours, route_topk(logits, **given))
    x_TD[5, 3] = torch.nan
    logits, ours = gate_topk(x_TD, weight, **options, want_logits=True)
    assert logits[5].isnan().all() and logits.isnan().sum() == 128
    check_routing(ours, route_topk(logits, **options))


@pytest.mark.parametrize("tokens", [2048, 4300, 16400])
@pytest.mark.parametrize("experts", [64, 128])
def test_everything_at_once(experts: int, tokens: int) -> None:
    """The most shared memory that a call can ask for."""
    x_TD, weight = operands(experts, 256, tokens)
    bias = expert_bias(experts, True)
    options = {"top_k": 16, "score_function": "sigmoid", "num_groups": experts // 8, "group_topk": 4, **LOSSES}
    forced = gate_topk(x_TD, weight, None, bias, **options)[1].ids.roll(1, 0)
    forced = forced.masked_fill(torch.rand(tokens, 16, device="cuda") < 0.1, -1)
    for more in ({}, {"valid": torch.rand(tokens, device="cuda") < 0.8}):
        logits, ours = gate_topk(x_TD, weight, None, bias, replay_ids=forced, **options, **more, want_logits=True)
        check_routing(ours, route_topk(logits, bias, replay_ids=forced, **options, **more))


@pytest.mark.parametrize("name", ["e128-k8", "e128-k8-groups"])
def test_gradients(name: str) -> None:
    """Of the unfused path with the same logits, bit for bit but for the order of sums."""
    experts, hidden, options, with_bias = CASES[name]
    x_TD, weight = operands(experts, hidden, 4096)
    bias = expert_bias(experts, with_bias)
    leaves = [x_TD.requires_grad_(), weight.requires_grad_()]
    logits, ours = gate_topk(x_TD, weight, None, bias, **options, **LOSSES)
    grads = [torch.randn_like(t) for t in (ours.weights, ours.score_sum, ours.z_sum)]
    found = torch.autograd.grad([ours.weights, ours.score_sum, ours.z_sum], leaves, grads)
    leaf = logits.detach().requires_grad_()
    theirs = route_topk(leaf, bias, **options, **LOSSES)
    (d_logits,) = torch.autograd.grad([theirs.weights, theirs.score_sum, theirs.z_sum], [leaf], grads)
    d_logits = d_logits.bfloat16()
    assert torch.equal(found[0], d_logits @ weight) and torch.equal(found[1], d_logits.t() @ x_TD)


def test_graph_replay_takes_other_inputs_and_bits_repeat() -> None:
    x_TD, weight = operands(128, 512, 4096)

    def call() -> tuple[Tensor, RouteTopk]:
        return gate_topk(x_TD, weight, top_k=8, **LOSSES, want_logits=True)

    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        logits, out = call()
    for seed in (1, 2):
        x_TD.copy_(operands(128, 512, 4096, seed)[0])
        graph.replay()
        again = call()
        assert torch.equal(logits, again[0])
        for name in EXACT + CLOSE:
            assert torch.equal(getattr(out, name), getattr(again[1], name)), name


@pytest.mark.parametrize(("experts", "hidden"), [(136, 512), (12, 64), (64, 100)])
def test_what_does_not_fit_runs_apart(experts: int, hidden: int) -> None:
    x_TD, weight = operands(experts, hidden, 300)
    logits, ours = gate_topk(x_TD, weight, top_k=4, **LOSSES)
    check_logits(logits, x_TD, weight)
    check_routing(ours, route_topk(logits, top_k=4, **LOSSES))


def test_no_tokens() -> None:
    x_TD, weight = operands(128, 512, 0)
    logits, out = gate_topk(x_TD, weight, top_k=8, **LOSSES, want_logits=True)
    assert logits.shape == (0, 128) and out.ids.shape == (0, 8) and not out.counts.any() and not out.z_sum.any()


@pytest.mark.parametrize("grouped", [False, True])
def test_router_module(grouped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The router with the fused gate beside the one without: the same routing but for near ties, the same gradients."""
    groups = {"score_function": "sigmoid", "num_groups": 8, "group_topk": 4, "expert_bias": True}
    config = MoEConfig(
        hidden_size=512,
        router=RouterConfig(num_experts=128, top_k=8, fused_gate=True, **(groups if grouped else {})),
        experts=ExpertsConfig(intermediate_size=64),
        losses=LossesConfig(aux="batch", aux_coeff=0.01, z_coeff=0.001),
    )
    torch.manual_seed(0)
    router = Router(config, device="cuda", dtype=torch.bfloat16)
    x_TD = torch.randn(4096, 512, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    d_weights = torch.randn(4096, 8, device="cuda")
    found = {}
    for wins in (True, False):
        monkeypatch.setattr(module, "gate_wins", lambda *_, wins=wins, **__: wins)
        out = router(x_TD)
        grads = torch.autograd.grad([out.weights_TK], [x_TD, router.weight], [d_weights])
        with torch.no_grad():
            unseen = router(x_TD, want_logits=False)
        assert ("logits" in unseen.stats) != wins and torch.equal(unseen.ids_TK, out.ids_TK)
        found[wins] = (out, *grads)
    ours, theirs = found[True], found[False]
    same = (ours[0].ids_TK == theirs[0].ids_TK).all(1)
    assert same.float().mean() > 0.99
    torch.testing.assert_close(ours[0].weights_TK[same], theirs[0].weights_TK[same], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(ours[1][same], theirs[1][same], rtol=0.02, atol=1e-3)
    assert ((ours[2] - theirs[2]).norm() / theirs[2].norm()) < 0.05
    torch.testing.assert_close(ours[0].losses["aux"], theirs[0].losses["aux"], rtol=1e-3, atol=0)
