"""Plan, row order and capacity against literal loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_layer.dispatch.arrange import fitting
from moe_layer.dispatch.plan import make_plan
from moe_layer.errors import ConfigError, RoutingError
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.sort_slots import sort_slots
from tests import oracle_dispatch

SHAPES = st.sampled_from([(8, 1), (8, 2), (8, 4), (8, 8), (6, 3), (12, 4), (60, 6), (5, 5)])


@st.composite
def routings(draw: st.DrawFn) -> tuple[torch.Tensor, int, int]:
    """Any ids: repeated ones and -1 included, zero tokens too."""
    E, R = draw(SHAPES)
    T, K = draw(st.integers(0, 12)), draw(st.integers(1, 5))
    hot = draw(st.booleans())  # most slots on one expert
    values = st.integers(-1, 0) if hot else st.integers(-1, E - 1)
    ids = draw(st.lists(st.lists(values, min_size=K, max_size=K), min_size=T, max_size=T))
    return torch.tensor(ids, dtype=torch.int32).view(T, K), E, R


@settings(max_examples=200)
@given(routings(), st.sampled_from([torch.int16, torch.int32, torch.int64]))
def test_plan(routing: tuple[torch.Tensor, int, int], dtype: torch.dtype) -> None:
    ids, E, R = routing
    plan = make_plan(ids.to(dtype), num_experts=E, num_ranks=R)
    want = oracle_dispatch.plan(ids.tolist(), E, R)
    assert plan.counts_E.tolist() == want["counts"]
    assert plan.send_counts_R.tolist() == [len(tokens) for tokens in want["tokens"]]
    assert plan.send_tokens.tolist() == [t for tokens in want["tokens"] for t in tokens]
    assert plan.position_TR.tolist() == want["position"]
    for tensor in (plan.ids_TK, plan.counts_E, plan.send_tokens, plan.send_counts_R, plan.position_TR):
        assert tensor.dtype == torch.int32


@settings(max_examples=200)
@given(routings(), st.sampled_from([1, 8, 16]), st.integers(-5, 5))
def test_row_order(routing: tuple[torch.Tensor, int, int], alignment: int, spare: int) -> None:
    """With too few rows (`spare` < 0) the last slots have none; the offsets tell."""
    ids, E, R = routing
    L = E // R
    for rank in range(R):
        want = oracle_dispatch.rows([ids.tolist() if r == 0 else [] for r in range(R)], E, rank, alignment)
        weights = torch.rand(ids.shape)
        size = {"first_expert": rank * L, "num_local": L, "num_rows": max(0, len(want) + spare)}
        order = sort_slots(ids, alignment=alignment, weights_CK=weights, **size)
        K = ids.shape[1]
        slots = [-1 if row is None else row[2] * K + row[3] for row in want] + [-1] * spare
        slots = slots[: max(0, len(want) + spare)]
        assert order.slot_N.tolist() == slots
        assert order.probs_N.tolist() == [0.0 if s < 0 else float(weights[s // K, s % K]) for s in slots]
        assert sort_slots(ids, alignment=alignment, **size).probs_N.numel() == 0
        back = {slot: n for n, slot in enumerate(slots) if slot >= 0}
        assert order.row_CK.flatten().tolist() == [back.get(s, -1) for s in range(ids.numel())]
        counts = [sum(row is not None and row[0] == rank * L + e for row in want) for e in range(L)]
        assert order.counts_L.tolist() == counts
        ends = [0]
        for count in counts:
            ends.append(ends[-1] + -(-count // alignment) * alignment)
        assert order.offsets_L1.tolist() == ends


@settings(max_examples=100)
@given(routings(), st.sampled_from([1, 8]), st.integers(0, 40))
def test_fitting_keeps_the_youngest_tokens(
    routing: tuple[torch.Tensor, int, int], alignment: int, capacity: int
) -> None:
    ids, E, _ = routing
    T = ids.shape[0]
    age = torch.randperm(T, generator=torch.Generator().manual_seed(T))
    got = fitting(ids, num_local=E, alignment=alignment, capacity=capacity, age_C=age)
    by_age = sorted(range(T), key=lambda c: int(age[c]))
    kept: list[int] = []
    for c in by_age:
        chosen = [e for row in [*kept, c] for e in ids[row].tolist() if e >= 0]
        if sum(-(-chosen.count(e) // alignment) * alignment for e in set(chosen)) > capacity:
            break
        kept.append(c)
    assert got.tolist() == [c in kept for c in range(T)]


def test_experts_that_do_not_split_over_the_ranks() -> None:
    with pytest.raises(
        ConfigError, match=r"num_experts \(60\) must be divisible by parallel.ep \(8\); try 1, 2, 3, 4, 5, 6"
    ):
        make_plan(torch.zeros(1, 1, dtype=torch.int32), num_experts=60, num_ranks=8)


@pytest.mark.parametrize(
    "ids", [torch.zeros(3), torch.zeros(3, dtype=torch.int32), torch.zeros(2, 2, dtype=torch.bool)]
)
def test_ids_that_are_none(ids: torch.Tensor) -> None:
    with pytest.raises(RoutingError, match="ids must be an integer"):
        make_plan(ids, num_experts=8, num_ranks=2)


def test_opcheck() -> None:
    ids = torch.tensor([[0, 3], [-1, 2], [7, 7]], dtype=torch.int32)
    check = torch.library.opcheck
    for ranks in (1, 2):
        check(torch.ops.moe_layer.dispatch_plan.default, (ids, 8, ranks))
    for alignment in (1, 8):
        check(torch.ops.moe_layer.sort_slots.default, (ids, 0, 8, alignment, 48))
        check(torch.ops.moe_layer.sort_slots.default, (ids, 0, 8, alignment, 48, torch.rand(ids.shape)))
    check(torch.ops.moe_layer.gather_rows.default, (torch.randn(3, 4), torch.tensor([2, -1, 0, 0])))


def test_gather_rows() -> None:
    x = torch.randn(3, 4)
    got = gather_rows(x, torch.tensor([2, -1, 0]))
    assert torch.equal(got, torch.stack((x[2], torch.zeros(4), x[0])))
    assert gather_rows(x[:0], torch.tensor([-1, -1])).tolist() == [[0.0] * 4] * 2
