"""`DispatchPlan`: what this rank's ids determine, before any communication."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moe_layer.errors import ConfigError, RoutingError
from moe_layer.ops.cast import cast
from moe_layer.ops.dispatch_plan import dispatch_plan
from moe_layer.types import DispatchPlan


def make_plan(ids_TK: Tensor, *, num_experts: int, num_ranks: int) -> DispatchPlan:
    """Plan for ids in `[-1, num_experts)`.

    Raises:
        RoutingError: wrong shape or dtype.
        ConfigError: `num_ranks` does not divide `num_experts`.
    """
    if ids_TK.ndim != 2 or ids_TK.dtype not in (torch.int16, torch.int32, torch.int64):
        raise RoutingError(f"ids must be an integer [T, K] tensor, got {ids_TK.dtype} {tuple(ids_TK.shape)}")
    check_divisible(num_experts, num_ranks)
    ids_TK = cast(ids_TK, torch.int32)
    make = partial(dispatch_plan, ids_TK, num_experts=num_experts, num_ranks=num_ranks)
    return DispatchPlan(ids_TK, num_experts, num_ranks, make)


def check_sizes(num_experts: int, top_k: int) -> None:
    """Raise ConfigError unless a token can have `top_k` different experts."""
    if num_experts < 1 or not 1 <= top_k <= num_experts:
        raise ConfigError(
            f"num_experts is {num_experts} and top_k {top_k}; there must be experts, and top_k from 1 to their number"
        )


def check_divisible(num_experts: int, num_ranks: int) -> None:
    """Raise ConfigError, naming sizes that work, unless the experts split evenly over the ranks."""
    if num_experts % num_ranks:
        fitting = [str(n) for n in range(1, num_experts + 1) if num_experts % n == 0]
        shown = ", ".join(fitting[:8]) + (", ..." if len(fitting) > 8 else "")
        raise ConfigError(f"num_experts ({num_experts}) must be divisible by parallel.ep ({num_ranks}); try {shown}")
