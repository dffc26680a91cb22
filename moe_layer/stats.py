"""Names and numbers of routing statistics. E experts."""

from __future__ import annotations

import math
from collections.abc import Sequence

EVENT_NAMES = ("rows_replayed", "slots_replayed", "slots_missing", "duplicates", "out_of_range", "nonfinite_rows")
"""The first entries of `route_topk`'s events, in order."""


def imbalance(load: Sequence[int]) -> float:
    """Largest load over the mean load; 0.0 when nothing was routed."""
    total = sum(load)
    return max(load) * len(load) / total if total else 0.0


def load_entropy(load: Sequence[int]) -> float:
    """Entropy of the load distribution divided by log E; 1.0 for a single expert, 0.0 when nothing was routed."""
    total = sum(load)
    if not total:
        return 0.0
    if len(load) == 1:
        return 1.0
    shares = [value / total for value in load if value]
    return abs(sum(share * math.log(share) for share in shares)) / math.log(len(load))
