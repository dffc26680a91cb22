"""Rows as e4m3 values with one fp32 scale per 128 columns (the last block may be shorter).

Precision: scale = largest finite magnitude of the block / 448 (at least 2^-126); values are divided by it and rounded
to nearest even. NaN and infinities become NaN in their place. Decoding multiplies in fp32 and rounds to the dtype.

Shape letters: T rows, D hidden, B blocks of 128 columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 128
E4M3_MAX = 448.0
SMALLEST_SCALE = 2.0**-126  # the smallest normal fp32: below it quotients would lose their precision


def fp8_encode(x_TD: Tensor) -> list[Tensor]:
    """uint8 `[T, D]` (e4m3fn bits) and fp32 scales `[T, B]`."""
    x_TBC = _blocks(x_TD.float())
    finite_TBC = x_TBC.isfinite()
    peak_TB1 = torch.where(finite_TBC, x_TBC.abs(), 0.0).amax(dim=2, keepdim=True)
    # By a tensor: CUDA multiplies by the reciprocal of a number, which may be another scale in the last bit.
    scale_TB1 = (peak_TB1 / peak_TB1.new_full((), E4M3_MAX)).clamp_min(SMALLEST_SCALE)
    values_TBC = torch.where(finite_TBC, x_TBC / scale_TB1, torch.nan).to(torch.float8_e4m3fn)
    values_TD = values_TBC.flatten(1)[:, : x_TD.shape[1]].contiguous()
    return [values_TD.view(torch.uint8), scale_TB1.squeeze(2)]


def fp8_decode(values_TD: Tensor, scale_TB: Tensor, *, dtype: torch.dtype) -> Tensor:
    """Rows `[T, D]` in `dtype`."""
    rows_TBC = _blocks(values_TD.view(torch.float8_e4m3fn).float()) * scale_TB.unsqueeze(2)
    return rows_TBC.flatten(1)[:, : values_TD.shape[1]].to(dtype)


def _blocks(x_TD: Tensor) -> Tensor:
    """`[T, B, 128]`, a short last block filled up with zeros."""
    short = -x_TD.shape[1] % BLOCK
    return (torch.nn.functional.pad(x_TD, (0, short)) if short else x_TD).unflatten(1, (-1, BLOCK))
