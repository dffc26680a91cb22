"""Options of single calls that every backend takes: `num_tokens`, `x_scale`, `out`.

    received = dispatcher.dispatch(x, routing, num_tokens=n)            # rows n, n+1, ... of x are padding
    received = dispatcher.dispatch(x_fp8, routing, x_scale=scales)      # travels as it is; received.scales
    received = dispatcher.dispatch(x, routing, out=rows_buffer)         # received.rows lies in the caller's buffer
    y = dispatcher.combine(rows, received, out=y_buffer)

Shape letters: T tokens, K slots, D hidden, S scales a token, C compact rows, N rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moe_layer.dispatch.formats import TokenFormat
from moe_layer.errors import CapacityError, ConfigError, RoutingError
from moe_layer.types import DispatchPlan, Received, Routing

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


def check_call(x_TD: Tensor, routing: Routing, plan: DispatchPlan | None, *, num_experts: int, top_k: int) -> None:
    """Whether x, routing and plan are of one batch and of this dispatcher; reads no memory of a GPU.

    Raises:
        RoutingError: names what does not fit, and both shapes, numbers or devices.
    """
    if not isinstance(x_TD, Tensor) or x_TD.ndim != 2:
        raise RoutingError(f"x must be [T, D], got {_describe(x_TD)}; flatten its leading dimensions")
    if not isinstance(routing, Routing):
        raise RoutingError(
            f"routing must be a Routing, got {_describe(routing)}; make one with Routing.from_ids(ids, weights, "
            "num_experts=...)"
        )
    T = x_TD.shape[0]
    for name, values in (("ids", routing.ids_TK), ("weights", routing.weights_TK)):
        if tuple(values.shape) != (T, top_k):
            raise RoutingError(f"{name} must be [{T}, {top_k}] for x of {T} tokens, got {tuple(values.shape)}")
        if values.device != x_TD.device:
            raise RoutingError(f"{name} are on {values.device} and x on {x_TD.device}; move one of them")
    experts = routing.counts_E.shape[0] if routing.counts_E.ndim == 1 else 0
    if experts not in (0, num_experts):  # 0: whoever made it left the counts out
        raise RoutingError(
            f"the routing is over {experts} experts and the dispatcher over {num_experts}; give both "
            "the global number of experts"
        )
    if plan is not None and tuple(plan.ids_TK.shape) != (T, top_k):
        raise RoutingError(
            f"the plan is of ids {tuple(plan.ids_TK.shape)}, x and routing are of ({T}, {top_k}); prepare one for "
            "this call"
        )
    looks = x_TD.device.type == "cpu" and not torch.compiler.is_compiling()  # where it costs no synchronisation
    if plan is not None and looks and bool((plan.ids_TK != routing.ids_TK).any()):
        raise RoutingError(
            "the plan is of other ids than the routing's; prepare one from these: prepare(routing.ids_TK)"
        )


def check_rows(rows: Tensor, received: Received) -> None:
    """Whether these can be the experts' outputs for `received`.

    Raises:
        RoutingError: not two dimensions, or another number of rows.
    """
    wanted = received.probs_N.shape[0]
    if rows.ndim != 2 or rows.shape[0] != wanted:
        raise RoutingError(
            f"rows must be [{wanted}, D], one for each (token, expert) of the dispatch and its pads, got "
            f"{tuple(rows.shape)}; under dispatch.rows compact, gather received.rows by received.index_N first"
        )


def check_add(add: Tensor | None, shape: tuple[int, ...]) -> None:
    """`add` is never broadcast.

    Raises:
        RoutingError: another shape than y.
    """
    if add is not None and tuple(add.shape) != shape:
        raise RoutingError(f"add must be {shape} like y, got {tuple(add.shape)}")


def check_idle(trips: Mapping[Any, Any], phase: str) -> None:
    """Whether no `phase` of this dispatch is under way: it would be mistaken for the next one.

    Raises:
        RoutingError: two sends without a recv between them.
    """
    if phase in trips:
        raise RoutingError(f"a {phase} of this dispatch was sent and not received; call {phase}_recv first")


def check_pending(trips: Mapping[Any, Any], phase: str) -> None:
    """Whether `phase` was sent and not received.

    Raises:
        RoutingError: a second recv of one send.
    """
    if phase not in trips:
        raise RoutingError(f"{phase}_recv was called again; every send has one recv, keep what the first one returned")


def _describe(value: object) -> str:
    return f"shape {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def limit_tokens(routing: Routing, num_tokens: Tensor | None, *, planned: bool = False) -> Routing:
    """The routing without slots of the tokens from `num_tokens` on: they are not dispatched, their y is `add` alone.

    Args:
        num_tokens: one integer on the tokens' device; on CUDA it is never read on the host and may change between
            replays of a graph.
        planned: the caller passed a plan, which was made from all tokens.

    Raises:
        RoutingError: not one integer on that device, outside [0, T] (checked on CPU), or together with a plan.
    """
    if num_tokens is None:
        return routing
    T, device = routing.ids_TK.shape[0], routing.ids_TK.device
    if planned:
        raise RoutingError("num_tokens and plan were both passed; make the plan from ids that are -1 for padding")
    if not isinstance(num_tokens, Tensor) or num_tokens.numel() != 1 or num_tokens.dtype not in _INTEGERS:
        found = f"{num_tokens.dtype} {tuple(num_tokens.shape)}" if isinstance(num_tokens, Tensor) else repr(num_tokens)
        raise RoutingError(
            f"num_tokens must be a 0-d integer tensor, got {found}; use torch.tensor(n, device=x.device)"
        )
    if num_tokens.device != device:
        raise RoutingError(f"num_tokens is on {num_tokens.device} and the tokens on {device}; move one of them")
    if device.type == "cpu" and not 0 <= int(num_tokens) <= T:
        raise RoutingError(f"num_tokens is {int(num_tokens)}, it must lie in [0, {T}] for {T} rows of x")
    real_T1 = (torch.arange(T, device=device) < num_tokens.reshape(())).unsqueeze(1)
    weights = routing.weights_TK
    return replace(
        routing,
        ids_TK=torch.where(real_T1, routing.ids_TK, -1),
        weights_TK=torch.where(real_T1, weights, weights.new_zeros(())),
    )


@dataclass(frozen=True)
class CallerRows:
    """The `TokenFormat` of one call's rows that the caller quantised: bytes and scales travel as they are."""

    hidden: int
    scale_TS: Tensor
    row_alignment: int = 1

    @property
    def msg_bytes(self) -> int:
        return self.hidden + self.scale_TS.shape[1] * self.scale_TS.element_size()

    def encode(self, x_TD: Tensor) -> list[Tensor]:
        return [x_TD.contiguous().view(torch.uint8), self.scale_TS.contiguous()]

    def decode(self, payload: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
        """The bytes; whoever gathered them views them as `dtype`."""
        return payload[0]


def caller_rows(x_TD: Tensor, x_scale: Tensor, token_format: TokenFormat | None) -> CallerRows:
    """Check quantised rows and their scales.

    Raises:
        RoutingError: x has no one-byte dtype or requires grad, or the scales are not `[T, S]` on x's device.
        ConfigError: the dispatcher has a token format of its own.
    """
    if token_format is not None:
        raise ConfigError("x_scale was passed to a dispatcher with a token_format; quantise in one place only")
    if x_TD.element_size() != 1:
        raise RoutingError(f"x_scale belongs to rows of one byte per element (float8 or int8), x is {x_TD.dtype}")
    if x_TD.requires_grad and torch.is_grad_enabled():
        raise RoutingError("x is quantised and requires grad; pass x.detach(): gradients end where you quantised")
    if not isinstance(x_scale, Tensor):
        raise RoutingError(f"x_scale must be a tensor [{x_TD.shape[0]}, S], got {type(x_scale).__name__}")
    if x_scale.ndim != 2 or x_scale.shape[0] != x_TD.shape[0] or x_scale.device != x_TD.device:
        raise RoutingError(
            f"x_scale must be [{x_TD.shape[0]}, S] on {x_TD.device}, got {tuple(x_scale.shape)} on {x_scale.device}"
        )
    return CallerRows(x_TD.shape[1], x_scale.detach())


def deliver(received: Received, out: Tensor | None) -> Received:
    """The same with its rows in the caller's buffer; the graph goes on through them.

    Raises:
        CapacityError: the buffer has fewer rows. RoutingError: other columns, dtype or device.
    """
    return received if out is None else replace(received, rows=into(received.rows, out, "out"))


def into(values: Tensor, out: Tensor, name: str) -> Tensor:
    """`values` copied to the first rows of `out`, and that part of `out`; gradients pass to `values`.

    Raises:
        RoutingError: a buffer of another kind, width, dtype or device, or one that requires grad.
        CapacityError: too few rows.
    """
    if not isinstance(out, Tensor):
        raise RoutingError(f"{name} must be a tensor [rows, {values.shape[1]}], got {type(out).__name__}")
    if out.ndim != 2 or out.shape[1:] != values.shape[1:] or out.dtype != values.dtype or out.device != values.device:
        raise RoutingError(
            f"{name} must be [rows, {values.shape[1]}] {values.dtype} on {values.device}, got {tuple(out.shape)} "
            f"{out.dtype} on {out.device}"
        )
    if out.requires_grad:
        raise RoutingError(f"{name} requires grad, but it is overwritten; pass a buffer without")
    if out.shape[0] < values.shape[0]:
        raise CapacityError(f"{name} holds {out.shape[0]} rows, {values.shape[0]} are needed; give it room for them")
    return _Into.apply(values, (out,))


class _Into(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, target: tuple[Tensor]) -> Tensor:
        part = target[0].detach()[: values.shape[0]]
        return part.copy_(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
