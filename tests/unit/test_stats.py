"""Imbalance and entropy of known loads."""

from __future__ import annotations

import math

import pytest

from moe_layer.stats import imbalance, load_entropy


def test_a_known_load() -> None:
    load = [6, 2, 0, 0]
    want = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25)) / math.log(4)
    assert imbalance(load) == 3.0 and abs(load_entropy(load) - want) < 1e-12


@pytest.mark.parametrize(
    ("load", "worst", "entropy"), [([3, 3, 3], 1.0, 1.0), ([9, 0, 0], 3.0, 0.0), ([0, 0], 0.0, 0.0), ([5], 1.0, 1.0)]
)
def test_extremes(load: list[int], worst: float, entropy: float) -> None:
    assert imbalance(load) == worst and abs(load_entropy(load) - entropy) < 1e-12
