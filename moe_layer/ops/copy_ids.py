"""`moe_layer::copy_ids`: write routing ids into a caller's int16, int32 or int64 buffer; not differentiable.

It is an op of its own because a custom op with autograd may not mutate its arguments.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.ops.kernels import load_kernels


@torch.library.custom_op("moe_layer::copy_ids", mutates_args=("out",), schema="(Tensor ids, Tensor(a!) out) -> ()")
def _op(ids: Tensor, out: Tensor) -> None:
    out.copy_(ids)


@_op.register_fake
def _fake(ids: Tensor, out: Tensor) -> None:
    return None


def check_id_buffer(out: Tensor, *, shape: tuple[int, ...], num_experts: int, device: torch.device) -> None:
    """Raise TypeError or ValueError unless `out` can take such ids; -1 must fit, so unsigned types cannot."""
    if out.dtype not in (torch.int16, torch.int32, torch.int64):
        raise TypeError(f"the id buffer must be int16, int32 or int64, got {out.dtype}")
    if out.dtype == torch.int16 and num_experts > 32767:
        raise ValueError(f"an int16 id buffer holds at most 32767 experts, got {num_experts}; use int32")
    if tuple(out.shape) != tuple(shape):
        raise ValueError(f"the id buffer must have shape {tuple(shape)}, got {tuple(out.shape)}")
    if not out.is_contiguous():
        raise ValueError(f"the id buffer must be contiguous, got strides {out.stride()}; pass a contiguous tensor")
    if out.device != device:
        raise ValueError(f"the id buffer is on {out.device} and the ids on {device}; move one of them")


def copy_ids(ids: Tensor, out: Tensor, *, num_experts: int) -> Tensor:
    """Copy integer `ids` `[..., K]` into `out` (same shape, contiguous, int16/int32/int64) and return `out`."""
    check_id_buffer(out, shape=tuple(ids.shape), num_experts=num_experts, device=ids.device)
    load_kernels(ids)
    torch.ops.moe_layer.copy_ids(ids, out)
    return out
