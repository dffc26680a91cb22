"""Activation checkpointing under replay: gradient error 0 in any order, and a guard for whoever forgot to bind."""

from __future__ import annotations

import gc
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_layer import RoutingError, RoutingSession
from tests.unit.replay_models import (
    assert_same,
    batch,
    grads,
    loss_of,
    make_model,
    make_trace,
)
from tests.unit.replay_recompute import KINDS, ORDERS, Runner, runners, schedule


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("kind", KINDS)
def test_recompute_in_any_order(kind: str, order: str) -> None:
    """Gradient error exactly 0 against the same without checkpointing, and the counters count once."""
    model = make_model()
    traces = [make_trace(seed=seed) for seed in (3, 4)]
    session = RoutingSession(model)

    def forward(index: int, run: Runner | None) -> Tensor:
        x = batch(index).requires_grad_()
        with session.replay(traces[index]):
            return loss_of(model(x, run))

    def counters() -> list[list[int]]:
        return [block.moe.router.tokens_per_expert.tolist() for block in model.blocks]

    schedule(ORDERS[order], lambda i: forward(i, None))
    expected, counted, metrics = grads(model), counters(), session.metrics()
    schedule(ORDERS[order], lambda i: forward(i, runners(session)[kind]))
    assert_same(grads(model), expected)
    assert counters() == [[2 * n for n in row] for row in counted]
    assert session.metrics() == metrics, "a recompute is not a second replay"


def test_recompute_twice() -> None:
    model = make_model()
    session = RoutingSession(model)
    with session.replay(make_trace(seed=3)):
        loss = loss_of(model(batch(), runners(session)["context_fn"]))
    loss.backward(retain_graph=True)
    first = grads(model)
    loss.backward()
    assert_same(grads(model), first)


def test_live_micro_batches_between_replayed_ones() -> None:
    model = make_model()
    session = RoutingSession(model)
    run = runners(session)["context_fn"]

    def step(run: Runner | None) -> dict[str, Tensor]:
        with session.replay(make_trace(seed=3)):
            a = loss_of(model(batch(0), run))
        b = loss_of(model(batch(1), run))
        with session.replay(make_trace(seed=4)):
            c = loss_of(model(batch(2), run))
            with session.live():
                d = loss_of(model(batch(3), run))
        for loss in (b, d, c, a):
            loss.backward()
        return grads(model)

    assert_same(step(run), step(None))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_unbound_recompute_raises(reentrant: bool, inside: bool) -> None:
    """The silent way to wrong gradients in other systems; `inside`: backward before the block is closed."""
    model = make_model()
    session = RoutingSession(model)

    def run(block: Any, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    x = batch().requires_grad_()
    with pytest.raises(RoutingError, match=r"'blocks.1.moe' recomputes without replay binding.*session.context_fn"):
        if inside:
            with session.replay(make_trace(seed=3)):
                loss_of(model(x, run)).backward()
        else:
            with session.replay(make_trace(seed=3)):
                loss = loss_of(model(x, run))
            loss.backward()


def test_modes_of_a_guard_without_a_graph() -> None:
    """Reentrant checkpoints hide the graph in `eval()` as well; log probabilities taken there disturb no training."""
    model = make_model()
    session = RoutingSession(model)

    def run(block: Any, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=True)

    with torch.no_grad(), session.replay(make_trace(seed=3)):
        model.eval()(batch())
    loss_of(model.train()(batch().requires_grad_(), run)).backward()  # live, in the other mode
    session.close()
    session = RoutingSession(model.eval())
    with session.replay(make_trace(seed=3)):
        loss = loss_of(model(batch().requires_grad_(), run))
    with pytest.raises(RoutingError, match="recomputes without replay binding"):
        loss.backward()


def test_unbound_recompute_under_a_frozen_router() -> None:
    """Nothing that the router makes is in the graph, but the experts' gradients are those of its choice."""
    model = make_model(aux=False)
    for block in model.blocks:
        block.requires_grad_(False)
    layer, x = model.blocks[1].moe, batch()
    layer.experts.requires_grad_(True)
    session = RoutingSession(model)

    def step(run: Any) -> dict[str, Tensor]:
        with session.replay(make_trace(seed=3)):
            loss = loss_of(model(x, run))
        loss.backward()
        return grads(model)

    want = step(None)
    assert_same(step(lambda b, x: checkpoint(b, x, use_reentrant=False, context_fn=session.context_fn)), want)
    with pytest.raises(RoutingError, match=r"'blocks.1.moe' recomputes without replay binding"):
        step(lambda b, x: checkpoint(b, x, use_reentrant=False))


def test_guard_lets_others_pass() -> None:
    """Live training with checkpointing, before and after a replay without it, raises nothing."""
    model = make_model()
    session = RoutingSession(model)

    def run(block: Any, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)

    loss_of(model(batch(), run)).backward()
    with session.replay(make_trace(seed=3)):
        loss_of(model(batch())).backward()
    gc.collect()
    loss_of(model(batch(), run)).backward()
    with session.record():
        loss_of(model(batch(), run)).backward()


def test_bound_function_serves_one_forward() -> None:
    model = make_model()
    session = RoutingSession(model)
    bound = session.bind(model.blocks[0])
    bound(batch())
    with pytest.raises(RoutingError, match=r"session\.bind for each forward"):
        bound(batch())
