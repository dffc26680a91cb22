"""`apply_probs: source`: no probabilities travel, every slot's row returns, and the weights are applied at home.

Shape letters: P slot rows at home (rank, token, slot order), T tokens, K slots, N expert-major rows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_layer.dispatch.formats import TokenFormat, decode_rows, encode_rows
from moe_layer.dispatch.route import Pending, SlotRoute
from moe_layer.dispatch.wire import Phase
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.sort_slots import sort_slots
from moe_layer.ops.tree_reduce import tree_reduce

if TYPE_CHECKING:
    from moe_layer.dispatch.exchange import Call


class SlotTrip:
    """Combine with one row per slot; `dual`: format of the gradients of these rows."""

    def __init__(self, call: Call, *, dual: TokenFormat) -> None:
        self.call, self.dual = call, dual
        arranged, plan = call.arranged, call.plan
        assert arranged is not None
        row_CK = arranged.order.row_CK
        # A dropped slot still travels, as a zero row: home knows how many slots it sent, not which ones had room.
        asked_CK = arranged.asked_CK
        self._slots = asked_CK.flatten().nonzero().squeeze(1)
        self._row_P = row_CK.flatten().index_select(0, self._slots)
        self._send_R = _per_block(asked_CK.sum(1), call.route.recv_R)
        self._home_R: list[int] = plan.counts_E.view(plan.num_ranks, -1).sum(1).tolist()
        ranks = plan.num_ranks
        self._home_TK = sort_slots(
            call.rank_TK(), first_expert=0, num_local=ranks, alignment=1, num_rows=sum(self._home_R)
        ).row_CK

    def send(self, rows_ND: Tensor) -> None:
        rows = gather_rows(rows_ND, self._row_P).to(self.call.wire)
        self.call.pending["combine"] = self._exchange("combine", [rows], send_R=self._send_R, recv_R=self._home_R)

    def receive(self, weights_TK: Tensor | None) -> tuple[Tensor, tuple[Tensor, ...]]:
        (home_PD,) = self.call.pending.pop("combine").wait()
        assert weights_TK is not None
        d = self.call.dispatcher
        sum_TD = tree_reduce(
            home_PD,
            self._home_TK,
            ids_MK=self.call.plan.ids_TK,
            weights_MK=weights_TK,
            num_experts=d.num_experts,
            blocks=d.blocks,
        )
        return sum_TD, (home_PD, weights_TK)

    def send_back(self, d_sum_TD: Tensor, saved: tuple[Tensor, ...]) -> Tensor:
        home_PD, weights_TK = saved
        d_home_PD, d_weights_TK = torch.ops.moe_layer.tree_reduce_bwd(
            d_sum_TD, home_PD, self._home_TK, weights_TK, None, home_PD.shape[0]
        )
        payload = encode_rows(self.dual, d_home_PD.to(self.call.dtype))
        at: Phase = "combine backward"
        self.call.pending[at] = self._exchange(at, payload, send_R=self._home_R, recv_R=self._send_R)
        return d_weights_TK.to(weights_TK.dtype)

    def receive_back(self, dtype: torch.dtype) -> Tensor:
        payload = self.call.pending.pop("combine backward").wait()
        d_rows_PD = decode_rows(self.dual, payload, dtype=self.call.dtype)
        assert self.call.arranged is not None
        N = self.call.arranged.order.slot_N.shape[0]
        position = torch.arange(self._row_P.numel(), device=self._row_P.device)
        target = torch.where(self._row_P >= 0, self._row_P, N).long()
        index_N = torch.full((N + 1,), -1, device=target.device).scatter_(0, target, position)[:-1]
        return gather_rows(d_rows_PD, index_N).to(dtype)

    def _exchange(self, phase: Phase, tensors: list[Tensor], *, send_R: list[int], recv_R: list[int]) -> Pending:
        link, route = self.call.link, self.call.route
        at = link.at(phase)
        if isinstance(route, SlotRoute):
            return route.slots(at, tensors, send_R=send_R, recv_R=recv_R, home=phase == "combine")
        tokens = self.call.plan.ids_TK.shape[0]
        link.exchange_headers(at, tokens=tokens, rows_R=send_R, row=tensors)
        started = [link.exchange_rows(at, tensor, send_R=send_R, recv_R=recv_R) for tensor in tensors]
        return Pending(link, at, [target for target, _ in started], [work for _, work in started])


def _per_block(values: Tensor, sizes: list[int]) -> list[int]:
    """Sums of consecutive runs of the given sizes."""
    return [int(part.sum()) for part in values.split(sizes)]
