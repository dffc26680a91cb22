"""The dispatcher protocol and what all backends share: wire formats, static sizes, the end of a combine."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.types import DispatchPlan, Received, Routing


class Dispatcher(Protocol):
    """Tokens to the ranks of their experts and back. Calls keep no state on the object; it travels in handles and
    `Received`."""

    def prepare(self, ids_TK: Tensor) -> DispatchPlan:
        """The plan of these ids, without communication."""
        ...

    def dispatch_begin(self, x_TD: Tensor) -> Any:
        """Start what needs no routing; the result goes to `dispatch` or `dispatch_send` with the same x, unchanged in
        between (`begun`). None where nothing can begin so early."""
        ...

    def dispatch_send(
        self,
        x_TD: Tensor,
        routing: Routing,
        plan: DispatchPlan | None = None,
        *,
        num_tokens: Tensor | None = None,
        x_scale: Tensor | None = None,
        begun: Any = None,
    ) -> tuple[Any, Tensor]:
        """Start moving rows; returns a handle and the token that joins the halves in the autograd graph.

        `num_tokens`: rows of x from this one on are padding. `x_scale`: `[T, S]` scales of an x that the caller
        quantised. See `moe_layer.dispatch.options`.
        """
        ...

    def dispatch_recv(self, handle: Any, token: Tensor, *, out: Tensor | None = None) -> Received:
        """Wait for the rows of the local experts; `out`: the caller's buffer for them."""
        ...

    def combine_send(self, rows: Tensor, received: Received) -> tuple[Any, Tensor]:
        """Start sending the experts' outputs home."""
        ...

    def combine_recv(
        self, handle: Any, token: Tensor, add: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """Wait for them; returns `[T, D]` in x's dtype (the rows' where x was quantised), `add` (a shared expert's
        output) joined in fp32; `out`: the caller's buffer for it."""
        ...

    def dispatch(
        self,
        x_TD: Tensor,
        routing: Routing,
        plan: DispatchPlan | None = None,
        *,
        num_tokens: Tensor | None = None,
        x_scale: Tensor | None = None,
        out: Tensor | None = None,
        begun: Any = None,
    ) -> Received:
        """`dispatch_send` and `dispatch_recv` in a row."""
        ...

    def combine(
        self, rows: Tensor, received: Received, add: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        """`combine_send` and `combine_recv` in a row."""
        ...

    def check(self) -> None:
        """Raise what was found on the device after the call that caused it returned. Synchronises."""
        ...


def wire_dtype(config: DispatchConfig, dtype: torch.dtype) -> torch.dtype:
    """Dtype in which pre-reduced rows travel home."""
    if config.combine_format == "input":
        return dtype
    return torch.bfloat16 if config.combine_format == "bf16" else torch.promote_types(dtype, torch.float32)


def round_to_wire(values: Tensor, wire: torch.dtype) -> Tensor:
    """The rounding of a trip in `wire`, for rows that need not travel: numerics must not depend on R.

    The gradient passes unrounded: it travels the other way, in the dispatch format.
    """
    return values if values.dtype == wire else _RoundToWire.apply(values, wire)


class _RoundToWire(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, wire: torch.dtype) -> Tensor:
        return values.to(wire).to(values.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def finish(sum_TD: Tensor, add: Tensor | None, *, dtype: torch.dtype) -> Tensor:
    """fp32 (or fp64) tree sum plus the shared expert's output, rounded once to `dtype`."""
    return (sum_TD if add is None else sum_TD + add.to(sum_TD.dtype)).to(dtype)


def homeward(received: Received, *, dtype: torch.dtype, weights_TK: Tensor) -> Received:
    """The same call with other values for its way home: rows that travelled as bytes return as `dtype`, and
    `apply_probs: source` multiplies by `weights_TK`. Every backend's state has these two fields."""
    return replace(received, state=replace(received.state, dtype=dtype, weights_TK=weights_TK))


def padded_rows(slots: int, *, num_local: int, alignment: int) -> int:
    """Rows that hold `slots` slots however they fall on the experts."""
    if alignment == 1:
        return slots
    worst = slots + min(num_local, slots) * (alignment - 1)
    return -(-worst // alignment) * alignment


def static_rows(config: DispatchConfig, *, slots: int) -> int:
    """Rows of a static buffer for `slots` = T*K slots."""
    return -(-math.ceil(config.static_factor * slots) // config.alignment) * config.alignment
