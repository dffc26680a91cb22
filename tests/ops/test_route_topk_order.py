"""route_topk: which experts, in which order - ties, NaN, infinities, denormals, groups, position independence."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_layer.ops.route_topk import route_topk
from moe_layer.ops.route_topk_select import best, score
from tests import oracle_router as oracle
from tests.ops.router_cases import bias_of, options, run_op

VALUES = {"finite": 1.0, "nan": math.nan, "inf": math.inf, "-inf": -math.inf}


@pytest.mark.parametrize(
    "rule",
    [
        oracle.Rule(top_k=4),
        oracle.Rule(top_k=4, score_function="sigmoid", bias=[0.0] * 8),
        oracle.Rule(top_k=4, softmax_order="pre", num_groups=4, group_topk=2),
        oracle.Rule(top_k=8, score_function="sqrtsoftplus"),
    ],
    ids=["plain", "bias", "groups", "all"],
)
def test_every_pattern_of_broken_logits(rule: oracle.Rule) -> None:
    """All 4^8 rows of {finite, nan, inf, -inf}: K distinct ids, finite experts first, counted."""
    patterns = list(itertools.product(VALUES.values(), repeat=8))
    logits = torch.tensor(patterns)
    finite = torch.isfinite(logits)
    logits = torch.where(finite, torch.arange(8.0) * torch.tensor([1.0, -1.0]).repeat(4), logits)
    out = run_op(logits, rule)
    assert int(out.events[5]) == int((~finite.all(dim=1)).sum())
    assert bool((out.ids.sort(dim=1).values.diff(dim=1) > 0).all()) and out.ids.min() >= 0 and out.ids.max() < 8
    if rule.num_groups == 0:
        chosen_finite = finite.gather(1, out.ids.long()).sum(dim=1)
        assert torch.equal(chosen_finite, finite.sum(dim=1).clamp(max=rule.top_k))
    step = 1 if rule.top_k == 4 and rule.bias is None and rule.num_groups == 0 else 17
    for row in range(0, len(patterns), step):
        assert out.ids[row].tolist() == oracle.ids_of_row(logits[row].tolist(), rule), patterns[row]


def test_a_broken_row_does_not_touch_its_neighbours() -> None:
    logits = torch.randn(4, 8)
    broken = logits.clone()
    broken[1, 3] = math.nan
    clean, dirty = (
        route_topk(x, top_k=3, want_z=True, aux_counts="live", cu_seqlens=torch.tensor([0, 1, 2, 4]))
        for x in (logits, broken)
    )
    for row in (0, 2, 3):
        assert torch.equal(clean.ids[row], dirty.ids[row]) and torch.equal(clean.weights[row], dirty.weights[row])
    assert torch.equal(clean.score_sum[[0, 2]], dirty.score_sum[[0, 2]]) and dirty.score_sum[1].isnan().all()


@pytest.mark.parametrize("num_experts", [1, 7, 16, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_equal_keys_go_to_the_lower_expert(num_experts: int, dtype: torch.dtype) -> None:
    """Few distinct values: every row is full of ties; the answer is the stable order."""
    logits = torch.randint(-1, 2, (200, num_experts)).to(dtype)
    logits[0] = 0.0
    logits[1, ::2] = -0.0
    expected = torch.sort(logits.double(), dim=1, descending=True, stable=True).indices
    for top_k in {1, min(4, num_experts), min(12, num_experts), num_experts}:
        for bias in (None, torch.zeros(num_experts)):
            out = route_topk(logits, bias, top_k=top_k, score_function="sigmoid")
            assert torch.equal(out.ids.long(), expected[:, :top_k])


def test_all_routes_of_the_selection_agree() -> None:
    """Repeated maximum (CPU, finite), packed keys (CUDA, broken rows) and two stable sorts (fp64) give the same ids."""
    keys = torch.randint(-3, 4, (500, 24)).float() * torch.tensor([1e-42, 1.0, 1e30]).repeat(8)
    blocked = torch.rand(500, 24) < 0.4
    blocked[:, ::4] = False  # as groups do, leave at least K open
    everyone = torch.ones_like(blocked)
    for closed in (None, blocked):
        fast = best(keys, None, closed, 6)
        assert torch.equal(fast, best(keys, everyone, closed, 6))
        assert torch.equal(fast, best(keys.double(), everyone, closed, 6))
    ok = torch.rand(500, 24) < 0.3
    assert torch.equal(best(keys, ok, blocked, 6), best(keys.double(), ok, blocked, 6))


@pytest.mark.parametrize("score_function", ["sigmoid", "sqrtsoftplus"])
def test_a_score_does_not_depend_on_where_it_stands(score_function: str) -> None:
    """Same input, same bits, for every length and offset (torch.sigmoid fails this on AVX machines)."""
    values = torch.cat([torch.randn(400) * 4, torch.tensor([0.0, -0.0, 1e-40, -100.0, 100.0, 20.0])])
    alone = torch.stack([score(value[None], score_function)[0] for value in values])
    for width in (1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 67, 130):
        many = score(values[:, None].expand(-1, width).contiguous(), score_function)
        assert torch.equal(many, alone[:, None].expand(-1, width)), width


def test_equal_logits_under_a_bias_stay_ties() -> None:
    for num_experts in (5, 17, 33, 100):
        logits = torch.full((3, num_experts), 0.3217)
        for score_function in ("sigmoid", "sqrtsoftplus", "softmax"):
            out = route_topk(
                logits, torch.zeros(num_experts), top_k=5, score_function=score_function, softmax_order="pre"
            )
            assert out.ids.tolist() == [[0, 1, 2, 3, 4]] * 3, (num_experts, score_function)


def test_group_rules() -> None:
    """sum_top2 and sum_topk_per_group choose differently; groups with negative keys are not masked by zero."""
    logits = torch.tensor([[9.0, -9.0, 4.0, 4.0, 3.0, 3.5]])
    two = route_topk(logits, top_k=1, num_groups=3, group_topk=1, group_rule="sum_top2")
    best_one = route_topk(logits, top_k=1, num_groups=3, group_topk=1, group_rule="sum_topk_per_group")
    assert two.ids.tolist() == [[2]] and best_one.ids.tolist() == [[0]]
    negative = route_topk(-logits.abs() - 1, top_k=2, num_groups=3, group_topk=1)
    assert negative.ids.tolist() == [[4, 5]]
    tie = route_topk(torch.zeros(2, 12), top_k=2, num_groups=4, group_topk=2)
    assert tie.ids.tolist() == [[0, 1]] * 2


@st.composite
def routed_rows(draw: st.DrawFn) -> tuple[list[list[float]], oracle.Rule]:
    """Rows of exactly representable values with ties, denormals and broken entries, under every rule."""
    groups = draw(st.sampled_from([0, 0, 1, 2, 4]))
    size = draw(st.integers(2, 4))
    num_experts = groups * size if groups else draw(st.integers(1, 14))
    group_topk = draw(st.integers(1, groups)) if groups else 0
    top_k = draw(st.integers(1, group_topk * size if groups else num_experts))
    group_rule = draw(st.sampled_from(["sum_top2", "sum_topk_per_group"]))
    if groups and top_k % group_topk:
        group_rule = "sum_top2"
    biased = draw(st.booleans())
    # Steps of 1/4 keep fp32 keys of different experts apart or exactly equal: s + b is compared in fp32 and in fp64.
    bias = (
        draw(st.lists(st.sampled_from([0.0, 0.25, -0.25, 1.0]), min_size=num_experts, max_size=num_experts))
        if biased
        else None
    )
    value = st.sampled_from([0.0, -0.0, 1.0, -1.0, 2.5, 1e-40, -3.0, 88.0, -200.0, math.nan, math.inf, -math.inf])
    rows = draw(st.lists(st.lists(value, min_size=num_experts, max_size=num_experts), min_size=0, max_size=4))
    rule = oracle.Rule(
        top_k=top_k,
        score_function=draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        softmax_order=draw(st.sampled_from(["pre", "post"])),
        num_groups=groups,
        group_topk=group_topk,
        group_rule=group_rule,
        bias=bias,
    )
    return rows, rule


@settings(max_examples=500)
@given(routed_rows())
def test_ids_of_any_row(case: tuple[list[list[float]], oracle.Rule]) -> None:
    rows, rule = case
    num_experts = (
        len(rows[0]) if rows else max(rule.top_k, rule.num_groups * 2, 1 if rule.bias is None else len(rule.bias))
    )
    if not rows and rule.num_groups:
        return
    logits = torch.tensor(rows, dtype=torch.float32).reshape(len(rows), num_experts)
    ids = route_topk(logits, bias_of(rule), **options(rule)).ids.tolist()
    for row, chosen in zip(logits.tolist(), ids, strict=True):
        assert len(set(chosen)) == rule.top_k
        expected = oracle.ids_of_row(row, rule)
        if chosen == expected:
            continue
        assert rule.bias is not None or rule.num_groups, (row, chosen, expected)
        assert near_tie(row, rule, chosen), (row, chosen, expected)


def near_tie(row: list[float], rule: oracle.Rule, chosen: list[int]) -> bool:
    """Some admissible set of groups has, within 8 ulp, the chosen keys as its best: fp32 cannot tell the rest apart."""
    keys = oracle.keys_of_row(row, rule)
    for kept in admissible_groups(keys, rule):
        closed = {e for e in range(len(keys)) if rule.num_groups and e // (len(keys) // rule.num_groups) not in kept}
        expected = oracle.order(keys, closed)[: rule.top_k]
        pairs = zip((keys[e] for e in chosen), (keys[e] for e in expected), strict=True)
        if not closed & set(chosen) and all(_close(ours, theirs) for ours, theirs in pairs):
            return True
    return False


def admissible_groups(keys: list[float], rule: oracle.Rule) -> list[set[int]]:
    if rule.num_groups == 0:
        return [set()]
    size = len(keys) // rule.num_groups
    count = 2 if rule.group_rule == "sum_top2" else rule.top_k // rule.group_topk
    totals = []
    for group in range(rule.num_groups):
        members = [-1e30 if math.isnan(key) else key for key in keys[group * size : (group + 1) * size]]
        totals.append(sum(sorted(members, reverse=True)[:count]))
    everyone = set(range(rule.num_groups))
    found = []
    for kept in map(set, itertools.combinations(sorted(everyone), rule.group_topk)):
        lowest = min(totals[group] for group in kept)
        highest = max((totals[group] for group in everyone - kept), default=-math.inf)
        if highest <= lowest or _close(lowest, highest):
            found.append(kept)
    return found


def _close(ours: float, theirs: float) -> bool:
    if math.isnan(ours) or math.isnan(theirs):
        return math.isnan(ours) and math.isnan(theirs)
    return abs(ours - theirs) <= 8 * 2.0**-23 * max(1.0, abs(ours))
