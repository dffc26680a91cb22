"""One dispatch and its combine over a window, and the autograd functions of its four halves. See nvlink.py.

Letters: T tokens, K slots, R ranks, C compact rows, N expert-major rows, L local experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_layer.dispatch.base import padded_rows, static_rows, wire_dtype
from moe_layer.dispatch.window import Trip, Window, padded_width
from moe_layer.dispatch.wire import Link, Phase, dtypes_word
from moe_layer.ops import ep
from moe_layer.ops._call import refuse_second_derivative
from moe_layer.ops.fp8_rows import BLOCK
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.types import DispatchPlan, GradientLink

if TYPE_CHECKING:
    from moe_layer.dispatch.nvlink import NvlinkDispatcher

REDUCE_BLOCKS = 128  # thread blocks of the send home, which reads K rows for one that it sends


@dataclass
class FusedCall:
    """State of one dispatch and its combine.

    Attributes:
        fp8: rows travel outwards as e4m3 (`dispatch_format: fp8_1x128`). dense: all of them do (`dispatch.push`).
        tokens_RT, position_TR, counts_R, places_TK, counts_E: see `ep_plan`. x_TD: what was sent, until it is received.
        weights_TK: fp32, kept with it. base_R1, recv_R: compact rows of each source. the next six: see `Arranged` and
            `Expanded`.
        trips: under way between a send and its recv. d_y_TD; d_rows and d_probs: what the trips of backward carry.
    """

    dispatcher: NvlinkDispatcher
    plan: DispatchPlan
    window: Window
    dtype: torch.dtype
    fp8: bool
    tokens_RT: Tensor
    position_TR: Tensor
    counts_R: Tensor
    places_TK: Tensor
    counts_E: Tensor
    dense: bool
    x_TD: Tensor | None = None
    token_C: Tensor | None = None
    weights_TK: Tensor | None = None
    base_R1: Tensor | None = None
    recv_R: Tensor | None = None
    row_CK: Tensor | None = None
    ids_CK: Tensor | None = None
    slot_N: Tensor | None = None
    offsets_L1: Tensor | None = None
    counts_L: Tensor | None = None
    index_N: Tensor | None = None
    trips: dict[Phase, Trip] = field(default_factory=dict)
    d_y_TD: Tensor | None = None
    d_rows: tuple[Tensor, Tensor] | None = None

    def begin(self, phase: Phase, *, width: int, home: bool) -> Trip:
        link = self.dispatcher.link
        link.check()
        trip = self.trips[phase] = self.window.begin(
            link.at(phase), width=width, dtypes=dtypes_word([self.dtype]), link=link, home=home
        )
        return trip

    def push(self, phase: Phase, rows: Tensor, **meta: Tensor) -> None:
        """Send rows `[T, D]` to the ranks of their experts."""
        w = self.window
        if self.dense and phase not in self.trips:
            self.trips[phase] = push_all(w, self.dispatcher.link, phase, rows, fp8=self.fp8)
        elif not self.dense:
            self.begin(phase, width=outward_width(rows, self.fp8), home=False)
        trip = self.trips[phase]
        w.send(
            trip,
            ep.ep_push,
            w.peers,
            w.state,
            rows,
            self.tokens_RT,
            self.counts_R,
            trip.words,
            blocks=self.dispatcher.config.sm_budget or 0,
            fp8=self.fp8,
            dense=self.dense,
            **meta,
        )

    def take(self, phase: Phase, own_rows: Tensor, out: Tensor) -> None:
        """Rows of a push, into the experts' places (or compact)."""
        assert self.base_R1 is not None and self.recv_R is not None
        config = self.dispatcher.config
        compact = config.rows == "compact"
        pads = config.alignment > 1 and not compact
        self.window.take(
            self.trips.pop(phase),
            own_rows,
            self.tokens_RT,
            self.base_R1,
            self.recv_R,
            row_CK=None if compact else self.row_CK,
            slot_N=self.slot_N if pads else None,
            offsets_L1=self.offsets_L1 if pads else None,
            out=out,
            fp8=self.fp8,
            token_C=self.token_C if self.dense else None,
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


class DispatchSend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, call: FusedCall) -> Tensor:
        ctx.call, ctx.weights_dtype = call, weights_TK.dtype
        call.x_TD = aligned(x_TD) if call.x_TD is None else call.x_TD
        call.weights_TK = weights_TK = weights_TK.float().contiguous()
        words = {"meta0": call.plan.ids_TK, "places": call.places_TK, "meta1": weights_TK}
        call.push("dispatch", call.x_TD, **words, counts_E=call.counts_E)
        return x_TD.new_empty(0)

    @staticmethod
    def backward(ctx: Any, d_token: Tensor) -> tuple[Tensor, Tensor, None]:
        call: FusedCall = ctx.call
        assert call.d_rows is not None
        (rows, probs_N), call.d_rows = call.d_rows, None
        compact = call.dispatcher.config.rows == "compact"
        dx_TD, d_weights_TK = call.home("dispatch backward", rows, compact=compact, probs_N=probs_N, add=None)
        return dx_TD, d_weights_TK.to(ctx.weights_dtype), None


class DispatchRecv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, call: FusedCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        d, w = call.dispatcher, call.window
        config, K = d.config, d.top_k
        room = d.link.size * d.max_tokens
        if config.capacity == "static":
            num_rows = static_rows(config, slots=d.max_tokens * K)
        else:
            num_rows = padded_rows(room * min(K, d.num_local), num_local=d.num_local, alignment=config.alignment)
        compact = config.rows == "compact"
        trip = call.trips.pop("dispatch")
        arranged = ep.ep_arrange(
            w.peers,
            w.state,
            trip.words,
            num_rows=num_rows,
            slots=K,
            num_local=d.num_local,
            alignment=config.alignment,
        )
        if config.capacity == "dropless":
            known = torch.cat((w.state[: ep.STATE_HEAD], arranged.offsets_L1[-1:], arranged.base_R1[-1:])).tolist()
            w.check(d.link, known)
            num_rows, room = known[-2:]
        assert call.x_TD is not None and call.weights_TK is not None
        own_TK, x_TD = (call.plan.ids_TK, call.places_TK, call.weights_TK), call.x_TD
        call.x_TD = call.weights_TK = None
        rows = x_TD.new_empty(room if compact else num_rows, x_TD.shape[1])
        got = ep.ep_expand(
            w.peers,
            w.state,
            x_TD,
            call.tokens_RT,
            own_TK,
            arranged,
            trip.words,
            first_expert=d.first_expert,
            num_compact=room,
            num_rows=num_rows,
            compact=compact,
            out=rows,
            fp8=call.fp8,
            dense=call.dense,
        )
        w.received(trip)
        call.report()
        call.recv_R, call.base_R1 = arranged.counts_R, arranged.base_R1
        call.offsets_L1, call.counts_L = arranged.offsets_L1, arranged.counts_L
        call.ids_CK, call.row_CK, call.slot_N, call.index_N = got.ids_CK, got.row_CK, got.slot_N, got.index_N
        call.token_C = got.token_C
        ctx.call = call
        ctx.mark_non_differentiable(got.rank_C, got.token_C)
        ctx.save_for_backward(token.new_empty(0))
        return rows, got.probs_N, got.rank_C, got.token_C

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_probs_N: Tensor, *_: Any) -> tuple[Tensor, None]:
        refuse_second_derivative()
        call: FusedCall = ctx.call
        compact = call.dispatcher.config.rows == "compact"
        d_rows, d_probs_N = aligned(d_rows), d_probs_N.contiguous()
        call.reduce_push("dispatch backward", d_rows, compact=compact, probs_N=d_probs_N)
        call.d_rows = (d_rows, d_probs_N)
        return d_rows.new_empty(0), None


class CombineSend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, call: FusedCall, link: GradientLink | None) -> Tensor:
        ctx.call, ctx.shape, ctx.dtype, ctx.link = call, rows_ND.shape, rows_ND.dtype, link
        call.reduce_push("combine", rows_ND, compact=False, probs_N=None)
        return rows_ND.new_empty(0)

    @staticmethod
    def backward(ctx: Any, d_token: Tensor) -> tuple[Tensor, None, None]:
        call: FusedCall = ctx.call
        assert call.d_y_TD is not None
        d_y_TD, call.d_y_TD = call.d_y_TD, None
        if call.dispatcher.config.rows == "compact":
            assert call.base_R1 is not None and call.row_CK is not None and call.slot_N is not None
            d_part_CD = d_y_TD.new_empty(call.row_CK.shape[0], d_y_TD.shape[1])
            call.take("combine backward", d_y_TD, d_part_CD)
            if ctx.link is not None:
                return ctx.link.put(d_part_CD), None, None
            compact_N = torch.where(call.slot_N >= 0, call.slot_N // call.dispatcher.top_k, -1)
            return gather_rows(d_part_CD, compact_N).to(ctx.dtype), None, None
        d_rows_ND = d_y_TD.new_empty(ctx.shape)
        call.take("combine backward", d_y_TD, d_rows_ND)
        return d_rows_ND.to(ctx.dtype), None, None


class CombineRecv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, add: Tensor | None, call: FusedCall, rows_ND: Tensor) -> Tensor:
        ctx.call, ctx.add_dtype = call, None if add is None else add.dtype
        y_TD, _ = call.home("combine", rows_ND, compact=False, probs_N=None, add=None if add is None else aligned(add))
        ctx.save_for_backward(token.new_empty(0))
        return y_TD

    @staticmethod
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        refuse_second_derivative()
        call: FusedCall = ctx.call
        _ = ctx.saved_tensors  # recompute runs here, before the trips of this backward take slots of the ring
        d_add = None if ctx.add_dtype is None else d_y_TD.to(ctx.add_dtype)
        d_y_TD = aligned(d_y_TD.to(call.dtype))
        call.push("combine backward", d_y_TD)
        call.d_y_TD = d_y_TD
        return d_y_TD.new_empty(0), d_add, None, None


class Dispatch(torch.autograd.Function):
    """Both halves in one node of the graph, which takes the host less than two."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, call: FusedCall) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return DispatchRecv.forward(ctx, DispatchSend.forward(ctx, x_TD, weights_TK, call), call)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        return DispatchSend.backward(ctx, DispatchRecv.backward(ctx, *gradients)[0])


class Combine(torch.autograd.Function):
    """Both halves in one node of the graph."""

    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, add: Tensor | None, call: FusedCall, link: GradientLink | None) -> Tensor:
        return CombineRecv.forward(ctx, CombineSend.forward(ctx, rows_ND, call, link), add, call, rows_ND)

    @staticmethod
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        token, d_add, *_ = CombineRecv.backward(ctx, d_y_TD)
        return CombineSend.backward(ctx, token)[0], d_add, None, None


@dataclass
class Begun:
    """A dense dispatch whose rows fly already, while their routing is not known: see `NvlinkDispatcher.dispatch_begin`.

    of: the x that it was begun with; x_TD: the same rows where copies can read them.
    """

    of: Tensor
    x_TD: Tensor
    trip: Trip


def push_all(window: Window, link: Link, phase: Phase, rows: Tensor, *, fp8: bool) -> Trip:
    """Take a slot and copy rows `[T, D]` into every peer's window; the words come later (`FusedCall.push`)."""
    link.check()
    width = outward_width(rows, fp8)
    trip = window.begin(
        link.at(phase), width=width, dtypes=dtypes_word([rows.dtype]), link=link, home=False, dense=True
    )
    encoded = rows.new_empty(rows.shape[0], width, dtype=torch.uint8) if fp8 else None
    window.push_rows(trip, rows, encoded)
    return trip


def outward_width(rows: Tensor, fp8: bool) -> int:
    """Bytes of a row on its way out."""
    return fp8_width(rows.shape[1]) if fp8 else row_width(rows)


def row_width(rows: Tensor) -> int:
    """Bytes of a row."""
    return rows.shape[1] * rows.element_size()


def fp8_width(hidden: int) -> int:
    """Bytes of an encoded row: values, scales, up to whole 16-byte units."""
    return padded_width(hidden + 4 * -(-hidden // BLOCK))


def aligned(rows: Tensor) -> Tensor:
    """The rows, contiguous and at an address for 16-byte accesses."""
    rows = rows.contiguous()
    return rows.clone() if rows.data_ptr() % 16 else rows
