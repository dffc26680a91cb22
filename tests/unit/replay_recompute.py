"""Ways and orders of activation checkpointing under a replay, shared by the CPU and GPU tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_layer import RoutingSession

Runner = Callable[[Any, Tensor], Tensor]


def runners(session: RoutingSession) -> dict[str, Runner]:
    """Ways to checkpoint a block under an open replay."""

    def selective() -> Any:
        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if "route_topk" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    def nested(block: Any, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return checkpoint(session.bind(block), x, use_reentrant=True)

        return checkpoint(session.bind(inner), x, use_reentrant=True)

    return {
        "context_fn": lambda b, x: checkpoint(b, x, use_reentrant=False, context_fn=session.context_fn),
        "bind, non-reentrant": lambda b, x: checkpoint(session.bind(b), x, use_reentrant=False),
        "bind, reentrant": lambda b, x: checkpoint(session.bind(b), x, use_reentrant=True),
        "bind, nested reentrant": nested,
        "selective": lambda b, x: checkpoint(b, x, use_reentrant=False, context_fn=session.composed(selective)),
    }


ORDERS = {"F0 B0 F1 B1": "f0b0f1b1", "F0 F1 B0 B1": "f0f1b0b1", "F0 F1 B1 B0": "f0f1b1b0", "one loss": "f0f1s"}


KINDS = ("context_fn", "bind, non-reentrant", "bind, reentrant", "bind, nested reentrant", "selective")


def schedule(order: str, forward: Callable[[int], Tensor]) -> None:
    losses: dict[int, Tensor] = {}
    for step, which in zip(order[::2], order[1::2] + " ", strict=False):
        if step == "f":
            losses[int(which)] = forward(int(which))
        elif step == "b":
            losses.pop(int(which)).backward()
        else:
            torch.stack(list(losses.values())).sum().backward()
