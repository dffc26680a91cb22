"""From compact rows and their ids to expert-major rows: shared by all backends. Integers, plus two gathers with
gradients.

Shape letters: C compact rows, K slots, N expert-major rows, L local experts, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.base import padded_rows, static_rows
from moe_layer.errors import CapacityError
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.sort_slots import SlotOrder, sort_slots


@dataclass(frozen=True)
class Arrangement:
    """order: see `SlotOrder`; compact_N: compact row of each row, -1 for pads; src_N3, counts_LR, ids_CK: see
    `Received`;
    kept_C: bool, False where a static buffer dropped the (token, rank) pair, None when nothing can be dropped;
    asked_CK: bool, slots of local experts before any were dropped."""

    order: SlotOrder
    compact_N: Tensor
    src_N3: Tensor
    counts_LR: Tensor
    ids_CK: Tensor
    kept_C: Tensor | None
    asked_CK: Tensor


def arrange(
    ids_CK: Tensor,
    *,
    config: DispatchConfig,
    first_expert: int,
    num_local: int,
    capacity_slots: int,
    rank_C: Tensor | None = None,
    token_C: Tensor | None = None,
    num_ranks: int = 1,
) -> Arrangement:
    """Row order for the slots of local experts.

    Args:
        ids_CK: int32 global ids; those of other ranks and -1 are skipped.
        capacity_slots: T*K, which static capacity is a multiple of.
        rank_C, token_C: int32 source of each compact row; None at one rank, where row c is token c.

    Raises:
        CapacityError: more rows than a static buffer holds and `overflow: error` (on CUDA at one rank: a device
            assertion).
    """
    C, K = ids_CK.shape
    local_CK = (ids_CK >= first_expert) & (ids_CK < first_expert + num_local)
    ids_CK = ids_CK if num_ranks == 1 else torch.where(local_CK, ids_CK, -1)
    kept_C = None
    if config.capacity == "static":
        num_rows = static_rows(config, slots=capacity_slots)
        kept_C = fitting(
            ids_CK - first_expert,
            num_local=num_local,
            alignment=config.alignment,
            capacity=num_rows,
            age_C=_age(C, rank_C, token_C, num_ranks=num_ranks, device=ids_CK.device),
        )
        ids_CK = _apply_capacity(ids_CK, kept_C, config=config, num_rows=num_rows)
    elif num_ranks == 1:
        num_rows = padded_rows(C * K, num_local=num_local, alignment=config.alignment)
    else:
        counts_L = torch.bincount((ids_CK - first_expert)[local_CK], minlength=num_local)
        num_rows = int((-(counts_L // -config.alignment) * config.alignment).sum())
    order = sort_slots(
        ids_CK, first_expert=first_expert, num_local=num_local, alignment=config.alignment, num_rows=num_rows
    )
    pad_N = order.slot_N < 0
    compact_N = torch.where(pad_N, -1, order.slot_N // max(K, 1))
    slot_N = torch.where(pad_N, -1, order.slot_N % max(K, 1))
    if rank_C is None or token_C is None:
        rank_N, token_N, counts_LR = torch.where(pad_N, -1, 0).to(torch.int32), compact_N, order.counts_L.unsqueeze(1)
    else:
        rank_N = gather_rows(rank_C.unsqueeze(1) + 1, compact_N).squeeze(1) - 1
        token_N = gather_rows(token_C.unsqueeze(1) + 1, compact_N).squeeze(1) - 1
        counts_LR = split_counts(ids_CK - first_expert, rank_C, num_local=num_local, num_ranks=num_ranks)
    return Arrangement(
        order, compact_N, torch.stack((rank_N, token_N, slot_N), dim=1), counts_LR, ids_CK, kept_C, local_CK
    )


def split_counts(local_CK: Tensor, rank_C: Tensor, *, num_local: int, num_ranks: int) -> Tensor:
    flat = (
        torch.where(local_CK >= 0, local_CK * num_ranks + rank_C.unsqueeze(1), num_local * num_ranks).flatten().long()
    )
    counts = torch.zeros(num_local * num_ranks + 1, dtype=torch.int32, device=flat.device)
    return counts.scatter_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))[:-1].view(num_local, num_ranks)


def _age(count: int, rank_C: Tensor | None, token_C: Tensor | None, *, num_ranks: int, device: torch.device) -> Tensor:
    """Rows with the highest age are dropped first: by token, then by source rank."""
    if rank_C is None or token_C is None:
        return torch.arange(count, device=device)
    return token_C.long() * num_ranks + rank_C


def fitting(local_CK: Tensor, *, num_local: int, alignment: int, capacity: int, age_C: Tensor) -> Tensor:
    """Bool `[C]`: the longest run of rows, youngest first, whose padded slots fit into `capacity`."""
    order_C = age_C.argsort(stable=True)
    local_PK = local_CK.index_select(0, order_C)
    hits_CL = torch.zeros(local_CK.shape[0], num_local + 1, dtype=torch.int64, device=local_CK.device)
    hits_CL.scatter_add_(1, torch.where(local_PK >= 0, local_PK, num_local).long(), torch.ones_like(local_PK).long())
    total_C = (-(hits_CL[:, :-1].cumsum(0) // -alignment) * alignment).sum(1)
    return torch.empty_like(total_C, dtype=torch.bool).scatter_(0, order_C, total_C <= capacity)


def _apply_capacity(ids_CK: Tensor, kept_C: Tensor, *, config: DispatchConfig, num_rows: int) -> Tensor:
    if config.overflow == "drop":
        return torch.where(kept_C.unsqueeze(1), ids_CK, -1)
    remedy = "raise dispatch.static_factor or set dispatch.overflow drop"
    if torch.compiler.is_compiling():  # numbers may be symbols here, which have no text
        torch._assert_async(kept_C.all(), f"static dispatch buffer overflowed; {remedy}")
        return ids_CK
    message = f"static dispatch buffer of {num_rows} rows (static_factor {config.static_factor:g}) overflowed; {remedy}"
    if kept_C.is_cuda:
        torch._assert_async(kept_C.all(), message)
    elif not bool(kept_C.all()):
        lost = int((~kept_C).sum())
        raise CapacityError(f"{message} ({lost} of {kept_C.numel()} (token, rank) pairs do not fit)")
    return ids_CK


class GatherProbs(torch.autograd.Function):
    """Probability of each row, 0 for pads: `order.probs_N`, where there is one; backward gathers by the inverse map."""

    @staticmethod
    def forward(ctx: Any, weights_CK: Tensor, order: SlotOrder) -> Tensor:
        ctx.save_for_backward(order.row_CK)
        if order.probs_N.shape == order.slot_N.shape:
            return order.probs_N
        return gather_slots(weights_CK, order.slot_N)

    @staticmethod
    def backward(ctx: Any, d_probs_N: Tensor) -> tuple[Tensor, None]:
        (row_CK,) = ctx.saved_tensors
        return scatter_slots(d_probs_N, row_CK), None


def gather_slots(values_CK: Tensor, slot_N: Tensor) -> Tensor:
    """Value of each row's slot, 0 for pads."""
    return gather_rows(values_CK.reshape(-1, 1), slot_N).squeeze(1)


def scatter_slots(values_N: Tensor, row_CK: Tensor) -> Tensor:
    """Value of each slot's row, 0 for absent slots."""
    return gather_rows(values_N.reshape(-1, 1), row_CK.flatten()).view(row_CK.shape)
