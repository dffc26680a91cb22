"""Every rank gathers every token (padded to the longest rank); partial sums of all tokens go home. For small T or R."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_layer.dispatch.route import Pending
from moe_layer.dispatch.wire import Link, Position
from moe_layer.types import DispatchPlan


class AllGatherRoute:
    """See `Route`. Rows past a rank's own T are zeros; `AllGatherRoute.tokens_R` says where they begin."""

    def __init__(self, link: Link, plan: DispatchPlan) -> None:
        self.link = link
        self.recv_R: list[int] = []
        self.tokens_R: list[int] = []
        self._num_tokens = plan.ids_TK.shape[0]
        self.position_TR = plan.position_TR  # replaced by the first `out`

    def out(self, at: Position, tensors: list[Tensor]) -> Pending:
        T, R = self._num_tokens, self.link.size
        headers = self.link.exchange_headers(at, tokens=T, rows_R=[T] * R, row=tensors)
        if not self.recv_R:
            self.tokens_R = [tokens for tokens, _rows in headers]
            longest = max(self.tokens_R)
            self.recv_R = [longest] * R
            device = self.position_TR.device
            token_T1 = torch.arange(T, dtype=torch.int32, device=device).unsqueeze(1)
            self.position_TR = token_T1 + longest * torch.arange(R, dtype=torch.int32, device=device)
        longest = self.recv_R[0]
        padded = [pad(tensor, (0, 0) * (tensor.ndim - 1) + (0, longest - T)) for tensor in tensors]
        started = [self.link.all_gather_rows(at, tensor) for tensor in padded]
        return Pending(self.link, at, [target.flatten(0, 1) for target, _ in started], [work for _, work in started])

    def back(self, at: Position, tensors: list[Tensor]) -> Pending:
        self.link.exchange_headers(at, tokens=self._num_tokens, rows_R=self.recv_R, row=tensors)
        started = [self.link.exchange_rows(at, t, send_R=self.recv_R, recv_R=self.recv_R) for t in tensors]
        return Pending(self.link, at, [target for target, _ in started], [work for _, work in started])
