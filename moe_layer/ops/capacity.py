"""Capacity by factor: slots above an expert's capacity get id -1 and weight 0; nothing is renormalised.

T tokens, K top-k, E experts. Plain differentiable tensor code, no reads of device memory. Order among equal weights:
lower token index first, then lower slot, so the same tokens survive everywhere.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Capped(NamedTuple):
    """ids `[T, K]` with -1 in dropped slots, weights `[T, K]` with 0 there, counts int32 `[E]` of the slots left."""

    ids: Tensor
    weights: Tensor
    counts: Tensor


def expert_capacity(num_tokens: int, top_k: int, num_experts: int, factor: float) -> int:
    """ceil(T*K/E * factor): slots one expert accepts from this rank.

    Raises:
        ValueError: `factor` is not positive.
    """
    if not factor > 0:
        raise ValueError(f"capacity_factor must be positive, got {factor}; None switches capacity off")
    return math.ceil(num_tokens * top_k / num_experts * factor)


def apply_capacity(
    ids_TK: Tensor, weights_TK: Tensor, num_experts: int, *, capacity: int, policy: str = "probs"
) -> Capped:
    """Drop the slots of each expert beyond its capacity.

    Args:
        ids_TK: integer `[T, K]`, -1 = not routed.
        weights_TK: floating `[T, K]`; gradients pass through the slots that stay.
        num_experts: E.
        capacity: slots an expert accepts, see `expert_capacity`.
        policy: "probs" keeps an expert's highest weights (NaN counts as lowest), "position" its lowest token indices.

    Raises:
        ValueError: another policy.
    """
    if policy not in ("probs", "position"):
        raise ValueError(f"capacity_policy must be probs or position, got {policy!r}")
    num_tokens, top_k = ids_TK.shape
    expert_N = torch.where(ids_TK >= 0, ids_TK, num_experts).flatten().to(torch.int64)
    if policy == "probs":
        weight_N = weights_TK.detach().flatten()
        weight_N = torch.where(torch.isnan(weight_N), -torch.inf, weight_N)
        by_weight_N = torch.sort(weight_N, descending=True, stable=True).indices
        sorted_N, inner_N = torch.sort(expert_N[by_weight_N], stable=True)
        order_N = by_weight_N[inner_N]
    else:
        sorted_N, order_N = torch.sort(expert_N, stable=True)
    experts = torch.arange(num_experts + 1, device=ids_TK.device)
    first_E = torch.searchsorted(sorted_N, experts)
    rank_N = torch.arange(expert_N.numel(), device=ids_TK.device) - first_E[sorted_N]
    keep_N = torch.zeros_like(expert_N, dtype=torch.bool).scatter(0, order_N, rank_N < capacity)
    keep_TK = keep_N.view(num_tokens, top_k) & (ids_TK >= 0)
    counts_E = torch.diff(first_E).clamp(max=capacity)
    return Capped(torch.where(keep_TK, ids_TK, -1), torch.where(keep_TK, weights_TK, 0.0), counts_E.to(torch.int32))
