"""RoutingStats: numbers of a known load, one copy for many layers, reset."""

from __future__ import annotations

import math

import pytest
import torch

from moe_layer.stats import RoutingStats, imbalance, load_entropy, make_report, read_stats


def test_report_of_a_known_load() -> None:
    report = make_report(torch.tensor([6, 2, 0, 0]))
    assert report.load == (6, 2, 0, 0) and report.dead == 2 and report.imbalance == 3.0
    want = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert abs(report.entropy - want) < 1e-12


@pytest.mark.parametrize(
    ("load", "worst", "entropy"), [([3, 3, 3], 1.0, 1.0), ([9, 0, 0], 3.0, 0.0), ([0, 0], 0.0, 0.0), ([5], 1.0, 1.0)]
)
def test_extremes(load: list[int], worst: float, entropy: float) -> None:
    assert imbalance(load) == worst and abs(load_entropy(load) - entropy) < 1e-12


def test_layers_accumulate_and_one_read_resets_them(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [RoutingStats(4), RoutingStats(6)]
    events = torch.tensor([1, 2, 3, 4, 5, 6, 0, 0], dtype=torch.int32)
    for _ in range(2):
        layers[0].add(torch.tensor([1, 2, 3, 4], dtype=torch.int32), events=events, dropped=torch.tensor(7))
    layers[1].add(torch.ones(6, dtype=torch.int32))
    copies = []
    original = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, "cpu", lambda self: copies.append(1) or original(self))
    first, second = read_stats(layers)
    assert len(copies) == 1
    assert first.load == (2, 4, 6, 8) and first.dropped == 14 and first.nonfinite == 12 and first.calls == 2
    assert first.events["rows_replayed"] == 2 and first.events["out_of_range"] == 10
    assert second.load == (1,) * 6 and second.dead == 0 and second.dropped == 0
    assert all(report.load == (0,) * len(report.load) for report in read_stats(layers))
    assert read_stats([]) == []
    with pytest.raises(ValueError, match=r"counts must be \[4\]"):
        layers[0].add(torch.ones(5, dtype=torch.int32))
