"""A route: the trips of one dispatch over a link, forth (rows of tokens to the ranks of their experts) and back.

A trip moves several tensors with one row per token (or per received row) behind one header. Backends differ only here.

Shape letters: T tokens, C compact rows received, S rows sent, R ranks, X any row shape.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from moe_layer.dispatch.wire import Link, Position
from moe_layer.errors import RankMismatch
from moe_layer.ops.tree_reduce import tree_reduce


@dataclass
class Pending:
    """A trip under way: its targets are valid after `wait`."""

    link: Link
    at: Position
    targets: list[Tensor]
    works: list[Any]

    def wait(self) -> list[Tensor]:
        """Raises DispatchTimeout when a peer does not deliver in time."""
        for work in self.works:
            self.link.wait(work, self.at)
        return self.targets


class Route(Protocol):
    """One dispatch's way. `out` must come first: it learns how many rows arrive from where.

    Attributes:
        recv_R: rows received from each rank (known after the first `out`).
        position_TR: where a token's row from each rank lies in what `back` returns, -1 = none.
    """

    link: Link
    recv_R: list[int]
    position_TR: Tensor

    def out(self, at: Position, tensors: list[Tensor]) -> Pending:
        """`[T, X]` tensors -> `[C, X]`, compact rows in (source rank, token) order."""
        ...

    def back(self, at: Position, tensors: list[Tensor]) -> Pending:
        """`[C, X]` tensors -> home rows, indexed by `position_TR`."""
        ...


@runtime_checkable
class SlotRoute(Protocol):
    """A route with its own way for one row a slot (`apply_probs: source`); others use the link's process group."""

    def slots(
        self, at: Position, tensors: list[Tensor], *, send_R: list[int], recv_R: list[int], home: bool
    ) -> Pending:
        """Rows grouped by destination rank -> rows grouped by source rank; `home`: from experts, else to them."""
        ...


def sum_position(route: Route) -> Tensor:
    """Where partial sums lie in what `back` returns: `position_TR`, or by domain where the route adds them up."""
    return getattr(route, "position_TM", route.position_TR)


def sum_home(home_SD: Tensor, position_TR: Tensor) -> Tensor:
    """Add the ranks' partial sums of each token: blocks of the tree continue as ranks. `[T, D]` fp32 or fp64."""
    T, R = position_TR.shape
    if R == 1 and home_SD.shape[0] == T:
        return home_SD.to(torch.promote_types(home_SD.dtype, torch.float32))
    rank_TR = torch.arange(R, dtype=torch.int32, device=home_SD.device).expand(T, R)
    return tree_reduce(home_SD, position_TR, ids_MK=rank_TR, num_experts=R, blocks=R)


def pick_home(home_SK: Tensor, position_TR: Tensor, *, rank_TK: Tensor) -> Tensor:
    """Each slot's value from the rank that owns its expert; 0 where the slot is absent (rank -1)."""
    T, K = rank_TK.shape
    if home_SK.shape[0] == 0 or rank_TK.numel() == 0:
        return home_SK.new_zeros(T, K)
    if position_TR.shape[1] == 1:  # partial sums stay here: so do the other ranks' slots
        return home_SK
    row_TK = position_TR.long().gather(1, rank_TK.clamp_min(0).long())
    value_TK = home_SK.flatten()[row_TK.clamp_min(0) * K + torch.arange(K, device=home_SK.device)]
    return torch.where((rank_TK >= 0) & (row_TK >= 0), value_TK, value_TK.new_zeros(()))


def check_arrivals(route: Route, at: Position, arriving_R: list[int]) -> None:
    """A later trip of a route must bring the rows its first one announced."""
    if arriving_R != route.recv_R:
        raise RankMismatch(f"at {at} rows {arriving_R} arrive from the ranks, expected {route.recv_R}")
