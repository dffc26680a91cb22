"""route_topk with recorded ids: slots kept, refilled, counted; recorded and straight-through weights."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_layer.ops.route_topk import RouteTopk, route_topk
from tests.ops.router_cases import check_against_oracle, run_op
from tests.oracle_router import Rule

RULES = [
    Rule(top_k=3),
    Rule(top_k=3, softmax_order="pre", renormalize=False),
    Rule(top_k=3, score_function="sigmoid", bias=[0.5, -0.5, 0.25, 0.0, -0.25, 0.75, -1.0, 0.5]),
    Rule(top_k=3, score_function="sqrtsoftplus", num_groups=4, group_topk=2),
    Rule(top_k=3, score_function="sigmoid", scaling_factor=2.5, num_groups=2, group_topk=1),
]
RECORDED = [[5, 2, 7], [-1, 4, -1], [3, 3, 3], [8, 0, 1], [-1, -1, -1], [0, 99, 0], [1, 0, 1]]


@pytest.mark.parametrize("weights_mode", ["live", "recorded", "straight_through"])
@pytest.mark.parametrize("aux_counts", ["live", "effective"])
@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_values_and_gradients(rule: Rule, aux_counts: str, weights_mode: str) -> None:
    logits = torch.randn(7, 8)
    valid = torch.tensor([True, True, True, True, True, False, True])
    check_against_oracle(
        logits,
        rule,
        recorded=torch.tensor(RECORDED),
        recorded_weights=torch.rand(7, 3),
        weights_mode=weights_mode,
        valid=valid,
        aux_counts=aux_counts,
    )


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64])
def test_any_integer_dtype(dtype: torch.dtype) -> None:
    logits = torch.randn(5, 8)
    ids = route_topk(torch.randn(5, 8), top_k=3).ids
    out = route_topk(logits, top_k=3, replay_ids=ids.to(dtype))
    assert torch.equal(out.ids, ids)
    assert out.events.tolist() == [5, 15, 0, 0, 0, 0, 0, 0]


def test_all_256_codes_of_uint8() -> None:
    logits = torch.randn(64, 256)
    ids = torch.arange(256, dtype=torch.uint8).view(64, 4)
    assert torch.equal(route_topk(logits, top_k=4, replay_ids=ids).ids, ids.int())


@pytest.mark.parametrize("rule", RULES, ids=range(len(RULES)))
def test_replaying_what_was_routed_changes_no_bit(rule: Rule) -> None:
    """Ids, weights and gradients of a replayed step equal those of the recorded one."""
    results = []
    recorded = None
    for _ in range(2):
        logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(3)).requires_grad_()
        out = run_op(logits, rule, replay_ids=recorded)
        (grad,) = torch.autograd.grad(out.weights, logits, torch.arange(18.0).view(6, 3))
        results.append((out.ids, out.weights, grad, out.counts))
        recorded = out.ids
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_rows_of_minus_one_are_live_rows() -> None:
    logits = torch.randn(6, 8)
    live = route_topk(logits, top_k=3)
    out = route_topk(logits, top_k=3, replay_ids=torch.full((6, 3), -1))
    assert torch.equal(out.ids, live.ids) and torch.equal(out.weights, live.weights)
    assert out.events.tolist() == [0, 0, 18, 0, 0, 0, 0, 0]


def test_gradient_reaches_the_replayed_experts_only() -> None:
    logits = torch.randn(4, 8, requires_grad=True)
    ids = torch.tensor([[0, 1]]).repeat(4, 1)
    out = route_topk(logits, top_k=2, replay_ids=ids)
    (grad,) = torch.autograd.grad(out.weights, logits, torch.randn(4, 2))
    assert grad[:, :2].abs().min() > 0 and not grad[:, 2:].any()


def test_recorded_weights_have_no_gradient_and_straight_through_ones_the_live_one() -> None:
    ids, recorded = torch.tensor([[6, 2]]), torch.tensor([[0.75, 0.125]])
    grads = {}
    for mode in ("live", "recorded", "straight_through"):
        logits = torch.arange(8.0)[None].requires_grad_()
        out = route_topk(logits, top_k=2, replay_ids=ids, replay_weights=recorded, weights_mode=mode)
        assert torch.equal(out.weights.detach(), recorded) == (mode != "live")
        (grads[mode],) = torch.autograd.grad(out.weights, logits, torch.tensor([[1.0, -2.0]]))
    assert not grads["recorded"].any() and grads["live"].any()
    assert torch.equal(grads["live"], grads["straight_through"])


def test_refill_keeps_out_of_closed_groups_until_they_are_recorded() -> None:
    """A recorded expert may lie outside the live groups; the filled slots stay inside them."""
    logits = torch.tensor([[9.0, 8.0, 7.0, 6.0, 1.0, 0.0, -1.0, -2.0]])
    out = route_topk(logits, top_k=3, num_groups=2, group_topk=1, replay_ids=torch.tensor([[7, -1, -1]]))
    assert out.ids.tolist() == [[7, 0, 1]]


def test_every_slot_filled_when_k_equals_e() -> None:
    out = route_topk(torch.tensor([[0.0, 3.0, 2.0, 1.0]]), top_k=4, replay_ids=torch.tensor([[2, -1, 2, 9]]))
    assert out.ids.tolist() == [[2, 1, 3, 0]]
    assert out.events.tolist() == [1, 1, 1, 1, 1, 0, 0, 0]


@st.composite
def replays(draw: st.DrawFn) -> tuple[int, int, list[list[int]], list[bool], int, str]:
    num_experts = draw(st.integers(1, 10))
    top_k = draw(st.integers(1, num_experts))
    row = st.lists(st.integers(-2, num_experts + 1), min_size=top_k, max_size=top_k)
    rows = draw(st.lists(row, min_size=0, max_size=4))
    valid = draw(st.lists(st.booleans(), min_size=len(rows), max_size=len(rows)))
    score_function = draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"]))
    return num_experts, top_k, rows, valid, draw(st.integers(0, 2**31)), score_function


@settings(max_examples=350)
@given(replays())
def test_any_recorded_rows(case: tuple[int, int, list[list[int]], list[bool], int, str]) -> None:
    """Distinct ids, recorded slots in place, the four slot counts add up, values and gradients as in the oracle."""
    num_experts, top_k, rows, valid, seed, score_function = case
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(rows), num_experts, generator=generator)
    recorded = torch.tensor(rows, dtype=torch.int64).reshape(len(rows), top_k)
    mask = torch.tensor(valid, dtype=torch.bool)
    rule = Rule(top_k=top_k, score_function=score_function)
    mode = ("live", "recorded", "straight_through")[seed % 3]
    weights = torch.rand(len(rows), top_k, generator=generator)
    out = check_against_oracle(
        logits, rule, recorded=recorded, recorded_weights=weights, weights_mode=mode, valid=mask, aux_counts="effective"
    )
    assert int(out.events[1:5].sum()) == top_k * sum(valid)
    for ids, given_ids in kept_slots(out, recorded, mask):
        assert ids == given_ids


def kept_slots(out: RouteTopk, recorded: torch.Tensor, valid: torch.Tensor) -> Iterator[tuple[int, int]]:
    """(returned, recorded) of every first occurrence in range, over valid rows."""
    for ids, wanted, alive in zip(out.ids.tolist(), recorded.tolist(), valid.tolist(), strict=True):
        for slot, expert in enumerate(wanted):
            if alive and 0 <= expert < out.counts.shape[0] and expert not in wanted[:slot]:
                yield ids[slot], expert
