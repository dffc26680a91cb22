"""Capacity, forced-uniform ids and the id buffer copy."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_layer.ops.capacity import apply_capacity, expert_capacity
from moe_layer.ops.copy_ids import copy_ids
from moe_layer.ops.uniform import uniform_ids


def literal_capacity(
    ids: list[list[int]], weights: list[list[float]], num_experts: int, capacity: int, policy: str
) -> list[list[bool]]:
    """Which slots stay, expert by expert."""
    keep = [[False] * len(row) for row in ids]
    for expert in range(num_experts):
        slots = [(t, k) for t, row in enumerate(ids) for k, e in enumerate(row) if e == expert]
        if policy == "probs":
            slots.sort(key=lambda slot: (-weights[slot[0]][slot[1]], slot))
        for token, slot in slots[:capacity]:
            keep[token][slot] = True
    return keep


@settings(max_examples=150)
@given(st.data())
def test_capacity_against_loops(data: st.DataObject) -> None:
    num_experts = data.draw(st.integers(1, 6))
    top_k = data.draw(st.integers(1, 3))
    row = st.lists(st.integers(-1, num_experts - 1), min_size=top_k, max_size=top_k)
    ids = data.draw(st.lists(row, max_size=8))
    values = st.lists(st.sampled_from([0.0, 0.25, 0.5, 1.0]), min_size=top_k, max_size=top_k)
    weights = data.draw(st.lists(values, min_size=len(ids), max_size=len(ids)))
    capacity = data.draw(st.integers(0, 5))
    policy = data.draw(st.sampled_from(["probs", "position"]))
    ids_TK = torch.tensor(ids, dtype=torch.int32).reshape(len(ids), top_k)
    weights_TK = torch.tensor(weights).reshape(len(ids), top_k).requires_grad_()
    kept = apply_capacity(ids_TK, weights_TK, num_experts, capacity=capacity, policy=policy)
    want = torch.tensor(literal_capacity(ids, weights, num_experts, capacity, policy)).reshape(len(ids), top_k).bool()
    assert kept.ids.dtype == torch.int32 and torch.equal(kept.ids, torch.where(want, ids_TK, -1))
    assert torch.equal(kept.weights, torch.where(want, weights_TK, 0.0))
    counts = [int((kept.ids == expert).sum()) for expert in range(num_experts)]
    assert kept.counts.tolist() == counts and kept.counts.dtype == torch.int32
    if len(ids):
        upstream = torch.randn(len(ids), top_k)
        (grad,) = torch.autograd.grad(kept.weights, weights_TK, upstream)
        assert torch.equal(grad, torch.where(want, upstream, 0.0))


def test_position_keeps_the_earliest_tokens() -> None:
    """Megatron's policy picks arbitrary ones (top-k over ties); ours is by token index."""
    ids = torch.zeros(10, 1, dtype=torch.int32)
    kept = apply_capacity(ids, torch.rand(10, 1), 2, capacity=4, policy="position")
    assert kept.ids.flatten().tolist() == [0] * 4 + [-1] * 6


def test_nan_weights_go_first() -> None:
    ids = torch.zeros(3, 1, dtype=torch.int32)
    kept = apply_capacity(ids, torch.tensor([[math.nan], [0.1], [0.2]]), 1, capacity=2)
    assert kept.ids.flatten().tolist() == [-1, 0, 0]


def test_capacity_is_a_ceiling_and_checked() -> None:
    assert expert_capacity(10, 2, 8, 1.0) == 3 and expert_capacity(0, 2, 8, 1.5) == 0
    with pytest.raises(ValueError, match="capacity_factor must be positive, got 0"):
        expert_capacity(10, 2, 8, 0.0)
    with pytest.raises(ValueError, match="capacity_policy must be probs or position, got 'first'"):
        apply_capacity(torch.zeros(1, 1, dtype=torch.int32), torch.zeros(1, 1), 1, capacity=1, policy="first")


def test_capacity_compiles() -> None:
    ids, weights = torch.randint(0, 4, (16, 2), dtype=torch.int32), torch.rand(16, 2)
    compiled = torch.compile(apply_capacity, fullgraph=True, backend="aot_eager")
    for eager, other in zip(
        apply_capacity(ids, weights, 4, capacity=5), compiled(ids, weights, 4, capacity=5), strict=True
    ):
        assert torch.equal(eager, other)


@pytest.mark.parametrize(("num_tokens", "top_k", "num_experts"), [(0, 2, 4), (7, 3, 8), (16, 8, 8), (5, 1, 3)])
def test_uniform_ids_are_balanced_and_distinct(num_tokens: int, top_k: int, num_experts: int) -> None:
    ids = uniform_ids(num_tokens, top_k, num_experts)
    assert ids.shape == (num_tokens, top_k) and ids.dtype == torch.int32
    counts = torch.bincount(ids.flatten().long(), minlength=num_experts)
    assert counts.max() - counts.min() <= 1
    assert all(len(set(row)) == top_k for row in ids.tolist())
    assert torch.equal(ids[: num_tokens // 2], uniform_ids(num_tokens // 2, top_k, num_experts))
    with pytest.raises(ValueError, match="top_k must lie in"):
        uniform_ids(3, 5, 4)


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_copy_ids(dtype: torch.dtype) -> None:
    ids = torch.randint(-1, 100, (4, 3), dtype=torch.int32)
    buffer = torch.zeros(4, 3, dtype=dtype)
    assert copy_ids(ids, buffer, num_experts=100) is buffer
    assert torch.equal(buffer.int(), ids)
    torch.library.opcheck(torch.ops.moe_layer.copy_ids.default, (ids, buffer))
    compiled = torch.compile(lambda i, b: copy_ids(i, b, num_experts=100), fullgraph=True, backend="aot_eager")
    compiled(ids + 1, buffer)
    assert torch.equal(buffer.int(), ids + 1)


@pytest.mark.parametrize(
    ("kind", "message", "buffer"),
    [
        (TypeError, "int16, int32 or int64", torch.zeros(4, 3, dtype=torch.uint8)),
        (ValueError, "at most 32767", torch.zeros(4, 3, dtype=torch.int16)),
        (ValueError, "must have shape", torch.zeros(3, 4, dtype=torch.int32)),
        (ValueError, "must be contiguous", torch.zeros(3, 4, dtype=torch.int32).t()),
        (ValueError, "is on meta", torch.zeros(4, 3, dtype=torch.int32, device="meta")),
    ],
)
def test_copy_ids_refuses(kind: type[Exception], message: str, buffer: torch.Tensor) -> None:
    with pytest.raises(kind, match=message):
        copy_ids(torch.zeros(4, 3, dtype=torch.int32), buffer, num_experts=40000)
