"""Any trip of rows through a window: the `Route` of backend nvlink for options without fused kernels.

Several tensors travel as one row of bytes. Token formats, `apply_probs: source`, dropping and fp64 take this way; what
they cost beside the fused one is a copy into such rows and one out of them.

Letters: T tokens, C compact rows, R ranks, S rows sent.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moe_layer.dispatch.route import Pending, row_bytes
from moe_layer.dispatch.window import Trip, Window, WindowSize, padded_width, window_for
from moe_layer.dispatch.wire import Link, Position
from moe_layer.errors import RankMismatch
from moe_layer.ops import ep
from moe_layer.types import DispatchPlan


class NvlinkRoute:
    """See `Route`. Home rows are in blocks of T, one a rank."""

    def __init__(self, link: Link, plan: DispatchPlan, *, max_tokens: int, depth: int, blocks: int) -> None:
        self.link, self.recv_R = link, []
        self._max_tokens, self._depth, self._blocks = max_tokens, depth, blocks
        self._tokens_RT, position_TR, self._counts_R, *_ = ep.ep_plan(
            plan.ids_TK, num_experts=plan.num_experts, num_ranks=plan.num_ranks
        )
        self._num_tokens = T = plan.ids_TK.shape[0]
        first_R = torch.arange(link.size, dtype=torch.int32, device=position_TR.device) * T
        self.position_TR = torch.where(position_TR >= 0, position_TR + first_R, -1)
        self._recv_counts_R = self._recv_base_R1 = position_TR.new_empty(0)

    def out(self, at: Position, tensors: list[Tensor]) -> Pending:
        return self._send(at, tensors, tokens=self._tokens_RT, counts=self._counts_R, home=False)

    def back(self, at: Position, tensors: list[Tensor]) -> Pending:
        longest = max([*self.recv_R, 1])
        place_S = torch.arange(longest, dtype=torch.int32, device=self._recv_base_R1.device)
        tokens_RS = (self._recv_base_R1[:-1].unsqueeze(1) + place_S).contiguous()
        return self._send(at, tensors, tokens=tokens_RS, counts=self._recv_counts_R, home=True)

    def _send(self, at: Position, tensors: list[Tensor], *, tokens: Tensor, counts: Tensor, home: bool) -> Pending:
        self.link.check()
        packed = _pack(tensors)
        need = WindowSize(self.link.size, self._max_tokens, packed.shape[1], 1, self._depth)
        window = window_for(self.link, need)
        trip = window.begin(at, width=packed.shape[1], link=self.link, home=home)
        window.send(
            trip, ep.ep_push, window.peers, window.state, packed, tokens, counts, trip.words, blocks=self._blocks
        )
        receive = partial(self._receive, window, trip, packed, tokens, tensors, home=home)
        return _Arriving(self.link, at, receive)

    def _receive(
        self, window: Window, trip: Trip, packed: Tensor, tokens: Tensor, like: list[Tensor], *, home: bool
    ) -> list[Tensor]:
        R, T, device = self.link.size, self._num_tokens, packed.device
        if home:
            counts_R, rows = self._counts_R, R * T
            base_R1 = torch.arange(R + 1, dtype=torch.int32, device=device) * T
        else:
            counts_R, base_R1 = ep.ep_await(window.peers, window.state, trip.words)
            state, arriving_R = torch.cat((window.state[:8], counts_R)).split((8, R))
            window.check(self.link, state.tolist())
            self.recv_R = self.recv_R or arriving_R.tolist()
            if arriving_R.tolist() != self.recv_R:
                raise RankMismatch(
                    f"at {trip.at} rows {arriving_R.tolist()} arrive from the ranks, expected {self.recv_R}"
                )
            self._recv_counts_R, self._recv_base_R1, rows = counts_R, base_R1, sum(self.recv_R)
        out = packed.new_empty(rows, packed.shape[1])
        window.take(trip, packed, tokens, base_R1, counts_R, out=out)
        window.check(self.link)
        return _unpack(out, like)


class _Arriving(Pending):
    """A trip whose rows are copied out of the window when somebody waits for them."""

    def __init__(self, link: Link, at: Position, receive: partial[list[Tensor]]) -> None:
        super().__init__(link, at, [], [])
        self._receive = receive

    def wait(self) -> list[Tensor]:
        return self._receive()


def _pack(tensors: list[Tensor]) -> Tensor:
    """One uint8 row of whole 16-byte units a row, zeros at its end."""
    rows, width = tensors[0].shape[0], row_bytes(tensors)
    parts = [_row_bytes(tensor) for tensor in tensors]
    parts.append(parts[0].new_zeros(rows, padded_width(width) - width))
    return torch.cat(parts, dim=1)


def _row_bytes(rows: Tensor) -> Tensor:
    width = rows.shape[1:].numel()
    if rows.numel() == 0:
        return torch.empty(rows.shape[0], width * rows.element_size(), dtype=torch.uint8, device=rows.device)
    return rows.contiguous().view(rows.shape[0], width).view(torch.uint8)


def _unpack(packed: Tensor, like: list[Tensor]) -> list[Tensor]:
    tensors, first = [], 0
    for one in like:
        width = one.shape[1:].numel() * one.element_size()
        part = packed[:, first : first + width].contiguous()
        tensors.append(part.view(one.dtype).view(part.shape[0], *one.shape[1:]))
        first += width
    return tensors
