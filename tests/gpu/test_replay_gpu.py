"""Sessions on a GPU: no host synchronisation, pinned records, recompute on autograd's own threads, graph capture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_layer import RoutingSession, RoutingTrace, TraceError
from tests.unit.replay_models import LAYERS, D, E, Model, T, assert_same, config, grads, make_trace


def make_model() -> Model:
    torch.manual_seed(0)
    return Model(config()).cuda()


def batch() -> Tensor:
    return torch.randn(T, D, generator=torch.Generator().manual_seed(1)).cuda()


def test_record_and_replay_do_not_synchronise() -> None:
    """The routers only: the experts' fp32 reference loop on CUDA may read counts."""
    model, x = make_model(), batch()
    session = RoutingSession(model)
    plan = make_trace(seed=3).plan(layers=session.layers, device="cuda")
    routers = [block.moe.router for block in model.blocks]

    def forwards() -> None:
        for router in routers:
            router(x)

    with session.record(weights=True), session.replay(plan, measure=True):
        forwards()  # allocates
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with session.record(weights=True) as recording, session.replay(plan, measure=True):
            forwards()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(call[0].is_pinned() for calls in recording._calls for call in calls)
    assert torch.equal(recording.trace().ids, make_trace(seed=3).ids)
    assert session.metrics().rows_replayed == 4 * T


@pytest.mark.parametrize("reentrant", [False, True])
def test_recompute_on_autograd_threads(reentrant: bool) -> None:
    model = make_model()
    session = RoutingSession(model)
    plans = [make_trace(seed=seed).plan(layers=LAYERS, device="cuda") for seed in (3, 4)]

    def run(block: Any, x: Tensor) -> Tensor:
        if reentrant:
            return checkpoint(session.bind(block), x, use_reentrant=True)
        return checkpoint(block, x, use_reentrant=False, context_fn=session.context_fn)

    found = []
    for runner in (None, run):
        losses = []
        for plan in plans:
            with session.replay(plan):
                losses.append(model(batch().requires_grad_(), runner).square().sum())
        losses[1].backward()
        losses[0].backward()
        found.append(grads(model))
    assert_same(*found)


def test_recording_inside_a_graph() -> None:
    """Each launch routes anew; `commit` takes home what that launch wrote."""
    model, x = make_model(), batch()
    routers = [block.moe.router for block in model.blocks]
    session = RoutingSession(model)
    with torch.no_grad():
        for router in routers:
            router(x)
        torch.cuda.synchronize()
        with (
            pytest.raises(TraceError, match="cannot capture"),
            torch.cuda.graph(torch.cuda.CUDAGraph()),
            session.record(),
        ):
            routers[0](x)
        graph = torch.cuda.CUDAGraph()
        with session.record(max_tokens=T) as recording:
            with torch.cuda.graph(graph):
                for router in routers:
                    router(x)
            expected = []
            for seed in range(3):
                x.copy_(torch.randn(T, D, generator=torch.Generator().manual_seed(seed)))
                graph.replay()
                recording.commit(T)
                expected.append(torch.stack([router(x).ids_TK for router in routers], dim=1))
    trace = recording.trace()
    assert torch.equal(trace.wide_ids(), torch.cat(expected).cpu())
    assert isinstance(trace, RoutingTrace) and trace.spec.num_experts == E
