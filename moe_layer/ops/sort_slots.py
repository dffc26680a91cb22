"""Order a rank's slots by (local expert, compact row, slot): the row order of every dispatcher. No autograd.

Compact rows are in (source rank, token) order, so a stable sort by expert gives (expert, source rank, token); nothing
here depends on timing, and there are no atomics on floats.

Shape letters: C compact rows, K slots, L local experts, N expert-major rows with pads.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.kernels import load_kernels


class SlotOrder(NamedTuple):
    """slot_N: flat slot `c*K + k` of each row, -1 for pads and the tail; row_CK: its inverse, -1 where the slot is
    absent;
    offsets_L1: row boundaries, pads included; counts_L: real rows; token_N: compact row c of each row, -1 for pads and
    the tail; index_N: the same with 0 there, which may be gathered. All int32. probs_N: fp32, the weight of each row's
    slot, 0 for pads and the tail; `[0]` where no weights were given."""

    slot_N: Tensor
    row_CK: Tensor
    offsets_L1: Tensor
    counts_L: Tensor
    token_N: Tensor
    index_N: Tensor
    probs_N: Tensor


def sort_slots(
    ids_CK: Tensor,
    *,
    first_expert: int,
    num_local: int,
    alignment: int,
    num_rows: int,
    weights_CK: Tensor | None = None,
) -> SlotOrder:
    """Rows for the experts `[first_expert, first_expert + num_local)`; other ids and -1 are absent.

    Args:
        ids_CK: int32 `[C, K]` global expert ids.
        alignment: every expert's rows are padded to a multiple of this.
        num_rows: N, normally at least the padded total; rows past `offsets_L1[-1]` belong to nobody. Slots whose row
            would lie past N have none (row_CK -1): whoever allows that compares `offsets_L1[-1]` with N.
        weights_CK: optional fp32 `[C, K]`, to be put into the rows' order.
    """
    load_kernels(ids_CK)
    op = torch.ops.moe_layer.sort_slots
    return SlotOrder(*call_plain(op, ids_CK, first_expert, num_local, alignment, num_rows, weights_CK))


def pad_to_capacity(order: SlotOrder, ids_CK: Tensor, *, num_local: int, capacity: int) -> SlotOrder:
    """The same order with exactly `capacity` rows an expert (drop and pad): row = expert * capacity + rank in it.

    Args:
        order: of `ids_CK`, with first_expert 0 and alignment 1, no expert above `capacity`.
    """
    first_L1 = torch.arange(num_local + 1, dtype=torch.int32, device=ids_CK.device) * capacity
    shift_L = (first_L1 - order.offsets_L1)[:-1]
    present_CK = order.row_CK >= 0
    shift_CK = shift_L.index_select(0, torch.where(present_CK, ids_CK, 0).flatten()).view(ids_CK.shape)
    row_CK = torch.where(present_CK, order.row_CK + shift_CK, -1)
    num_rows = num_local * capacity
    slot_P = torch.arange(row_CK.numel(), dtype=torch.int32, device=ids_CK.device)
    target_P = torch.where(row_CK >= 0, row_CK, num_rows).flatten().long()
    slot_N = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=ids_CK.device).scatter_(0, target_P, slot_P)[:-1]
    index_N = slot_N.clamp_min(0) // max(ids_CK.shape[1], 1)
    token_N = torch.where(slot_N >= 0, index_N, -1)
    return SlotOrder(slot_N, row_CK, first_L1, order.counts_L, token_N, index_N, order.probs_N.new_empty(0))


@torch.library.custom_op("moe_layer::sort_slots", mutates_args=())
def _sort_slots(
    ids: Tensor,
    first_expert: int,
    num_local: int,
    alignment: int,
    num_rows: int,
    weights: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    local_P = ids.flatten() - first_expert
    local_P = torch.where((ids.flatten() >= 0) & (local_P >= 0) & (local_P < num_local), local_P, num_local)
    order_P = _stable_order(local_P, num_local)
    key_P = local_P.index_select(0, order_P)
    every_L1 = torch.arange(num_local + 1, dtype=key_P.dtype, device=key_P.device)
    begin_L1 = torch.searchsorted(key_P, every_L1)  # first sorted position of each expert, then of the absent slots
    counts_L = begin_L1.diff()
    offsets_L1 = torch.nn.functional.pad((-(counts_L // -alignment) * alignment).cumsum(0), (1, 0))
    # sorted position -> row: shifted by the pads of the experts before it; absent slots go to a row that is cut off
    shift_L1 = offsets_L1 - begin_L1
    position_P = torch.arange(order_P.numel(), device=order_P.device)
    row_P = torch.where(key_P < num_local, position_P + shift_L1.index_select(0, key_P), num_rows).clamp_max(num_rows)
    slot_N = torch.full((num_rows + 1,), -1, dtype=torch.int32, device=ids.device)
    slot_N.scatter_(0, row_P, order_P.to(torch.int32))
    row_CK = torch.empty_like(local_P).scatter_(0, order_P, torch.where(row_P < num_rows, row_P, -1).to(torch.int32))
    slot_N = slot_N[:-1].clone()
    index_N = slot_N.clamp_min(0) // max(ids.shape[1], 1)
    token_N = torch.where(slot_N >= 0, index_N, -1)
    row_CK, counts_L = row_CK.view(ids.shape), counts_L.to(torch.int32)
    if weights is None or weights.numel() == 0:
        probs_N = torch.zeros(0 if weights is None else num_rows, dtype=torch.float32, device=ids.device)
    else:
        probs_N = torch.where(slot_N >= 0, weights.flatten().index_select(0, slot_N.clamp_min(0)), 0.0)
    return slot_N, row_CK, offsets_L1.to(torch.int32), counts_L, token_N, index_N, probs_N


@_sort_slots.register_fake
def _(ids, first_expert, num_local, alignment, num_rows, weights=None):  # type: ignore[no-untyped-def]
    rows = (num_rows,)
    shapes = (rows, ids.shape, (num_local + 1,), (num_local,), rows, rows)
    new = [ids.new_empty(shape, dtype=torch.int32) for shape in shapes]
    return (*new, ids.new_empty(0 if weights is None else num_rows, dtype=torch.float32))


def _stable_order(key_P: Tensor, top: int) -> Tensor:
    """Positions of a stable ascending sort of small integers in `[0, top]`."""
    if not key_P.is_cuda and top < 2**15:
        # numpy sorts 16-bit integers by radix: 20 us for 8192 keys, where torch's comparison sort takes 210 us
        return torch.from_numpy(np.argsort(key_P.to(torch.int16).numpy(), kind="stable"))
    return key_P.argsort(stable=True)
