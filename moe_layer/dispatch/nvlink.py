"""Expert parallelism over NVLink: our kernels push deduplicated rows into the receivers' windows.

    dispatch_send   plan of the ids, then one push (ids and probabilities first, rows after) on the window's stream
    dispatch_recv   wait for ids; order the slots while rows fly; copy each row to its experts' places as it arrives
    combine_send    sum the rows of each token that came from a peer, push the partial row to its home
    combine_recv    sum the own rows of each token and, as they arrive, the peers' partial rows

The backward of each is another's forward: dispatch_recv's is combine_send, dispatch_send's is combine_recv, and so on.
Rows, order and bits are those of `all_to_all`. Options that these ops do not serve (foreign token formats, dropping,
fp64, rows that are not whole 16-byte units) run through `NvlinkRoute` over the same windows; `apply_probs: source` does
so both ways, with a row a slot on the way home.

Dropless, dispatch_recv reads the row counts on the host once, while the rows are still flying. With `capacity: static`
nothing is read on the host and the four calls can be captured in a CUDA graph; an overflow is kept on the device, fills
the outputs with NaN and is raised by `check()`.

Letters: T tokens, K slots, R ranks, C compact rows, N expert-major rows, L local experts, D hidden.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.arrange import split_counts
from moe_layer.dispatch.base import wire_dtype
from moe_layer.dispatch.exchange import ExchangeDispatcher
from moe_layer.dispatch.formats import InputFormat, TokenFormat, format_for
from moe_layer.dispatch.nvlink_call import (
    Begun,
    Combine,
    CombineRecv,
    CombineSend,
    Dispatch,
    DispatchRecv,
    DispatchSend,
    FusedCall,
    aligned,
    push_all,
    row_width,
)
from moe_layer.dispatch.nvlink_route import NvlinkRoute
from moe_layer.dispatch.options import check_add, check_idle, check_pending, check_rows, deliver, into, limit_tokens
from moe_layer.dispatch.route import Route
from moe_layer.dispatch.window import WindowSize, padded_width, window_for
from moe_layer.dispatch.wire import Link
from moe_layer.errors import ConfigError, RoutingError
from moe_layer.ops import ep
from moe_layer.ops.fp8_rows import BLOCK
from moe_layer.types import DispatchPlan, GradientLink, Received, Routing

_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_RANKS, _MOST_ROWS = 8, 32  # a warp sums a token's rows, one of each slot, one of each peer and what is added


class NvlinkDispatcher(ExchangeDispatcher):
    """The `Dispatcher` of backend nvlink."""

    def __init__(
        self,
        config: DispatchConfig,
        *,
        num_experts: int,
        top_k: int,
        link: Link,
        token_format: TokenFormat | None = None,
    ) -> None:
        if config.max_tokens_per_part is None:
            raise ConfigError("dispatch.max_tokens_per_rank is required by backend nvlink, whose buffers it sizes")
        self.max_tokens: int = config.max_tokens_per_part
        self.dense = dense_push(config, ranks=link.size, top_k=top_k)
        super().__init__(
            config,
            num_experts=num_experts,
            top_k=top_k,
            link=link,
            open_route=self._open_route,
            probs_at_home=config.apply_probs == "source",
            token_format=token_format,
        )

    def _open_route(self, link: Link, plan: DispatchPlan) -> Route:
        c = self.config
        return NvlinkRoute(link, plan, max_rows=self._max_rows, depth=c.ring_depth, blocks=c.sm_budget or 0)

    @property
    def _max_rows(self) -> int:
        """Of a trip, from one rank: with the weights at home each of a token's slots has a row."""
        return self.max_tokens * (self.top_k if self.probs_at_home else 1)

    def window_size(self, hidden: int, dtype: torch.dtype) -> WindowSize:
        """What calls with rows of `hidden` columns need: the fused ones, or those of `apply_probs: source`."""
        itemsize = max(dtype.itemsize, wire_dtype(self.config, dtype).itemsize)
        if self.probs_at_home:
            form = format_for(self.config, self.token_format, hidden=hidden, dtype=dtype)
            width = padded_width(max(form.msg_bytes + 4 * (self.top_k + 1), hidden * itemsize))
            return WindowSize(self.link.size, self._max_rows, width, 1, self.config.ring_depth)
        return WindowSize(
            self.link.size,
            self.max_tokens,
            hidden * itemsize,
            1 + 3 * self.top_k,
            self.config.ring_depth,
            self.num_local,
        )

    def buffer_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        """Bytes of device memory that the window takes on each rank, before it is made.

        With `apply_probs: source` about K times as many as otherwise: each of a token's slots has a row.
        """
        return self.window_size(hidden, dtype).num_bytes

    def _fused(self, x_TD: Tensor) -> bool:
        form = format_for(self.config, self.token_format, hidden=x_TD.shape[1], dtype=x_TD.dtype)
        return (
            (isinstance(form, InputFormat) or self._fp8(x_TD))
            and not self.probs_at_home
            and (self.config.capacity == "dropless" or self.config.overflow == "error")
            and x_TD.dtype in _FUSED_DTYPES
            and row_width(x_TD) % 16 == 0
            and self.top_k + self.link.size <= _MOST_ROWS
            and self.link.size <= _MOST_RANKS
        )

    def _fp8(self, x_TD: Tensor) -> bool:
        whole_blocks = x_TD.dtype == torch.bfloat16 and x_TD.shape[1] % BLOCK == 0
        return self.config.dispatch_format == "fp8_1x128" and whole_blocks

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def dispatch_begin(self, x_TD: Tensor) -> Begun | None:
        if not self.dense or not self._fused(x_TD):
            return None
        self._check_tokens(x_TD)
        window = window_for(self.link, self.window_size(x_TD.shape[1], x_TD.dtype))
        rows = aligned(x_TD.detach())
        return Begun(x_TD, rows, push_all(window, self.link, "dispatch", rows, fp8=self._fp8(x_TD)))

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
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
        options = {"num_tokens": num_tokens, "x_scale": x_scale}
        fused = self._fused_call(x_TD, routing, plan, **options, begun=begun)
        if fused is None:
            return super().dispatch_send(x_TD, routing, plan, **options)
        call, weights_TK = fused
        return call, DispatchSend.apply(x_TD, weights_TK, call)

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
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
        options = {"num_tokens": num_tokens, "x_scale": x_scale}
        fused = self._fused_call(x_TD, routing, plan, **options, begun=begun)
        if fused is None:
            return super().dispatch_recv(*super().dispatch_send(x_TD, routing, plan, **options), out=out)
        call, weights_TK = fused
        return deliver(self._received(call, *Dispatch.apply(x_TD, weights_TK, call)), out)

    def _fused_call(
        self,
        x_TD: Tensor,
        routing: Routing,
        plan: DispatchPlan | None,
        *,
        num_tokens: Tensor | None,
        x_scale: Tensor | None,
        begun: Any,
    ) -> tuple[FusedCall, Tensor] | None:
        """A call of the fused ops and the weights that it sends; None where `ExchangeDispatcher` serves these options.

        Raises:
            RoutingError: shapes that do not fit, or another x than `dispatch_begin` was given.
        """
        self._check_input(x_TD, routing, plan)
        if begun is not None and (begun.of is not x_TD or x_scale is not None):
            raise RoutingError("x is not what dispatch_begin was called with; pass the same tensor to both, unscaled")
        if begun is None and (x_scale is not None or not self._fused(x_TD)):
            if self.probs_at_home and x_scale is None:
                window_for(self.link, self.window_size(x_TD.shape[1], x_TD.dtype))  # once, for all of its trips
            return None
        routing = limit_tokens(routing, num_tokens, planned=plan is not None)
        plan = self.prepare(routing.ids_TK) if plan is None else plan
        if self.dense and begun is None:
            begun = self.dispatch_begin(x_TD)
        if begun is None:
            window = window_for(self.link, self.window_size(x_TD.shape[1], x_TD.dtype))
        else:
            window = begun.trip.window
        lists = ep.ep_plan(plan.ids_TK, num_experts=self.num_experts, num_ranks=self.link.size)
        call = FusedCall(self, plan, window, x_TD.dtype, self._fp8(x_TD), *lists, dense=self.dense)
        if begun is not None:
            call.x_TD, call.trips["dispatch"] = begun.x_TD, begun.trip
        return call, routing.weights_TK

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def dispatch_recv(self, handle: Any, token: Tensor, *, out: Tensor | None = None) -> Received:
        if not isinstance(handle, FusedCall):
            return super().dispatch_recv(handle, token, out=out)
        check_pending(handle.trips, "dispatch")
        return deliver(self._received(handle, *DispatchRecv.apply(token, handle)), out)

    def _received(self, handle: FusedCall, rows: Tensor, probs_N: Tensor, rank_C: Tensor, token_C: Tensor) -> Received:
        slot_N, ids_CK, row_CK, offsets_L1 = handle.slot_N, handle.ids_CK, handle.row_CK, handle.offsets_L1
        assert slot_N is not None and ids_CK is not None and row_CK is not None and offsets_L1 is not None
        assert handle.counts_L is not None and handle.index_N is not None
        index_N = handle.index_N if self.config.rows == "compact" else None
        return Received(
            rows=rows,
            index_N=index_N,
            probs_N=probs_N,
            act_probs_N=probs_N if self.config.apply_probs == "activation" else None,
            offsets_L1=offsets_L1,
            counts_L=handle.counts_L,
            split=partial(self._split, ids_CK, rank_C),
            first_expert=self.first_expert,
            src=partial(_sources, slot_N, rank_C, token_C, self.top_k),
            row_CK=row_CK,
            ids_CK=ids_CK,
            plan=handle.plan,
            state=handle,
            link=GradientLink(index_N, offsets_L1)
            if index_N is not None and self.config.apply_probs == "activation"
            else None,
        )

    def _split(self, ids_CK: Tensor, rank_C: Tensor) -> Tensor:
        return split_counts(ids_CK - self.first_expert, rank_C, num_local=self.num_local, num_ranks=self.link.size)

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def combine_send(self, rows: Tensor, received: Received) -> tuple[Any, Tensor]:
        call = received.state
        if not isinstance(call, FusedCall):
            return super().combine_send(rows, received)
        rows, link = self._outgoing(rows, received)
        return (call, rows.detach()), CombineSend.apply(rows, call, link)

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def combine(
        self, rows: Tensor, received: Received, add: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        call = received.state
        if not isinstance(call, FusedCall):
            return super().combine(rows, received, add, out=out)
        rows, link = self._outgoing(rows, received)
        check_add(add, (call.plan.ids_TK.shape[0], rows.shape[1]))
        y_TD = Combine.apply(rows, add, call, link)
        return y_TD if out is None else into(y_TD, out, "out")

    def _outgoing(self, rows: Tensor, received: Received) -> tuple[Tensor, GradientLink | None]:
        """The experts' rows as they are summed, and the link of their gradient."""
        check_rows(rows, received)
        check_idle(received.state.trips, "combine")
        if self.config.apply_probs == "combine":
            wide = torch.promote_types(rows.dtype, torch.float32)
            rows = rows.to(wide) * received.probs_N.to(wide).unsqueeze(1)
        link = received.link if received.link is not None and received.link.accepted(rows) else None
        return aligned(rows), link

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def combine_recv(
        self, handle: Any, token: Tensor, add: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        if not isinstance(handle, tuple):
            return super().combine_recv(handle, token, add, out=out)
        check_pending(handle[0].trips, "combine")
        check_add(add, (handle[0].plan.ids_TK.shape[0], handle[1].shape[1]))
        y_TD = CombineRecv.apply(token, add, *handle)
        return y_TD if out is None else into(y_TD, out, "out")

    def check(self) -> None:
        """Raise what earlier calls found on the device.

        Raises:
            DispatchTimeout, RankMismatch, CapacityError.
        """
        if self.link.context.window is not None:
            self.link.context.window.check(self.link)
        super().check()


def dense_push(config: DispatchConfig, *, ranks: int, top_k: int) -> bool:
    """Whether all rows go to all ranks, by copy engine and before the routing is known (`dispatch.push`).

    `auto`: where at least 93% of the tokens need any given rank under uniform routing, 1 - (1 - 1/R)^K; so many rows
    take as long by kernel (340 GB/s on two H200s) as all by copy engine (364).
    """
    if config.push == "auto":
        return 1 - (1 - 1 / ranks) ** top_k >= 340 / 364
    return config.push == "dense"


def _sources(slot_N: Tensor, rank_C: Tensor, token_C: Tensor, top_k: int) -> Tensor:
    """int32 [N, 3]: source rank, token, slot; -1 for pads."""
    pad_N, row_N = slot_N < 0, (slot_N.clamp_min(0) // top_k).long()
    if rank_C.numel() == 0:
        return torch.full((slot_N.shape[0], 3), -1, dtype=torch.int32, device=slot_N.device)
    parts = (rank_C.index_select(0, row_N), token_C.index_select(0, row_N), slot_N % top_k)
    return torch.stack([torch.where(pad_N, -1, part) for part in parts], dim=1)
