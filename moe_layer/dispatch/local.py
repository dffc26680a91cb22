"""One rank: no traffic and no host synchronisation. Compact rows are x itself; expert-major rows are gathered from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.arrange import GatherProbs, arrange
from moe_layer.dispatch.base import finish, round_to_wire, wire_dtype
from moe_layer.dispatch.plan import make_plan
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.tree_reduce import reduction_blocks, tree_reduce
from moe_layer.types import DispatchPlan, Received, Routing


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

    def __init__(self, config: DispatchConfig, *, num_experts: int, top_k: int, layer_index: int = 0) -> None:
        self.config = config
        self.num_experts = num_experts
        self.top_k = top_k
        self.layer_index = layer_index
        self.blocks = reduction_blocks(num_experts)

    def prepare(self, ids_TK: Tensor) -> DispatchPlan:
        return make_plan(ids_TK, num_experts=self.num_experts, num_ranks=1)

    def dispatch(self, x_TD: Tensor, routing: Routing, plan: DispatchPlan | None = None) -> Received:
        plan = self.prepare(routing.ids_TK) if plan is None else plan
        arranged = arrange(
            plan.ids_TK,
            config=self.config,
            first_expert=0,
            num_local=self.num_experts,
            capacity_slots=(self.config.max_tokens_per_rank or x_TD.shape[0]) * self.top_k,
        )
        order, token_N = arranged.order, arranged.compact_N
        probs_N = GatherProbs.apply(routing.weights_TK, order.slot_N, order.row_CK)
        compact = self.config.rows == "compact"
        dropped_TR = None if arranged.kept_C is None else ~arranged.kept_C.unsqueeze(1)
        return Received(
            rows=x_TD if compact else self._expand(x_TD, token_N, order.row_CK, arranged.ids_CK),
            index_N=token_N.clamp_min(0) if compact else None,
            probs_N=probs_N,
            act_probs_N=probs_N if self.config.apply_probs == "activation" else None,
            offsets_L1=order.offsets_L1,
            counts_L=order.counts_L,
            counts_LR=arranged.counts_LR,
            expert_ids_L=torch.arange(self.num_experts, dtype=torch.int32, device=x_TD.device),
            src_N3=arranged.src_N3,
            row_CK=order.row_CK,
            ids_CK=arranged.ids_CK,
            plan=plan,
            state=LocalState(routing.weights_TK, token_N, x_TD.dtype, dropped_TR),
        )

    def _expand(self, x_TD: Tensor, token_N: Tensor, row_TK: Tensor, ids_TK: Tensor) -> Tensor:
        wire = wire_dtype(self.config, x_TD.dtype)
        return _Expand.apply(x_TD, token_N, row_TK, ids_TK, self.num_experts, self.blocks, wire)

    def combine(self, rows: Tensor, received: Received, add: Tensor | None = None) -> Tensor:
        state: LocalState = received.state
        wire = wire_dtype(self.config, state.dtype)
        rows_travel = self.config.apply_probs == "source"
        if rows_travel:
            rows = round_to_wire(rows, wire)
        sum_TD = tree_reduce(
            rows,
            received.row_CK,
            ids_MK=received.ids_CK,
            weights_MK=None if self.config.apply_probs == "activation" else state.weights_TK,
            src_N=state.token_N,
            num_experts=self.num_experts,
            blocks=self.blocks,
        )
        return finish(sum_TD if rows_travel else round_to_wire(sum_TD, wire), add, dtype=state.dtype)

    def check(self) -> None:
        """Nothing is reported late here."""

    def dispatch_send(self, x_TD: Tensor, routing: Routing, plan: DispatchPlan | None = None) -> tuple[Any, Tensor]:
        return (x_TD, routing, plan), x_TD.new_empty(0)

    def dispatch_recv(self, handle: Any, token: Tensor) -> Received:
        return self.dispatch(*handle)

    def combine_send(self, rows: Tensor, received: Received) -> tuple[Any, Tensor]:
        return (rows, received), rows.new_empty(0)

    def combine_recv(self, handle: Any, token: Tensor, add: Tensor | None = None) -> Tensor:
        rows, received = handle
        return self.combine(rows, received, add)


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
        row_TK, ids_TK = ctx.saved_tensors
        dx_TD = tree_reduce(d_rows, row_TK, ids_MK=ids_TK, num_experts=ctx.num_experts, blocks=ctx.blocks)
        return dx_TD.to(ctx.wire).to(ctx.dtype), None, None, None, None, None, None
