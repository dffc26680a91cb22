"""Deduplicated rows by uneven all-to-all: a token travels once to each rank that has one of its experts."""

from __future__ import annotations

from torch import Tensor

from moe_layer.dispatch.route import Pending, check_arrivals
from moe_layer.dispatch.wire import Link, Position
from moe_layer.types import DispatchPlan


class AllToAllRoute:
    """See `Route`."""

    def __init__(self, link: Link, plan: DispatchPlan) -> None:
        self.link = link
        self.position_TR = plan.position_TR
        self.send_R: list[int] = plan.send_counts_R.tolist()
        self.recv_R: list[int] = []
        self._tokens = plan.send_tokens
        self._num_tokens = plan.ids_TK.shape[0]

    def out(self, at: Position, tensors: list[Tensor]) -> Pending:
        headers = self.link.exchange_headers(at, tokens=self._num_tokens, rows_R=self.send_R, row=tensors)
        arriving_R = [rows for _tokens, rows in headers]
        self.recv_R = self.recv_R or arriving_R
        check_arrivals(self, at, arriving_R)
        sent = [tensor.index_select(0, self._tokens) for tensor in tensors]
        return self._exchange(at, sent, send_R=self.send_R, recv_R=self.recv_R)

    def back(self, at: Position, tensors: list[Tensor]) -> Pending:
        self.link.exchange_headers(at, tokens=self._num_tokens, rows_R=self.recv_R, row=tensors)
        return self._exchange(at, tensors, send_R=self.recv_R, recv_R=self.send_R)

    def _exchange(self, at: Position, tensors: list[Tensor], *, send_R: list[int], recv_R: list[int]) -> Pending:
        started = [self.link.exchange_rows(at, tensor, send_R=send_R, recv_R=recv_R) for tensor in tensors]
        return Pending(self.link, at, [target for target, _ in started], [work for _, work in started])
