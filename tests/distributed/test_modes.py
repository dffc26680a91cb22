"""Layouts, alignment, static capacity, the halves, and what goes wrong when a configuration does not fit."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import CapacityError, ConfigError, DispatchTimeout, RankMismatch, RoutingError
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Received, Routing
from tests import oracle_dispatch
from tests.distributed.cases import (
    Case,
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


def routing_of(case: Case, mine: slice, w: torch.Tensor | None = None) -> Routing:
    weights = case.w_TK[mine] if w is None else w
    return Routing(
        ids_TK=case.ids_TK[mine], weights_TK=weights, counts_E=torch.zeros(case.num_experts, dtype=torch.int32)
    )


def receive(case: Case, config: DispatchConfig, context: ParallelContext | None) -> Received:
    """What this rank's experts get."""
    rank, size = (0, 1) if context is None else (context.ep_rank, context.ep_size)
    cuts = even_cuts(case.x_TD.shape[0], size)
    mine = slice(None) if config.backend == "replicated" or size == 1 else slice(cuts[rank], cuts[rank + 1])
    dispatcher = make_dispatcher(config, num_experts=case.num_experts, top_k=case.top_k, context=context)
    return dispatcher.dispatch(case.x_TD[mine], routing_of(case, mine))


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("rows", "alignment"), [("compact", 1), ("expert_major", 1), ("expert_major", 8), ("expert_major", 16)]
)
def test_received_against_loops(ranks: ThreadRanks, size: int, backend: str, rows: str, alignment: int) -> None:
    """Every field: order, pads, probabilities, offsets, counts, maps."""
    case = make_case(size, T=22, D=4, E=8, K=3)
    config = config_for(backend, rows=rows, alignment=alignment)
    got = (
        [receive(case, config, None)] if size == 1 else ranks.run(size, lambda context: receive(case, config, context))
    )
    cuts = [0, 22] if backend == "replicated" else even_cuts(22, size)
    ids = [case.ids_TK[a:b].tolist() for a, b in itertools.pairwise(cuts)]
    for rank, received in enumerate(got):
        if backend == "replicated":
            want = oracle_dispatch.rows([ids[0] if r == 0 else [] for r in range(size)], 8, rank, alignment)
            want = [row and (row[0], rank if size > 1 else 0, *row[2:]) for row in want]
            begin = [0] * size
        else:
            want = oracle_dispatch.rows(ids, 8, rank, alignment)
            begin = cuts
        N, L = len(want), 8 // size
        ends = received.offsets_L1.tolist()
        assert ends[-1] == N and received.probs_N.shape[0] >= N
        assert [list(row[1:]) if row else [-1, -1, -1] for row in want] == received.src_N3[:N].tolist()
        assert (received.src_N3[N:] == -1).all()
        for e in range(L):
            real = [row for row in want[ends[e] : ends[e + 1]] if row]
            assert {row[0] for row in real} <= {rank * L + e} and int(received.counts_L[e]) == len(real)
            assert received.counts_LR[e].tolist() == (
                [len(real)]
                if received.counts_LR.shape[1] == 1
                else [sum(row[1] == r for row in real) for r in range(size)]
            )
        assert received.expert_ids_L.tolist() == list(range(rank * L, (rank + 1) * L))
        x = received.rows if received.index_N is None else received.rows[received.index_N.long()]
        for n, row in enumerate(want):
            if row is None:
                assert received.probs_N[n] == 0 and (rows == "compact" or torch.count_nonzero(x[n]) == 0)
            else:
                t = begin[row[1]] + row[2]
                assert received.probs_N[n] == case.w_TK[t, row[3]] and torch.equal(x[n], case.x_TD[t])
        used = [n for slots in received.row_CK.tolist() for n in slots if n >= 0]
        assert sorted(used) == [n for n, row in enumerate(want) if row]
        assert ((received.ids_CK >= 0) == (received.row_CK >= 0)).all()
        for slots, owners in zip(received.row_CK.tolist(), received.ids_CK.tolist(), strict=True):
            assert all(want[n][0] == e for n, e in zip(slots, owners, strict=True) if n >= 0)  # type: ignore[index]


@pytest.mark.parametrize("backend", ["all_to_all", "all_gather", "nvlink", "nvlink:dense"])
@pytest.mark.parametrize("apply_probs", ["activation", "combine", "source"])
@pytest.mark.parametrize("alignment", [8, 128])
def test_alignment_changes_no_value(ranks: ThreadRanks, backend: str, apply_probs: str, alignment: int) -> None:
    """Pads and tail of the experts' output are NaN in these cases: nobody may read them."""
    case = make_case(1, T=22, D=8, E=8, K=3)
    want = run_case(case, DispatchConfig(apply_probs=apply_probs))
    assert_same_bits(run_case(case, DispatchConfig(apply_probs=apply_probs, alignment=alignment)), want)
    config = config_for(backend, apply_probs=apply_probs, alignment=alignment)
    assert_same_bits(joined(ranks.run(2, lambda context: run_case(case, config, context))), want)


def test_partial_sums_without_reduce(ranks: ThreadRanks) -> None:
    """replicated, reduce false: y, dx and dprobs are this rank's shares; their sum is the whole."""
    case = make_case(2, T=9, D=8, E=8, K=3, dtype=torch.float64)
    want = run_case(case, DispatchConfig())
    config = DispatchConfig(backend="replicated", reduce=False)
    got = ranks.run(4, lambda context: run_case(case, config, context))
    for name in ("y", "dx", "dw"):
        torch.testing.assert_close(sum(getattr(r, name) for r in got), getattr(want, name), rtol=1e-12, atol=1e-12)


def test_replicated_with_different_tokens(ranks: ThreadRanks) -> None:
    def one(context: ParallelContext) -> None:
        case = make_case(2, T=8 + context.ep_rank, D=8, E=8, K=3)
        run_case(case, DispatchConfig(backend="replicated", deadline_s=3), context)

    for error in ranks.run(2, one, fresh=True):
        assert isinstance(error, RankMismatch) and "[8, 9] tokens" in str(error) and "all_gather" in str(error)


# ---- static capacity ---------------------------------------------------------------------------------------------


def _dropped(case: Case, *, size: int, capacity: int) -> set[tuple[int, int]]:
    """(global token, destination rank) pairs without room: from the highest (token, source rank) down."""
    cuts, L, lost = even_cuts(case.x_TD.shape[0], size), case.num_experts // size, set()
    for rank in range(size):
        pairs = []
        for source in range(size):
            for t in range(cuts[source], cuts[source + 1]):
                slots = sum(e >= 0 and e // L == rank for e in case.ids_TK[t].tolist())
                if slots:
                    pairs.append((t - cuts[source], source, t, slots))
        used = 0
        for _, _, t, slots in sorted(pairs):
            used += slots
            if used > capacity:
                lost.add((t, rank))
    return lost


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("backend", ["all_to_all", "all_gather", "nvlink", "nvlink:dense"])
@pytest.mark.parametrize("apply_probs", ["activation", "source"])
def test_overflow_drops_from_the_last_token_down(ranks: ThreadRanks, size: int, backend: str, apply_probs: str) -> None:
    case = make_case(3, T=24, D=8, E=8, K=3)
    keys = {"max_tokens_per_rank": 24 // size} if backend.startswith("nvlink") else {}
    config = config_for(backend, capacity="static", static_factor=0.6, overflow="drop", apply_probs=apply_probs, **keys)
    capacity = math.ceil(0.6 * (24 // size) * 3)
    lost = _dropped(case, size=size, capacity=capacity)
    assert lost
    ids = case.ids_TK.clone()
    for t, rank in lost:
        ids[t] = torch.where(ids[t] * size // 8 == rank, -1, ids[t])
    want = run_case(Case(case.x_TD, ids, case.w_TK, case.dy_TD, case.experts), DispatchConfig(apply_probs=apply_probs))
    if size == 1:
        got = run_case(case, config)
    else:
        got = joined(ranks.run(size, lambda context: run_case(case, config, context)))
    assert_same_bits(got, want)


@pytest.mark.parametrize("size", [1, 2])
def test_source_learns_what_was_dropped(ranks: ThreadRanks, size: int) -> None:
    case = make_case(3, T=24, D=8, E=8, K=3)
    config = DispatchConfig(capacity="static", static_factor=0.6, overflow="drop")

    def one(context: ParallelContext | None) -> torch.Tensor:
        rank = 0 if context is None else context.ep_rank
        cuts = even_cuts(24, size)
        mine = slice(cuts[rank], cuts[rank + 1])
        dispatcher = make_dispatcher(config, num_experts=8, top_k=3, context=context)
        received = dispatcher.dispatch(case.x_TD[mine], routing_of(case, mine))
        dispatcher.combine(apply_experts(received, case.experts[: 8 // size]), received)
        return received.state.dropped_TR

    got = torch.cat([one(None)] if size == 1 else ranks.run(size, one))
    lost = _dropped(case, size=size, capacity=math.ceil(0.6 * (24 // size) * 3))
    assert {(t, r) for t, r in got.nonzero().tolist() if (case.ids_TK[t] >= 0).any()} >= lost
    assert got.shape == (24, size)


@pytest.mark.parametrize("alignment", [1, 8])
def test_static_rows_have_one_size(alignment: int) -> None:
    sizes = set()
    for seed in range(4):
        case = make_case(seed, T=10, D=4, E=4, K=2, absent=0.5)
        config = DispatchConfig(capacity="static", static_factor=4.0, alignment=alignment, max_tokens_per_rank=16)
        sizes.add(receive(case, config, None).rows.shape[0])
    assert sizes == {128}


def test_overflow_error_names_the_remedy(ranks: ThreadRanks) -> None:
    case = make_case(3, T=24, D=8, E=8, K=3, absent=0.0)
    config = DispatchConfig(capacity="static", static_factor=0.5)
    with pytest.raises(CapacityError, match=r"36 rows \(static_factor 0.5\) overflowed; raise dispatch.static_factor"):
        run_case(case, config)
    # only rank 1 overflows; rank 0 learns it at its next trip
    ids = torch.full_like(case.ids_TK, -1)
    ids[:, 0] = 7
    one_sided = Case(case.x_TD, ids, case.w_TK, case.dy_TD, case.experts)
    errors = ranks.run(
        2,
        lambda context: run_case(one_sided, DispatchConfig(capacity="static", static_factor=0.5), context),
        fresh=True,
    )
    assert [type(error) for error in errors] == [CapacityError, CapacityError]
    assert "ranks [1] overflowed" in str(errors[0]) and "static_factor" in str(errors[1])


def test_more_tokens_than_allowed(ranks: ThreadRanks) -> None:
    config = DispatchConfig(capacity="static", max_tokens_per_rank=4)
    errors = ranks.run(2, lambda c: run_case(make_case(0, T=12, D=4, E=4, K=2), config, c), fresh=True)
    for error in errors:
        assert isinstance(error, CapacityError) and "6 tokens exceed dispatch.max_tokens_per_rank (4)" in str(error)


# ---- disagreement ------------------------------------------------------------------------------------------------


def test_experts_must_split(ranks: ThreadRanks) -> None:
    def one(context: ParallelContext) -> None:
        make_dispatcher(DispatchConfig(), num_experts=60, top_k=2, context=context)

    for error in ranks.run(8, one, fresh=True):
        assert isinstance(error, ConfigError)
        assert str(error).startswith("num_experts (60) must be divisible by parallel.ep (8); try 1, 2, 3")


def test_local_serves_one_rank(ranks: ThreadRanks) -> None:
    def one(context: ParallelContext) -> None:
        make_dispatcher(DispatchConfig(backend="local"), num_experts=8, top_k=2, context=context)

    assert all(isinstance(error, ConfigError) for error in ranks.run(2, one, fresh=True))


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"top_k": 3}, "top_k: 2 on rank 0, 3 on rank 1"),
        ({"num_experts": 16}, "num_experts: 8 on rank 0, 16 on rank 1"),
        ({"layer_index": 5}, "layer: 0 on rank 0, 5 on rank 1"),
        ({"config": DispatchConfig(alignment=8)}, "dispatch.alignment: 1 on rank 0, 8 on rank 1"),
    ],
)
def test_static_facts_are_compared_at_bind(ranks: ThreadRanks, change: dict, text: str) -> None:
    def one(context: ParallelContext) -> None:
        facts = {"config": DispatchConfig(), "num_experts": 8, "top_k": 2, "layer_index": 0}
        facts |= change if context.ep_rank == 1 else {}
        make_dispatcher(facts.pop("config"), context=context, **facts)

    for error in ranks.run(2, one, fresh=True):
        assert isinstance(error, RankMismatch) and text in str(error)


def _dispatch_only(context: ParallelContext, *, D: int = 8, layer: int = 0) -> None:
    case = make_case(0, T=6, D=D, E=12, K=2)
    dispatcher = make_dispatcher(DispatchConfig(deadline_s=2.0), num_experts=12, top_k=2, context=context)
    dispatcher.link.layer = layer  # bound in agreement, then out of step
    dispatcher.dispatch(case.x_TD, routing_of(case, slice(None)))


def test_size_mismatch(ranks: ThreadRanks) -> None:
    for error in ranks.run(3, lambda c: _dispatch_only(c, D=16 if c.ep_rank == 2 else 8), fresh=True):
        assert isinstance(error, RankMismatch) and "row_bytes" in str(error) and "rank 2 has" in str(error)


@pytest.mark.parametrize(
    ("backend", "apply_probs"),
    [*itertools.product(("all_to_all", "all_gather", "nvlink", "nvlink:dense"), ("activation", "source")),
     ("replicated", "activation")],  # under source its sums are fp32 whatever x is
)  # fmt: skip
def test_dtypes_of_one_size(ranks: ThreadRanks, backend: str, apply_probs: str) -> None:
    """One rank in fp16, the others in bf16: the bits of one would be read as numbers of the other."""
    config = config_for(backend, deadline_s=5, apply_probs=apply_probs)

    def one(context: ParallelContext) -> None:
        dispatcher = make_dispatcher(config, num_experts=8, top_k=2, context=context)
        case = make_case(0, T=6, D=16, E=8, K=2)
        dtype = torch.float16 if context.ep_rank == 1 else torch.bfloat16
        received = dispatcher.dispatch(case.x_TD.to(dtype), routing_of(case, slice(None)))
        dispatcher.combine(torch.ones(received.probs_N.shape[0], 16, dtype=dtype), received)

    for error in ranks.run(2, one, fresh=True):
        assert isinstance(error, RankMismatch) and "dtypes" in str(error)
        assert backend.startswith("nvlink") or (
            "rank 0 has bfloat16" in str(error) and "rank 1 has float16" in str(error)
        )


def test_other_layer_and_other_step(ranks: ThreadRanks) -> None:
    for error in ranks.run(3, lambda c: _dispatch_only(c, layer=int(c.ep_rank == 1)), fresh=True):
        assert isinstance(error, RankMismatch) and "about the layer" in str(error) and "rank 1 has 1" in str(error)

    def late(context: ParallelContext) -> None:
        context.step = 7 - (context.ep_rank == 0)
        _dispatch_only(context)

    for error in ranks.run(3, late, fresh=True):
        assert isinstance(error, RankMismatch) and "about the step" in str(error) and "rank 0 has 6" in str(error)


def test_absent_rank_is_named_and_the_group_stays_unusable(ranks: ThreadRanks) -> None:
    def one(context: ParallelContext) -> tuple[Exception, Exception] | None:
        dispatcher = make_dispatcher(
            DispatchConfig(deadline_s=1.0), num_experts=12, top_k=2, context=context, layer_index=3
        )
        if context.ep_rank == 1:
            return None
        context.step = 7
        case = make_case(0, T=6, D=8, E=12, K=2)
        caught = []
        for _ in range(2):
            with pytest.raises(DispatchTimeout) as info:
                dispatcher.dispatch(case.x_TD, routing_of(case, slice(None)))
            caught.append(info.value)
        with pytest.raises(DispatchTimeout):
            dispatcher.check()
        return tuple(caught)

    results = ranks.run(3, one, fresh=True)
    for errors in (results[0], results[2]):
        assert "layer 3, step 7, phase dispatch" in str(errors[0]) and "ranks [1] of 3 did not report" in str(errors[0])
        assert "unusable since" in str(errors[1])


def test_wrong_ids(ranks: ThreadRanks) -> None:
    def one(context: ParallelContext) -> None:
        dispatcher = make_dispatcher(DispatchConfig(), num_experts=8, top_k=2, context=context)
        dispatcher.dispatch(
            torch.zeros(5, 4), Routing.from_ids(torch.zeros(4, 2).long(), torch.ones(4, 2), num_experts=8)
        )

    for error in ranks.run(2, one, fresh=True):
        assert isinstance(error, RoutingError) and "[5, 2] for x of 5 tokens" in str(error)
