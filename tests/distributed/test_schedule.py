"""Halves in any order: several dispatches in flight, 1F1B orders, both kinds of activation checkpointing, dropped
handles."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import Dispatcher, make_dispatcher
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import (
    Case,
    Result,
    apply_experts,
    assert_same_bits,
    config_for,
    even_cuts,
    make_case,
    run_case,
)
from tests.distributed.ranks import ThreadRanks

BACKENDS = ("all_to_all", "all_gather", "replicated", "nvlink", "nvlink:dense")


class Share:
    """One rank's leaves of a case."""

    def __init__(self, case: Case, context: ParallelContext, *, replicated: bool) -> None:
        rank, size = context.ep_rank, context.ep_size
        cuts = even_cuts(case.x_TD.shape[0], size)
        mine = slice(None) if replicated else slice(cuts[rank], cuts[rank + 1])
        L = case.num_experts // size
        self.x = case.x_TD[mine].clone().requires_grad_()
        self.w = case.w_TK[mine].clone().requires_grad_()
        self.experts = case.experts[rank * L : (rank + 1) * L].clone().requires_grad_()
        self.ids, self.dy = case.ids_TK[mine], case.dy_TD[mine]

    def forward(self, dispatcher: Dispatcher, x: Tensor, w: Tensor) -> Tensor:
        routing = Routing(ids_TK=self.ids, weights_TK=w, counts_E=torch.zeros(0, dtype=torch.int32))
        received = dispatcher.dispatch(x, routing)
        return dispatcher.combine(apply_experts(received, self.experts), received)

    def result(self, y: Tensor) -> Result:
        assert self.x.grad is not None and self.w.grad is not None and self.experts.grad is not None
        return Result(y.detach(), self.x.grad, self.w.grad, self.experts.grad)


def _bound(context: ParallelContext, case: Case, backend: str) -> Dispatcher:
    return make_dispatcher(config_for(backend), num_experts=case.num_experts, top_k=case.top_k, context=context)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_micro_batches_in_flight(ranks: ThreadRanks, backend: str, order: tuple[int, int]) -> None:
    """F0 F1 B0 B1 and F0 F1 B1 B0 give what each gives alone, through one dispatcher."""
    cases = [make_case(seed, T=20 + seed, D=8, E=8, K=3) for seed in range(2)]

    def one(context: ParallelContext) -> list[tuple[Result, Result]]:
        alone = [run_case(case, config_for(backend), context) for case in cases]
        dispatcher = _bound(context, cases[0], backend)
        shares = [Share(case, context, replicated=backend == "replicated") for case in cases]
        ys = [share.forward(dispatcher, share.x, share.w) for share in shares]
        for i in order:
            ys[i].backward(shares[i].dy)
        return [(share.result(y), want) for share, y, want in zip(shares, ys, alone, strict=True)]

    for pairs in ranks.run(2, one):
        for got, want in pairs:
            assert_same_bits(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_halves_interleave(ranks: ThreadRanks, backend: str) -> None:
    """Both sends before either recv, other work between them, combines likewise."""
    cases = [make_case(seed, T=20, D=8, E=8, K=3) for seed in range(2)]

    def one(context: ParallelContext) -> list[tuple[Result, Result]]:
        alone = [run_case(case, config_for(backend), context) for case in cases]
        d = _bound(context, cases[0], backend)
        shares = [Share(case, context, replicated=backend == "replicated") for case in cases]
        plans = [d.prepare(share.ids) for share in shares]
        sent = [
            d.dispatch_send(s.x, Routing(ids_TK=s.ids, weights_TK=s.w, counts_E=torch.zeros(0)), plan)
            for s, plan in zip(shares, plans, strict=True)
        ]
        received = [d.dispatch_recv(handle, token) for handle, token in sent]
        rows = [apply_experts(r, s.experts) for r, s in zip(received, shares, strict=True)]
        back = [d.combine_send(row, r) for row, r in zip(rows, received, strict=True)]
        ys = [
            d.combine_recv(handle, token, torch.zeros_like(s.x))
            for (handle, token), s in zip(back, shares, strict=True)
        ]
        torch.autograd.backward(ys, [s.dy for s in shares])
        return [(share.result(y), want) for share, y, want in zip(shares, ys, alone, strict=True)]

    for pairs in ranks.run(2, one):
        for got, want in pairs:
            assert_same_bits(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("micro_batches", [1, 2])
def test_checkpointing(ranks: ThreadRanks, backend: str, reentrant: bool, micro_batches: int) -> None:
    """Recompute runs the dispatch again, whole, and changes no bit; F0 F1 B1 B0 with two."""
    cases = [make_case(seed, T=20, D=8, E=8, K=3) for seed in range(micro_batches)]

    def one(context: ParallelContext) -> list[tuple[Result, Result]]:
        alone = [run_case(case, config_for(backend), context) for case in cases]
        d = _bound(context, cases[0], backend)
        shares = [Share(case, context, replicated=backend == "replicated") for case in cases]
        ys = []
        for share in shares:
            ys.append(
                checkpoint(
                    lambda x, w, share=share: share.forward(d, x, w),
                    share.x,
                    share.w,
                    use_reentrant=reentrant,
                    preserve_rng_state=False,
                )
            )
        for y, share in reversed(list(zip(ys, shares, strict=True))):
            y.backward(share.dy)
        # the link is in step: nothing was left half done
        again = run_case(cases[0], config_for(backend), context)
        assert_same_bits(again, alone[0])
        return [(share.result(y), want) for share, y, want in zip(shares, ys, alone, strict=True)]

    for pairs in ranks.run(2, one):
        for got, want in pairs:
            assert_same_bits(got, want)


@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_twice_and_no_grad(ranks: ThreadRanks, backend: str) -> None:
    case = make_case(0, T=20, D=8, E=8, K=3)

    def one(context: ParallelContext) -> None:
        d = _bound(context, case, backend)
        share = Share(case, context, replicated=backend == "replicated")
        with torch.no_grad():
            quiet = share.forward(d, share.x, share.w)
        y = share.forward(d, share.x, share.w)
        assert torch.equal(quiet, y) and not quiet.requires_grad
        first = torch.autograd.grad(y, (share.x, share.w, share.experts), share.dy, retain_graph=True)
        second = torch.autograd.grad(y, (share.x, share.w, share.experts), share.dy)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))

    ranks.run(2, one)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("leaves", [("x",), ("w",), ("experts",), ("w", "experts"), ()])
def test_leaves_without_gradients(ranks: ThreadRanks, backend: str, leaves: tuple[str, ...]) -> None:
    """x, weights or experts alone require gradients: the others' are not made, theirs are the same bits."""
    case = make_case(0, T=20, D=8, E=8, K=3)

    def one(context: ParallelContext) -> None:
        want = run_case(case, config_for(backend), context)
        d = _bound(context, case, backend)
        share = Share(case, context, replicated=backend == "replicated")
        for name in ("x", "w", "experts"):
            getattr(share, name).requires_grad_(name in leaves)
        y = share.forward(d, share.x, share.w)
        assert torch.equal(y, want.y) and y.requires_grad == bool(leaves)
        if leaves:
            y.backward(share.dy)
        for name, field in (("x", "dx"), ("w", "dw"), ("experts", "d_experts")):
            gradient = getattr(share, name).grad
            assert gradient is None if name not in leaves else torch.equal(gradient, getattr(want, field))
        with torch.inference_mode():
            quiet = share.forward(d, share.x, share.w)
        assert torch.equal(quiet, want.y) and not quiet.requires_grad

    ranks.run(2, one)


def test_a_dropped_handle_does_not_disturb_the_next(ranks: ThreadRanks) -> None:
    case = make_case(0, T=20, D=8, E=8, K=3)

    def one(context: ParallelContext) -> None:
        want = run_case(case, DispatchConfig(), context)
        d = _bound(context, case, "all_to_all")
        share = Share(case, context, replicated=False)
        routing = Routing(ids_TK=share.ids, weights_TK=share.w, counts_E=torch.zeros(0))
        handle, token = d.dispatch_send(share.x, routing)
        del handle, token
        assert_same_bits(run_case(case, DispatchConfig(), context), want)

    ranks.run(2, one)


def test_graphs_are_freed(ranks: ThreadRanks) -> None:
    """No cycle keeps a step's tensors alive: without the collector they go when the graph goes."""
    case = make_case(0, T=20, D=8, E=8, K=3)

    def one(context: ParallelContext) -> list[bool]:
        d = _bound(context, case, "all_to_all")
        share = Share(case, context, replicated=False)
        routing = Routing(ids_TK=share.ids, weights_TK=share.w * 1, counts_E=torch.zeros(0))
        received = d.dispatch(share.x * 1, routing)
        y = d.combine(apply_experts(received, share.experts), received)
        probes = [weakref.ref(received.rows), weakref.ref(received.state), weakref.ref(routing.weights_TK)]
        y.backward(share.dy)
        del received, y, routing
        return [probe() is None for probe in probes]

    gc.disable()
    try:
        assert ranks.run(2, one) == [[True] * 3] * 2
    finally:
        gc.enable()


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("apply_probs", ["activation", "combine", "source"])
def test_gradcheck(ranks: ThreadRanks, size: int, apply_probs: str) -> None:
    """Numerical gradients in fp64 through dispatch, experts and combine; every rank perturbs in the same order."""
    case = make_case(1, T=4, D=2, E=4, K=2, dtype=torch.float64)
    config = DispatchConfig(apply_probs=apply_probs, deadline_s=10)

    def one(context: ParallelContext | None) -> bool:
        d = make_dispatcher(config, num_experts=4, top_k=2, context=context)
        # all ranks hold the same tokens, so that the evaluations pair up; the sum of what they send is each one's
        # output
        experts = case.experts[: 4 // size].clone()

        def fn(x: Tensor, w: Tensor, experts: Tensor) -> Tensor:
            routing = Routing(ids_TK=case.ids_TK, weights_TK=w, counts_E=torch.zeros(0))
            received = d.dispatch(x, routing)
            return d.combine(apply_experts(received, experts), received, add=x * 0.5)

        x, w = case.x_TD.clone().requires_grad_(), case.w_TK.clone().requires_grad_()
        if size == 1:
            return torch.autograd.gradcheck(fn, (x, w, experts.requires_grad_()))
        return torch.autograd.gradcheck(lambda x, w: fn(x, w, experts), (x, w))

    assert all([one(None)] if size == 1 else ranks.run(size, one))


def test_many_ranks_break_the_graph_at_a_named_place(ranks: ThreadRanks) -> None:
    """R > 1 under torch.compile: a documented break; values and gradients stay."""
    case = make_case(0, T=20, D=8, E=8, K=3)

    def one(context: ParallelContext) -> tuple[Result, Result]:
        want = run_case(case, DispatchConfig(), context)
        d = _bound(context, case, "all_to_all")
        share = Share(case, context, replicated=False)
        return d, share, want  # type: ignore[return-value]

    pairs = ranks.run(2, one)

    def compiled(context: ParallelContext) -> None:
        d, share, want = pairs[context.ep_rank]  # type: ignore[misc]
        y = torch.compile(lambda x, w: share.forward(d, x * 1.0, w), backend="eager")(share.x, share.w)
        y.backward(share.dy)
        assert_same_bits(share.result(y), want)

    ranks.run(2, compiled)
