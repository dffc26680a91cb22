"""What `scripts/bench/dispatch.py` compares with: the un-deduplicated NCCL path, and local copies in place of messages.

`UndedupedDispatcher` takes the steps of Megatron's all-to-all dispatcher: permute the T*K slots by expert, exchange
rows and probabilities with `all_to_all_single`, permute (source, expert) chunks to expert-major; and the reverse. Its
local permutations run on this project's gather and sum kernels, which are no slower than torch's.

`CopyDispatcher` is a step whose messages are local copies of as many bytes: what is left is computation.

Shape letters: T tokens, K slots, D hidden, E experts, L experts here, R ranks, P slots sent, N rows received, C compact
rows, S rows that return home.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_layer.config import DispatchConfig
from moe_layer.dispatch.arrange import gather_slots, scatter_slots
from moe_layer.dispatch.base import finish
from moe_layer.dispatch.plan import make_plan
from moe_layer.dispatch.route import pick_home, sum_home
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.tree_reduce import reduction_blocks, tree_reduce
from moe_layer.parallel import compat
from moe_layer.types import DispatchPlan, Received, Routing

STATIC_FACTOR = 1.25  # rows per T*K under static capacity; uniform routing over two ranks needs about 1.02


def dispatch_config(backend: str, *, tokens: int, **options: Any) -> DispatchConfig:
    """The configuration of `all_to_all`, `nvlink`, ..., of `nvlink:static` (static capacity, no host read), or of
    `nvlink:static:dense` (`dispatch.push`).

    Raises:
        ConfigError: this version has no such backend or option.
    """
    name, _, rest = backend.partition(":")
    capacity, _, push = rest.partition(":")
    options |= {"backend": name, "deadline_s": 20.0}
    if capacity or name == "nvlink":
        options["max_tokens_per_rank"] = tokens
    if capacity:
        options |= {"capacity": capacity, "static_factor": STATIC_FACTOR}
    if push:
        options["push"] = push
    return DispatchConfig(**options)


@dataclass(frozen=True)
class Splits:
    """What the un-deduplicated path must know: slots in expert order, their inverse, rows per rank, the chunk order."""

    token_P: Tensor
    slot_P: Tensor
    position_TK: Tensor
    send_R: list[int]
    recv_R: list[int]
    major_N: Tensor
    source_N: Tensor
    offsets_L1: Tensor
    counts_L: Tensor


class UndedupedDispatcher:
    """`dispatch` and `combine` of the `Dispatcher` protocol. `splits` given: counts and orders are known beforehand."""

    def __init__(self, group: Any, *, num_experts: int, top_k: int) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)
        self.num_experts, self.top_k = num_experts, top_k
        self.num_local = num_experts // self.size

    def splits(self, routing: Routing) -> Splits:
        """Sort the slots, gather everybody's counts, read them on the host (as Megatron's dispatcher must)."""
        ids_P, device = routing.ids_TK.flatten(), routing.ids_TK.device
        slot_P = ids_P.argsort(stable=True)
        position_TK = torch.empty_like(slot_P).scatter_(0, slot_P, torch.arange(slot_P.numel(), device=device))
        counts_E = routing.counts_E.long()
        every_RE = counts_E.new_empty(self.size, self.num_experts)
        compat.all_gather(self.group, every_RE.flatten(), counts_E).wait()
        counts_RRL = every_RE.view(self.size, self.size, self.num_local)  # source, destination, expert there
        counts_RL = counts_RRL[:, self.rank]
        sizes = torch.stack((counts_RRL[self.rank].sum(1), counts_RL.sum(1))).tolist()
        chunk_RL = torch.arange(self.num_local * self.size, device=device).view(self.num_local, self.size).T
        place_N = chunk_RL.flatten().repeat_interleave(counts_RL.flatten(), output_size=sum(sizes[1]))
        major_N = place_N.argsort(stable=True)
        source_N = torch.empty_like(major_N).scatter_(0, major_N, torch.arange(major_N.numel(), device=device))
        counts_L = counts_RL.sum(0).to(torch.int32)
        offsets_L1 = torch.nn.functional.pad(counts_L.cumsum(0), (1, 0)).to(torch.int32)
        return Splits(
            token_P=slot_P // self.top_k,
            slot_P=slot_P,
            position_TK=position_TK.view_as(routing.ids_TK).to(torch.int32),
            send_R=sizes[0],
            recv_R=sizes[1],
            major_N=major_N,
            source_N=source_N,
            offsets_L1=offsets_L1,
            counts_L=counts_L,
        )

    def exchange(self, rows: Tensor, *, send_R: list[int], recv_R: list[int]) -> Tensor:
        target = rows.new_empty(sum(recv_R), *rows.shape[1:])
        dist.all_to_all_single(target, rows, recv_R, send_R, group=self.group)
        return target

    def dispatch_begin(self, x_TD: Tensor) -> None:
        return None

    def dispatch(self, x_TD: Tensor, routing: Routing, splits: Splits | None = None, *, begun: None = None) -> Received:
        splits = self.splits(routing) if splits is None else splits
        rows, probs_N = _UndedupedOut.apply(x_TD, routing.weights_TK, routing.ids_TK, self, splits)
        return Received(
            rows=rows,
            index_N=None,
            probs_N=probs_N,
            act_probs_N=probs_N,
            offsets_L1=splits.offsets_L1,
            counts_L=splits.counts_L,
            split=splits.counts_L.unsqueeze(1),
            first_expert=self.rank * self.num_local,
            src=splits.source_N,
            row_CK=splits.position_TK,
            ids_CK=routing.ids_TK,
            plan=make_plan(routing.ids_TK, num_experts=self.num_experts, num_ranks=self.size),
            state=(splits, x_TD.dtype),
        )

    def combine(self, rows: Tensor, received: Received, add: Tensor | None = None) -> Tensor:
        splits, dtype = received.state
        return finish(_UndedupedHome.apply(rows, received.ids_CK, self, splits), add, dtype=dtype)

    def sum_slots(self, home_PD: Tensor, ids_TK: Tensor, splits: Splits) -> Tensor:
        blocks = reduction_blocks(self.num_experts)
        return tree_reduce(
            home_PD, splits.position_TK, ids_MK=ids_TK, num_experts=self.num_experts, blocks=blocks, like_rows=True
        )

    def check(self) -> None:
        """Nothing is reported late."""


class _UndedupedOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, ids: Tensor, d: UndedupedDispatcher, s: Splits) -> Any:
        ctx.d, ctx.s, ctx.ids, ctx.shape = d, s, ids, weights.shape
        probs_P = weights.flatten().index_select(0, s.slot_P)
        rows = d.exchange(x.index_select(0, s.token_P), send_R=s.send_R, recv_R=s.recv_R)
        probs = d.exchange(probs_P, send_R=s.send_R, recv_R=s.recv_R)
        return rows.index_select(0, s.major_N), probs.index_select(0, s.major_N)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_probs: Tensor) -> Any:
        d, s = ctx.d, ctx.s
        home_PD = d.exchange(d_rows.index_select(0, s.source_N), send_R=s.recv_R, recv_R=s.send_R)
        home_P = d.exchange(d_probs.index_select(0, s.source_N), send_R=s.recv_R, recv_R=s.send_R)
        d_weights = home_P.index_select(0, s.position_TK.flatten()).view(ctx.shape)
        return d.sum_slots(home_PD, ctx.ids, s), d_weights, None, None, None


class _UndedupedHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, ids: Tensor, d: UndedupedDispatcher, s: Splits) -> Tensor:
        ctx.d, ctx.s = d, s
        home_PD = d.exchange(rows.index_select(0, s.source_N), send_R=s.recv_R, recv_R=s.send_R)
        return d.sum_slots(home_PD, ids, s)

    @staticmethod
    def backward(ctx: Any, d_y: Tensor) -> Any:
        d, s = ctx.d, ctx.s
        rows = d.exchange(d_y.index_select(0, s.token_P), send_R=s.send_R, recv_R=s.recv_R)
        return rows.index_select(0, s.major_N), None, None, None


@dataclass(frozen=True)
class Copies:
    """Indices of one real dispatch (of the `all_to_all` backend), so that a copy of it needs no messages.

    token_C: local token whose row stands for a received one; home_S: compact row that stands for a returning one.
    """

    token_C: Tensor
    home_S: Tensor
    compact_N: Tensor
    slot_N: Tensor
    row_CK: Tensor
    ids_CK: Tensor
    rank_TK: Tensor
    plan: DispatchPlan

    @classmethod
    def of(cls, received: Received) -> Copies:
        call = received.state
        arranged, plan = call.arranged, received.plan
        T, C, S = plan.ids_TK.shape[0], arranged.ids_CK.shape[0], plan.send_tokens.shape[0]
        device = plan.ids_TK.device
        plan.position_TR  # noqa: B018 - computed here, not inside a timed step
        return cls(
            token_C=torch.arange(C, device=device) % T,
            home_S=torch.arange(S, device=device) % C,
            compact_N=arranged.compact_N,
            slot_N=arranged.order.slot_N,
            row_CK=arranged.order.row_CK,
            ids_CK=arranged.ids_CK,
            rank_TK=call.rank_TK(),
            plan=plan,
        )


class CopyDispatcher:
    """A dispatcher whose rows are copies of local ones: same shapes, same local work, no messages, no host read."""

    def __init__(self, template: Received) -> None:
        self.template, self.copies = template, Copies.of(template)
        self.compact = template.index_N is not None

    def dispatch_begin(self, x_TD: Tensor) -> None:
        return None

    def dispatch(self, x_TD: Tensor, routing: Routing, *, begun: None = None) -> Received:
        rows, probs_N = _CopyOut.apply(x_TD, routing.weights_TK, self)
        found = {name: getattr(self.template, name) for name in Received.__dataclass_fields__}
        return Received(**found | {"rows": rows, "probs_N": probs_N, "act_probs_N": probs_N, "state": x_TD.dtype})

    def combine(self, rows: Tensor, received: Received, add: Tensor | None = None) -> Tensor:
        return finish(_CopyHome.apply(rows, self, received.state), add, dtype=received.state)

    def partial_sums(self, rows_ND: Tensor) -> Tensor:
        c, E = self.copies, self.copies.plan.num_experts
        return tree_reduce(
            rows_ND, c.row_CK, ids_MK=c.ids_CK, num_experts=E, blocks=reduction_blocks(E), like_rows=True
        )

    def check(self) -> None:
        """Nothing is reported late."""


class _CopyOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weights: Tensor, d: CopyDispatcher) -> Any:
        ctx.d, ctx.dtype = d, x.dtype
        c = d.copies
        x_CD, weights_CK = x.index_select(0, c.token_C), weights.index_select(0, c.token_C)
        return x_CD if d.compact else gather_rows(x_CD, c.compact_N), gather_slots(weights_CK, c.slot_N)

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_probs: Tensor) -> Any:
        d, c = ctx.d, ctx.d.copies
        part_CD = d_rows if d.compact else d.partial_sums(d_rows)
        d_x = sum_home(part_CD.index_select(0, c.home_S), c.plan.position_TR).to(ctx.dtype)
        d_slots_SK = scatter_slots(d_probs, c.row_CK).index_select(0, c.home_S)
        return d_x, pick_home(d_slots_SK, c.plan.position_TR, rank_TK=c.rank_TK), None


class _CopyHome(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, d: CopyDispatcher, dtype: torch.dtype) -> Tensor:
        ctx.d, ctx.dtype = d, dtype
        c = d.copies
        return sum_home(d.partial_sums(rows).to(dtype).index_select(0, c.home_S), c.plan.position_TR)

    @staticmethod
    def backward(ctx: Any, d_sum: Tensor) -> Any:
        c = ctx.d.copies
        return gather_rows(d_sum.to(ctx.dtype).index_select(0, c.token_C), c.compact_N), None, None
