"""expert_histogram: the Python body here, the CUDA twin in tests/gpu/test_histogram.py."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moe_layer.ops.histogram import expert_histogram


def oracle(ids: list[int], num_experts: int) -> list[int]:
    return [sum(1 for i in ids if i == expert) for expert in range(num_experts)]


@given(
    num_experts=st.sampled_from([1, 2, 7, 64, 257]),
    ids=st.lists(st.integers(-3, 300), max_size=64),
)
def test_matches_a_literal_count(num_experts: int, ids: list[int]) -> None:
    counts_E = expert_histogram(torch.tensor(ids, dtype=torch.int32), num_experts=num_experts)
    assert counts_E.dtype == torch.int32
    assert counts_E.tolist() == oracle(ids, num_experts)


def test_any_shape_and_stride() -> None:
    ids_TK = torch.randint(-1, 5, (6, 8), dtype=torch.int32)
    expected = oracle(ids_TK[:, ::2].flatten().tolist(), 5)
    assert expert_histogram(ids_TK[:, ::2], num_experts=5).tolist() == expected
    assert expert_histogram(ids_TK[:, ::2].t(), num_experts=5).tolist() == expected


def test_empty_and_unrouted() -> None:
    assert expert_histogram(torch.empty(0, 4, dtype=torch.int32), num_experts=3).tolist() == [0, 0, 0]
    assert expert_histogram(torch.full((5, 2), -1, dtype=torch.int32), num_experts=3).tolist() == [0, 0, 0]


def test_opcheck_and_fullgraph() -> None:
    ids = torch.randint(-1, 9, (11, 3), dtype=torch.int32)
    torch.library.opcheck(torch.ops.moe_layer.expert_histogram.default, (ids, 9))
    compiled = torch.compile(lambda i: expert_histogram(i, num_experts=9) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), expert_histogram(ids, num_experts=9) * 2)


def test_errors_name_value_and_remedy() -> None:
    with pytest.raises(TypeError, match=r"ids must be int32, got torch.int64; convert with .to\(torch.int32\)"):
        expert_histogram(torch.zeros(3, dtype=torch.int64), num_experts=2)
    with pytest.raises(ValueError, match="num_experts must be at least 1, got 0"):
        expert_histogram(torch.zeros(3, dtype=torch.int32), num_experts=0)
