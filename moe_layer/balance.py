"""Auxiliary-loss-free balancing: nudge each expert's selection bias against its load."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


@torch.no_grad()
def update_expert_bias(
    expert_bias_E: Tensor,
    tokens_per_expert_E: Tensor,
    rate: float,
    zero_mean: bool = False,
    group: dist.ProcessGroup | None = None,
) -> None:
    """In place: bias += rate * sign(mean load - load); then the counter is zeroed. Call it once per optimizer step.

    Args:
        expert_bias_E: fp32 `[E]`.
        tokens_per_expert_E: int64 `[E]`, slots this rank routed since the last call; summed over the group.
        rate: step; 0 leaves the bias alone.
        zero_mean: subtract the mean of the bias afterwards.
        group: all data ranks; None means this rank alone.

    The comparison with the mean is made in integers (sum against E * count), so equal loads never drift.

    Raises:
        TypeError: the counter is not int64. ValueError: shapes or dtypes that do not fit.
    """
    if not expert_bias_E.is_floating_point() or expert_bias_E.shape != tokens_per_expert_E.shape:
        raise ValueError(
            f"expert_bias and tokens_per_expert must be floating and int64 [E], got {expert_bias_E.dtype} "
            f"{tuple(expert_bias_E.shape)} and {tuple(tokens_per_expert_E.shape)}"
        )
    if tokens_per_expert_E.dtype != torch.int64:
        raise TypeError(f"tokens_per_expert must be int64, got {tokens_per_expert_E.dtype}")
    load_E = tokens_per_expert_E.clone()
    if group is not None and dist.get_world_size(group) > 1:
        dist.all_reduce(load_E, group=group)
    direction_E = torch.sign(load_E.sum() - load_E * load_E.numel())
    expert_bias_E.add_(direction_E.to(expert_bias_E.dtype), alpha=rate)
    if zero_mean:
        expert_bias_E.sub_(expert_bias_E.mean())
    tokens_per_expert_E.zero_()
