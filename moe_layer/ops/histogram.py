"""Tokens per expert. CUDA twin: csrc/histogram.cu.

Precision notes: integers only, so any order of additions gives the same bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.ops.kernels import load_kernels


def reference(ids: Tensor, num_experts: int) -> Tensor:
    """One pass without a host synchronisation: ids that do not count go to an extra bin that is cut off."""
    counted = (ids >= 0) & (ids < num_experts)
    bins = torch.where(counted, ids, num_experts).flatten()
    counts = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    return counts.index_add_(0, bins, torch.ones_like(bins))[:num_experts].clone()


@torch.library.custom_op("moe_layer::expert_histogram", mutates_args=())
def _expert_histogram(ids: Tensor, num_experts: int) -> Tensor:
    return reference(ids, num_experts)


@_expert_histogram.register_fake
def _(ids: Tensor, num_experts: int) -> Tensor:
    return ids.new_empty((num_experts,), dtype=torch.int32)


def expert_histogram(ids: Tensor, *, num_experts: int) -> Tensor:
    """Count how often each expert occurs.

    Args:
        ids: int32 of any shape; -1 marks a slot that is not routed. Ids outside `[0, num_experts)` are not counted: the
            router has reported them before they get here.
        num_experts: E, at least 1.

    Returns:
        int32 `[num_experts]` on the device of `ids`; not differentiable.

    Raises:
        TypeError: `ids` is not int32. ValueError: `num_experts` is not positive.
    """
    if ids.dtype != torch.int32:
        raise TypeError(f"ids must be int32, got {ids.dtype}; convert with .to(torch.int32)")
    if num_experts < 1:
        raise ValueError(f"num_experts must be at least 1, got {num_experts}")
    load_kernels(ids)
    return _expert_histogram(ids.contiguous(), num_experts)
