"""Forced-uniform routing for benchmarks: ids that depend on the token index alone."""

from __future__ import annotations

import torch
from torch import Tensor


def uniform_ids(num_tokens: int, top_k: int, num_experts: int, device: torch.device | str | None = None) -> Tensor:
    """int32 [T, K]: slot k of token t goes to expert (t*K + k) mod E.

    Expert loads differ by at most one and a row's ids are distinct, because top_k <= num_experts.

    Raises:
        ValueError: `top_k` is not in 1..E.
    """
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in 1..{num_experts} (the number of experts), got {top_k}")
    slots = torch.arange(num_tokens * top_k, device=device, dtype=torch.int64) % num_experts
    return slots.to(torch.int32).view(num_tokens, top_k)
