"""pack_fp8 and unpack_fp8: one byte an element, scales, special values."""

from __future__ import annotations

import pytest
import torch

from moe_layer.ops.stash import pack_fp8, packed_columns, unpack_fp8


@pytest.mark.parametrize("columns", [4, 128, 132, 384])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_error_is_that_of_e4m3_with_a_scale_per_block(columns: int, dtype: torch.dtype) -> None:
    torch.manual_seed(columns)
    h = (torch.randn(9, columns) * 10 ** torch.randn(9, 1)).to(dtype)
    packed = pack_fp8(h)
    assert packed.dtype == torch.uint8 and packed.shape == (9, packed_columns(columns))
    back = unpack_fp8(packed, columns, torch.float32)
    for start in range(0, columns, 128):
        block, found = h[:, start : start + 128].float(), back[:, start : start + 128]
        scale = block.abs().amax(1, keepdim=True) / 448
        assert ((found - block).abs() <= block.abs() * 2**-4 + scale * 2**-10).all()


def test_zeros_stay_zeros_and_what_is_not_finite_becomes_nan() -> None:
    h = torch.zeros(3, 256)
    h[1, 5], h[1, 6], h[2, 200] = float("inf"), 3.0, float("nan")
    back = unpack_fp8(pack_fp8(h), 256, torch.float32)
    assert not back[0].any() and back[1, 5].isnan() and back[1, 6] == 3.0 and back[2, 200].isnan()
    assert int(back.isnan().sum()) == 2


def test_opcheck() -> None:
    h = torch.randn(3, 8, dtype=torch.bfloat16)
    torch.library.opcheck(torch.ops.moe_layer.pack_fp8.default, (h,))
    torch.library.opcheck(torch.ops.moe_layer.unpack_fp8.default, (pack_fp8(h), 8, torch.bfloat16))
