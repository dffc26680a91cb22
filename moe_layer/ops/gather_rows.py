"""`x[index]` with zero rows where the index is -1. No autograd: callers know the inverse map and give the gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.kernels import load_kernels


def gather_rows(x_CD: Tensor, index_N: Tensor) -> Tensor:
    """Args: `[C, D]` of any dtype; int32 or int64 `[N]` in `[-1, C)`. Returns `[N, D]`."""
    load_kernels(x_CD)
    return call_plain(torch.ops.moe_layer.gather_rows, x_CD, index_N)


@torch.library.custom_op("moe_layer::gather_rows", mutates_args=())
def _gather_rows(x: Tensor, index: Tensor) -> Tensor:
    if x.shape[0] == 0:
        return x.new_zeros(index.shape[0], x.shape[1])
    out = x.index_select(0, index.clamp_min(0))
    absent_N = index < 0
    if index.is_cuda or bool(absent_N.any()):
        out.masked_fill_(absent_N.unsqueeze(1), 0)
    return out


@_gather_rows.register_fake
def _(x, index):  # type: ignore[no-untyped-def]
    return x.new_empty(index.shape[0], x.shape[1])
