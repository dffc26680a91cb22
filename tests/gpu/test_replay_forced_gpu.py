"""Forced ids on a GPU: any integer dtype from any device, bad ones counted, gate weights in fp32, quantised experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer import MoELayer, RoutingError, RoutingSession
from moe_layer.compat.mojo_opset import MojoMoE
from tests.unit.replay_models import E, K, T, config, make_trace, random_ids

pytestmark = pytest.mark.gpu

D, F = 64, 32
INTEGERS = [torch.uint8, torch.uint16, torch.int8, torch.int16, torch.int32, torch.int64]
BACKENDS = [
    (torch.float32, "reference"),
    (torch.bfloat16, "reference"),
    (torch.bfloat16, "grouped_mm"),
    (torch.float16, "reference"),
]


def make_layer(dtype: torch.dtype = torch.bfloat16, backend: str = "grouped_mm", **settings: Any) -> MoELayer:
    torch.manual_seed(0)
    return MoELayer(config(aux=False, hidden=D, width=F, backend=backend, **settings)).to("cuda", dtype)


def batch(dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(5)).to("cuda", dtype)


def forced() -> Tensor:
    return random_ids(layers=1, seed=2)[:, 0]


@pytest.mark.parametrize("kind", INTEGERS)
@pytest.mark.parametrize("where", ["cpu", "cuda"])
def test_ids_of_any_integer_dtype_from_any_device(kind: torch.dtype, where: str) -> None:
    layer, x = make_layer(), batch()
    y, routing = layer(x, replay=forced().to(where, kind), return_routing=True)
    assert torch.equal(routing.ids_TK.cpu(), forced().int())
    assert torch.equal(MojoMoE(layer)(x, forced().view(2, -1, K).to(where, kind)), y)


@pytest.mark.parametrize("kind", INTEGERS)
def test_ids_out_of_range_are_counted_and_raise_in_strict_mode(kind: torch.dtype) -> None:
    layer, x = make_layer(), batch()
    bad = forced()
    bad[1, 0], bad[4, 1] = E, 100
    _, routing = layer(x, replay=bad.to("cuda", kind), return_routing=True)
    assert int(routing.stats["events"][4]) == 2
    ids = routing.ids_TK.cpu()
    good = bad < E
    assert torch.equal(ids[good], bad[good].int()) and bool((ids.sort(1).values.diff(dim=1) > 0).all())
    with pytest.raises(RoutingError, match=rf"2 replay ids outside \[0, {E}\)"):
        layer.check()
    layer.check()  # told once
    MojoMoE(layer)(x, bad.to("cuda", kind))  # counted only
    layer.router.faults.zero_()
    with pytest.raises(ValueError, match="2 replay ids outside"):
        MojoMoE(layer, strict=True)(x, bad.to("cuda", kind))
    with pytest.raises(ValueError, match=r"must lie in \[-1, 8\)"):
        MojoMoE(layer)(x, bad.to(kind))  # on the CPU, where looking is free


def test_a_damaged_plan_is_counted_in_the_metrics() -> None:
    layer = make_layer()
    trace = make_trace()
    session = RoutingSession(layer)
    plan = trace.plan(layers=trace.spec.layers[:1], device="cuda")
    ids = plan.ids.clone()
    ids[0, 3, 0] = 200
    plan = replace(plan, spec=replace(plan.spec, layers=(".",)), ids=ids)
    with session.replay(plan):
        layer(batch())
    metrics = session.metrics()
    assert (metrics.out_of_range, metrics.rows_replayed, metrics.slots_replayed) == (1, T, K * T - 1)
    with pytest.raises(RoutingError, match="1 replay ids outside"):
        layer.check()


@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_gate_weights_are_fp32(dtype: torch.dtype, backend: str) -> None:
    layer, x = make_layer(dtype, backend), batch(dtype)
    y, routing = layer(x, replay=forced(), return_routing=True)
    chosen = torch.softmax(routing.stats["logits"].double(), -1).gather(1, forced().cuda())
    assert y.dtype == dtype and routing.weights_TK.dtype == torch.float32
    expected = chosen / chosen.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weights_TK.double(), expected, rtol=2e-6, atol=1e-7)


@pytest.mark.parametrize(("dtype", "backend"), BACKENDS)
def test_missing_slots_never_repeat_an_expert(dtype: torch.dtype, backend: str) -> None:
    ids = forced()
    ids[:, 1] = -1
    _, routing = make_layer(dtype, backend)(batch(dtype), replay=ids, return_routing=True)
    found = routing.ids_TK.cpu()
    assert torch.equal(found[:, 0], ids[:, 0].int()) and bool((found[:, 0] != found[:, 1]).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("weight_format", ["int8", "fp8_1x128"])
def test_quantised_experts_are_those_of_the_cpu(weight_format: str, dtype: torch.dtype) -> None:
    """Same scales and codes; sums in another order, so one code of one activation may fall the other way."""
    layer = make_layer(dtype, "auto", weight_format=weight_format)
    twin = MoELayer(layer.config).to(dtype)
    twin.load_state_dict(layer.state_dict())
    x = batch(dtype)
    with torch.no_grad(), RoutingSession(layer) as session:
        with session.record() as recording:
            live = layer(x)
        with session.replay(recording.trace()):
            assert torch.equal(layer(x), live)
        y, expected = layer(x, replay=forced()), twin(x.cpu(), replay=forced())
    error = (y.cpu().double() - expected.double()).abs() / expected.double().abs().max()
    assert error.max() < (2e-3 if dtype == torch.float32 else 1e-2), error.max()
    assert error.median() < (1e-6 if dtype == torch.float32 else 1e-3), error.median()
    with pytest.raises(RuntimeError, match=f"weight_format {weight_format} has no backward"):
        layer(x.requires_grad_()).sum().backward()
