"""How far two traces of the same tokens are apart, on the CPU. N rows, L layers, K top-k."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.trace import RoutingTrace


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
    return _difference(first.wide_ids(), second.wide_ids())


def best_shift(first: RoutingTrace, second: RoutingTrace, *, reach: int = 2) -> int:
    """By how many tokens `second` must be moved to overlap most with `first`; 0 when it is aligned."""
    a, b, n = first.wide_ids(), second.wide_ids(), first.num_tokens
    overlaps = {0: _difference(a, b).overlap}
    for by in range(1, min(reach, n - 1) + 1):
        overlaps[by] = _difference(a[by:], b[: n - by]).overlap
        overlaps[-by] = _difference(a[: n - by], b[by:]).overlap
    return max(overlaps, key=lambda by: (overlaps[by], by == 0))


def _difference(a_NLK: Tensor, b_NLK: Tensor) -> TraceDifference:
    complete_NL = (a_NLK >= 0).all(2) & (b_NLK >= 0).all(2)
    shared_NL = (a_NLK.unsqueeze(3) == b_NLK.unsqueeze(2)).any(3).sum(2)
    top_k = a_NLK.shape[2]
    rows = int(complete_NL.sum())
    differs_NL = complete_NL & (shared_NL < top_k)
    order_NL = complete_NL & (shared_NL == top_k) & (a_NLK != b_NLK).any(2)
    tokens = complete_NL.any(1)

    def share(mask: Tensor) -> float:
        return int(mask.sum()) / max(1, rows)

    return TraceDifference(
        rows=rows,
        mismatch=share(differs_NL),
        order_only=share(order_NL),
        token_mismatch=int(differs_NL.any(1).sum()) / max(1, int(tokens.sum())),
        overlap=float(torch.where(complete_NL, shared_NL, 0).sum()) / max(1, rows * top_k),
        zero_overlap=share(complete_NL & (shared_NL == 0)),
    )
