"""`moe_layer::attach_losses`: the identity on the routing weights that carries losses and counters into the backward.

A layer returns only y, so its auxiliary losses reach the optimizer through the graph of y: in backward this op sends
`scale` to every attached loss. The same backward adds the routed counts to the layer's counters, because a backward runs
exactly once per use, whatever recomputes the forward: reentrant checkpointing (first forward without grad), non-reentrant
checkpointing (recomputed forward whose nodes are never run backward), no_grad and evaluation all count right.

Letters: T tokens, K top-k, E experts, n losses. `scale` and the counters are read and written when the backward runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


@torch.library.custom_op(
    "moe_layer::attach_losses",
    mutates_args=(),
    schema="(Tensor weights, Tensor losses, Tensor scale, Tensor counts, Tensor? tokens_per_expert,"
    " Tensor? aux_counts, Tensor? aux_history) -> Tensor",
)
def _op(
    weights: Tensor,
    losses: Tensor,
    scale: Tensor,
    counts: Tensor,
    tokens_per_expert: Tensor | None,
    aux_counts: Tensor | None,
    aux_history: Tensor | None,
) -> Tensor:
    return weights.clone()  # an operator may not return its own input


@_op.register_fake
def _fake(weights: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(weights)


@torch.library.custom_op(
    "moe_layer::add_counts_", mutates_args=("counter",), schema="(Tensor(a!) counter, Tensor counts) -> ()"
)
def _add_counts(counter: Tensor, counts: Tensor) -> None:
    counter.add_(counts.reshape(counter.shape))


@_add_counts.register_fake
def _add_counts_fake(counter: Tensor, counts: Tensor) -> None:
    return None


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, losses, scale, counts, tokens_per_expert, aux_counts, aux_history = inputs
    ctx.set_materialize_grads(False)
    # Plain attributes, not save_for_backward: counters and scale change between this forward and its backward by design,
    # which autograd's version check would report as an error.
    ctx.scale, ctx.counters = scale, ((tokens_per_expert, counts), (aux_history, aux_counts))
    ctx.losses_shape, ctx.losses_dtype = losses.shape, losses.dtype


def _backward(ctx: Any, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    for counter, counts in ctx.counters:
        if counter is not None and counts is not None:
            torch.ops.moe_layer.add_counts_(counter, counts)
    d_losses = None
    if ctx.needs_input_grad[1]:
        d_losses = ctx.scale.to(ctx.losses_dtype).expand(ctx.losses_shape)
    return (d_weights, d_losses, None, None, None, None, None)


_op.register_autograd(_backward, setup_context=_setup_context)


def attach_losses(
    weights_TK: Tensor,
    losses: Tensor,
    scale: Tensor,
    counts_E: Tensor,
    tokens_per_expert: Tensor | None,
    *,
    aux_counts: Tensor | None = None,
    aux_history: Tensor | None = None,
) -> Tensor:
    """Return `weights_TK`; its backward adds `scale` to each loss's gradient and the counts to the counters, once.

    Args:
        weights_TK: floating `[T, K]`.
        losses: floating `[n]` (n may be 0), each already multiplied by its coefficient.
        scale: 0-d fp32; gradient given to every loss (loss scaling, accumulation).
        counts_E: integer `[E]`, added to `tokens_per_expert`.
        tokens_per_expert: int64 `[E]` buffer, or None to count nothing.
        aux_counts, aux_history: the same for the counts the `global` auxiliary loss remembers.

    Raises:
        ValueError: shapes that do not fit. TypeError: counters that are not int64, or counts that are not integers.
    """
    if scale.ndim != 0:
        raise ValueError(f"scale must be a 0-d tensor, got shape {tuple(scale.shape)}")
    if losses.ndim != 1:
        raise ValueError(f"losses must be [n], got shape {tuple(losses.shape)}; stack 0-d losses with torch.stack")
    for name, counter, counts in (
        ("tokens_per_expert", tokens_per_expert, counts_E),
        ("aux_history", aux_history, aux_counts),
    ):
        if counter is None or counts is None:
            continue
        if counter.dtype != torch.int64 or counts.is_floating_point():
            raise TypeError(f"{name} must be int64 and its counts an integer tensor, got {counter.dtype}, {counts.dtype}")
        if counter.numel() != counts.numel():
            raise ValueError(f"{name} has {counter.numel()} entries and its counts {counts.numel()}")
    if not torch.is_grad_enabled():
        return weights_TK
    return torch.ops.moe_layer.attach_losses(
        weights_TK, losses, scale, counts_E, tokens_per_expert, aux_counts, aux_history
    )
