"""`moe_layer::count_pass_`: what one backward pass adds to a router's counters, in one launch. No autograd."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain

# Not a custom_op: its Python wrapper for mutated arguments costs more than the launch.
torch.library.define(
    "moe_layer::count_pass_",
    "(Tensor(a!)? tokens_per_expert, Tensor? counts, Tensor(b!)? log_sums, Tensor? log_values,"
    " Tensor? log_events, Tensor(c!)? aux_history, Tensor? aux_counts) -> ()",
)


@torch.library.impl("moe_layer::count_pass_", "default")
def _count_pass(
    tokens_per_expert: Tensor | None,
    counts: Tensor | None,
    log_sums: Tensor | None,
    log_values: Tensor | None,
    log_events: Tensor | None,
    aux_history: Tensor | None,
    aux_counts: Tensor | None,
) -> None:
    for counter, values in ((tokens_per_expert, counts), (aux_history, aux_counts)):
        if counter is not None and values is not None:
            counter.add_(values.reshape(counter.shape))
    if log_sums is not None and log_values is not None:
        first = log_values.numel()
        log_sums[:first].add_(log_values)
        if log_events is not None:
            log_sums[first:].add_(log_events[: log_sums.numel() - first])


@torch.library.register_fake("moe_layer::count_pass_")
def _(*_: Tensor | None) -> None:
    return None


def count_pass(
    *,
    tokens_per_expert: Tensor | None,
    counts: Tensor | None,
    log_sums: Tensor | None,
    log_values: Tensor | None,
    log_events: Tensor | None,
    aux_history: Tensor | None,
    aux_counts: Tensor | None,
) -> None:
    """Add to counters in place; a pair with a None in it is left out.

    Args:
        tokens_per_expert, aux_history: int64 `[E]`. counts, aux_counts: int32, as many entries.
        log_sums: fp32 `[n]`. log_values: fp32 `[v]`, added to its first v entries. log_events: int32, at least n - v
            entries, added to the rest.
    """
    op = torch.ops.moe_layer.count_pass_
    call_plain(op, tokens_per_expert, counts, log_sums, log_values, log_events, aux_history, aux_counts)
