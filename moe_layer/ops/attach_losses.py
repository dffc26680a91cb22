"""`moe_layer::attach_losses`: the identity on the routing weights that carries losses and counters into the backward.

A layer returns only y, so its auxiliary losses reach the optimizer through the graph of y: in backward this op sends
`scale` to every attached loss. The same backward adds the routed counts to the layer's counters, because a backward
runs exactly once per use, whatever recomputes the forward: reentrant checkpointing (first forward without grad),
non-reentrant checkpointing (the recomputed nodes never run backward) and no_grad all count right.

T tokens, K top-k, E experts, n losses. `scale` and the counters are read and written when the backward runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.ops.count_pass import count_pass


@torch.library.custom_op(
    "moe_layer::attach_losses",
    mutates_args=(),
    schema="(Tensor weights, Tensor? losses, Tensor scale, Tensor? counts, Tensor? tokens_per_expert,"
    " Tensor? log_values, Tensor? log_sums, Tensor? aux_counts, Tensor? aux_history) -> Tensor",
)
def _op(
    weights: Tensor,
    losses: Tensor | None,
    scale: Tensor,
    counts: Tensor | None,
    tokens_per_expert: Tensor | None,
    log_values: Tensor | None,
    log_sums: Tensor | None,
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


@torch.library.custom_op("moe_layer::with_history", mutates_args=(), schema="(Tensor counts, Tensor history) -> Tensor")
def _with_history_op(counts: Tensor, history: Tensor) -> Tensor:
    return counts + history


@_with_history_op.register_fake
def _with_history_fake(counts: Tensor, history: Tensor) -> Tensor:
    return torch.empty_like(counts)


def with_history(counts_E: Tensor, history_E: Tensor) -> Tensor:
    """int64 `[E]` counts plus those of earlier passes, which the backward of `attach_losses` will change.

    An op of its own under torch.compile: inductor moves a plain addition into the kernel that uses it, and where the
    forward is recomputed that kernel runs after the change (torch 2.13).
    """
    if torch.compiler.is_compiling():
        return torch.ops.moe_layer.with_history(counts_E, history_E)
    return counts_E + history_E


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    _, losses, scale, counts, tokens_per_expert, log_values, log_sums, aux_counts, aux_history = inputs
    ctx.set_materialize_grads(False)
    # Plain attributes, not save_for_backward: counters and scale change between this forward and its backward by
    # design, which autograd's version check would report as an error.
    ctx.scale = scale
    ctx.counters = ((tokens_per_expert, counts), (log_sums, log_values), (aux_history, aux_counts))
    ctx.log_events = None
    ctx.losses_like = None if losses is None else (losses.shape, losses.dtype)


def _count(ctx: Any) -> None:
    if torch.compiler.is_compiling():
        for counter, counts in ctx.counters:
            if counter is not None and counts is not None:
                torch.ops.moe_layer.add_counts_(counter, counts)
        return
    (tokens_per_expert, counts), (log_sums, log_values), (aux_history, aux_counts) = ctx.counters
    count_pass(
        tokens_per_expert=tokens_per_expert,
        counts=counts,
        log_sums=log_sums,
        log_values=log_values,
        log_events=ctx.log_events,
        aux_history=aux_history,
        aux_counts=aux_counts,
    )


def _backward(ctx: Any, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
    _count(ctx)
    return (d_weights, _d_losses(ctx), *[None] * 7)


def _d_losses(ctx: Any) -> Tensor | None:
    """`scale` for each loss, where the second input, the losses, wants a gradient."""
    if not ctx.needs_input_grad[1]:
        return None
    shape, dtype = ctx.losses_like
    return ctx.scale.to(dtype).expand(shape)


_op.register_autograd(_backward, setup_context=_setup_context)


class _EagerDoor(torch.autograd.Function):
    """The op's autograd for eager mode, from the same functions; see `route_topk._EagerDoor` for why.

    `others`: the op's other arguments, which take no part in autograd; in one tuple, as each costs the host a little.
    """

    @staticmethod
    def forward(
        ctx: Any, weights: Tensor, losses: Tensor | None, others: tuple[Tensor | None, ...], log_events: tuple[Any]
    ) -> Tensor:
        output = weights.view_as(weights)
        _setup_context(ctx, (weights, losses, *others), output)
        (ctx.log_events,) = log_events
        return output

    @staticmethod
    def backward(ctx: Any, d_weights: Tensor | None) -> tuple[Tensor | None, ...]:
        _count(ctx)
        return d_weights, _d_losses(ctx), None, None


def attach_losses(
    weights_TK: Tensor,
    losses: Tensor | None,
    scale: Tensor,
    counts: Tensor | None = None,
    tokens_per_expert: Tensor | None = None,
    *,
    log_values: Tensor | None = None,
    log_sums: Tensor | None = None,
    log_events: Tensor | None = None,
    aux_counts: Tensor | None = None,
    aux_history: Tensor | None = None,
) -> Tensor:
    """Return `weights_TK`; its backward adds `scale` to each loss's gradient and the counts to the counters, once.

    Args:
        weights_TK: floating `[T, K]`.
        losses: floating `[n]`, each already multiplied by its coefficient; None for none.
        scale: 0-d fp32; gradient given to every loss (loss scaling, accumulation).
        counts: integer `[E]`, added to `tokens_per_expert`, an int64 `[E]` buffer. None counts nothing.
        log_values: fp32, added to `log_sums`, an fp32 buffer (sums to log): to all of it, or with `log_events` (int32;
            eager only) to its first entries, and the events to the rest.
        aux_counts: integer `[1, E]`, added to `aux_history`, what the `global` auxiliary loss remembers.

    Raises:
        ValueError: shapes that do not fit. TypeError: a counter that is not int64, or counts that are not integers.

    Under torch.compile two forwards before the first backward are refused by autograd ("modified by an inplace
    operation"), because the compiled graph saves the counters; eager accepts any order.
    """
    if scale.ndim != 0:
        raise ValueError(f"scale must be a 0-d tensor, got shape {tuple(scale.shape)}")
    if losses is not None and losses.ndim != 1:
        raise ValueError(f"losses must be [n], got shape {tuple(losses.shape)}; stack 0-d losses with torch.stack")
    _check_counter("tokens_per_expert", tokens_per_expert, counts, integer=True)
    _check_counter("aux_history", aux_history, aux_counts, integer=True)
    if log_events is None:
        _check_counter("log_sums", log_sums, log_values, integer=False)
    if not torch.is_grad_enabled():
        return weights_TK
    if log_values is not None:
        log_values = log_values.detach()
    others = (scale, counts, tokens_per_expert, log_values, log_sums, aux_counts, aux_history)
    if torch.compiler.is_compiling():
        return torch.ops.moe_layer.attach_losses(weights_TK, losses, *others)
    return _EagerDoor.apply(weights_TK, losses, others, (log_events,))


def _check_counter(name: str, counter: Tensor | None, values: Tensor | None, *, integer: bool) -> None:
    if counter is None or values is None:
        return
    if integer and (counter.dtype != torch.int64 or values.is_floating_point()):
        raise TypeError(
            f"{name} must be int64 and what is added to it integers, got {counter.dtype} and {values.dtype}"
        )
    if counter.numel() != values.numel():
        raise ValueError(f"{name} has {counter.numel()} entries and what is added to it {values.numel()}")
