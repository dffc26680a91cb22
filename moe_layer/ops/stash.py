"""H between forward and backward in one byte an element: `experts.recompute: fp8_h`. No autograd.

Layout: uint8 `[N, C + 4 B]`, B = ceil(C / 128): e4m3 codes, then one fp32 scale per 128 columns (its bytes).

Precision: scale = largest finite magnitude of the block / 448 (at least 2^-126, so that a block of zeros stays zeros);
values are divided by it and rounded to nearest even, at most 2^-4 of an element or 2^-10 of the scale away. NaN and
infinities come back as NaN. Unpacking multiplies in fp32 and rounds to the wanted dtype.

N rows, C columns, B blocks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain

BLOCK = 128
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126


def packed_columns(columns: int) -> int:
    """Bytes of one packed row. C must be a multiple of 4, so that the scales are aligned."""
    return columns + 4 * (-(-columns // BLOCK))


def pack_fp8(h_NC: Tensor) -> Tensor:
    """Floating `[N, C]`, C a multiple of 4 -> uint8 `[N, C + 4 ceil(C / 128)]`."""
    return call_plain(torch.ops.moe_layer.pack_fp8, h_NC)


def unpack_fp8(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    """What `pack_fp8` was given, rounded: `[N, columns]` in `dtype` (float32, bfloat16 or float16)."""
    return call_plain(torch.ops.moe_layer.unpack_fp8, packed, columns, dtype)


@torch.library.custom_op("moe_layer::pack_fp8", mutates_args=())
def _pack_fp8(h: Tensor) -> Tensor:
    N, C = h.shape
    blocks = -(-C // BLOCK)
    h_NBC = torch.nn.functional.pad(h.float(), (0, blocks * BLOCK - C)).view(N, blocks, BLOCK)
    finite = h_NBC.isfinite()
    peak_NB1 = torch.where(finite, h_NBC.abs(), 0.0).amax(dim=2, keepdim=True)
    # By a tensor: CUDA multiplies by the reciprocal of a number, which may be another scale in the last bit.
    scale_NB1 = (peak_NB1 / peak_NB1.new_full((), E4M3_MAX)).clamp_min(SMALLEST_SCALE)
    codes = torch.where(finite, h_NBC / scale_NB1, torch.nan).to(torch.float8_e4m3fn).view(torch.uint8)
    scales = scale_NB1.view(N, blocks).contiguous().view(torch.uint8)
    return torch.cat((codes.view(N, blocks * BLOCK)[:, :C], scales), dim=1)


@_pack_fp8.register_fake
def _(h: Tensor) -> Tensor:
    return h.new_empty(h.shape[0], packed_columns(h.shape[1]), dtype=torch.uint8)


@torch.library.custom_op("moe_layer::unpack_fp8", mutates_args=())
def _unpack_fp8(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    values_NC = packed[:, :columns].contiguous().view(torch.float8_e4m3fn).float()
    scales_NB = packed[:, columns:].contiguous().view(torch.float32)
    return (values_NC * scales_NB.repeat_interleave(BLOCK, dim=1)[:, :columns]).to(dtype)


@_unpack_fp8.register_fake
def _(packed: Tensor, columns: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(packed.shape[0], columns, dtype=dtype)
