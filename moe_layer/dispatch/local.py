"""One rank: no traffic and no host synchronisation. Compact rows are x itself (as a `dispatch_format` would round it);
expert-major rows are gathered from them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.arrange import GatherProbs, arrange
from moe_layer.dispatch.base import finish, padded_rows, round_to_wire, wire_dtype
from moe_layer.dispatch.formats import TokenFormat, after_trip, format_for, round_gradient, round_rows
from moe_layer.dispatch.options import caller_rows, check_add, check_call, check_rows, deliver, into, limit_tokens
from moe_layer.dispatch.plan import make_plan
from moe_layer.ops._call import refuse_second_derivative
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.sort_slots import SlotOrder, pad_to_capacity, sort_slots
from moe_layer.ops.tree_reduce import reduction_blocks, tree_reduce
from moe_layer.types import DispatchPlan, GradientLink, Received, Routing


@dataclass(frozen=True)
class LocalState:
    """weights_TK: the routing weights (differentiable); token_N: source token of each row, -1 for pads; dtype: of x;
    dropped_TR: bool, tokens that a static buffer left out, None when it cannot."""

    weights_TK: Tensor
    token_N: Tensor
    dtype: torch.dtype
    dropped_TR: Tensor | None


class LocalDispatcher:
    """The `Dispatcher` for R = 1."""

    def __init__(
        self,
        config: DispatchConfig,
        *,
        num_experts: int,
        top_k: int,
        layer_index: int = 0,
        token_format: TokenFormat | None = None,
    ) -> None:
        self.config = config
        self.num_experts = num_experts
        self.top_k = top_k
        self.layer_index = layer_index
        self.token_format = token_format
        self.blocks = reduction_blocks(num_experts)
        self.compact = config.rows == "compact"

    def prepare(self, ids_TK: Tensor) -> DispatchPlan:
        return make_plan(ids_TK, num_experts=self.num_experts, num_ranks=1)

    def dispatch_begin(self, x_TD: Tensor) -> Any:
        return None

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
        check_call(x_TD, routing, plan, num_experts=self.num_experts, top_k=self.top_k)
        routing = limit_tokens(routing, num_tokens, planned=plan is not None)
        plan = self.prepare(routing.ids_TK) if plan is None else plan
        order, ids_TK, dropped_TR = self._order(plan.ids_TK, routing.weights_TK)
        if routing.capacity is not None:
            order = pad_to_capacity(order, ids_TK, num_local=self.num_experts, capacity=routing.capacity)
        probs_N = GatherProbs.apply(routing.weights_TK, order)
        in_activation = self.config.apply_probs == "activation"
        has_pads = self.config.alignment > 1 or routing.capacity is not None
        scales = None
        if x_scale is None:
            x_TD = round_rows(x_TD, self._format(x_TD, x_TD.dtype))
            rows = x_TD if self.compact else self._expand(x_TD, order.token_N, order.row_CK, ids_TK)
        else:
            rows, scales = self._quantised(x_TD, x_scale, order.token_N)
        linked = in_activation and not has_pads and not torch.compiler.is_compiling()
        received = Received(
            rows=rows,
            index_N=order.index_N if self.compact else None,
            probs_N=probs_N,
            act_probs_N=probs_N if in_activation else None,
            offsets_L1=order.offsets_L1,
            counts_L=order.counts_L,
            split=partial(order.counts_L.unsqueeze, 1),
            first_expert=0,
            src=partial(_sources, order, self.top_k),
            row_CK=order.row_CK,
            ids_CK=ids_TK,
            plan=plan,
            state=LocalState(routing.weights_TK, order.token_N, x_TD.dtype, dropped_TR),
            link=GradientLink(order.index_N, order.offsets_L1) if linked and scales is None else None,
            scales=scales,
        )
        return deliver(received, out)

    def _quantised(self, x_TD: Tensor, x_scale: Tensor, token_N: Tensor) -> tuple[Tensor, Tensor]:
        """The caller's bytes and scales in the rows' order."""
        bytes_TD, scale_TS = caller_rows(x_TD, x_scale, self.token_format).encode(x_TD)
        if self.compact:
            return x_TD, scale_TS
        return gather_rows(bytes_TD, token_N).view(x_TD.dtype), gather_rows(scale_TS, token_N)

    def _order(self, ids_TK: Tensor, weights_TK: Tensor) -> tuple[SlotOrder, Tensor, Tensor | None]:
        """Row order, the ids that are kept, and which tokens a static buffer dropped."""
        if self.config.capacity == "static":
            slots = (self.config.max_tokens_per_part or ids_TK.shape[0]) * self.top_k
            arranged = arrange(
                ids_TK, config=self.config, first_expert=0, num_local=self.num_experts, capacity_slots=slots
            )
            dropped_TR = None if arranged.kept_C is None else ~arranged.kept_C.unsqueeze(1)
            return arranged.order, arranged.ids_CK, dropped_TR
        num_rows = padded_rows(ids_TK.numel(), num_local=self.num_experts, alignment=self.config.alignment)
        order = sort_slots(
            ids_TK,
            first_expert=0,
            num_local=self.num_experts,
            alignment=self.config.alignment,
            num_rows=num_rows,
            weights_CK=weights_TK.detach() if weights_TK.dtype == torch.float32 else None,
        )
        return order, ids_TK, None

    def _format(self, rows: Tensor, dtype: torch.dtype) -> TokenFormat:
        return format_for(self.config, self.token_format, hidden=rows.shape[1], dtype=dtype)

    def _expand(self, x_TD: Tensor, token_N: Tensor, row_TK: Tensor, ids_TK: Tensor) -> Tensor:
        wire = wire_dtype(self.config, x_TD.dtype)
        return _Expand.apply(x_TD, token_N, row_TK, ids_TK, self.num_experts, self.blocks, wire)

    def combine(
        self, rows: Tensor, received: Received, add: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        y_TD = self._combine(rows, received, add)
        return y_TD if out is None else into(y_TD, out, "out")

    def _combine(self, rows: Tensor, received: Received, add: Tensor | None) -> Tensor:
        check_rows(rows, received)
        state: LocalState = received.state
        check_add(add, (state.weights_TK.shape[0], rows.shape[1]))
        if received.scales is not None:  # x was quantised: y has the experts' dtype
            state = replace(state, dtype=rows.dtype)
        wire, dual = wire_dtype(self.config, state.dtype), self._format(rows, state.dtype)
        if (
            self.config.apply_probs == "activation"
            and rows.dtype == state.dtype
            and wire in (rows.dtype, torch.float32)
        ):
            return _Sum.apply(
                rows,
                add,
                received.row_CK,
                received.ids_CK,
                state.token_N,
                (self.num_experts, self.blocks, wire == rows.dtype),
                dual,
                received.link if received.link is not None and received.link.accepted(rows) else None,
            )
        rows_travel = self.config.apply_probs == "source"
        if rows_travel:
            rows = round_gradient(round_to_wire(rows, wire), dual, dtype=state.dtype)
        sum_TD = tree_reduce(
            rows,
            received.row_CK,
            ids_MK=received.ids_CK,
            weights_MK=None if self.config.apply_probs == "activation" else state.weights_TK,
            src_N=state.token_N,
            num_experts=self.num_experts,
            blocks=self.blocks,
        )
        if not rows_travel:
            sum_TD = round_gradient(round_to_wire(sum_TD, wire), dual, dtype=state.dtype)
        return finish(sum_TD, add, dtype=state.dtype)

    def check(self) -> None:
        """Nothing is reported late here."""

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
        return ((x_TD, routing, plan), options), x_TD.new_empty(0)

    def dispatch_recv(self, handle: Any, token: Tensor, *, out: Tensor | None = None) -> Received:
        arguments, options = handle
        return self.dispatch(*arguments, **options, out=out)

    def combine_send(self, rows: Tensor, received: Received) -> tuple[Any, Tensor]:
        return (rows, received), rows.new_empty(0)

    def combine_recv(
        self, handle: Any, token: Tensor, add: Tensor | None = None, *, out: Tensor | None = None
    ) -> Tensor:
        rows, received = handle
        return self.combine(rows, received, add, out=out)


def _sources(order: SlotOrder, top_k: int) -> Tensor:
    """int32 [N, 3]: rank 0, token, slot; -1 for pads."""
    pad_N = order.slot_N < 0
    slot_N = torch.where(pad_N, -1, order.slot_N % top_k)
    return torch.stack((torch.where(pad_N, -1, 0).to(torch.int32), order.token_N, slot_N), dim=1)


class _Sum(torch.autograd.Function):
    """y = tree sum of a token's rows (+ add), rounded once more; d(rows) is a gather of d(y), done by the experts if
    linked."""

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        add: Tensor | None,
        row_TK: Tensor,
        ids_TK: Tensor,
        token_N: Tensor,
        static: tuple[int, int, bool],
        dual: TokenFormat,
        link: GradientLink | None,
    ) -> Tensor:
        num_experts, blocks, round_to_rows = static
        ctx.dual, ctx.link, ctx.add_dtype = dual, link, None if add is None else add.dtype
        ctx.save_for_backward(token_N)
        return tree_reduce(
            rows,
            row_TK,
            ids_MK=ids_TK,
            num_experts=num_experts,
            blocks=blocks,
            add_MD=add,
            round_to_rows=round_to_rows,
            like_rows=True,
        )

    @staticmethod
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        (token_N,) = ctx.saved_tensors
        d_add = None if ctx.add_dtype is None else d_y_TD.to(ctx.add_dtype)
        d_rows = None
        if ctx.needs_input_grad[0]:
            d_y_TD = after_trip(d_y_TD.contiguous(), ctx.dual)
            d_rows = gather_rows(d_y_TD, token_N) if ctx.link is None else ctx.link.put(d_y_TD)
        return d_rows, d_add, None, None, None, None, None, None


class _Expand(torch.autograd.Function):
    """rows = x[token] with zero pads; backward sums a token's rows by the tree."""

    @staticmethod
    def forward(
        ctx: Any,
        x_TD: Tensor,
        token_N: Tensor,
        row_TK: Tensor,
        ids_TK: Tensor,
        num_experts: int,
        blocks: int,
        wire: torch.dtype,
    ) -> Tensor:
        ctx.save_for_backward(row_TK, ids_TK)
        ctx.num_experts, ctx.blocks, ctx.wire, ctx.dtype = num_experts, blocks, wire, x_TD.dtype
        return gather_rows(x_TD, token_N)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        row_TK, ids_TK = ctx.saved_tensors
        dx_TD = tree_reduce(d_rows, row_TK, ids_MK=ids_TK, num_experts=ctx.num_experts, blocks=ctx.blocks)
        return dx_TD.to(ctx.wire).to(ctx.dtype), None, None, None, None, None, None
