"""The finished losses of route_topk: the bits of batch_losses on its sums, forward and backward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.ops.batch_losses import batch_losses
from moe_layer.ops.route_topk import RouteTopk, route_topk

BOTH = {"aux_counts": "live", "want_z": True}


def finish(out: RouteTopk, top_k: int) -> tuple[Tensor, Tensor]:
    aux = (out.aux_counts, out.score_sum) if out.aux_counts.ndim == 2 else (None, None)
    z_sum = out.z_sum if out.z_sum.numel() else None
    return batch_losses(out.counts, *aux, z_sum, top_k=top_k, aux_coeff=0.02, z_coeff=0.003)


@pytest.mark.parametrize("wanted", [BOTH, {"aux_counts": "effective"}, {"want_z": True}], ids=["both", "aux", "z"])
@pytest.mark.parametrize("tokens", [0, 1, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_bits_of_batch_losses(tokens: int, dtype: torch.dtype, wanted: dict[str, Any]) -> None:
    logits = torch.randn(tokens, 12).to(dtype)
    valid = torch.rand(tokens) < 0.8
    given = {"top_k": 3, "score_function": "sigmoid", "valid": valid, **wanted}
    weights, summary = torch.randn(tokens, 3), torch.randn(5)
    results = []
    for fused in (True, False):
        leaf = logits.detach().requires_grad_()
        out = route_topk(leaf, loss_coeffs=(0.02, 0.003) if fused else None, **given)
        losses, scaled = (out.losses, out.scaled_losses) if fused else finish(out, 3)
        total = scaled.sum() + (losses * summary.to(losses)).sum() + (out.weights * weights).sum()
        results.append((losses, scaled, *torch.autograd.grad(total, leaf)))
    assert all(torch.equal(one, two) for one, two in zip(*results, strict=True))


def test_gradients_of_sums_and_losses_add_up() -> None:
    logits = torch.randn(6, 8, dtype=torch.float64, requires_grad=True)

    def everything(x: Tensor) -> tuple[Tensor, ...]:
        out = route_topk(x, top_k=2, loss_coeffs=(0.3, 0.7), **BOTH)
        return out.weights, out.score_sum, out.z_sum, out.losses[:2], out.scaled_losses

    assert torch.autograd.gradcheck(everything, logits)


def test_compiled_is_eager() -> None:
    logits = torch.randn(9, 8, requires_grad=True)

    def step(x: Tensor) -> tuple[Tensor, Tensor]:
        out = route_topk(x, top_k=2, loss_coeffs=(0.3, 0.7), **BOTH)
        return out.scaled_losses.sum() + out.weights.square().sum(), out.losses

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    (one, summary), (two, again) = step(logits), compiled(logits)
    assert torch.equal(one, two) and torch.equal(summary, again)
    assert torch.equal(torch.autograd.grad(one, logits)[0], torch.autograd.grad(two, logits)[0])


def test_nobody_asked() -> None:
    out = route_topk(torch.randn(4, 8), top_k=2, **BOTH)
    assert out.losses.numel() == out.scaled_losses.numel() == 0


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="loss_coeffs needs sums to finish"):
        route_topk(torch.randn(4, 8), top_k=2, loss_coeffs=(1.0, 1.0))
    with pytest.raises(ValueError, match="losses of one batch"):
        route_topk(torch.randn(4, 8), top_k=2, loss_coeffs=(1.0, 1.0), cu_seqlens=torch.tensor([0, 2, 4]), **BOTH)
