"""`p2p_world_size` < R: ranks lie in domains that reach each other directly (one host's NVLink); between domains bytes
are dear. A token crosses once per remote domain and spreads inside it:

    out    source (d, l) -> (d', l), its counterpart in each domain that the token needs -> the ranks of d' that need it
    back   each rank of d' -> (d', l), where the domain's partial sums are added -> home: one row per (token, domain)

A domain of aligned ranks is a subtree of the sum tree, and the added row travels in the tree's own precision: the bits
are those of `all_to_all`. What is no sum (gradients of probabilities, flags) returns as it is, G values a row.

Shape letters: T tokens, R = M*G ranks in M domains of G, S (token, domain) pairs sent, B rows at a counterpart, C
compact rows received, X any row shape, K slots, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from moe_layer.dispatch.route import Pending
from moe_layer.dispatch.wire import Link, Position
from moe_layer.errors import RankMismatch
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.tree_reduce import tree_reduce
from moe_layer.types import DispatchPlan


class HierarchicalRoute:
    """See `Route`; `recv_R` is known when the first `out` was waited for. Partial sums come home by `position_TM`."""

    def __init__(self, link: Link, plan: DispatchPlan, *, domain: int) -> None:
        T, R, G = plan.ids_TK.shape[0], link.size, domain
        self.link, self.recv_R = link, []
        self._domain, self._domains, self._me = G, R // G, link.rank % G
        self._num_tokens = T
        need_TMG = (plan.position_TR >= 0).view(T, R // G, G)
        need_MT = need_TMG.any(2).T
        pairs = need_MT.nonzero()
        self._token_S = pairs[:, 1]
        self._needs_SG = need_TMG[pairs[:, 1], pairs[:, 0]].to(torch.uint8)
        self.position_TM = _positions(need_MT).T.contiguous()
        every_TMG = self.position_TM.unsqueeze(2) * G + torch.arange(G, dtype=torch.int32, device=need_MT.device)
        self.position_TR = torch.where(need_TMG, every_TMG, -1).view(T, R)
        self._send_R = self._across(need_MT.sum(1).tolist())
        self._arrive_R: list[int] = []
        self._spread_R: list[int] = []
        self._gather_R: list[int] = []

    def out(self, at: Position, tensors: list[Tensor]) -> Pending:
        sent = [tensor.index_select(0, self._token_S) for tensor in tensors]
        first = not self.recv_R
        if first:
            sent.append(self._needs_SG)
        arriving_R, crossing = self._start(at, sent, send_R=self._send_R, recv_R=self._arrive_R)
        self._arrive_R = arriving_R
        return _Staged(crossing, partial(self._spread, at, first))

    def _spread(self, at: Position, first: bool, arrived: list[Tensor]) -> list[Tensor]:
        """At the counterpart: each row to the ranks of this domain that need it."""
        G, device = self._domain, self.position_TM.device
        if first:
            needs_GB = arrived.pop().bool().T
            self._row = needs_GB.nonzero()[:, 1]
            self._place_BG = _positions(needs_GB).T.contiguous()
            self._spread_R = self._inside(needs_GB.sum(1).tolist())
            from_M = torch.tensor(self._arrive_R[self._me :: G], device=device)
            domain_B = torch.arange(self._domains, device=device).repeat_interleave(from_M)
            arrived.append(domain_B.to(torch.int32).unsqueeze(1))
        sent = [tensor.index_select(0, self._row) for tensor in arrived]
        arriving_R, spreading = self._start(at, sent, send_R=self._spread_R, recv_R=self._gather_R)
        rows = spreading.wait()
        if first:
            self._gather_R = arriving_R
            self._sort(domain_C=rows.pop().squeeze(1))
        return [tensor.index_select(0, self._order_C) for tensor in rows]

    def _sort(self, domain_C: Tensor) -> None:
        """Rows arrive by (counterpart, domain, token) and are wanted by (source rank, token)."""
        G, device = self._domain, domain_C.device
        first = self.link.rank - self._me
        from_G = torch.tensor(self._gather_R[first : first + G], device=device)
        rank_C = domain_C * G + torch.arange(G, device=device).repeat_interleave(from_G)
        self._order_C = rank_C.argsort(stable=True)
        self._arrival_C = self._order_C.argsort()
        self.recv_R = torch.bincount(rank_C, minlength=self.link.size).tolist()

    def back(self, at: Position, tensors: list[Tensor]) -> Pending:
        """The first tensor holds partial sums."""
        sent = [tensor.index_select(0, self._arrival_C) for tensor in tensors]
        _, gathering = self._start(at, sent, send_R=self._gather_R, recv_R=self._spread_R)
        return _Staged(gathering, partial(self._cross_home, at))

    def _cross_home(self, at: Position, arrived: list[Tensor]) -> list[Tensor]:
        """At the counterpart: add this domain's partial sums, send one row per token home."""
        parts, *others = arrived
        G, B = self._domain, self._place_BG.shape[0]
        rank_BG = torch.arange(G, dtype=torch.int32, device=parts.device).expand(B, G)
        sums_BD = tree_reduce(parts, self._place_BG, ids_MK=rank_BG, num_experts=G, blocks=G)
        flat = self._place_BG.flatten()
        sent = [sums_BD, *(gather_rows(other, flat).view(B, G * other.shape[1]) for other in others)]
        _, crossing = self._start(at, sent, send_R=self._arrive_R, recv_R=self._send_R)
        home_SD, *rest = crossing.wait()
        return [home_SD, *(other.view(other.shape[0] * G, other.shape[1] // G) for other in rest)]

    def _start(
        self, at: Position, tensors: list[Tensor], *, send_R: list[int], recv_R: list[int]
    ) -> tuple[list[int], Pending]:
        """Headers and rows of one stage; `recv_R` is empty when it is not known yet."""
        link = self.link
        headers = link.exchange_headers(at, tokens=self._num_tokens, rows_R=send_R, row=tensors)
        arriving_R = [rows for _tokens, rows in headers]
        if recv_R and arriving_R != recv_R:
            raise RankMismatch(f"at {at} rows {arriving_R} arrive from the ranks, expected {recv_R}")
        started = [link.exchange_rows(at, tensor, send_R=send_R, recv_R=arriving_R) for tensor in tensors]
        return arriving_R, Pending(link, at, [target for target, _ in started], [work for _, work in started])

    def _across(self, counts_M: list[int]) -> list[int]:
        """Per rank: counts for the counterparts, 0 for everybody else."""
        G = self._domain
        return [counts_M[rank // G] if rank % G == self._me else 0 for rank in range(self.link.size)]

    def _inside(self, counts_G: list[int]) -> list[int]:
        """Per rank: counts for the own domain, 0 for everybody else."""
        G, mine = self._domain, self.link.rank // self._domain
        return [counts_G[rank % G] if rank // G == mine else 0 for rank in range(self.link.size)]


def _positions(needs: Tensor) -> Tensor:
    """Place of each True in row-major order, -1 elsewhere; int32, the shape of `needs`."""
    count = needs.flatten().cumsum(0).view(needs.shape) - 1
    return torch.where(needs, count, -1).to(torch.int32)


class _Staged(Pending):
    """A trip in two stages: the second begins when somebody waits for it."""

    def __init__(self, first: Pending, then: Callable[[list[Tensor]], list[Tensor]]) -> None:
        super().__init__(first.link, first.at, [], [])
        self._first, self._then = first, then

    def wait(self) -> list[Any]:
        return self._then(self._first.wait())
