"""What `route_topk` returns."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

NUM_EVENTS = 8
"""Events, over valid rows: rows with a replayed slot, slots replayed, slots missing (-1), duplicates, slots out of
range, rows with a non-finite logit, 0, 0. The four slot counts add up to K * valid rows when ids are replayed."""


class RouteTopk(NamedTuple):
    """What `route_topk` returns; an output nobody asked for has zero elements.

    Shapes keep the leading dimensions of the logits (`[..., K]`, `[..., E]`).

    Attributes:
        weights: fp32 (fp64), 0 where the id is -1.
        ids: int32, -1 in rows that are not valid.
        counts: int32 [E], slots per expert over valid rows.
        aux_counts: int32 [S, E], per sequence, see `aux_counts` of `route_topk`.
        score_sum: fp32 (fp64) [S, E], sum over valid tokens of the scores normalised over all E.
        z_sum: fp32 (fp64) [1], sum over valid tokens of logsumexp(logits)^2.
        events: int32 [8], see `NUM_EVENTS`.
        probs: logits' dtype, the weights as a dense matrix.
        scores: fp32 (fp64), scores normalised over all E, 0 in rows that are not valid.
        map: bool [..., E], or uint8 [..., ceil(E/8)] with expert e at bit e%8 of byte e//8.
        losses: fp32 (fp64) [5], the entries of `batch_losses.SUMMARY`: unscaled losses and what a log keeps of them.
        scaled_losses: fp32 (fp64) [n], the losses there are (load balancing, then z) times their coefficients.
    """

    weights: Tensor
    ids: Tensor
    counts: Tensor
    aux_counts: Tensor
    score_sum: Tensor
    z_sum: Tensor
    events: Tensor
    probs: Tensor
    scores: Tensor
    map: Tensor
    losses: Tensor
    scaled_losses: Tensor
