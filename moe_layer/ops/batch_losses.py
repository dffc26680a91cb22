"""`moe_layer::batch_losses`: the load-balancing and z losses of one rank's batch, from the sums of `route_topk`.

One launch forward and one backward on CUDA (csrc/router_losses.cu), where the formulas of `moe_layer/losses.py` as
tensor expressions take about twenty each. E experts, K top-k. Sums and losses are fp32 (fp64 for fp64 sums). With
n = counts.sum() / K valid tokens:

    aux = E * sum_e (aux_counts_e / aux_counts.sum()) * (score_sum_e / n),    z = z_sum / n

A group of ranks, several sequences and the `global` history are cases for `moe_layer/losses.py`, whose bits the
reference here has.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.kernels import load_kernels

SUMMARY = ("aux", "z", "micro_batches", "tokens", "dropped")


class BatchLosses(NamedTuple):
    """Attributes:
    summary: `[5]`, the entries of SUMMARY: unscaled losses (0 without one), 1, valid tokens, 0. Differentiable in
        its first two entries.
    scaled: `[n]`, the losses there are (aux, then z) times their coefficients.
    """

    summary: Tensor
    scaled: Tensor


@torch.library.custom_op(
    "moe_layer::batch_losses",
    mutates_args=(),
    schema="(Tensor counts, Tensor? aux_counts, Tensor? score_sum, Tensor? z_sum, *, int top_k, float aux_coeff,"
    " float z_coeff) -> (Tensor, Tensor)",
)
def _op(
    counts: Tensor,
    aux_counts: Tensor | None,
    score_sum: Tensor | None,
    z_sum: Tensor | None,
    *,
    top_k: int,
    aux_coeff: float,
    z_coeff: float,
) -> tuple[Tensor, Tensor]:
    wide = _wide(score_sum, z_sum)
    tokens = counts.sum(dtype=torch.int64) // top_k
    divisor = tokens.clamp(min=1).to(wide)
    zero = torch.zeros((), dtype=wide, device=counts.device)
    aux = z = zero
    scaled = []
    if aux_counts is not None and score_sum is not None:
        aux = (_share(aux_counts, wide) * (score_sum[0] / divisor)).sum() * aux_counts.shape[1]
        scaled.append(aux * aux_coeff)
    if z_sum is not None:
        z = z_sum[0] * (1 / divisor)
        scaled.append(z * z_coeff)
    return torch.stack((aux, z, zero + 1, tokens.to(wide), zero)), torch.stack(scaled)


def _share(aux_counts: Tensor, dtype: torch.dtype) -> Tensor:
    """[E] share of the slots."""
    slots_E = aux_counts[0].to(torch.int64)
    return slots_E.to(dtype) / slots_E.sum().clamp(min=1).to(dtype)


def _wide(score_sum: Tensor | None, z_sum: Tensor | None) -> torch.dtype:
    given = score_sum if score_sum is not None else z_sum
    assert given is not None  # batch_losses checks
    return given.dtype


@_op.register_fake
def _fake(
    counts: Tensor, aux_counts: Tensor | None, score_sum: Tensor | None, z_sum: Tensor | None, **_: Any
) -> tuple[Tensor, Tensor]:
    wide = _wide(score_sum, z_sum)
    number = (score_sum is not None) + (z_sum is not None)
    return counts.new_empty(len(SUMMARY), dtype=wide), counts.new_empty(number, dtype=wide)


@torch.library.custom_op(
    "moe_layer::batch_losses_bwd",
    mutates_args=(),
    schema="(Tensor? d_summary, Tensor? d_scaled, Tensor summary, Tensor? aux_counts, *, bool has_z, int top_k,"
    " float aux_coeff, float z_coeff) -> (Tensor, Tensor)",
)
def _bwd_op(
    d_summary: Tensor | None,
    d_scaled: Tensor | None,
    summary: Tensor,
    aux_counts: Tensor | None,
    *,
    has_z: bool,
    top_k: int,
    aux_coeff: float,
    z_coeff: float,
) -> tuple[Tensor, Tensor]:
    def gradient(index: int, position: int, coeff: float) -> Tensor:
        """Of unscaled loss `index`, which stands at `position` among the scaled ones."""
        parts = [] if d_scaled is None else [d_scaled[position] * coeff]
        if d_summary is not None:
            parts.append(d_summary[index])
        return sum(parts[1:], parts[0])

    tokens = summary[3].clamp(min=1)
    d_score_sum = d_z = summary.new_empty(0)
    if aux_counts is not None:  # the order of losses.py's own backward: the same bits
        share_E = _share(aux_counts, summary.dtype)
        d_score_sum = ((gradient(0, 0, aux_coeff) * share_E.shape[0]) * share_E / tokens)[None]
    if has_z:
        d_z = (gradient(1, 0 if aux_counts is None else 1, z_coeff) * (1 / tokens)).reshape(1)
    return d_score_sum, d_z


@_bwd_op.register_fake
def _bwd_fake(
    d_summary: Tensor | None,
    d_scaled: Tensor | None,
    summary: Tensor,
    aux_counts: Tensor | None,
    *,
    has_z: bool,
    **_: Any,
) -> tuple[Tensor, Tensor]:
    aux_shape = (0,) if aux_counts is None else tuple(aux_counts.shape)
    return summary.new_empty(aux_shape), summary.new_empty(1 if has_z else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    _, aux_counts, _, z_sum = inputs
    ctx.set_materialize_grads(False)
    ctx.options = {**keyword_only_inputs, "has_z": z_sum is not None}
    ctx.save_for_backward(output[0], aux_counts)


def _backward(ctx: Any, d_summary: Tensor | None, d_scaled: Tensor | None) -> tuple[Tensor | None, ...]:
    if d_summary is None and d_scaled is None:
        return (None,) * 4
    summary, aux_counts = ctx.saved_tensors
    backward = torch.ops.moe_layer.batch_losses_bwd
    d_score_sum, d_z = call_plain(backward, d_summary, d_scaled, summary, aux_counts, **ctx.options)
    return (None, None, None if aux_counts is None else d_score_sum, d_z if ctx.options["has_z"] else None)


_op.register_autograd(_backward, setup_context=_setup_context)


class _EagerDoor(torch.autograd.Function):
    """The op's autograd for eager mode, from the same functions; see `route_topk._EagerDoor` for why."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        output = call_plain(torch.ops.moe_layer.batch_losses, *inputs[:-1], **inputs[-1])
        _setup_context(ctx, inputs[:-1], inputs[-1], output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        return (*_backward(ctx, *grads), None)


def batch_losses(
    counts_E: Tensor,
    aux_counts_SE: Tensor | None = None,
    score_sum_SE: Tensor | None = None,
    z_sum: Tensor | None = None,
    *,
    top_k: int,
    aux_coeff: float = 1.0,
    z_coeff: float = 1.0,
) -> BatchLosses:
    """The losses of a batch and what a log keeps of them; differentiable in `score_sum_SE` and `z_sum`.

    Args:
        counts_E: int32 `[E]`, K slots for every valid token.
        aux_counts_SE, score_sum_SE: int32 and fp32 (fp64) `[1, E]`; both or none.
        z_sum: fp32 (fp64) `[1]`, or None.
        top_k: K.
        aux_coeff, z_coeff: coefficients.

    Raises:
        ValueError: shapes that do not fit, or neither loss asked for.
    """
    if (aux_counts_SE is None) != (score_sum_SE is None):
        raise ValueError("aux_counts and score_sum must be given together; pass both or neither")
    if score_sum_SE is None and z_sum is None:
        raise ValueError("batch_losses needs aux_counts with score_sum, or z_sum; got neither")
    shape = (1, *counts_E.shape)
    for name, tensor in (("aux_counts", aux_counts_SE), ("score_sum", score_sum_SE)):
        if tensor is not None and tensor.shape != shape:
            raise ValueError(f"{name} must have shape {shape} to fit the counts, got {tuple(tensor.shape)}")
    if z_sum is not None and z_sum.shape != (1,):
        raise ValueError(f"z_sum must be [1], got {tuple(z_sum.shape)}")
    options = {"top_k": top_k, "aux_coeff": float(aux_coeff), "z_coeff": float(z_coeff)}
    inputs = (counts_E, aux_counts_SE, score_sum_SE, z_sum)
    load_kernels(counts_E)
    if torch.compiler.is_compiling():
        return BatchLosses(*torch.ops.moe_layer.batch_losses(*inputs, **options))
    return BatchLosses(*_EagerDoor.apply(*inputs, options))
