"""Names and numbers of routing statistics. E experts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache

import torch
from torch import Tensor

EVENT_NAMES = ("rows_replayed", "slots_replayed", "slots_missing", "duplicates", "out_of_range", "nonfinite_rows")
"""The first entries of `route_topk`'s events, in order."""
LOG_NAMES = ("aux", "z", "micro_batches", "tokens", "dropped", *EVENT_NAMES)
"""What `collect_stats` sums over the backward passes: unscaled losses, passes, valid tokens, dropped slots, events."""


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


def log_values(
    unscaled: dict[str, Tensor], num_valid_S: Tensor, dropped: Tensor | None, events: Tensor
) -> tuple[Tensor, Tensor | None]:
    """fp32 sums in the order of LOG_NAMES and the events that follow them (None under torch.compile: they are in the
    first)."""
    zero = torch.zeros((), device=events.device)
    head = [
        unscaled.get("aux", zero),
        unscaled.get("z", zero),
        zero + 1,
        num_valid_S.sum(),
        zero if dropped is None else dropped,
    ]
    return with_events(torch.stack([value.detach().to(torch.float32) for value in head]), events)


def with_events(values: Tensor, events: Tensor) -> tuple[Tensor, Tensor | None]:
    """Head of the log and events: apart in eager mode, in one tensor under torch.compile."""
    if torch.compiler.is_compiling():
        return torch.cat((values.detach(), events[: len(EVENT_NAMES)].to(torch.float32))), None
    return values, events


@lru_cache(maxsize=64)
def quiet_head(tokens: int, device: torch.device) -> Tensor:
    """aux, z, micro_batches, tokens, dropped of a pass without losses; a copy from the host would synchronise."""
    head = torch.zeros(5, device=device)
    head[2].fill_(1.0)
    head[3].fill_(float(tokens))
    return head
