"""What arrives and where it goes, see moe_layer/ops/ep.py: `ep_await`, `ep_arrange`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.ep_model import BAD_COUNT, Failed, Trip


def ep_await(peers: Tensor, state: Tensor, trip: Tensor) -> tuple[Tensor, Tensor]:
    """Wait for the headers of all ranks: int32 counts_R of arriving rows and base_R1, their first compact rows; zeros
    after a failure."""
    return call_plain(torch.ops.moe_layer.ep_await, peers, state, trip)


@torch.library.custom_op("moe_layer::ep_await", mutates_args=("state",))
def _ep_await(peers: Tensor, state: Tensor, trip: Tensor) -> tuple[Tensor, Tensor]:
    t = Trip(peers, state, trip)
    try:
        t.start()
        counts = torch.tensor(t.headers(), dtype=torch.int32)
    except Failed:
        counts = torch.zeros(t.ranks, dtype=torch.int32)
    return counts, _begins(counts)


@_ep_await.register_fake
def _(peers, state, trip):  # type: ignore[no-untyped-def]
    R = peers.shape[0]
    return peers.new_empty((R,), dtype=torch.int32), peers.new_empty((R + 1,), dtype=torch.int32)


def _begins(counts: Tensor) -> Tensor:
    return torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()


class Arranged(NamedTuple):
    """Compact rows in (source, token) order and the rows of their slots. int32 but for the probabilities.

    counts_R, base_R1: arriving rows and first compact row of each source; token_C, rank_C: where a compact row comes
    from; ids_CK: ids of local experts; row_CK: the slot's row; -1 in all four: none. slot_N: flat slot `c*K + k` of
    each row, -1 for pads and the tail; probs_N: fp32, 0 there; offsets_L1, counts_L: as in `SlotOrder`, no further than
    the rows; index_N: `[0]` unless `compact`: compact row of each row, 0 for pads and the tail.
    """

    counts_R: Tensor
    base_R1: Tensor
    token_C: Tensor
    rank_C: Tensor
    ids_CK: Tensor
    row_CK: Tensor
    slot_N: Tensor
    probs_N: Tensor
    offsets_L1: Tensor
    counts_L: Tensor
    index_N: Tensor


def ep_arrange(
    peers: Tensor,
    state: Tensor,
    trip: Tensor,
    *,
    num_compact: int,
    num_rows: int,
    slots: int,
    first_expert: int,
    num_local: int,
    alignment: int,
    compact: bool,
) -> Arranged:
    """Wait for the headers and words of all ranks (`ep_push` with ids, places, weights and counts_E) and give every
    slot its row, by (expert, source, token, slot): the order of `sort_slots`.

    Args:
        num_compact, num_rows: C and N, of the outputs. More rows than N are reported as an overflow; after a failure
            there are none, and outputs are as for empty trips.
        slots: K. alignment: every expert's rows are padded to a multiple of this.
    """
    op = torch.ops.moe_layer.ep_arrange
    return Arranged(
        *call_plain(op, peers, state, trip, num_compact, num_rows, slots, first_expert, num_local, alignment, compact)
    )


@torch.library.custom_op("moe_layer::ep_arrange", mutates_args=("state",))
def _ep_arrange(
    peers: Tensor,
    state: Tensor,
    trip: Tensor,
    num_compact: int,
    num_rows: int,
    slots: int,
    first_expert: int,
    num_local: int,
    alignment: int,
    compact: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, K = Trip(peers, state, trip), slots
    count_RL = torch.zeros(t.ranks, num_local, dtype=torch.int32)
    count_R = [0] * t.ranks
    try:
        t.start()
        arriving = t.headers()
        for source in range(t.ranks):
            count_RL[source] = t.expert_counts(t.me, source, num_local)
            for count in count_RL[source].tolist():
                if not 0 <= count <= t.words["max_rows"] * K:
                    raise t.fail(BAD_COUNT, peer=source, wanted=t.words["max_rows"], seen=count)
        count_R = arriving
    except Failed:
        count_RL.zero_()
    counts_R = torch.tensor(count_R, dtype=torch.int32)
    base = _begins(counts_R)
    total_L = count_RL.sum(0)
    offsets = _begins(-(total_L // -alignment) * alignment)
    if int(offsets[-1]) > num_rows:
        t.overflow(wanted=int(offsets[-1]), rows=num_rows)
    first_RL = offsets[:-1] + count_RL.cumsum(0) - count_RL
    token, rank = (torch.full((num_compact,), -1, dtype=torch.int32) for _ in range(2))
    ids, row = (torch.full((num_compact, K), -1, dtype=torch.int32) for _ in range(2))
    slot, probs = torch.full((num_rows + 1,), -1, dtype=torch.int32), torch.zeros(num_rows + 1)
    for source, count in enumerate(count_R):
        mine = slice(int(base[source]), int(base[source + 1]))
        words = t.meta(t.me, source, count, 1 + 3 * K)
        token[mine], rank[mine] = words[:, 0].int(), source
        expert, place = words[:, 1 : 1 + K], words[:, 1 + K : 1 + 2 * K]
        local = (expert >= first_expert) & (expert < first_expert + num_local)
        ids[mine] = torch.where(local, expert, -1)
        e = torch.where(local, expert - first_expert, 0).long()
        at = first_RL[source][e] + place
        fits = local & (place >= 0) & (place < count_RL[source][e]) & (at < num_rows)
        row[mine] = torch.where(fits, at, -1).int()
        target = torch.where(fits, at, num_rows).flatten().long()
        flat = torch.arange(mine.start * K, mine.stop * K, dtype=torch.int32)
        slot.scatter_(0, target, flat)
        probs.scatter_(0, target, words[:, 1 + 2 * K :].contiguous().view(torch.float32).flatten())
    slot, probs = slot[:-1].clone(), probs[:-1].clone()
    offsets = offsets.clamp_max(num_rows)
    index = slot.clamp_min(0) // K if compact else slot.new_empty(0)
    counts_L = torch.minimum(total_L.int(), offsets.diff())
    return counts_R, base, token, rank, ids, row, slot, probs, offsets, counts_L, index


@_ep_arrange.register_fake
def _(peers, state, trip, num_compact, num_rows, slots, first_expert, num_local, alignment, compact):  # type: ignore[no-untyped-def]
    R, C, N = peers.shape[0], (num_compact,), (num_rows,)
    shapes = ((R,), (R + 1,), C, C, (*C, slots), (*C, slots), N, N, (num_local + 1,), (num_local,), (N[0] * compact,))
    new = [peers.new_empty(shape, dtype=torch.float32 if i == 7 else torch.int32) for i, shape in enumerate(shapes)]
    return tuple(new)
