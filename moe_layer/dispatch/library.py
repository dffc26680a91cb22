"""Other libraries' expert-parallel kernels behind this package's dispatcher: `backend: deep_ep` and `nccl_ep`.

A library moves rows out (with ids and weights), moves rows home and adds them up there. Everything else, the order of
rows, probabilities, gradients, is `ExchangeDispatcher`'s: a library is a `Route`. Rows may arrive in any order; they
are sorted by (source rank, token), so that experts see what every other backend delivers. The sum over the ranks is
the library's, of bf16 rows: no bit promise.

Shape letters: T tokens, K slots, D hidden, C compact rows received.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_layer.dispatch.route import Pending
from moe_layer.dispatch.wire import Link, Position
from moe_layer.errors import ConfigError, RoutingError
from moe_layer.types import DispatchPlan


@dataclass(frozen=True)
class Sizes:
    """What a library's buffers are made for, once for all layers of a context."""

    hidden: int
    num_experts: int
    top_k: int
    max_tokens: int


@dataclass(frozen=True)
class Arrived:
    """rows [C, D]; local_CK: local expert or -1; weights_CK fp32; source_C int64: rank * max_tokens + token; ticket:
    what the later trips of this dispatch need."""

    rows: Tensor
    local_CK: Tensor
    weights_CK: Tensor
    source_C: Tensor
    ticket: Any


class Transport(Protocol):
    """A library on one context; every call is collective."""

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Arrived:
        """Rows to the ranks of their experts; ids int64 global, -1 = not routed."""
        ...

    def dispatch_again(self, x_TD: Tensor, ticket: Any) -> Tensor:
        """Other rows the same way: `[C, D]` in the order of `Arrived`."""
        ...

    def combine(self, rows_CD: Tensor, ticket: Any) -> Tensor:
        """`[T, D]`: the ranks' rows of each token, added up."""
        ...

    def combine_back(self, rows_CD: Tensor, weights_CK: Tensor, ticket: Any) -> tuple[Tensor, Tensor]:
        """The same with `[C, K]` values, of which each slot's owner has one: `[T, D]` and `[T, K]`."""
        ...

    def close(self) -> None:
        """Free the buffers; every rank calls it."""
        ...


class LibraryRoute:
    """See `Route`. Home rows are sums already: one a token."""

    def __init__(
        self, link: Link, plan: DispatchPlan, *, open_transport: Callable[[Sizes], Transport], max_tokens: int
    ):
        self.link, self.recv_R = link, []
        self._plan, self._open, self._max_tokens = plan, open_transport, max_tokens
        T = plan.ids_TK.shape[0]
        self.position_TR = torch.arange(T, dtype=torch.int32, device=plan.ids_TK.device).unsqueeze(1)

    def out(self, at: Position, tensors: list[Tensor]) -> Pending:
        if not self.recv_R and len(tensors) != 3:
            raise RoutingError("this dispatch.backend moves bfloat16 rows without x_scale; use all_to_all or nvlink")
        found = self.link.start(lambda: self._again(tensors[0]) if self.recv_R else self._first(*tensors), at)
        return Pending(self.link, at, found, [])

    def back(self, at: Position, tensors: list[Tensor]) -> Pending:
        parts, *values = [tensor.index_select(0, self._arrival_C) for tensor in tensors]
        ticket = self._ticket

        def go() -> list[Tensor]:
            if not values:
                return [self._transport.combine(parts, ticket)]
            return list(self._transport.combine_back(parts, values[0], ticket))

        return Pending(self.link, at, self.link.start(go, at), [])

    def _first(self, x_TD: Tensor, _meta: Tensor, weights_TK: Tensor) -> list[Tensor]:
        if x_TD.dtype != torch.bfloat16:
            raise RoutingError(
                f"this dispatch.backend moves bfloat16 rows, x is {x_TD.dtype}; use all_to_all for others"
            )
        plan, limit = self._plan, self._max_tokens
        sizes = Sizes(x_TD.shape[1], plan.num_experts, plan.ids_TK.shape[1], limit)
        self._transport = self._open(sizes)
        got = self._transport.dispatch(x_TD.contiguous(), plan.ids_TK.long(), weights_TK.float().contiguous())
        order_C = got.source_C.argsort(stable=True)
        self._order_C, self._arrival_C, self._ticket = order_C, order_C.argsort(), got.ticket
        source_C = got.source_C.index_select(0, order_C)
        self.recv_R = torch.bincount(source_C // limit, minlength=self.link.size).tolist()
        first = plan.num_experts // self.link.size * self.link.rank
        local_CK = got.local_CK.index_select(0, order_C)
        ids_CK = torch.where(local_CK >= 0, local_CK + first, -1)
        meta = torch.cat((ids_CK + 1, (source_C % limit).unsqueeze(1)), dim=1).to(torch.int32)
        return [got.rows.index_select(0, order_C), meta, got.weights_CK.index_select(0, order_C)]

    def _again(self, x_TD: Tensor) -> list[Tensor]:
        rows = self._transport.dispatch_again(x_TD.contiguous(), self._ticket)
        return [rows.index_select(0, self._order_C)]


def transport_opener(name: str, link: Link) -> Callable[[Sizes], Transport]:
    """Makes (once a context and size) the transport of `deep_ep` or `nccl_ep`.

    Raises:
        ConfigError: the library is not installed.
    """
    if name == "deep_ep":
        from moe_layer.dispatch.deep_ep import DeepEpTransport as make
        from moe_layer.dispatch.deep_ep import load
    else:
        from moe_layer.dispatch.nccl_ep import NcclEpTransport as make
        from moe_layer.dispatch.nccl_ep import load
    try:
        library = load()
    except ImportError as error:
        raise ConfigError(
            f"dispatch.backend {name} needs a library that cannot be imported ({error}); install it (docs/dispatch.md) "
            "or use all_to_all or nvlink"
        ) from error
    held = link.context.libraries

    def open_transport(sizes: Sizes) -> Transport:
        key = (name, sizes)
        if key not in held:
            held[key] = make(library, link, sizes)
        return held[key]

    return open_transport
