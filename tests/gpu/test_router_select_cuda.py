"""Selection in the lean router kernels where short cuts end: ties, one lane with the best, forced ids almost live.

Without a bias and groups the keys are the logits themselves: ids and counts equal the CPU's exactly in any dtype.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.ops import _ext
from moe_layer.ops.route_topk import RouteTopk, route_topk
from tests.gpu.router_cases import LOSSES

pytestmark = pytest.mark.gpu
# Tokens, experts, K: every layout of the kernels. From 8448 tokens on 8 lanes share a row of 256 experts (H200).
SHAPES = [
    (1031, 8, 2),
    (1031, 40, 5),
    (1031, 64, 8),
    (1031, 64, 16),
    (1031, 72, 3),
    (1031, 128, 8),
    (1031, 128, 16),
    (1031, 256, 8),
    (9001, 256, 8),
    (9001, 256, 16),
    (9001, 136, 13),
    (4501, 384, 8),
    (1031, 320, 16),
    (1031, 512, 10),
    (1031, 512, 1),
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    status = _ext.status()
    assert status.loaded, status.sentence()


def hard_logits(tokens: int, experts: int, dtype: torch.dtype, finite: bool) -> Tensor:
    """Rows with many ties, with the best experts side by side, far apart, equal, or not finite (then sums are NaN)."""
    generator = torch.Generator().manual_seed(7)
    x_TE = torch.randn(tokens, experts, generator=generator) * 2
    x_TE[1::4] = (x_TE[1::4] * 4).round() / 4
    first = torch.randint(0, experts // 8, (tokens,), generator=generator) * 8
    for row in range(2, tokens, 4):
        x_TE[row, first[row] : first[row] + 8] += 8
    x_TE[3::64] *= 1e3
    x_TE[4::64] = 1.5
    if not finite:
        x_TE[5::97, 3] = torch.nan
        x_TE[6::97, 1] = torch.inf
        x_TE[7::97, 2:5] = -torch.inf
    return x_TE.to(dtype)


def compare(logits: Tensor, options: dict[str, Any], **inputs: Any) -> RouteTopk:
    theirs = route_topk(logits, **options, **inputs)
    ours = route_topk(logits.cuda(), **options, **{name: value.cuda() for name, value in inputs.items()})
    for name in ("ids", "counts", "aux_counts", "events"):
        assert torch.equal(getattr(ours, name).cpu(), getattr(theirs, name)), name
    for name in ("weights", "score_sum", "z_sum"):
        torch.testing.assert_close(
            getattr(ours, name).cpu(), getattr(theirs, name), rtol=2e-5, atol=1e-7, equal_nan=True
        )
    return ours


@pytest.mark.parametrize("finite", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
def test_live(tokens: int, experts: int, top_k: int, dtype: torch.dtype, finite: bool) -> None:
    compare(hard_logits(tokens, experts, dtype, finite), {"top_k": top_k, **LOSSES})


@pytest.mark.parametrize(("aux_counts", "finite"), [("live", True), ("live", False), ("effective", True)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "experts", "top_k"), SHAPES)
def test_almost_live(tokens: int, experts: int, top_k: int, dtype: torch.dtype, aux_counts: str, finite: bool) -> None:
    """Forced ids that are the live ones in most rows; the counts of the aux loss stay those of the live ids."""
    logits = hard_logits(tokens, experts, dtype, finite)
    options = {"top_k": top_k, **LOSSES, "aux_counts": aux_counts}
    forced = route_topk(logits, **options).ids.clone()
    more = route_topk(logits, top_k=top_k + 4).ids
    forced[1::3] = forced[1::3].flip(1)  # another order is the same set
    for extra in range(4):  # the first ones that were not chosen
        forced[8 + extra :: 16, -1] = more[8 + extra :: 16, top_k + extra]
    forced[7::16, 0], forced[7::16, -1] = more[7::16, top_k], more[7::16, top_k + 2]
    generator = torch.Generator().manual_seed(8)
    others = torch.rand(tokens, experts, generator=generator).argsort(dim=1)[:, :top_k].int()
    forced[12::32] = others[12::32]
    whole = compare(logits, options, replay_ids=forced)
    assert torch.equal(whole.ids.cpu(), forced)
    forced[14::64, 0] = -1
    forced[15::128, top_k // 2] = experts + 3
    forced[16::256, -1] = forced[16::256, 0]
    compare(logits, options, replay_ids=forced.to(torch.int16))
