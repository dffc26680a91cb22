"""Tokens that every rank already has: dispatch is free, slots of other ranks' experts are skipped, partial sums are
gathered.

With `reduce` the backward pass gathers the partial gradients of x in the same fixed order, so x's gradient is whole on
every rank, as y is. Without it both stay this rank's partial sums and nothing is sent.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.dispatch.route import Pending
from moe_layer.dispatch.wire import Link, Position
from moe_layer.errors import RankMismatch
from moe_layer.types import DispatchPlan


class ReplicatedRoute:
    """See `Route`; compact rows are the tokens themselves."""

    def __init__(self, link: Link, plan: DispatchPlan, *, reduce: bool) -> None:
        T = plan.ids_TK.shape[0]
        device = plan.ids_TK.device
        self.link = link
        self.reduce = reduce
        self.recv_R = [T if rank == link.rank else 0 for rank in range(link.size)]
        self._num_tokens = T
        token_T1 = torch.arange(T, dtype=torch.int32, device=device).unsqueeze(1)
        ranks = link.size if reduce else 1
        self.position_TR = token_T1 + T * torch.arange(ranks, dtype=torch.int32, device=device)

    def out(self, at: Position, tensors: list[Tensor]) -> Pending:
        return Pending(self.link, at, [tensor.detach() for tensor in tensors], [])

    def back(self, at: Position, tensors: list[Tensor]) -> Pending:
        if not self.reduce:
            return Pending(self.link, at, tensors, [])
        T, R = self._num_tokens, self.link.size
        headers = self.link.exchange_headers(at, tokens=T, rows_R=[T] * R, row=tensors)
        tokens_R = [tokens for tokens, _rows in headers]
        if tokens_R != [T] * R:
            raise RankMismatch(
                f"backend replicated needs the same tokens on every rank, got {tokens_R} tokens at {at}; "
                "use all_gather or all_to_all for different tokens"
            )
        started = [self.link.all_gather_rows(at, tensor) for tensor in tensors]
        return Pending(self.link, at, [target.flatten(0, 1) for target, _ in started], [work for _, work in started])
