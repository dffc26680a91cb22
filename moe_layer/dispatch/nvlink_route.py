"""Any trip of rows through a window: the `Route` of backend nvlink for options without fused kernels.

Several tensors travel as one row of bytes. Token formats, `apply_probs: source`, dropping and fp64 take this way; what
they cost beside the fused one is a copy into such rows and one out of them. Under `apply_probs: source` a token has up
to K rows in a trip (`slots`), so that the window is K times as large.

Letters: T tokens, C compact rows, R ranks, S rows sent.
"""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor

from moe_layer.dispatch.route import Pending
from moe_layer.dispatch.window import Trip, Window, WindowSize, padded_width, window_for
from moe_layer.dispatch.wire import Link, Position, dtypes_word, row_bytes
from moe_layer.errors import RankMismatch
from moe_layer.ops import ep
from moe_layer.types import DispatchPlan


class NvlinkRoute:
    """See `Route` and `SlotRoute`. Home rows are in blocks of T, one a rank; `max_rows`: of a trip, from one rank."""

    def __init__(self, link: Link, plan: DispatchPlan, *, max_rows: int, depth: int, blocks: int) -> None:
        self.link, self.recv_R = link, []
        self._max_rows, self._depth, self._blocks = max_rows, depth, blocks
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

    def slots(
        self, at: Position, tensors: list[Tensor], *, send_R: list[int], recv_R: list[int], home: bool
    ) -> Pending:
        counts_R = torch.tensor(send_R, dtype=torch.int32, device=self.position_TR.device)
        first_R = counts_R.cumsum(0) - counts_R
        place_S = torch.arange(max(*send_R, 1), dtype=torch.int32, device=counts_R.device)
        tokens_RS = (first_R.unsqueeze(1) + place_S).int()
        return self._send(at, tensors, tokens=tokens_RS, counts=counts_R, home=home, recv_R=recv_R)

    def _send(
        self,
        at: Position,
        tensors: list[Tensor],
        *,
        tokens: Tensor,
        counts: Tensor,
        home: bool,
        recv_R: list[int] | None = None,
    ) -> Pending:
        self.link.check()
        packed = _pack(tensors)
        need = WindowSize(self.link.size, self._max_rows, packed.shape[1], 1, self._depth)
        window = window_for(self.link, need)
        trip = window.begin(
            at, width=packed.shape[1], dtypes=dtypes_word([t.dtype for t in tensors]), link=self.link, home=home
        )
        window.send(
            trip, ep.ep_push, window.peers, window.state, packed, tokens, counts, trip.words, blocks=self._blocks
        )
        if recv_R is None:
            receive = partial(self._receive, window, trip, packed, tokens, tensors, home=home)
        else:
            receive = partial(self._receive_slots, window, trip, packed, tokens, tensors, recv_R=recv_R)
        return _Arriving(self.link, at, receive)

    def _receive(
        self, window: Window, trip: Trip, packed: Tensor, tokens: Tensor, like: list[Tensor], *, home: bool
    ) -> list[Tensor]:
        R, T, device = self.link.size, self._num_tokens, packed.device
        if home:
            counts_R, rows = self._counts_R, R * T
            base_R1 = torch.arange(R + 1, dtype=torch.int32, device=device) * T
        else:
            self.recv_R, counts_R, base_R1 = self._await(window, trip, self.recv_R)
            self._recv_counts_R, self._recv_base_R1, rows = counts_R, base_R1, sum(self.recv_R)
        return self._take(window, trip, packed, tokens, like, counts_R=counts_R, base_R1=base_R1, rows=rows)

    def _receive_slots(
        self, window: Window, trip: Trip, packed: Tensor, tokens: Tensor, like: list[Tensor], *, recv_R: list[int]
    ) -> list[Tensor]:
        _, counts_R, base_R1 = self._await(window, trip, recv_R)
        return self._take(window, trip, packed, tokens, like, counts_R=counts_R, base_R1=base_R1, rows=sum(recv_R))

    def _await(self, window: Window, trip: Trip, expected_R: list[int]) -> tuple[list[int], Tensor, Tensor]:
        """How many rows arrive from each rank (as expected, if anything is), and where they begin."""
        counts_R, base_R1 = ep.ep_await(window.peers, window.state, trip.words)
        state = torch.cat((window.state[: ep.STATE_HEAD], counts_R)).tolist()
        window.check(self.link, state)
        arriving_R = state[ep.STATE_HEAD :]
        if expected_R and arriving_R != expected_R:
            raise RankMismatch(f"at {trip.at} rows {arriving_R} arrive from the ranks, expected {expected_R}")
        return arriving_R, counts_R, base_R1

    def _take(
        self,
        window: Window,
        trip: Trip,
        packed: Tensor,
        tokens: Tensor,
        like: list[Tensor],
        *,
        counts_R: Tensor,
        base_R1: Tensor,
        rows: int,
    ) -> list[Tensor]:
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
        if part.storage_offset() % one.element_size():  # one row is contiguous where it lies
            part = part.clone()
        tensors.append(part.view(one.dtype).view(part.shape[0], *one.shape[1:]))
        first += width
    return tensors
