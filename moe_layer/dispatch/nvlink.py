"""Expert parallelism over NVLink: our kernels push deduplicated rows into the receivers' windows.

    dispatch_send   plan of the ids, then one push (ids and probabilities first, rows after) on the window's stream
    dispatch_recv   wait for ids; order the slots while rows fly; copy each row to its experts' places as it arrives
    combine_send    sum the rows of each token that came from a peer, push the partial row to its home
    combine_recv    sum the own rows of each token and, as they arrive, the peers' partial rows

The backward of each is another's forward: dispatch_recv's is combine_send, dispatch_send's is combine_recv, and so on.
Rows, order and bits are those of `all_to_all`. Options that these ops do not serve (token formats, `apply_probs:
source`, dropping, fp64, rows that are not whole 16-byte units) run through `NvlinkRoute` over the same windows.

Dropless, dispatch_recv reads the row counts on the host once, while the rows are still flying. With `capacity: static`
nothing is read on the host and the four calls can be captured in a CUDA graph; an overflow is kept on the device, fills
the outputs with NaN and is raised by `check()`.

Letters: T tokens, K slots, R ranks, C compact rows, N expert-major rows, L local experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.arrange import gather_slots, split_counts
from moe_layer.dispatch.base import padded_rows, static_rows, wire_dtype
from moe_layer.dispatch.exchange import ExchangeDispatcher
from moe_layer.dispatch.formats import InputFormat, TokenFormat, format_for
from moe_layer.dispatch.nvlink_route import NvlinkRoute
from moe_layer.dispatch.options import deliver, into, limit_tokens
from moe_layer.dispatch.route import Route
from moe_layer.dispatch.window import Trip, Window, WindowSize, window_for
from moe_layer.dispatch.wire import Link, Phase
from moe_layer.errors import ConfigError
from moe_layer.ops import ep
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.sort_slots import sort_slots
from moe_layer.types import DispatchPlan, Received, Routing

_FUSED_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_MOST_RANKS, _MOST_SLOTS = 8, 32
PUSH_BLOCKS, REDUCE_BLOCKS = 24, 96  # the first only copies, the second reads K rows for one that it sends


@dataclass
class FusedCall:
    """State of one dispatch and its combine.

    Attributes:
        x_TD: what was sent, until it is received. tokens_RT, position_TR, counts_R: see `ep_plan`.
        base_R1, recv_R: compact rows of each source. row_CK, ids_CK, slot_N, offsets_L1: see `SlotOrder`.
        trips: under way between a send and its recv. d_y_TD; d_rows and d_probs: what the trips of backward carry.
    """

    dispatcher: NvlinkDispatcher
    plan: DispatchPlan
    window: Window
    dtype: torch.dtype
    tokens_RT: Tensor
    position_TR: Tensor
    counts_R: Tensor
    weights_TK: Tensor | None = None
    x_TD: Tensor | None = None
    base_R1: Tensor | None = None
    recv_R: Tensor | None = None
    row_CK: Tensor | None = None
    ids_CK: Tensor | None = None
    slot_N: Tensor | None = None
    offsets_L1: Tensor | None = None
    trips: dict[Phase, Trip] = field(default_factory=dict)
    d_y_TD: Tensor | None = None
    d_rows: tuple[Tensor, Tensor] | None = None

    def begin(self, phase: Phase, *, width: int, home: bool) -> Trip:
        link = self.dispatcher.link
        link.check()
        trip = self.trips[phase] = self.window.begin(link.at(phase), width=width, link=link, home=home)
        return trip

    def push(self, phase: Phase, rows: Tensor, **meta: Tensor) -> None:
        """Send rows `[T, D]` to the ranks of their experts."""
        w = self.window
        trip = self.begin(phase, width=_width(rows), home=False)
        blocks = self.dispatcher.config.sm_budget or PUSH_BLOCKS
        w.send(
            trip,
            ep.ep_push,
            w.peers,
            w.state,
            rows,
            self.tokens_RT,
            self.counts_R,
            trip.words,
            blocks=blocks,
            **meta,
        )

    def take(self, phase: Phase, own_rows: Tensor, out: Tensor) -> None:
        """Rows of a push, into the experts' places (or compact)."""
        assert self.base_R1 is not None and self.recv_R is not None
        config = self.dispatcher.config
        compact, static = config.rows == "compact", config.capacity == "static"
        self.window.take(
            self.trips.pop(phase),
            own_rows,
            self.tokens_RT,
            self.base_R1,
            self.recv_R,
            row_CK=None if compact else self.row_CK,
            slot_N=self.slot_N if (static if compact else config.alignment > 1) else None,
            offsets_L1=self.offsets_L1 if static or not compact else None,
            out=out,
        )
        self.report()

    def reduce_push(self, phase: Phase, rows: Tensor, *, compact: bool, probs_N: Tensor | None) -> None:
        """Send the partial row of each received token home."""
        w, d = self.window, self.dispatcher
        trip = self.begin(phase, width=rows.shape[1] * self.wire.itemsize, home=True)
        args = (w.peers, w.state, rows, self.row_CK, self.ids_CK, self.base_R1, trip.words)
        w.send(
            trip,
            ep.ep_reduce_push,
            *args,
            probs_N=probs_N,
            wire=self.wire,
            num_experts=d.num_experts,
            tree_blocks=d.blocks,
            compact=compact,
            blocks=d.config.sm_budget or REDUCE_BLOCKS,
        )

    def home(
        self, phase: Phase, rows: Tensor, *, compact: bool, probs_N: Tensor | None, add: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Each token's sum, and what came home of `probs_N`."""
        w, d, trip = self.window, self.dispatcher, self.trips.pop(phase)
        assert self.row_CK is not None and self.ids_CK is not None and self.base_R1 is not None
        out = ep.ep_home(
            w.peers,
            w.state,
            rows,
            self.row_CK,
            self.ids_CK,
            self.base_R1,
            self.position_TR,
            self.plan.ids_TK,
            trip.words,
            probs_N=probs_N,
            add=add,
            dtype=self.dtype,
            wire=self.wire,
            num_experts=d.num_experts,
            tree_blocks=d.blocks,
            compact=compact,
        )
        w.received(trip)
        self.report()
        return out

    def report(self) -> None:
        """On a CPU an error is known at once; CUDA's is raised by `check()` or the next dispatch."""
        if self.window.device.type == "cpu":
            self.window.check(self.dispatcher.link)

    @property
    def wire(self) -> torch.dtype:
        return wire_dtype(self.dispatcher.config, self.dtype)


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
        if config.max_tokens_per_rank is None:
            raise ConfigError("dispatch.max_tokens_per_rank is required by backend nvlink, whose buffers it sizes")
        self.max_tokens: int = config.max_tokens_per_rank
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
        return NvlinkRoute(
            link, plan, max_tokens=self.max_tokens, depth=c.ring_depth, blocks=c.sm_budget or PUSH_BLOCKS
        )

    def window_size(self, hidden: int, dtype: torch.dtype) -> WindowSize:
        """What the fused calls need for rows of `hidden` columns."""
        itemsize = max(dtype.itemsize, wire_dtype(self.config, dtype).itemsize)
        return WindowSize(
            self.link.size, self.max_tokens, hidden * itemsize, 1 + 2 * self.top_k, self.config.ring_depth
        )

    def buffer_bytes(self, hidden: int, dtype: torch.dtype) -> int:
        """Bytes of device memory that the window takes on each rank, before it is made."""
        return self.window_size(hidden, dtype).num_bytes

    def _fused(self, x_TD: Tensor) -> bool:
        form = format_for(self.config, self.token_format, hidden=x_TD.shape[1], dtype=x_TD.dtype)
        return (
            isinstance(form, InputFormat)
            and not self.probs_at_home
            and (self.config.capacity == "dropless" or self.config.overflow == "error")
            and x_TD.dtype in _FUSED_DTYPES
            and _width(x_TD) % 16 == 0
            and self.top_k <= _MOST_SLOTS
            and self.link.size <= _MOST_RANKS
        )

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def dispatch_send(
        self,
        x_TD: Tensor,
        routing: Routing,
        plan: DispatchPlan | None = None,
        *,
        num_tokens: Tensor | None = None,
        x_scale: Tensor | None = None,
    ) -> tuple[Any, Tensor]:
        if x_scale is not None or not self._fused(x_TD):
            return super().dispatch_send(x_TD, routing, plan, num_tokens=num_tokens, x_scale=x_scale)
        routing = limit_tokens(routing, num_tokens, planned=plan is not None)
        plan = self.prepare(routing.ids_TK) if plan is None else plan
        self._check_input(x_TD, routing)
        window = window_for(self.link, self.window_size(x_TD.shape[1], x_TD.dtype))
        lists = ep.ep_plan(plan.ids_TK, num_experts=self.num_experts, num_ranks=self.link.size)
        call = FusedCall(self, plan, window, x_TD.dtype, *lists)
        return call, _DispatchSend.apply(x_TD, routing.weights_TK, call)

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def dispatch_recv(self, handle: Any, token: Tensor, *, out: Tensor | None = None) -> Received:
        if not isinstance(handle, FusedCall):
            return super().dispatch_recv(handle, token, out=out)
        rows, probs_N, rank_C, token_C = _DispatchRecv.apply(token, handle)
        slot_N, ids_CK, row_CK, offsets_L1 = handle.slot_N, handle.ids_CK, handle.row_CK, handle.offsets_L1
        assert slot_N is not None and ids_CK is not None and row_CK is not None and offsets_L1 is not None
        counts_L = offsets_L1.diff()
        if self.config.alignment > 1:
            real_L = _counts(ids_CK, first_expert=self.first_expert, num_local=self.num_local)
            counts_L = torch.minimum(real_L, counts_L) if self.config.capacity == "static" else real_L
        split = partial(
            split_counts, ids_CK - self.first_expert, rank_C, num_local=self.num_local, num_ranks=self.link.size
        )
        received = Received(
            rows=rows,
            index_N=(slot_N.clamp_min(0) // self.top_k) if self.config.rows == "compact" else None,
            probs_N=probs_N,
            act_probs_N=probs_N if self.config.apply_probs == "activation" else None,
            offsets_L1=offsets_L1,
            counts_L=counts_L,
            split=split,
            first_expert=self.first_expert,
            src=partial(_sources, slot_N, rank_C, token_C, self.top_k),
            row_CK=row_CK,
            ids_CK=ids_CK,
            plan=handle.plan,
            state=handle,
        )
        return deliver(received, out)

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def combine_send(self, rows: Tensor, received: Received) -> tuple[Any, Tensor]:
        call = received.state
        if not isinstance(call, FusedCall):
            return super().combine_send(rows, received)
        if self.config.apply_probs == "combine":
            wide = torch.promote_types(rows.dtype, torch.float32)
            rows = rows.to(wide) * received.probs_N.to(wide).unsqueeze(1)
        rows = rows.contiguous()
        return (call, rows.detach()), _CombineSend.apply(rows, call)

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def combine_recv(
        self, handle: Any, token: Tensor, add: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        if not isinstance(handle, tuple):
            return super().combine_recv(handle, token, add, out=out)
        y_TD = _CombineRecv.apply(token, add, *handle)
        return y_TD if out is None else into(y_TD, out, "out")

    def check(self) -> None:
        """Raise what earlier calls found on the device.

        Raises:
            DispatchTimeout, RankMismatch, CapacityError.
        """
        if self.link.context.window is not None:
            self.link.context.window.check(self.link)
        super().check()


class _DispatchSend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, call: FusedCall) -> Tensor:
        ctx.call, ctx.weights_dtype = call, weights_TK.dtype
        call.x_TD = x_TD.contiguous()
        call.push("dispatch", call.x_TD, meta0=call.plan.ids_TK, meta1=weights_TK.float().contiguous())
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, d_token: Tensor) -> tuple[Tensor, Tensor, None]:
        call: FusedCall = ctx.call
        assert call.d_rows is not None
        (rows, probs_N), call.d_rows = call.d_rows, None
        compact = call.dispatcher.config.rows == "compact"
        dx_TD, d_weights_TK = call.home("dispatch backward", rows, compact=compact, probs_N=probs_N, add=None)
        return dx_TD, d_weights_TK.to(ctx.weights_dtype), None


class _DispatchRecv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, call: FusedCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d, w = call.dispatcher, call.window
        config, K = d.config, d.top_k
        room = d.link.size * d.max_tokens
        call.recv_R, call.base_R1, token_C, rank_C, ids_CK, weights_CK = ep.ep_await(
            w.peers,
            w.state,
            call.trips["dispatch"].words,
            num_rows=room,
            words0=K,
            words1=K,
            first_expert=d.first_expert,
            num_local=d.num_local,
        )
        if config.capacity == "static":
            num_rows = static_rows(config, slots=d.max_tokens * K)
        else:
            num_rows = padded_rows(room * min(K, d.num_local), num_local=d.num_local, alignment=config.alignment)
        order = sort_slots(
            ids_CK,
            first_expert=d.first_expert,
            num_local=d.num_local,
            alignment=config.alignment,
            num_rows=num_rows,
        )
        slot_N, row_CK = order.slot_N, order.row_CK
        if config.capacity == "dropless":
            known = torch.cat((w.state[: ep.STATE_HEAD], order.offsets_L1[-1:], call.base_R1[-1:])).tolist()
            w.check(d.link, known)
            num_rows, room = known[-2:]
            slot_N = slot_N[:num_rows]
            row_CK, ids_CK, weights_CK = row_CK[:room], ids_CK[:room], weights_CK[:room]
            token_C, rank_C = token_C[:room], rank_C[:room]
        call.slot_N, call.row_CK, call.ids_CK, call.offsets_L1 = slot_N, row_CK, ids_CK, order.offsets_L1
        assert call.x_TD is not None
        x_TD, call.x_TD = call.x_TD, None
        rows = x_TD.new_empty(room if config.rows == "compact" else num_rows, x_TD.shape[1])
        call.take("dispatch", x_TD, rows)
        if config.capacity == "static":  # after an overflow, reported above, nobody may read or write past the rows
            call.offsets_L1 = order.offsets_L1.clamp_max(num_rows)
        probs_N = gather_slots(weights_CK, slot_N)
        ctx.call = call
        ctx.mark_non_differentiable(rank_C, token_C)
        ctx.save_for_backward(token.new_empty(0))
        return rows, probs_N, rank_C, token_C

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_probs_N: Tensor, *_: Any) -> tuple[Tensor, None]:
        call: FusedCall = ctx.call
        compact = call.dispatcher.config.rows == "compact"
        d_rows, d_probs_N = d_rows.contiguous(), d_probs_N.contiguous()
        call.reduce_push("dispatch backward", d_rows, compact=compact, probs_N=d_probs_N)
        call.d_rows = (d_rows, d_probs_N)
        return d_rows.new_zeros(0), None


class _CombineSend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, call: FusedCall) -> Tensor:
        ctx.call, ctx.shape, ctx.dtype = call, rows_ND.shape, rows_ND.dtype
        call.reduce_push("combine", rows_ND, compact=False, probs_N=None)
        return rows_ND.new_empty(0)

    @staticmethod
    def backward(ctx: Any, d_token: Tensor) -> tuple[Tensor, None]:
        call: FusedCall = ctx.call
        assert call.d_y_TD is not None
        d_y_TD, call.d_y_TD = call.d_y_TD, None
        if call.dispatcher.config.rows == "compact":
            assert call.base_R1 is not None and call.row_CK is not None and call.slot_N is not None
            d_part_CD = d_y_TD.new_empty(call.row_CK.shape[0], d_y_TD.shape[1])
            call.take("combine backward", d_y_TD, d_part_CD)
            compact_N = torch.where(call.slot_N >= 0, call.slot_N // call.dispatcher.top_k, -1)
            return gather_rows(d_part_CD, compact_N).to(ctx.dtype), None
        d_rows_ND = d_y_TD.new_empty(ctx.shape)
        call.take("combine backward", d_y_TD, d_rows_ND)
        return d_rows_ND.to(ctx.dtype), None


class _CombineRecv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, add: Tensor | None, call: FusedCall, rows_ND: Tensor) -> Tensor:
        ctx.call, ctx.add_dtype = call, None if add is None else add.dtype
        y_TD, _ = call.home(
            "combine", rows_ND, compact=False, probs_N=None, add=None if add is None else add.contiguous()
        )
        ctx.save_for_backward(token.new_empty(0))
        return y_TD

    @staticmethod
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        call: FusedCall = ctx.call
        _ = ctx.saved_tensors  # recompute runs here, before the trips of this backward take slots of the ring
        d_add = None if ctx.add_dtype is None else d_y_TD.to(ctx.add_dtype)
        d_y_TD = d_y_TD.to(call.dtype).contiguous()
        call.push("combine backward", d_y_TD)
        call.d_y_TD = d_y_TD
        return d_y_TD.new_zeros(0), d_add, None, None


def _width(rows: Tensor) -> int:
    return rows.shape[1] * rows.element_size()


def _counts(ids_CK: Tensor, *, first_expert: int, num_local: int) -> Tensor:
    local = torch.where(ids_CK >= 0, ids_CK - first_expert, num_local).flatten().long()
    counts = torch.zeros(num_local + 1, dtype=torch.int32, device=ids_CK.device)
    return counts.scatter_add_(0, local, torch.ones_like(local, dtype=torch.int32))[:-1]


def _sources(slot_N: Tensor, rank_C: Tensor, token_C: Tensor, top_k: int) -> Tensor:
    """int32 [N, 3]: source rank, token, slot; -1 for pads."""
    pad_N, row_N = slot_N < 0, (slot_N.clamp_min(0) // top_k).long()
    if rank_C.numel() == 0:
        return torch.full((slot_N.shape[0], 3), -1, dtype=torch.int32, device=slot_N.device)
    parts = (rank_C.index_select(0, row_N), token_C.index_select(0, row_N), slot_N % top_k)
    return torch.stack([torch.where(pad_N, -1, part) for part in parts], dim=1)
