"""Dispatch over a process group: four autograd halves around a `Route`.

    dispatch_send -> dispatch_recv -> experts -> combine_send -> combine_recv

A send starts collectives and returns a `token`, an empty tensor that carries the graph edge to its recv; the recv
waits. In backward the edges run the other way: recv's backward starts, send's backward waits. Each recv saves an empty
tensor last: recompute that stops early, at the last tensor it needs, cannot leave a send without its recv.

Shape letters: T tokens, C compact rows, K slots, N expert-major rows, D hidden, R ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.arrange import Arrangement, arrange, gather_slots, scatter_slots
from moe_layer.dispatch.base import finish, round_to_wire, wire_dtype
from moe_layer.dispatch.formats import InputFormat, TokenFormat, decode_rows, encode_rows, format_for, round_gradient
from moe_layer.dispatch.options import (
    CallerRows,
    caller_rows,
    check_add,
    check_call,
    check_idle,
    check_pending,
    check_rows,
    deliver,
    into,
    limit_tokens,
)
from moe_layer.dispatch.plan import make_plan
from moe_layer.dispatch.route import Pending, Route, pick_home, sum_home, sum_position
from moe_layer.dispatch.source import SlotTrip
from moe_layer.dispatch.wire import Link
from moe_layer.errors import CapacityError
from moe_layer.ops._call import refuse_second_derivative
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.tree_reduce import reduction_blocks, tree_reduce
from moe_layer.types import DispatchPlan, Received, Routing


@dataclass
class Call:
    """State of one dispatch and its combine: created by dispatch_send, carried by handles and `Received`, never shared.

    Attributes:
        format: of the rows that travel out; `dual()` is that of the d(sum) rows in combine's backward.
        pending: the trip under way between a send and its recv (one per direction, forward or backward).
        scale_CS: scales of rows that the caller quantised, set by dispatch_recv.
        dropped_TR: bool, set by combine_recv under `overflow: drop`: pairs whose rank had no room.
    """

    dispatcher: ExchangeDispatcher
    route: Route
    link: Link
    plan: DispatchPlan
    dtype: torch.dtype
    weights_dtype: torch.dtype
    format: TokenFormat
    weights_TK: Tensor | None = None
    arranged: Arrangement | None = None
    scale_CS: Tensor | None = None
    dropped_TR: Tensor | None = None
    pending: dict[str, Pending] = field(default_factory=dict)

    @property
    def wire(self) -> torch.dtype:
        return wire_dtype(self.dispatcher.config, self.dtype)

    def dual(self, rows: Tensor) -> TokenFormat:
        d = self.dispatcher
        return format_for(d.config, d.token_format, hidden=rows.shape[1], dtype=self.dtype)

    def rank_TK(self) -> Tensor:
        """Owner of each slot, -1 when absent."""
        ids_TK = self.plan.ids_TK
        return torch.where(ids_TK >= 0, ids_TK * self.plan.num_ranks // self.plan.num_experts, -1)


class ExchangeDispatcher:
    """The `Dispatcher` for R > 1; `open_route` makes the backend's route for a plan."""

    def __init__(
        self,
        config: DispatchConfig,
        *,
        num_experts: int,
        top_k: int,
        link: Link,
        open_route: Callable[[Link, DispatchPlan], Route],
        probs_at_home: bool,
        token_format: TokenFormat | None = None,
    ) -> None:
        self.config = config
        self.num_experts, self.top_k = num_experts, top_k
        self.num_local = num_experts // link.size
        self.first_expert = self.num_local * link.rank
        self.blocks = reduction_blocks(num_experts)
        self.link = link
        self.open_route = open_route
        self.token_format = token_format
        self.probs_at_home = probs_at_home  # apply_probs: source, unless the weights are known everywhere anyway

    def prepare(self, ids_TK: Tensor) -> DispatchPlan:
        return make_plan(ids_TK, num_experts=self.num_experts, num_ranks=self.link.size)

    def dispatch_begin(self, x_TD: Tensor) -> Any:
        return None

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
        self._check_input(x_TD, routing, plan)
        routing = limit_tokens(routing, num_tokens, planned=plan is not None)
        plan = self.prepare(routing.ids_TK) if plan is None else plan
        if x_scale is None:
            form = format_for(self.config, self.token_format, hidden=x_TD.shape[1], dtype=x_TD.dtype)
        else:
            form = caller_rows(x_TD, x_scale, self.token_format)
        route, weights_dtype = self.open_route(self.link, plan), routing.weights_TK.dtype
        call = Call(self, route, self.link, plan, x_TD.dtype, weights_dtype, form)
        if self.probs_at_home:
            call.weights_TK = routing.weights_TK
        return call, _DispatchSend.apply(x_TD, routing.weights_TK, call)

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def dispatch_recv(self, handle: Any, token: Tensor, *, out: Tensor | None = None) -> Received:
        check_pending(handle.pending, "dispatch")
        rows, probs_N = _DispatchRecv.apply(token, handle)
        arranged = handle.arranged
        assert arranged is not None
        order = arranged.order
        compact = self.config.rows == "compact"
        scales = handle.scale_CS
        if scales is not None:
            rows = rows.view(handle.dtype)
            scales = scales if compact else gather_rows(scales, arranged.compact_N)
        received = Received(
            rows=rows,
            index_N=arranged.compact_N.clamp_min(0) if compact else None,
            probs_N=probs_N,
            act_probs_N=probs_N if self.config.apply_probs == "activation" else None,
            offsets_L1=order.offsets_L1,
            counts_L=order.counts_L,
            split=arranged.counts_LR,
            first_expert=self.first_expert,
            src=arranged.src_N3,
            row_CK=order.row_CK,
            ids_CK=arranged.ids_CK,
            plan=handle.plan,
            state=handle,
            scales=scales,
        )
        return deliver(received, out)

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def combine_send(self, rows: Tensor, received: Received) -> tuple[Any, Tensor]:
        check_rows(rows, received)
        call: Call = received.state
        check_idle(call.pending, "combine")
        if call.scale_CS is not None:  # x was quantised: y has the experts' dtype
            call = replace(call, dtype=rows.dtype)
        if self.probs_at_home:
            trip: Any = SlotTrip(call, dual=call.dual(rows))
        elif self.config.apply_probs == "activation":
            trip = PartialTrip(call, wire=call.wire, dual=call.dual(rows))
        else:
            dual = call.dual(rows)
            wide, source = torch.promote_types(rows.dtype, torch.float32), self.config.apply_probs == "source"
            if source:  # the same roundings as rows that travel home, and their gradients back
                rows = round_gradient(round_to_wire(rows, call.wire), dual, dtype=call.dtype)
                dual = InputFormat(rows.shape[1], call.dtype)
            rows = rows.to(wide) * received.probs_N.to(wide).unsqueeze(1)
            trip = PartialTrip(call, wire=wide if source else call.wire, dual=dual)
        return trip, _CombineSend.apply(rows, trip)

    @torch.compiler.disable(reason="dispatch over several ranks talks to its peers: a documented graph break")
    def combine_recv(
        self, handle: Any, token: Tensor, add: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        check_pending(handle.call.pending, "combine")
        sum_TD = _CombineRecv.apply(token, handle.call.weights_TK, handle)
        check_add(add, tuple(sum_TD.shape))
        y_TD = finish(sum_TD, add, dtype=handle.call.dtype)
        return y_TD if out is None else into(y_TD, out, "out")

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
        sent = self.dispatch_send(x_TD, routing, plan, num_tokens=num_tokens, x_scale=x_scale, begun=begun)
        return self.dispatch_recv(*sent, out=out)

    def combine(
        self, rows: Tensor, received: Received, add: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        return self.combine_recv(*self.combine_send(rows, received), add, out=out)

    def check(self) -> None:
        """Raise DispatchTimeout when an earlier call found the group unusable."""
        self.link.check()

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()

    def _check_input(self, x_TD: Tensor, routing: Routing, plan: DispatchPlan | None) -> None:
        check_call(x_TD, routing, plan, num_experts=self.num_experts, top_k=self.top_k)
        self._check_tokens(x_TD)

    def _check_tokens(self, x_TD: Tensor) -> None:
        T, limit, chunks = x_TD.shape[0], self.config.max_tokens_per_part, self.config.chunks
        if limit is not None and T > limit:
            whole = "" if chunks == 1 else f", {self.config.max_tokens_per_rank} in {chunks} dispatch.chunks"
            raise CapacityError(
                f"{T} tokens exceed dispatch.max_tokens_per_rank ({limit}{whole}); raise it or send fewer tokens"
            )


class PartialTrip:
    """Combine with one pre-reduced row per (token, rank); `wire`: their dtype, `dual`: format of the d(sum) rows."""

    def __init__(self, call: Call, *, wire: torch.dtype, dual: TokenFormat) -> None:
        self.call = call
        self.wire, self.dual = wire, dual

    def send(self, rows_ND: Tensor) -> None:
        call, d = self.call, self.call.dispatcher
        assert call.arranged is not None
        part_CD = tree_reduce(
            rows_ND,
            call.arranged.order.row_CK,
            ids_MK=call.arranged.ids_CK,
            num_experts=d.num_experts,
            blocks=d.blocks,
        )
        tensors = [part_CD.to(self.wire)]
        if call.arranged.kept_C is not None and d.config.overflow == "drop":
            tensors.append(call.arranged.kept_C.to(torch.uint8).unsqueeze(1))
        call.pending["combine"] = call.route.back(call.link.at("combine"), tensors)

    def receive(self, weights_TK: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        call = self.call
        home_SD, *kept = call.pending.pop("combine").wait()
        position_TR = call.route.position_TR
        if kept:
            kept_TR = gather_rows(kept[0], position_TR.flatten()).view(position_TR.shape)
            call.dropped_TR = (kept_TR == 0) & (position_TR >= 0)
        return sum_home(home_SD, sum_position(call.route)), ()

    def send_back(self, d_sum_TD: Tensor, saved: tuple[Tensor, ...]) -> None:
        call = self.call
        payload = encode_rows(self.dual, d_sum_TD.to(call.dtype))
        call.pending["combine backward"] = call.route.out(call.link.at("combine backward"), payload)
        return None

    def receive_back(self, dtype: torch.dtype) -> Tensor:
        payload = self.call.pending.pop("combine backward").wait()
        d_part_CD = decode_rows(self.dual, payload, dtype=self.call.dtype)
        assert self.call.arranged is not None
        return gather_rows(d_part_CD, self.call.arranged.compact_N).to(dtype)


class _DispatchSend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weights_TK: Tensor, call: Call) -> Tensor:
        ctx.call = call
        token_T1 = torch.arange(x_TD.shape[0], dtype=torch.int32, device=x_TD.device).unsqueeze(1)
        # ids travel plus one, so that the zero rows of a padded gather mean "absent"
        tensors = [*encode_rows(call.format, x_TD), torch.cat((call.plan.ids_TK + 1, token_T1), dim=1)]
        if not call.dispatcher.probs_at_home:
            tensors.append(weights_TK)
        call.pending["dispatch"] = call.route.out(call.link.at("dispatch"), tensors)
        return weights_TK.new_empty(0)

    @staticmethod
    def backward(ctx: Any, d_token: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        call: Call = ctx.call
        home_SD, *home = call.pending.pop("dispatch backward").wait()
        dx_TD = None if call.scale_CS is not None else sum_home(home_SD, sum_position(call.route)).to(call.dtype)
        if not home:
            return dx_TD, None, None
        d_weights_TK = pick_home(home[0], call.route.position_TR, rank_TK=call.rank_TK())
        return dx_TD, d_weights_TK.to(call.weights_dtype), None


class _DispatchRecv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, call: Call) -> tuple[Tensor, Tensor]:
        d = call.dispatcher
        arrived = call.pending.pop("dispatch").wait()
        weights = None if d.probs_at_home else arrived.pop()
        *payload, meta = arrived
        if isinstance(call.format, CallerRows):
            x_CD, call.scale_CS = payload
        else:
            x_CD = decode_rows(call.format, payload, dtype=call.dtype)
        call.arranged = arranged = _arrange(call, ids_CK=meta[:, :-1] - 1, token_C=meta[:, -1])
        order = arranged.order
        if weights is None:
            weights = torch.ones(arranged.ids_CK.shape, dtype=call.weights_dtype, device=x_CD.device)
        ctx.call = call
        rows = x_CD if d.config.rows == "compact" else gather_rows(x_CD, arranged.compact_N)
        probs_N = gather_slots(weights, order.slot_N)
        ctx.save_for_backward(token.new_empty(0))
        return rows, probs_N

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_probs_N: Tensor) -> tuple[Tensor, None]:
        refuse_second_derivative()
        call: Call = ctx.call
        d = call.dispatcher
        assert call.arranged is not None
        order = call.arranged.order
        if call.scale_CS is not None:  # quantised by the caller: no gradient, but the header wants rows
            part_CD = d_probs_N.new_zeros(call.scale_CS.shape[0], 1)
        elif d.config.rows == "compact":
            part_CD = d_rows
        else:
            part_CD = tree_reduce(
                d_rows, order.row_CK, ids_MK=call.arranged.ids_CK, num_experts=d.num_experts, blocks=d.blocks
            )
        tensors = [part_CD if call.scale_CS is not None else part_CD.to(call.wire)]
        if not d.probs_at_home:
            tensors.append(scatter_slots(d_probs_N, order.row_CK))
        call.pending["dispatch backward"] = call.route.back(call.link.at("dispatch backward"), tensors)
        return d_probs_N.new_zeros(0), None


def _arrange(call: Call, *, ids_CK: Tensor, token_C: Tensor) -> Arrangement:
    d = call.dispatcher
    T = call.plan.ids_TK.shape[0]
    recv_R = torch.tensor(call.route.recv_R, device=ids_CK.device)
    rank_C = torch.arange(d.link.size, dtype=torch.int32, device=ids_CK.device).repeat_interleave(
        recv_R, output_size=ids_CK.shape[0]
    )
    try:
        return arrange(
            ids_CK,
            config=d.config,
            first_expert=d.first_expert,
            num_local=d.num_local,
            capacity_slots=(d.config.max_tokens_per_part or T) * d.top_k,
            rank_C=rank_C,
            token_C=token_C,
            num_ranks=d.link.size,
        )
    except CapacityError:
        call.link.report_overflow(call.link.at("dispatch"), tokens=T)
        raise


class _CombineSend(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows_ND: Tensor, trip: Any) -> Tensor:
        ctx.trip, ctx.dtype = trip, rows_ND.dtype
        trip.send(rows_ND)
        return rows_ND.new_empty(0)

    @staticmethod
    def backward(ctx: Any, d_token: Tensor) -> tuple[Tensor, None]:
        return ctx.trip.receive_back(ctx.dtype), None


class _CombineRecv(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, token: Tensor, weights_TK: Tensor | None, trip: Any) -> Tensor:
        sum_TD, saved = trip.receive(weights_TK)
        ctx.trip = trip
        ctx.save_for_backward(*saved, token.new_empty(0))
        return sum_TD

    @staticmethod
    def backward(ctx: Any, d_sum_TD: Tensor) -> tuple[Tensor, Tensor | None, None]:
        refuse_second_derivative()
        d_weights_TK = ctx.trip.send_back(d_sum_TD, ctx.saved_tensors[:-1])
        return d_sum_TD.new_zeros(0), d_weights_TK, None
