"""The seam between a router and whoever watches or steers it.

A router has one attribute, `routing_tap`, None unless a session is attached. Before it selects it asks the tap for a
decision, afterwards it shows the tap what it did. Copies of a model start without a tap: a session belongs to one
model.

T tokens, E experts, K top-k.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_layer.types import RoutingDecision


@dataclass(frozen=True)
class Routed:
    """What a router decided, before capacity.

    Attributes:
        ids_TK: int32, -1 in rows that are not valid. weights_TK: fp32. logits_TE: of the gate. valid_T: bool or None.
        events: int32 [8], see `moe_layer.ops.route_topk`. live: what the router would have chosen by itself, `[T, K]`.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor
    valid_T: Tensor | None
    events: Tensor
    live: Callable[[], Tensor]


class RoutingTap(Protocol):
    def before(
        self, replay: RoutingDecision | None, *, num_tokens: int, device: torch.device
    ) -> RoutingDecision | None:
        """The decision that this call honours; `replay` is what the caller passed."""
        ...

    def after(self, routed: Routed) -> None:
        """Look at the outcome."""
        ...


class NotCopied:
    """Base of taps: deepcopy and pickle put None in their place."""

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


def is_recomputing() -> bool:
    """Whether this code runs inside a backward pass, which is where activation checkpointing runs a forward again."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def is_capturing(tensor: Tensor) -> bool:
    """Whether work on this tensor goes into a CUDA graph instead of being done."""
    return tensor.is_cuda and not torch.compiler.is_compiling() and torch.cuda.is_current_stream_capturing()
