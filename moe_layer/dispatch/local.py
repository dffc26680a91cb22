"""One rank: no traffic and no host synchronisation. Compact rows are x itself; expert-major rows are gathered from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.base import finish, padded_rows, wire_dtype
from moe_layer.dispatch.plan import make_plan
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.sort_slots import sort_slots
from moe_layer.ops.tree_reduce import reduction_blocks, tree_reduce
from moe_layer.types import DispatchPlan, Received, Routing


@dataclass(frozen=True)
class LocalState:
    """weights_TK: the routing weights (differentiable); token_N: source token of each row, -1 for pads; dtype of x."""

    weights_TK: Tensor
    token_N: Tensor
    dtype: torch.dtype


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
        ids_TK, (T, K) = plan.ids_TK, plan.ids_TK.shape
        num_rows = padded_rows(T * K, num_local=self.num_experts, alignment=self.config.alignment)
        order = sort_slots(
            ids_TK, first_expert=0, num_local=self.num_experts, alignment=self.config.alignment, num_rows=num_rows
        )
        token_N = torch.where(order.slot_N >= 0, order.slot_N // max(K, 1), -1)
        probs_N = _GatherProbs.apply(routing.weights_TK, order.slot_N, order.row_CK)
        compact = self.config.rows == "compact"
        wire = wire_dtype(self.config, x_TD.dtype)
        rows = x_TD if compact else _Expand.apply(
            x_TD, token_N, order.row_CK, ids_TK, self.num_experts, self.blocks, wire
        )
        zero_N = torch.zeros_like(order.slot_N)
        return Received(
            rows=rows,
            index_N=token_N.clamp_min(0) if compact else None,
            probs_N=probs_N,
            act_probs_N=probs_N if self.config.apply_probs == "activation" else None,
            offsets_L1=order.offsets_L1,
            counts_L=order.counts_L,
            counts_LR=order.counts_L.unsqueeze(1),
            expert_ids_L=torch.arange(self.num_experts, dtype=torch.int32, device=ids_TK.device),
            src_N3=torch.stack(
                (zero_N.masked_fill_(order.slot_N < 0, -1), token_N, torch.where(token_N >= 0, order.slot_N % max(K, 1), -1)),
                dim=1,
            ),
            row_CK=order.row_CK,
            ids_CK=ids_TK,
            plan=plan,
            state=LocalState(routing.weights_TK, token_N, x_TD.dtype),
        )

    def combine(self, rows: Tensor, received: Received, add: Tensor | None = None) -> Tensor:
        state: LocalState = received.state
        sum_TD = tree_reduce(
            rows,
            received.row_CK,
            ids_MK=received.ids_CK,
            weights_MK=None if self.config.apply_probs == "activation" else state.weights_TK,
            src_N=state.token_N,
            num_experts=self.num_experts,
            blocks=self.blocks,
        )
        wire = wire_dtype(self.config, state.dtype)
        rounded_TD = sum_TD if wire == sum_TD.dtype else sum_TD.to(wire).to(sum_TD.dtype)
        return finish(rounded_TD, add, dtype=state.dtype)

    def check(self) -> None:
        """Nothing is reported late here."""

    def dispatch_send(
        self, x_TD: Tensor, routing: Routing, plan: DispatchPlan | None = None
    ) -> tuple[Any, Tensor]:
        return (x_TD, routing, plan), x_TD.new_empty(0)

    def dispatch_recv(self, handle: Any, token: Tensor) -> Received:
        return self.dispatch(*handle)

    def combine_send(self, rows: Tensor, received: Received) -> tuple[Any, Tensor]:
        return (rows, received), rows.new_empty(0)

    def combine_recv(self, handle: Any, token: Tensor, add: Tensor | None = None) -> Tensor:
        return self.combine(*handle, add)


class _Expand(torch.autograd.Function):
    """rows = x[token] with zero pads; backward sums a token's rows by the tree."""

    @staticmethod
    def forward(
        ctx: Any, x_TD: Tensor, token_N: Tensor, row_TK: Tensor, ids_TK: Tensor, num_experts: int, blocks: int, wire: torch.dtype
    ) -> Tensor:
        ctx.save_for_backward(row_TK, ids_TK)
        ctx.num_experts, ctx.blocks, ctx.wire, ctx.dtype = num_experts, blocks, wire, x_TD.dtype
        return gather_rows(x_TD, token_N)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor | None, ...]:
        row_TK, ids_TK = ctx.saved_tensors
        dx_TD = tree_reduce(d_rows, row_TK, ids_MK=ids_TK, num_experts=ctx.num_experts, blocks=ctx.blocks)
        return dx_TD.to(ctx.wire).to(ctx.dtype), None, None, None, None, None, None


class _GatherProbs(torch.autograd.Function):
    """Probability of each row, 0 for pads; backward gathers by the inverse map."""

    @staticmethod
    def forward(ctx: Any, weights_CK: Tensor, slot_N: Tensor, row_CK: Tensor) -> Tensor:
        ctx.save_for_backward(row_CK)
        return gather_rows(weights_CK.reshape(-1, 1), slot_N).squeeze(1)

    @staticmethod
    def backward(ctx: Any, d_probs_N: Tensor) -> tuple[Tensor, None, None]:
        (row_CK,) = ctx.saved_tensors
        return gather_rows(d_probs_N.reshape(-1, 1), row_CK.flatten()).view(row_CK.shape), None, None
