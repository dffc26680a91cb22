"""Record and replay on a GPU: the bits of the live run, recompute, no host synchronisation, streams, CUDA graphs.

The models run torch's grouped GEMM in bf16, which is there without QuACK and reads nothing on the host.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer import RoutingDecision, RoutingSession, RoutingTrace, TraceError
from moe_layer.compat.megatron_replay import RouterReplay, RouterReplayAction
from moe_layer.ops import _ext
from tests.unit.replay_models import (
    LAYERS,
    ROUTERS,
    E,
    K,
    Model,
    T,
    assert_same,
    config,
    grads,
    loss_of,
    make_trace,
    random_ids,
)
from tests.unit.replay_recompute import KINDS, ORDERS, Runner, runners, schedule

pytestmark = pytest.mark.gpu

BF16 = torch.bfloat16
D, F = 64, 32


def make_model(*, dtype: torch.dtype = BF16, seed: int = 0, **settings: Any) -> Model:
    torch.manual_seed(seed)
    backend = "grouped_mm" if dtype == BF16 else "reference"
    return Model(config(**{"backend": backend, "hidden": D, "width": F, **settings})).to("cuda", dtype)


def batch(seed: int = 0, *, tokens: int = T, dtype: torch.dtype = BF16) -> Tensor:
    return torch.randn(tokens, D, generator=torch.Generator().manual_seed(seed + 100)).to("cuda", dtype)


def explicit(model: Model, x: Tensor, trace: RoutingTrace) -> Tensor:
    """Forward with the trace's ids as arguments: no session involved."""
    for layer, block in enumerate(model.blocks):
        x = x + block.moe(block.norm(x), replay=RoutingDecision(trace.wide_ids()[:, layer].cuda()))
    return x


@contextmanager
def no_synchronisation() -> Iterator[None]:
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_the_kernels_are_loaded() -> None:
    assert _ext.status().loaded, _ext.status().sentence()


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(8, 2), (128, 8), (256, 8), (512, 10)])
@pytest.mark.parametrize("router", ROUTERS)
def test_replay_of_a_recorded_run_is_the_run(router: str, size: tuple[int, int]) -> None:
    """Ids, output, dx and every gradient to the bit; ids of one and of two bytes."""
    model = make_model(experts=size[0], top_k=size[1], **ROUTERS[router])
    x, session = batch(tokens=300).requires_grad_(), RoutingSession(model)

    def step() -> dict[str, Tensor]:
        y = model(x)
        loss_of(y).backward()
        assert x.grad is not None
        found = grads(model) | {"y": y.detach(), "dx": x.grad}
        x.grad = None
        return found

    with session.record(weights=True) as live:
        expected = step()
    with session.replay(live.trace()), session.record(weights=True) as again:
        found = step()
    assert torch.equal(again.trace().ids, live.trace().ids)
    assert torch.equal(again.trace().weights, live.trace().weights)  # type: ignore[arg-type]
    assert_same(found, expected)


@pytest.mark.parametrize("dtype", [BF16, torch.float32])
def test_forced_routing_reaches_the_router_gradient(dtype: torch.dtype) -> None:
    model, trace, x = make_model(aux=False, dtype=dtype), make_trace(seed=3), batch(dtype=dtype)
    loss_of(explicit(model, x, trace)).backward()
    expected = grads(model)
    with RoutingSession(model) as session, session.replay(trace):
        loss_of(model(x)).backward()
    found = grads(model)
    assert_same(found, expected)
    assert all(found[f"{layer}.router.weight"].abs().sum() > 0 for layer in LAYERS)
    loss_of(model(x)).backward()
    assert not torch.equal(grads(model)["blocks.0.moe.router.weight"], found["blocks.0.moe.router.weight"])


def test_partial_traces_are_filled_as_on_the_cpu() -> None:
    ids = random_ids(seed=6)
    ids[:3], ids[5, :, 1] = -1, -1
    trace = RoutingTrace.from_ids(ids, num_experts=E, layers=LAYERS)
    model = make_model()
    with RoutingSession(model) as session, session.replay(trace), session.record() as recording:
        model(batch())
    used = recording.trace().wide_ids()
    assert bool((used.sort(-1).values.diff(dim=-1) > 0).all())
    assert torch.equal(torch.where(ids >= 0, used, -1), ids.int())
    metrics = session.metrics()
    assert (metrics.rows_replayed, metrics.slots_filled) == (2 * (T - 3), 2 * (3 * K + 1))


def test_alarm_for_a_shifted_trace() -> None:
    model, x = make_model(seed=5, experts=64, top_k=4), batch(tokens=400)
    session = RoutingSession(model)
    with session.record() as recording:
        model(x)
    trace = recording.trace()
    for shift in (0, 1):
        plan = trace.plan(torch.arange(400) - shift, layers=session.layers, device="cuda")
        with session.replay(plan, measure=True):
            model(x)
        metrics = session.metrics()
        assert metrics.rows_compared > 0
        if shift:
            with pytest.raises(TraceError, match="the trace is shifted"):
                metrics.check_alignment()
        else:
            metrics.check_alignment()


# ---- recompute ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_recompute_in_any_order(kind: str, order: str) -> None:
    """Backward passes, and with them recomputes, run on autograd's own threads here."""
    model = make_model()
    session = RoutingSession(model)
    plans = [make_trace(seed=seed).plan(layers=LAYERS, device="cuda") for seed in (3, 4)]

    def forward(index: int, run: Runner | None) -> Tensor:
        with session.replay(plans[index]):
            return loss_of(model(batch(index).requires_grad_(), run))

    schedule(ORDERS[order], lambda i: forward(i, None))
    expected, metrics = grads(model), session.metrics()
    schedule(ORDERS[order], lambda i: forward(i, runners(session)[kind]))
    assert_same(grads(model), expected)
    assert session.metrics() == metrics, "a recompute is not a second replay"


# ---- recording to the host ------------------------------------------------------------------------------------------


def test_record_and_replay_do_not_synchronise() -> None:
    model, x = make_model(), batch().requires_grad_()
    session = RoutingSession(model)
    trace = make_trace(seed=3)
    plan = trace.plan(layers=session.layers, device="cuda")

    def step() -> Any:
        with session.record(weights=True) as recording, session.replay(plan, measure=True):
            loss_of(model(x)).backward()
        return recording

    step()  # allocates
    with no_synchronisation():
        recording = step()
    assert all(part.is_pinned() for calls in recording._calls for call in calls for part in call if part is not None)
    assert torch.equal(recording.trace().ids, trace.ids)
    assert session.metrics().rows_replayed == 4 * T


def test_host_memory_is_the_formats_arithmetic() -> None:
    """A prompt and 300 decoding steps of two sequences; pinned memory is taken in few chunks, not call by call."""
    model = make_model(experts=256, top_k=8)
    x = batch(tokens=700)
    session = RoutingSession(model)
    with torch.no_grad(), session.record() as recording:
        parts = [model(x[:100])] + [model(x[at : at + 2]) for at in range(100, 700, 2)]
    assert recording.host_bytes == 700 * len(LAYERS) * 8
    starts = {call[0].untyped_storage().data_ptr() for calls in recording._calls for call in calls}
    assert len(starts) == 1
    trace = recording.trace()
    with torch.no_grad(), session.replay(trace):
        again = [model(x[:100])] + [model(x[at : at + 2]) for at in range(100, 700, 2)]
    assert torch.equal(torch.cat(parts), torch.cat(again))


def test_records_of_another_stream_are_waited_for() -> None:
    """The model runs late on a side stream, and `trace()` is called at once, inside the block and after it."""
    model, x = make_model(), batch()
    session = RoutingSession(model)
    with torch.no_grad(), session.record() as recording:
        model(x)
    expected, side = recording.trace().ids, torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.no_grad(), session.record() as recording:
        with torch.cuda.stream(side):
            torch.cuda._sleep(200_000_000)
            model(x)
        inside = recording.trace()
    assert torch.equal(inside.ids, expected) and torch.equal(recording.trace().ids, expected)


# ---- CUDA graphs ----------------------------------------------------------------------------------------------------


def warm_up(step: Any) -> None:
    """What a capture needs before it: libraries loaded, workspaces allocated on a side stream."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
        step()
    torch.cuda.current_stream().wait_stream(side)


def test_live_recording_inside_a_graph() -> None:
    """Each launch routes anew; `commit` takes home what that launch wrote."""
    model, twin, x = make_model(), make_model(), batch()
    session = RoutingSession(model)
    with torch.no_grad():
        warm_up(lambda: model(x))
        with (
            pytest.raises(TraceError, match="cannot capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            session.record(),
        ):
            model(x)
        graph = torch.cuda.CUDAGraph()
        with session.record(max_tokens=T + 3) as recording, torch.cuda.graph(graph):
            model(x)
        expected = []
        for seed in range(3):
            x.copy_(batch(seed))
            graph.replay()
            recording.commit(T)
            with RoutingSession(twin) as other, other.record() as plain:
                twin(x)
            expected.append(plain.trace())
    assert torch.equal(recording.trace().ids, RoutingTrace.concat(expected).ids)


@pytest.mark.parametrize("missing", [False, True])
def test_a_training_step_in_a_graph_replays_other_plans(missing: bool) -> None:
    """Forward and backward captured once; plans and inputs are copied into place; counters see every launch."""
    model, twin, x = make_model(), make_model(), batch().requires_grad_()
    traces = []
    for seed in range(3):
        ids = random_ids(seed=seed)
        ids[seed, :, 1] = -1 if missing else ids[seed, :, 1]
        traces.append(RoutingTrace.from_ids(ids, num_experts=E, layers=LAYERS))
    plans = [trace.plan(layers=LAYERS, device="cuda") for trace in traces]
    plan, session = plans[0].to("cuda"), RoutingSession(model)
    plan = replace(plan, ids=plan.ids.clone(), valid=None if plan.valid is None else plan.valid.clone())

    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        x.grad = None
        y = model(x)
        loss_of(y).backward()
        return y

    def warm() -> None:
        with session.replay(plan, measure=True):
            step()

    warm_up(warm)
    session.metrics()
    model.zero_grad(set_to_none=True)
    x.grad = None
    graph = torch.cuda.CUDAGraph()
    with session.replay(plan, measure=True), session.record(max_tokens=T) as recording, torch.cuda.graph(graph):
        y = step()
    assert x.grad is not None
    for seed, (other, trace) in enumerate(zip(plans, traces, strict=True)):
        x.data.copy_(batch(seed))
        plan.ids.copy_(other.ids)
        if plan.valid is not None:
            plan.valid.copy_(other.valid)
        graph.replay()
        recording.commit(T)
        fresh = batch(seed).requires_grad_()
        expected = explicit(twin, fresh, trace)
        loss_of(expected).backward()
        assert torch.equal(y, expected) and torch.equal(x.grad, fresh.grad)
        assert_same({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}, grads(twin))
    recorded, wanted = recording.trace().wide_ids(), torch.cat([trace.wide_ids() for trace in traces])
    assert torch.equal(torch.where(wanted >= 0, recorded, -1), wanted) and bool((recorded >= 0).all())
    metrics = session.metrics()
    assert (metrics.slots_replayed, metrics.rows_compared) == (int((wanted >= 0).sum()), 3 * len(LAYERS) * T)
    assert 0 < metrics.mismatch <= metrics.token_mismatch <= 1


def test_megatrons_statics_inside_a_graph() -> None:
    """RECORD into a static buffer under capture; REPLAY_FORWARD takes ids from the host, of any integer dtype."""
    model, x = make_model(), batch()
    try:
        RouterReplay.attach(model)
        buffer = torch.zeros(T + 2, len(LAYERS), K, dtype=torch.int32, device="cuda")
        RouterReplay.set_global_static_buffers(buffer)
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad():
            warm_up(lambda: model(x))
            RouterReplay.set_global_router_replay_action(RouterReplayAction.RECORD)
            with torch.cuda.graph(graph):
                model(x)
            x.copy_(batch(7))
            graph.replay()
            live = buffer[:T].clone()
            RouterReplay.set_replay_data([ids.cpu().to(torch.int16) for ids in live.unbind(1)])
            RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)
            replayed = model(x)
            RouterReplay.clear_global_router_replay_action()
            assert torch.equal(replayed, model(x))
    finally:
        RouterReplay.clear_global_router_replay_instances()


# ---- compiled -------------------------------------------------------------------------------------------------------


def test_sessions_under_compile() -> None:
    """No graph break; records of a compiled graph reach the host when the block ends."""
    layer, trace = make_model().blocks[0].moe, RoutingTrace.from_ids(random_ids(layers=1), num_experts=E, layers=["."])
    session = RoutingSession(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    with torch.no_grad():
        with session.replay(trace), session.record() as recording:
            y = compiled(batch())
        assert torch.equal(recording.trace().ids, trace.ids)
        assert torch.equal(y, layer(batch(), replay=trace.wide_ids()[:, 0].cuda()))
