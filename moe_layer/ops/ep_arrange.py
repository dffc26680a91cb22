"""How much arrives and where it goes, see moe_layer/ops/ep.py: `ep_await`, `ep_arrange`."""

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
    """Where the rows of each expert begin, and of each source there. int32.

    counts_R, base_R1: arriving rows and first compact row of each source; first_RL: `[R + 1, L]`, the first row of the
    slots from rank r for local expert e, and in the last line where the expert's rows end and its pads begin;
    offsets_L1, counts_L: as in `SlotOrder`, no further than the rows.
    """

    counts_R: Tensor
    base_R1: Tensor
    first_RL: Tensor
    offsets_L1: Tensor
    counts_L: Tensor


def ep_arrange(
    peers: Tensor, state: Tensor, trip: Tensor, *, num_rows: int, slots: int, num_local: int, alignment: int
) -> Arranged:
    """Wait for the headers and counts of all ranks (`ep_push` with counts_E), which come before any row.

    Args:
        num_rows: N. More rows than that are reported as an overflow; after a failure there are none.
        slots: K. alignment: every expert's rows are padded to a multiple of this.
    """
    op = torch.ops.moe_layer.ep_arrange
    return Arranged(*call_plain(op, peers, state, trip, num_rows, slots, num_local, alignment))


@torch.library.custom_op("moe_layer::ep_arrange", mutates_args=("state",))
def _ep_arrange(
    peers: Tensor, state: Tensor, trip: Tensor, num_rows: int, slots: int, num_local: int, alignment: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    t = Trip(peers, state, trip)
    count_RL = torch.zeros(t.ranks, num_local, dtype=torch.int32)
    count_R = [0] * t.ranks
    try:
        t.start()
        arriving = t.headers()
        for source in range(t.ranks):
            counts = t.read_pairs(source, t.expert_counts(t.me, source, num_local))
            count_RL[source] = torch.tensor(counts, dtype=torch.int32)
            for count in counts:
                if not 0 <= count <= t.words["max_rows"] * slots:
                    raise t.fail(BAD_COUNT, peer=source, wanted=t.words["max_rows"], seen=count)
        count_R = arriving
    except Failed:
        count_RL.zero_()
    counts_R = torch.tensor(count_R, dtype=torch.int32)
    total_L = count_RL.sum(0)
    offsets = _begins(-(total_L // -alignment) * alignment)
    if int(offsets[-1]) > num_rows:
        t.overflow(wanted=int(offsets[-1]), rows=num_rows)
    first_RL = (offsets[:-1] + torch.nn.functional.pad(count_RL.cumsum(0), (0, 0, 1, 0))).int()
    offsets = offsets.clamp_max(num_rows)
    return counts_R, _begins(counts_R), first_RL, offsets, torch.minimum(total_L.int(), offsets.diff())


@_ep_arrange.register_fake
def _(peers, state, trip, num_rows, slots, num_local, alignment):  # type: ignore[no-untyped-def]
    R, L = peers.shape[0], num_local
    shapes = ((R,), (R + 1,), (R + 1, L), (L + 1,), (L,))
    new = [peers.new_empty(shape, dtype=torch.int32) for shape in shapes]
    return tuple(new)
