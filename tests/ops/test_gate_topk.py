"""gate_topk on the CPU: the two ops it stands for, its gradient, and the router with it in their place."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer import router as module
from moe_layer.config.model import ExpertsConfig, LossesConfig, MoEConfig, ReplayConfig, RouterConfig
from moe_layer.layer import MoELayer
from moe_layer.ops import gate_topk as op
from moe_layer.ops.gate import gate_logits
from moe_layer.ops.gate_topk import gate_fits, gate_topk, gate_wins
from moe_layer.ops.route_topk import RouteTopk, route_topk
from moe_layer.router import Router

LOSSES = {"aux_counts": "live", "want_z": True}
CASES: dict[str, dict[str, Any]] = {
    "softmax": {"top_k": 4},
    "pre": {"top_k": 3, "softmax_order": "pre", "renormalize": False},
    "groups": {"top_k": 4, "score_function": "sigmoid", "num_groups": 4, "group_topk": 2, "scaling_factor": 2.5},
}


def operands(dtype: torch.dtype, tokens: int = 33, hidden: int = 24, experts: int = 16) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    shapes = ((tokens, hidden), (experts, hidden), (experts,))
    return tuple(torch.randn(shape, generator=generator, dtype=dtype).requires_grad_() for shape in shapes)


def same(ours: RouteTopk, theirs: RouteTopk) -> None:
    for name, value in ours._asdict().items():
        assert torch.equal(value.nan_to_num(), getattr(theirs, name).nan_to_num()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_of_the_two_ops(name: str, dtype: torch.dtype) -> None:
    x_TD, weight, gate_bias = operands(dtype)
    expert_bias = torch.randn(16) * 0.1 if name == "groups" else None
    logits, ours = gate_topk(x_TD, weight, gate_bias, expert_bias, **CASES[name], **LOSSES)
    expected = gate_logits(x_TD, weight, gate_bias, gate_dtype="fp32_out")
    theirs = route_topk(expected, expert_bias, **CASES[name], **LOSSES)
    assert torch.equal(logits, expected)
    same(ours, theirs)
    grads = [torch.randn_like(t) for t in (logits, ours.weights, ours.score_sum, ours.z_sum)]
    found = torch.autograd.grad([logits, ours.weights, ours.score_sum, ours.z_sum], [x_TD, weight, gate_bias], grads)
    wanted = torch.autograd.grad(
        [expected, theirs.weights, theirs.score_sum, theirs.z_sum], [x_TD, weight, gate_bias], grads
    )
    for one, two in zip(found, wanted, strict=True):
        # bf16: d(logits) is rounded to bf16 before the products, as on CUDA
        assert (one - two).norm() <= (0.01 if dtype == torch.bfloat16 else 1e-6) * two.norm()


def test_logits_only_where_they_are_needed() -> None:
    x_TD, weight, gate_bias = (t.detach() for t in operands(torch.float32))
    logits, out = gate_topk(x_TD, weight, gate_bias, top_k=4)
    assert logits.shape == (0, 16) and out.ids.shape == (33, 4)
    assert gate_topk(x_TD, weight, gate_bias, top_k=4, want_logits=True)[0].shape == (33, 16)
    assert gate_topk(x_TD, weight.requires_grad_(), gate_bias, top_k=4)[0].shape == (33, 16)
    with torch.no_grad():
        assert gate_topk(x_TD, weight, gate_bias, top_k=4)[0].shape == (0, 16)


@pytest.mark.parametrize("name", CASES)
def test_gradcheck(name: str) -> None:
    x_TD, weight, gate_bias = operands(torch.float64, tokens=5, hidden=6)

    def call(*inputs: Tensor) -> tuple[Tensor, ...]:
        logits, out = gate_topk(*inputs, **CASES[name], **LOSSES, loss_coeffs=(0.1, 0.2))
        return logits, out.weights, out.score_sum, out.z_sum, out.losses[:2], out.scaled_losses

    assert torch.autograd.gradcheck(call, (x_TD, weight, gate_bias))


@pytest.mark.parametrize("want_logits", [True, False])
def test_opcheck(want_logits: bool) -> None:
    x_TD, weight, gate_bias = operands(torch.float32)
    if not want_logits:  # its backward reads them
        x_TD, weight, gate_bias = x_TD.detach(), weight.detach(), gate_bias.detach()
    keys = (
        "score_function",
        "softmax_order",
        "renormalize",
        "scaling_factor",
        "num_groups",
        "group_topk",
        "group_rule",
    )
    options = {name: gate_topk.__kwdefaults__[name] for name in (*keys, "weights_mode")} | LOSSES
    torch.library.opcheck(
        torch.ops.moe_layer.gate_topk.default,
        (x_TD, weight, gate_bias, None, torch.zeros(33, 4, dtype=torch.int32), None, torch.rand(33) < 0.5),
        options | {"top_k": 4, "want_logits": want_logits, "want_losses": True, "aux_coeff": 0.1, "z_coeff": 0.2},
    )


def test_fullgraph_compile() -> None:
    x_TD, weight, gate_bias = operands(torch.float32)

    def call(x_TD: Tensor) -> tuple[Tensor, Tensor]:
        logits, out = gate_topk(x_TD, weight, gate_bias, top_k=4, **LOSSES)
        return logits, out.weights * 2

    expected = call(x_TD)
    found = torch.compile(call, fullgraph=True, backend="aot_eager")(x_TD)
    assert all(torch.equal(one, two) for one, two in zip(found, expected, strict=True))
    d_weights = torch.randn(33, 4)
    one, two = (torch.autograd.grad(weights, [x_TD, weight], d_weights) for _, weights in (found, expected))
    assert all(torch.allclose(a, b) for a, b in zip(one, two, strict=True))


def test_no_tokens_strides_and_nan() -> None:
    x_TD, weight, _ = operands(torch.float32)
    logits, out = gate_topk(x_TD[:0], weight, top_k=4, **LOSSES)
    assert logits.shape == (0, 16) and not out.counts.any()
    wide = torch.cat([x_TD, x_TD], dim=1).detach()
    same(gate_topk(wide[:, :24], weight, top_k=4)[1], gate_topk(x_TD, weight, top_k=4)[1])
    wide[3, 3] = torch.nan
    out = gate_topk(wide[:, :24], weight, top_k=4)[1]
    assert out.events[5] == 1 and (out.ids >= 0).all() and out.weights.isnan().any(1).sum() == 1


@pytest.mark.parametrize(
    ("text", "error", "change"),
    [
        ("do not fit", ValueError, {"weight": torch.zeros(16, 23)}),
        ("cast one", TypeError, {"weight": torch.zeros(16, 24, dtype=torch.bfloat16)}),
        ("top_k must lie", ValueError, {"top_k": 17}),
        ("replay_ids must have shape", ValueError, {"replay_ids": torch.zeros(2, 4, dtype=torch.int32)}),
    ],
)
def test_bad_arguments(text: str, error: type[Exception], change: dict[str, Any]) -> None:
    with pytest.raises(error, match=text):
        gate_topk(**({"x_TD": torch.zeros(3, 24), "weight": torch.zeros(16, 24), "top_k": 4} | change))


# ------------------------------------------------------------------------------------------------------- the router


def config(**router: Any) -> MoEConfig:
    return MoEConfig(
        hidden_size=24,
        router=RouterConfig(num_experts=16, top_k=4, linear_bias=True, **{"fused_gate": True, **router}),
        experts=ExpertsConfig(intermediate_size=8),
        losses=LossesConfig(aux="batch", aux_coeff=0.02, z_coeff=0.001),
        replay=ReplayConfig(bias_counts="effective" if "capacity_factor" in router else "live"),
    )


@pytest.mark.parametrize("router", [{}, {"jitter_eps": 0.1}, {"capacity_factor": 1.0}], ids=str)
def test_the_router_does_not_change(router: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Live, masked and replayed, with gradients and counters."""
    valid = torch.rand(33) < 0.8
    ids = torch.rand(33, 16).argsort(dim=1)[:, :4]
    d_weights = torch.randn(33, 4)
    found = []
    for wins in (False, True):
        monkeypatch.setattr(module, "gate_wins", lambda *_, wins=wins, **__: wins)
        torch.manual_seed(0)
        ours = Router(config(**router))
        x_TD = torch.randn(33, 24, requires_grad=True)
        results = []
        replays = [None] if router.get("capacity_factor") else [None, module.RoutingDecision(ids=ids)]
        for replay in replays:
            out = ours(x_TD, valid_T=valid, replay=replay)
            out.weights_TK.backward(d_weights)
            results += [out.ids_TK, out.weights_TK, out.stats["logits"], out.stats["events"], *out.losses.values()]
        results += [x_TD.grad, *(p.grad for p in ours.parameters()), ours.tokens_per_expert, ours.log_sums]
        found.append(results)
    assert all(torch.allclose(one, two, rtol=1e-5, atol=1e-7) for one, two in zip(*found, strict=True))


def test_the_layer_asks_for_logits_only_to_return_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "gate_wins", lambda *_, **__: True)
    layer, x = MoELayer(config()), torch.randn(5, 24)
    asked = []
    plain = module.gate_topk
    monkeypatch.setattr(module, "gate_topk", lambda *a, **k: asked.append(k["want_logits"]) or plain(*a, **k))
    with torch.no_grad():
        layer(x)
        _, routing = layer(x, return_routing=True)
        MoELayer(config(fused_gate=False))(x)
    assert asked == [False, True] and routing.stats["logits"].shape == (5, 16)


def test_a_frozen_router_counts_what_it_would_have_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """replay.bias_counts: live reads the logits although nothing is differentiated."""
    monkeypatch.setattr(module, "gate_wins", lambda *_, **__: True)
    router = Router(config()).requires_grad_(False)
    x_TD, ids = torch.randn(33, 24), torch.rand(33, 16).argsort(dim=1)[:, :4]
    out = router(x_TD, replay=module.RoutingDecision(ids=ids), want_logits=False)
    assert out.stats["logits"].shape == (33, 16)


def test_only_what_the_kernel_serves_fits() -> None:
    x_TD, weight = torch.zeros(3, 24, dtype=torch.bfloat16), torch.zeros(16, 24, dtype=torch.bfloat16)
    options = {"top_k": 4, "score_function": "softmax", "num_groups": 0, "group_topk": 0, "group_rule": "sum_top2"}
    assert not gate_fits(x_TD, weight, None, **options)  # not on CUDA


def test_where_blocks_would_idle_the_two_ops_run() -> None:
    wins = [tokens for tokens in range(0, 40000, 8) if op._fills(tokens, 132)]
    edges = [tokens for tokens in wins if tokens - 8 not in wins or tokens + 8 not in wins]
    assert edges == [1024, 4224, 15208, 16896]


def test_the_choice_compiles() -> None:
    x_TD, weight = torch.zeros(3, 24, dtype=torch.bfloat16), torch.zeros(16, 24, dtype=torch.bfloat16)
    options = {"top_k": 4, "score_function": "softmax", "num_groups": 0, "group_topk": 0, "group_rule": "sum_top2"}

    def call(x_TD: Tensor) -> Tensor:
        return x_TD + 1 if gate_wins(x_TD, weight, None, **options) or op._hopper_sms(0) > 0 else x_TD + 2

    assert torch.equal(torch.compile(call, fullgraph=True, backend="eager")(x_TD), x_TD + 2)
