"""batch_losses against the formulas of losses.py: the same bits, forward and backward."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_layer import losses
from moe_layer.ops.batch_losses import batch_losses


def sums(experts: int, top_k: int, tokens: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    ids = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k]
    counts = torch.bincount(ids.flatten(), minlength=experts).to(torch.int32)
    live = counts.flip(0)[None].contiguous()
    scores = torch.softmax(torch.randn(tokens, experts, dtype=dtype), dim=1).sum(dim=0, keepdim=True)
    z_sum = torch.randn(tokens, dtype=dtype).square().sum(dim=0, keepdim=True)
    return counts, live, scores.requires_grad_(), z_sum.requires_grad_()


@pytest.mark.parametrize("tokens", [0, 1, 77])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_bits_of_the_formulas(tokens: int, dtype: torch.dtype) -> None:
    counts, live, scores, z_sum = sums(12, 3, tokens, dtype)
    valid = torch.tensor([tokens])
    aux = losses.load_balancing_loss(live, scores, top_k=3, num_tokens=valid)
    z = losses.z_loss(z_sum, valid)
    wanted = torch.stack((aux * 0.02, z * 0.003))
    upstream = torch.randn(2, dtype=dtype)
    d_wanted = torch.autograd.grad(wanted, (scores, z_sum), upstream)
    ours = batch_losses(counts, live, scores, z_sum, top_k=3, aux_coeff=0.02, z_coeff=0.003)
    d_ours = torch.autograd.grad(ours.scaled, (scores, z_sum), upstream)
    assert torch.equal(ours.scaled, wanted)
    assert torch.equal(ours.summary, torch.stack((aux, z, aux * 0 + 1, valid[0].to(dtype), aux * 0)))
    assert all(torch.equal(one, two) for one, two in zip(d_ours, d_wanted, strict=True))


@pytest.mark.parametrize("which", ["aux", "z"])
def test_one_loss_alone(which: str) -> None:
    counts, live, scores, z_sum = sums(8, 2, 33)
    if which == "aux":
        ours = batch_losses(counts, live, scores, top_k=2, aux_coeff=0.5)
        wanted, leaf = losses.load_balancing_loss(live, scores, top_k=2) * 0.5, scores
    else:
        ours = batch_losses(counts, z_sum=z_sum, top_k=2, z_coeff=0.5)
        wanted, leaf = losses.z_loss(z_sum, 33) * 0.5, z_sum
    assert torch.equal(ours.scaled, wanted[None])
    one, two = (torch.autograd.grad(loss, leaf)[0] for loss in (ours.scaled.sum(), wanted))
    assert torch.equal(one, two)


def test_gradients_of_summary_and_scaled_add_up() -> None:
    counts, live, scores, z_sum = sums(8, 2, 33, torch.float64)

    def both(scores: Tensor, z_sum: Tensor) -> tuple[Tensor, Tensor]:
        ours = batch_losses(counts, live, scores, z_sum, top_k=2, aux_coeff=0.1, z_coeff=0.7)
        return ours.summary[:2], ours.scaled

    assert torch.autograd.gradcheck(both, (scores, z_sum))


def test_compiled_is_eager() -> None:
    counts, live, scores, z_sum = sums(8, 2, 33)

    def loss(scores: Tensor, z_sum: Tensor) -> Tensor:
        return batch_losses(counts, live, scores, z_sum, top_k=2, aux_coeff=0.1, z_coeff=0.7).scaled.sum()

    grads = [
        torch.autograd.grad(f(scores, z_sum), (scores, z_sum)) for f in (loss, torch.compile(loss, backend="aot_eager"))
    ]
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))


def test_bad_arguments() -> None:
    counts, live, scores, z_sum = sums(8, 2, 33)
    with pytest.raises(ValueError, match="given together"):
        batch_losses(counts, live, top_k=2)
    with pytest.raises(ValueError, match="got neither"):
        batch_losses(counts, top_k=2)
    with pytest.raises(ValueError, match="aux_counts must have shape"):
        batch_losses(counts, live[:, :4], scores, top_k=2)
    with pytest.raises(ValueError, match="z_sum must be"):
        batch_losses(counts, z_sum=z_sum.expand(2), top_k=2)


def test_opcheck() -> None:
    counts, live, scores, z_sum = sums(8, 2, 33)
    coefficients = {"top_k": 2, "aux_coeff": 0.1, "z_coeff": 0.7}
    opcheck = torch.library.opcheck
    opcheck(torch.ops.moe_layer.batch_losses.default, (counts, live, scores, z_sum), coefficients)
    opcheck(torch.ops.moe_layer.batch_losses.default, (counts, None, None, z_sum), coefficients)
    summary, scaled = torch.ops.moe_layer.batch_losses(counts, live, scores, z_sum, **coefficients)
    given = (torch.randn(5), torch.randn_like(scaled), summary.detach(), live)
    opcheck(torch.ops.moe_layer.batch_losses_bwd.default, given, coefficients | {"has_z": True})
