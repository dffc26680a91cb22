"""How far two traces of the same tokens are apart, on the CPU. N rows, L layers, K top-k."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from moe_layer.errors import TraceError
from moe_layer.replay.trace import RoutingTrace

CHUNK = 1 << 14
"""Rows that are looked at together."""
COUNTS = ("rows", "differs", "order", "zero", "tokens", "tokens_differ", "shared")


@dataclass(frozen=True)
class TraceDifference:
    """Rates over router calls that both traces have complete.

    Attributes:
        rows: router calls compared. mismatch: their sets of experts differ. order_only: equal sets in another order.
        token_mismatch: tokens with a differing layer. overlap: mean |A & B| / K. zero_overlap: calls that share no
            expert.
    """

    rows: int
    mismatch: float
    order_only: float
    token_mismatch: float
    overlap: float
    zero_overlap: float


def compare_traces(first: RoutingTrace, second: RoutingTrace) -> TraceDifference:
    """
    Raises:
        TraceError: traces of different models, or of different numbers of tokens.
    """
    if first.spec != second.spec or first.num_tokens != second.num_tokens:
        raise TraceError(
            f"cannot compare {first.num_tokens} rows of {len(first.spec.layers)} layers, "
            f"{first.spec.num_experts} experts, "
            f"top_k {first.spec.top_k} with {second.num_tokens} of {len(second.spec.layers)}, "
            f"{second.spec.num_experts}, "
            f"{second.spec.top_k}; both must be of one model and the same tokens"
        )
    return _difference(first, second)


def best_shift(first: RoutingTrace, second: RoutingTrace, *, reach: int = 2) -> int:
    """By how many tokens `second` must be moved to overlap most with `first`; 0 when it is aligned."""
    overlaps = {0: _difference(first, second).overlap}
    for by in range(1, min(reach, first.num_tokens - 1) + 1):
        overlaps[by] = _difference(first, second, by=by).overlap
        overlaps[-by] = _difference(first, second, by=-by).overlap
    return max(overlaps, key=lambda by: (overlaps[by], by == 0))


def _difference(first: RoutingTrace, second: RoutingTrace, *, by: int = 0) -> TraceDifference:
    """With `second` moved by so many tokens; chunk by chunk, so that mapped files stay on disk."""
    n, top_k = first.num_tokens - abs(by), first.spec.top_k
    sums = torch.zeros(len(COUNTS), dtype=torch.int64)
    for start in range(0, n, CHUNK):
        rows = range(start, min(start + CHUNK, n))
        a_NLK, b_NLK = (
            trace.wide_ids(rows.start + skip, rows.stop + skip)
            for trace, skip in ((first, max(by, 0)), (second, max(-by, 0)))
        )
        complete_NL = (a_NLK >= 0).all(2) & (b_NLK >= 0).all(2)
        shared_NL = torch.stack([(a_NLK == b_NLK.roll(k, 2)).sum(2) for k in range(top_k)]).sum(0)  # ids are distinct
        differs_NL = complete_NL & (shared_NL < top_k)
        order_NL = complete_NL & (shared_NL == top_k) & (a_NLK != b_NLK).any(2)
        zero_NL = complete_NL & (shared_NL == 0)
        counts = (complete_NL, differs_NL, order_NL, zero_NL, complete_NL.any(1), differs_NL.any(1))
        sums += torch.stack([*(count.sum() for count in counts), torch.where(complete_NL, shared_NL, 0).sum()])
    total = dict(zip(COUNTS, sums.tolist(), strict=True))
    rows_compared = max(1, total["rows"])
    return TraceDifference(
        rows=total["rows"],
        mismatch=total["differs"] / rows_compared,
        order_only=total["order"] / rows_compared,
        token_mismatch=total["tokens_differ"] / max(1, total["tokens"]),
        overlap=total["shared"] / (rows_compared * top_k),
        zero_overlap=total["zero"] / rows_compared,
    )
