"""Routing statistics that stay on the device until somebody logs them.

`RoutingStats` adds integers into one int64 tensor per layer; `read_stats` brings any number of layers to the host in a
single copy and returns frozen `RoutingReport`s. E experts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EVENT_NAMES = ("rows_replayed", "slots_replayed", "slots_missing", "duplicates", "out_of_range", "nonfinite_rows")
"""The first entries of `route_topk`'s events, in order."""
NUM_EVENTS = 8
NUM_EXTRA = NUM_EVENTS + 2
"""After the E loads: 8 events, dropped slots, calls."""


@dataclass(frozen=True)
class RoutingReport:
    """One layer's routing since the last report.

    Attributes:
        load: slots per expert. imbalance: max load / mean load (1.0 is balanced; 0.0 without tokens).
        entropy: entropy of the load over log E (1.0 is balanced). dead: experts without a slot.
        dropped: slots removed by capacity. nonfinite: rows with NaN or infinite logits.
        events: `EVENT_NAMES` -> count. calls: how often `add` ran.
    """

    load: tuple[int, ...]
    imbalance: float
    entropy: float
    dead: int
    dropped: int
    nonfinite: int
    events: Mapping[str, int]
    calls: int


class RoutingStats:
    """Device-side accumulator of one layer."""

    def __init__(self, num_experts: int, *, device: torch.device | str | None = None) -> None:
        self.num_experts = num_experts
        self.packed = torch.zeros(num_experts + NUM_EXTRA, dtype=torch.int64, device=device)

    @torch.no_grad()
    def add(self, counts_E: Tensor, *, events: Tensor | None = None, dropped: Tensor | None = None) -> None:
        """Add integer counts `[E]`, `route_topk`'s events `[8]` and a 0-d number of dropped slots; no host sync."""
        if counts_E.shape != (self.num_experts,):
            raise ValueError(f"counts must be [{self.num_experts}], got {tuple(counts_E.shape)}")
        self.packed[: self.num_experts] += counts_E
        if events is not None:
            self.packed[self.num_experts : self.num_experts + NUM_EVENTS] += events
        if dropped is not None:
            self.packed[-2] += dropped
        self.packed[-1] += 1


def read_stats(stats: Sequence[RoutingStats], *, reset: bool = True) -> list[RoutingReport]:
    """Reports of many layers with one device-to-host copy; `reset` starts the next interval."""
    if not stats:
        return []
    rows = torch.cat([layer.packed for layer in stats]).cpu().split([layer.packed.numel() for layer in stats])
    if reset:
        for layer in stats:
            layer.packed.zero_()
    return [
        make_report(row[: layer.num_experts], row[layer.num_experts :]) for layer, row in zip(stats, rows, strict=True)
    ]


def make_report(load_E: Tensor, extra: Tensor | None = None) -> RoutingReport:
    """Report from host tensors: loads `[E]` and, if given, the 8 events, dropped slots and calls."""
    load = tuple(int(value) for value in load_E.tolist())
    rest = [0] * NUM_EXTRA if extra is None else [int(value) for value in extra.tolist()]
    events = dict(zip(EVENT_NAMES, rest, strict=False))
    return RoutingReport(
        load=load,
        imbalance=imbalance(load),
        entropy=load_entropy(load),
        dead=sum(1 for value in load if value == 0),
        dropped=rest[-2],
        nonfinite=events["nonfinite_rows"],
        events=events,
        calls=rest[-1],
    )


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
