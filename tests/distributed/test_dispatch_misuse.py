"""Batches, routings, rows and recvs that do not belong together: one sentence on every backend, before any trip."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import RoutingError
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Received, Routing
from tests.distributed.ranks import ThreadRanks

T, D, E, K = 6, 16, 8, 2
BACKENDS: dict[str, dict[str, Any]] = {
    "local": {"backend": "local"},
    "local, compact": {"backend": "local", "rows": "compact"},
    "all_to_all": {"backend": "all_to_all"},
    "replicated": {"backend": "replicated"},
    "weights at home": {"backend": "all_gather", "apply_probs": "source"},
    "nvlink": {"backend": "nvlink", "max_tokens_per_rank": T},
}


def routed(T: int = T, K: int = K, E: int = E) -> Routing:
    ids_TK = torch.rand(T, E, generator=torch.Generator().manual_seed(1)).argsort(1)[:, :K]
    return Routing.from_ids(ids_TK, torch.ones(T, K), num_experts=E)


def x(T: int = T) -> Tensor:
    return torch.ones(T, D)


DISPATCHES: dict[str, tuple[Callable[[Any], Any], str]] = {
    "more tokens than ids": (lambda d: d.dispatch(x(5), routed(4)), r"ids must be \[5, 2\] for x of 5 .* got \(4, 2\)"),
    "more ids than tokens": (lambda d: d.dispatch(x(4), routed(5)), r"ids must be \[4, 2\] for x of 4 .* got \(5, 2\)"),
    "K": (lambda d: d.dispatch(x(), routed(K=3)), r"ids must be \[6, 2\] for x of 6 tokens, got \(6, 3\)"),
    "E": (lambda d: d.dispatch(x(), routed(E=16)), "the routing is over 16 experts and the dispatcher over 8"),
    "weights": (
        lambda d: d.dispatch(x(), Routing(routed().ids_TK, torch.ones(T, 1), torch.zeros(E))),
        r"weights must be \[6, 2\]",
    ),
    "three dimensions": (
        lambda d: d.dispatch(x().unsqueeze(0), routed()),
        r"x must be \[T, D\], got shape \(1, 6, 16\)",
    ),
    "one dimension": (lambda d: d.dispatch(x()[0], routed()), r"x must be \[T, D\], got shape \(16,\)"),
    "a list": (lambda d: d.dispatch([1.0], routed()), r"x must be \[T, D\], got list"),
    "ids for a routing": (lambda d: d.dispatch(x(), routed().ids_TK), r"got shape \(6, 2\); make one with Routing"),
    "another device": (lambda d: d.dispatch(x().to("meta"), routed()), "ids are on cpu and x on meta"),
    "a plan of others": (
        lambda d: d.dispatch(x(), routed(), d.prepare(routed(3).ids_TK)),
        r"the plan is of ids \(3, 2\), x and routing are of \(6, 2\)",
    ),
    "a plan of another batch": (
        lambda d: d.dispatch(x(), routed(), d.prepare(routed().ids_TK.flip(0))),
        "the plan is of other ids than the routing's",
    ),
    "halves": (lambda d: d.dispatch_recv(*d.dispatch_send(x(5), routed(4))), r"ids must be \[5, 2\]"),
    "scales in a list": (lambda d: d.dispatch(x().to(torch.float8_e4m3fn), routed(), x_scale=[1.0]), "got list"),
}
COMBINES: dict[str, tuple[Callable[[Any, Tensor, Received], Any], str]] = {
    "a row lost": (lambda d, rows, r: d.combine(rows[:-1], r), r"rows must be \[\d+, D\], one for each"),
    "a row too many": (lambda d, rows, r: d.combine(torch.cat((rows, rows[:1])), r), r"rows must be \[\d+, D\]"),
    "three dimensions of rows": (lambda d, rows, r: d.combine(rows.unsqueeze(0), r), r"rows must be \[\d+, D\]"),
    "add of one token": (lambda d, rows, r: d.combine(rows, r, torch.ones(D)), r"add must be \(6, 16\) like y"),
    "add of fewer tokens": (lambda d, rows, r: d.combine(rows, r, torch.ones(1, D)), r"add must be \(6, 16\) like y"),
    "add of a half": (
        lambda d, rows, r: d.combine_recv(*d.combine_send(rows, r), torch.ones(1, D)),
        r"add must be \(6, 16\) like y",
    ),
    "out in a list": (lambda d, rows, r: d.combine(rows, r, out=[rows]), "out must be a tensor"),
}


def run(ranks: ThreadRanks, backend: str, fn: Callable[[Any], None]) -> None:
    """On every rank alike, so that no rank waits for another."""

    def one(context: ParallelContext | None) -> None:
        config = DispatchConfig(**BACKENDS[backend], deadline_s=5)
        fn(make_dispatcher(config, num_experts=E, top_k=K, context=context))

    one(None) if backend.startswith("local") else ranks.run(2, one)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dispatches_that_do_not_fit(ranks: ThreadRanks, backend: str) -> None:
    def all_of_them(dispatcher: Any) -> None:
        for act, text in DISPATCHES.values():
            with pytest.raises(RoutingError, match=text):
                act(dispatcher)
        assert dispatcher.dispatch(x(), routed()).probs_N.numel() > 0, "still usable"

    run(ranks, backend, all_of_them)


@pytest.mark.parametrize("backend", BACKENDS)
def test_combines_that_do_not_fit(ranks: ThreadRanks, backend: str) -> None:
    def all_of_them(dispatcher: Any) -> None:
        for act, text in COMBINES.values():
            received = dispatcher.dispatch(x(), routed())
            with pytest.raises(RoutingError, match=text):
                act(dispatcher, torch.ones(received.probs_N.shape[0], D), received)

    run(ranks, backend, all_of_them)


@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivatives(ranks: ThreadRanks, backend: str) -> None:
    """They would lack the dispatcher's part wherever x has another path to the loss."""

    def twice(dispatcher: Any) -> None:
        x_TD = x().requires_grad_()
        received = dispatcher.dispatch(x_TD, routed())
        rows = received.rows if received.index_N is None else received.rows[received.index_N]
        y = dispatcher.combine(torch.tanh(rows), received)
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad((y + x_TD * x_TD).sum(), x_TD, create_graph=True)

    run(ranks, backend, twice)


@pytest.mark.parametrize("backend", [name for name in BACKENDS if not name.startswith("local")])
def test_halves_received_twice(ranks: ThreadRanks, backend: str) -> None:
    def twice(dispatcher: Any) -> None:
        sent = dispatcher.dispatch_send(x(), routed())
        received = dispatcher.dispatch_recv(*sent)
        with pytest.raises(RoutingError, match="dispatch_recv was called again; every send has one recv"):
            dispatcher.dispatch_recv(*sent)
        rows = torch.ones(received.probs_N.shape[0], D)
        back = dispatcher.combine_send(rows, received)
        for again in (dispatcher.combine_send, dispatcher.combine):  # it would be received in the first one's place
            with pytest.raises(RoutingError, match="a combine of this dispatch was sent and not received"):
                again(rows * 3, received)
        y = dispatcher.combine_recv(*back)
        assert torch.equal(dispatcher.combine(rows, received), y), "one after the other"
        with pytest.raises(RoutingError, match="combine_recv was called again"):
            dispatcher.combine_recv(*back)

    run(ranks, backend, twice)


def test_routings_of_ones_own() -> None:
    """Any integer dtype; what is no pair of tensors on one device gets a sentence."""
    ids, weights = torch.tensor([[200, 3]]), torch.ones(1, 2)
    for dtype in (torch.uint8, torch.uint16, torch.int16, torch.uint32, torch.int64, torch.uint64):
        assert Routing.from_ids(ids.to(dtype), weights, num_experts=256).ids_TK.tolist() == [[200, 3]]
        with pytest.raises(RoutingError, match=r"ids must lie in \[-1, 200\), got 3\.\.200"):
            Routing.from_ids(ids.to(dtype), weights, num_experts=200)
    with pytest.raises(RoutingError, match=r"must be tensors \[T, K\], got list and Tensor"):
        Routing.from_ids([[1, 2]], weights, num_experts=8)  # type: ignore[arg-type]
    with pytest.raises(RoutingError, match="ids are on cpu and weights on meta"):
        Routing.from_ids(ids, weights.to("meta"), num_experts=256)
