"""The bias update: direction, exact ties with the mean, zero mean, sum over ranks, counters reset."""

from __future__ import annotations

import pytest
import torch

from moe_layer import balance
from moe_layer.balance import update_expert_bias
from tests.unit.thread_group import ThreadGroup


def test_moves_against_the_load_and_resets_the_counter() -> None:
    bias, load = torch.tensor([0.5, 0.0, -0.5, 0.25]), torch.tensor([10, 2, 6, 6])
    update_expert_bias(bias, load, 0.125)
    assert bias.tolist() == [0.375, 0.125, -0.5, 0.25]
    assert load.tolist() == [0, 0, 0, 0]


def test_equal_load_never_drifts() -> None:
    """A mean in fp32 would miss 3 * 16777217 / 3; the comparison is in integers."""
    bias, load = torch.zeros(3), torch.full((3,), 16777217)
    update_expert_bias(bias, load, 0.001)
    assert not bias.any()
    bias, load = torch.zeros(3), torch.tensor([16777217, 16777217, 16777218])
    update_expert_bias(bias, load, 0.5)
    assert bias.tolist() == [0.5, 0.5, -0.5]


def test_no_tokens_and_zero_rate_leave_it_alone() -> None:
    bias = torch.tensor([0.5, -0.5])
    update_expert_bias(bias, torch.zeros(2, dtype=torch.int64), 0.1)
    update_expert_bias(bias, torch.tensor([4, 0]), 0.0)
    assert bias.tolist() == [0.5, -0.5]


def test_zero_mean() -> None:
    bias = torch.tensor([1.0, 0.0, 0.0, 0.0])
    update_expert_bias(bias, torch.tensor([9, 1, 1, 1]), 0.5, zero_mean=True)
    assert bias.sum() == 0 and bias.tolist() == [0.0, 0.0, 0.0, 0.0]


def test_sums_over_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank alone would move the other way; together expert 0 is the busy one on both."""
    loads = [torch.tensor([9, 0]), torch.tensor([1, 2])]
    biases = [torch.zeros(2), torch.zeros(2)]
    group = ThreadGroup(2)
    group.run(monkeypatch, balance, lambda r: update_expert_bias(biases[r], loads[r], 0.25, group=group))
    assert biases[0].tolist() == biases[1].tolist() == [-0.25, 0.25]
    assert group.calls == 1 and not loads[0].any() and not loads[1].any()


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="must be floating and int64"):
        update_expert_bias(torch.zeros(3), torch.zeros(2, dtype=torch.int64), 0.1)
    with pytest.raises(TypeError, match="must be int64"):
        update_expert_bias(torch.zeros(3), torch.zeros(3), 0.1)
