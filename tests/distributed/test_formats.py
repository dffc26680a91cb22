"""dispatch_format fp8_1x128: its numbers, the same bits on any number of ranks, its gradients, whole layers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_layer import MoELayer
from moe_layer.config import ExpertsConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.dispatch.formats import Fp8BlockFormat, after_trip
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests import oracle_dispatch
from tests.distributed.cases import (
    Case,
    Result,
    apply_experts,
    assert_same_bits,
    config_for,
    even_cuts,
    joined,
    make_case,
    run_case,
)
from tests.distributed.ranks import ThreadRanks

BACKENDS = ("all_to_all", "all_gather", "replicated", "nvlink", "nvlink:dense")
PROBS = ("activation", "combine", "source")
FP8 = DispatchConfig(dispatch_format="fp8_1x128")
TABLE = [m / 8 * 2.0**-6 if e == 0 else (1 + m / 8) * 2.0 ** (e - 7) for e in range(16) for m in range(8)][:-1]
"""Magnitudes of e4m3fn, by code; the last code is NaN."""


def nearest_e4m3(value: float) -> float:
    """Nearest entry of the table, ties to the even code."""
    code = min(range(len(TABLE)), key=lambda c: (abs(TABLE[c] - abs(value)), c % 2))
    return TABLE[code] if value >= 0 else -TABLE[code]


# ---- fp8_1x128 by itself -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("D", [3, 128, 200])
def test_values_and_scales_against_a_table(D: int) -> None:
    x_TD = torch.randn(3, D, generator=torch.Generator().manual_seed(D)) * torch.tensor([[1e-3], [1.0], [7e4]])
    form = Fp8BlockFormat(D)
    values, scales = form.encode(x_TD)
    assert values.dtype == torch.uint8 and scales.dtype == torch.float32 and scales.shape == (3, -(-D // 128))
    decoded = form.decode([values, scales], dtype=torch.float32)
    for t in range(3):
        for d in range(D):
            block = x_TD[t, d // 128 * 128 : d // 128 * 128 + 128]
            scale = block.abs().max() / 448
            assert scales[t, d // 128] == scale
            want = torch.tensor(nearest_e4m3((x_TD[t, d] / scale).item())) * scale
            assert decoded[t, d] == want, (t, d)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_error_bound(dtype: torch.dtype) -> None:
    """2^-4 of the element, or 2^-10 of the scale where e4m3 is subnormal (and one rounding to the rows' dtype)."""
    g = torch.Generator().manual_seed(0)
    x_TD = (torch.randn(64, 300, generator=g) * torch.exp(2 * torch.randn(64, 300, generator=g))).to(dtype)
    error = (after_trip(x_TD, Fp8BlockFormat(300)) - x_TD).abs().double()
    scale_TD = Fp8BlockFormat(300).encode(x_TD)[1].double().repeat_interleave(128, 1)[:, :300]
    last = torch.finfo(dtype).eps if dtype.itemsize == 2 else 1e-6
    bound = torch.maximum(x_TD.double().abs() * 2**-4, scale_TD * 2**-10) + x_TD.double().abs() * 2 * last
    assert (error <= bound + torch.finfo(dtype).smallest_normal).all()
    assert (error > 0).any()


def test_zeros_extremes_and_what_is_not_finite() -> None:
    tiny, huge = 1e-44, torch.finfo(torch.float32).max
    x_TD = torch.zeros(4, 256)
    x_TD[0, 128:] = 1.0
    x_TD[1, 0], x_TD[1, 1] = tiny, -tiny
    x_TD[2, 0], x_TD[2, 200] = huge, -huge
    x_TD[3, :128] = torch.linspace(-3, 3, 128)
    clean = after_trip(x_TD, Fp8BlockFormat(256))
    assert torch.equal(clean[:3, 2:], x_TD[:3, 2:]) and torch.equal(clean[2], x_TD[2]), "zeros, ones and the largest"
    assert (clean[1, :2].abs() <= 2**-126 * 2**-9).all()
    broken = x_TD.clone()
    broken[3, 5], broken[3, 6], broken[3, 7] = torch.nan, torch.inf, -torch.inf
    got = after_trip(broken, Fp8BlockFormat(256))
    assert got[3, 5:8].isnan().all()
    keep = torch.ones(256, dtype=torch.bool).index_fill(0, torch.arange(5, 8), False)
    assert torch.equal(got[:, keep], clean[:, keep]), "neighbours keep their values"
    zero_bytes = [torch.zeros_like(part) for part in Fp8BlockFormat(256).encode(x_TD)]
    assert torch.count_nonzero(Fp8BlockFormat(256).decode(zero_bytes, dtype=torch.float32)) == 0
    assert after_trip(x_TD[:0], Fp8BlockFormat(256)).shape == (0, 256)


# ---- the same bits on any number of ranks ------------------------------------------------------------------------


def run_ranks(ranks: ThreadRanks, size: int, case: Case, config: DispatchConfig) -> Result:
    got = ranks.run(size, lambda context: run_case(case, config, context))
    return joined(got, replicated=config.backend == "replicated")


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apply_probs", PROBS)
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
def test_ranks_do_not_change_bits(ranks: ThreadRanks, backend: str, apply_probs: str, rows: str) -> None:
    """y and all gradients, so both the rows and the d(sum) rows are rounded at home as they are on the wire."""
    case = make_case(3, T=26, D=136, E=8, K=3)
    plain: dict[str, Any] = {"apply_probs": apply_probs}
    rounded = plain | {"dispatch_format": "fp8_1x128"}
    want = run_case(case, DispatchConfig(**rounded, rows="expert_major"))
    assert_same_bits(run_case(case, DispatchConfig(**rounded, rows="compact")), want)
    for size in (2, 4):
        assert_same_bits(run_ranks(ranks, size, case, config_for(backend, **rounded, rows=rows)), want)
    unrounded = run_case(case, DispatchConfig(**plain))
    for name in ("y", "dx", "dw", "d_experts"):
        assert not torch.equal(getattr(want, name), getattr(unrounded, name)), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apply_probs", PROBS)
def test_bf16_rows(ranks: ThreadRanks, backend: str, apply_probs: str) -> None:
    """bf16 x, fp32 combine: y and every gradient."""
    case = make_case(4, T=24, D=144, E=8, K=3, dtype=torch.bfloat16)
    rounded: dict[str, Any] = {
        "apply_probs": apply_probs,
        "dispatch_format": "fp8_1x128",
        "combine_format": "fp32",
    }
    want = run_case(case, DispatchConfig(**rounded))
    for size in (2, 4):
        got = run_ranks(ranks, size, case, config_for(backend, **rounded))
        assert_same_bits(got, want)


@pytest.mark.parametrize("backend", ["all_to_all", "all_gather", "nvlink", "nvlink:dense"])
def test_uneven_and_idle_ranks(ranks: ThreadRanks, backend: str) -> None:
    config = config_for(backend, dispatch_format="fp8_1x128")
    for T, cuts in ((9, [0, 0, 5, 5, 9]), (0, [0, 0, 0, 0, 0]), (7, [0, 7, 7, 7, 7])):
        case = make_case(T, T=T, D=40, E=8, K=2, absent=0.4)
        got = ranks.run(4, lambda context, case=case, cuts=cuts: run_case(case, config, context, cuts=cuts))
        assert_same_bits(joined(got), run_case(case, FP8))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute(ranks: ThreadRanks, backend: str, reentrant: bool) -> None:
    """A checkpointed dispatch encodes again and changes no bit."""
    case = make_case(9, T=20, D=24, E=8, K=3)
    config = config_for(backend, dispatch_format="fp8_1x128")

    def one(context: ParallelContext) -> tuple[Result, Result]:
        cuts, rank = even_cuts(20, 2), context.ep_rank
        mine = slice(None) if backend == "replicated" else slice(cuts[rank], cuts[rank + 1])
        x, w = case.x_TD[mine].clone().requires_grad_(), case.w_TK[mine].clone().requires_grad_()
        experts = case.experts[4 * rank : 4 * rank + 4].clone().requires_grad_()
        d = make_dispatcher(config, num_experts=8, top_k=3, context=context)

        def forward(x_TD: Tensor, w_TK: Tensor) -> Tensor:
            routing = Routing(ids_TK=case.ids_TK[mine], weights_TK=w_TK, counts_E=torch.zeros(0))
            received = d.dispatch(x_TD, routing)
            return d.combine(apply_experts(received, experts), received)

        y = checkpoint(forward, x, w, use_reentrant=reentrant, preserve_rng_state=False)
        assert isinstance(y, Tensor)
        y.backward(case.dy_TD[mine])
        assert x.grad is not None and w.grad is not None and experts.grad is not None
        return Result(y.detach(), x.grad, w.grad, experts.grad), run_case(case, config, context)

    for got, want in ranks.run(2, one):
        assert_same_bits(got, want)


# ---- what the rounding does to values and gradients --------------------------------------------------------------


@pytest.mark.parametrize("apply_probs", PROBS)
def test_straight_through_against_loops(apply_probs: str) -> None:
    """y = layer(Q(x)); dx is the gradient at Q(x), with rounded d(sum); `source` rounds w * d(sum), and after d(w)."""
    case = make_case(5, T=15, D=24, E=6, K=3)
    form, ids = Fp8BlockFormat(24), case.ids_TK.tolist()

    def rounded(values: Tensor) -> Tensor:
        return after_trip(values.reshape(-1, 24).float(), form).double().view_as(values)

    x, w, experts = (t.double().requires_grad_() for t in (rounded(case.x_TD), case.w_TK, case.experts))
    dy = case.dy_TD.double()
    if apply_probs == "source":
        out = []
        for t, slots in enumerate(ids):
            total = torch.zeros(24, dtype=torch.float64)
            for k, e in enumerate(slots):
                if e >= 0:
                    row = oracle_dispatch.expert(x[t], experts[e], None)
                    row.register_hook(rounded)
                    total = total + w[t, k] * row
            out.append(total)
        y = torch.stack(out)
    else:
        y = oracle_dispatch.layer(x, ids, w, experts, before=apply_probs == "activation")
        dy = rounded(dy)
    wants = (y.detach(), *torch.autograd.grad(y, (x, w, experts), dy))
    got = run_case(case, DispatchConfig(apply_probs=apply_probs, dispatch_format="fp8_1x128"))
    for found, want in zip((got.y, got.dx, got.dw, got.d_experts), wants, strict=True):
        assert (found.double() - want).abs().max() / want.abs().max() < 5e-6


def test_error_against_the_unrounded_layer(ranks: ThreadRanks) -> None:
    """Experts that change nothing: y is off by at most the format's bound times the weights."""
    case = make_case(6, T=32, D=192, E=8, K=3, absent=0.0)

    def one(context: ParallelContext | None) -> Tensor:
        size, rank = (1, 0) if context is None else (context.ep_size, context.ep_rank)
        cuts = even_cuts(32, size)
        mine = slice(cuts[rank], cuts[rank + 1])
        d = make_dispatcher(FP8, num_experts=8, top_k=3, context=context)
        w_TK = torch.ones_like(case.w_TK[mine])
        received = d.dispatch(case.x_TD[mine], Routing.from_ids(case.ids_TK[mine], w_TK, num_experts=8))
        return d.combine(received.rows, received)

    y_TD = one(None)
    assert torch.equal(y_TD, torch.cat(ranks.run(4, one)))
    scale_TD = Fp8BlockFormat(192).encode(case.x_TD)[1].repeat_interleave(128, 1)[:, :192]
    bound = 3 * torch.maximum(case.x_TD.abs() * 2**-4, scale_TD * 2**-10) * (1 + 1e-5)
    assert ((y_TD - 3 * case.x_TD).abs() <= bound).all()


def make_layer(**dispatch: Any) -> MoELayer:
    torch.manual_seed(0)
    config = MoEConfig(
        hidden_size=160,
        router=RouterConfig(num_experts=8, top_k=2),
        experts=ExpertsConfig(intermediate_size=32, init_std=0.1),
        shared_expert=SharedExpertConfig(intermediate_size=32),
        dispatch=DispatchConfig(**dispatch),
    )
    return MoELayer(config)


def step(layer: MoELayer, call: Any = None) -> dict[str, Tensor]:
    x = torch.randn(2, 20, 160, generator=torch.Generator().manual_seed(1)).requires_grad_()
    y = (call or layer)(x)
    y.square().sum().backward()
    grads = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: tensor for name, tensor in {"y": y.detach(), "dx": x.grad, **grads}.items() if tensor is not None}


def test_layer() -> None:
    """Small errors everywhere; compact rows (gradients linked) and expert-major agree."""
    plain, rounded = step(make_layer()), step(make_layer(dispatch_format="fp8_1x128"))
    assert plain.keys() == rounded.keys()
    for name, want in plain.items():
        error = (rounded[name] - want).norm() / want.norm()
        assert 0 < error < 2**-4, (name, error)
    other = step(make_layer(dispatch_format="fp8_1x128", rows="expert_major"))
    for name, want in rounded.items():
        torch.testing.assert_close(other[name], want, rtol=1e-5, atol=1e-5)


def test_layer_compiles_fullgraph() -> None:
    """aot_eager: the ops of the eager pass, so its bits."""
    eager = step(make_layer(dispatch_format="fp8_1x128"))
    layer = make_layer(dispatch_format="fp8_1x128")
    compiled = step(layer, torch.compile(layer.__call__, fullgraph=True, backend="aot_eager"))
    for name, want in eager.items():
        torch.testing.assert_close(compiled[name], want, rtol=1e-5, atol=1e-5)
    assert torch.equal(compiled["y"], eager["y"])


def test_rows_quantised_by_the_caller_travel_as_they_are(ranks: ThreadRanks) -> None:
    x_TD = torch.randint(0, 256, (6, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def one(context: ParallelContext | None) -> Tensor:
        d = make_dispatcher(FP8, num_experts=4, top_k=1, context=context)
        routing = Routing.from_ids(torch.zeros(6, 1).long(), torch.ones(6, 1), num_experts=4)
        return d.dispatch(x_TD, routing).rows

    assert torch.equal(one(None), x_TD)
    assert torch.equal(ranks.run(2, one)[0], torch.cat((x_TD, x_TD)))
