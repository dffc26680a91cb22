"""`backend: replicated` and the shared expert: the ranks hold the same tokens, so each computes its share of T/R.

Rank r takes tokens `[T*r/R, T*(r+1)/R)`. With `dispatch.reduce` outputs and gradients are gathered, so that every rank
has them whole, as it has y and d(x); without, both are this rank's part among zeros, to be added up by the caller.

Shape letters: T tokens, t of them here, R ranks, D hidden.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_layer.dispatch.wire import Link
from moe_layer.errors import RankMismatch
from moe_layer.parallel import compat


class TokenShare:
    """This rank's share of tokens that every rank holds; collective calls, alike on all ranks."""

    def __init__(self, link: Link, *, reduce: bool) -> None:
        self.link, self.reduce = link, reduce

    def take(self, x_TD: Tensor) -> Tensor:
        """`[T, D]` -> `[t, D]`; the gradient comes back whole (or among zeros)."""
        return _Take.apply(x_TD, self)

    def spread(self, y_tD: Tensor, *, tokens: int) -> Tensor:
        """`[t, D]` -> `[T, D]`, whole (or among zeros); the gradient is this rank's share.

        Raises:
            RankMismatch: the ranks hold different numbers of tokens.
            DispatchTimeout: a rank did not take part.
        """
        return _Spread.apply(y_tD, tokens, self)

    def sum_gradient(self, gradient: Tensor) -> Tensor:
        """The whole gradient of a weight that saw this rank's share (unchanged without `reduce`)."""
        if self.reduce:
            at = self.link.at("combine backward")
            gradient = gradient.contiguous()
            self.link.wait(self.link.start(lambda: compat.start_all_reduce(self.link.group, gradient), at), at)
        return gradient

    def bounds(self, tokens: int) -> tuple[int, int]:
        rank, size = self.link.rank, self.link.size
        return tokens * rank // size, tokens * (rank + 1) // size

    def cut(self, whole_TD: Tensor) -> Tensor:
        first, end = self.bounds(whole_TD.shape[0])
        return whole_TD[first:end]

    def join(self, part_tD: Tensor, tokens: int, *, forward: bool) -> Tensor:
        first, end = self.bounds(tokens)
        if not self.reduce:
            return pad(part_tD, (0, 0, first, tokens - end))
        size, at = self.link.size, self.link.at("combine" if forward else "dispatch backward")
        longest = -(-tokens // size)
        headers = self.link.exchange_headers(at, tokens=tokens, rows_R=[longest] * size, row=[part_tD])
        tokens_R = [theirs for theirs, _rows in headers]
        if tokens_R != [tokens] * size:
            raise RankMismatch(
                f"backend replicated needs the same tokens on every rank, got {tokens_R} tokens at {at}; "
                "use all_gather or all_to_all for different tokens"
            )
        every, work = self.link.all_gather_rows(at, pad(part_tD, (0, 0, 0, longest - (end - first))))
        self.link.wait(work, at)
        sizes = [tokens * (rank + 1) // size - tokens * rank // size for rank in range(size)]
        return torch.cat([every[rank, : sizes[rank]] for rank in range(size)])


class _Take(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, share: TokenShare) -> Tensor:
        ctx.share, ctx.tokens = share, x_TD.shape[0]
        return share.cut(x_TD).clone()

    @staticmethod
    def backward(ctx: Any, d_x_tD: Tensor) -> tuple[Tensor, None]:
        return ctx.share.join(d_x_tD, ctx.tokens, forward=False), None


class _Spread(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y_tD: Tensor, tokens: int, share: TokenShare) -> Tensor:
        ctx.share = share
        return share.join(y_tD, tokens, forward=True)

    @staticmethod
    def backward(ctx: Any, d_y_TD: Tensor) -> tuple[Tensor, None, None]:
        return ctx.share.cut(d_y_TD), None, None
