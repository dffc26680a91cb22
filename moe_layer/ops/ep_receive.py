"""The receiving half of a trip, see moe_layer/ops/ep.py: `ep_await`, `ep_take`, `ep_home`, `ep_skip`."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.ep_model import (
    OVERFLOW,
    WIRE_CODES,
    WIRES,
    Failed,
    Trip,
    as_bytes,
    decoded_rows,
    encoded_rows,
    partial_rows,
    poison,
    slot_values,
)
from moe_layer.ops.tree_reduce import tree_reduce


def ep_await(
    peers: Tensor,
    state: Tensor,
    trip: Tensor,
    *,
    num_rows: int,
    words0: int,
    words1: int,
    first_expert: int,
    num_local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Wait for the headers and meta words of all ranks; rows may still be under way.

    Args:
        num_rows: C, room for the compact rows: R * max_tokens_per_rank.
        words0, words1: widths of the meta0 and meta1 that were sent; 0 where only the counts are wanted.
        first_expert, num_local: meta0 holds expert ids; those of other ranks become -1.

    Returns:
        int32 counts_R and base_R1 (compact rows of each source), token_C, rank_C (-1 past the end), meta0 [C, words0]
        (-1 past the end), fp32 meta1 [C, words1] (0 past the end). No rows at all after a failure.
    """
    op = torch.ops.moe_layer.ep_await
    return call_plain(op, peers, state, trip, num_rows, words0, words1, first_expert, num_local)


@torch.library.custom_op("moe_layer::ep_await", mutates_args=("state",))
def _ep_await(
    peers: Tensor,
    state: Tensor,
    trip: Tensor,
    num_rows: int,
    words0: int,
    words1: int,
    first_expert: int,
    num_local: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t = Trip(peers, state, trip)
    try:
        t.start()
        count_R = t.headers()
    except Failed:
        count_R = [0] * t.ranks
    counts = torch.tensor(count_R, dtype=torch.int32)
    base = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).int()
    token = torch.full((num_rows,), -1, dtype=torch.int32)
    rank = torch.full((num_rows,), -1, dtype=torch.int32)
    meta0 = torch.full((num_rows, words0), -1, dtype=torch.int32)
    meta1 = torch.zeros(num_rows, words1)
    for source, count in enumerate(count_R if words0 else []):
        rows = slice(int(base[source]), int(base[source + 1]))
        words = t.meta(t.me, source, count, 1 + words0 + words1)
        token[rows], rank[rows] = words[:, 0].int(), source
        ids = words[:, 1 : 1 + words0]
        meta0[rows] = torch.where((ids >= first_expert) & (ids < first_expert + num_local), ids, -1).int()
        meta1[rows] = words[:, 1 + words0 :].contiguous().view(torch.float32)
    return counts, base, token, rank, meta0, meta1


@_ep_await.register_fake
def _(peers, state, trip, num_rows, words0, words1, first_expert, num_local):  # type: ignore[no-untyped-def]
    R, C = peers.shape[0], num_rows
    shapes = ((R,), (R + 1,), (C,), (C,), (C, words0))
    new = [peers.new_empty(shape, dtype=torch.int32) for shape in shapes]
    return (*new, peers.new_empty((C, words1), dtype=torch.float32))


def ep_take(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    tokens_RS: Tensor,
    base_R1: Tensor,
    counts_R: Tensor,
    trip: Tensor,
    *,
    row_CK: Tensor | None = None,
    slot_N: Tensor | None = None,
    offsets_L1: Tensor | None = None,
    out: Tensor,
    fp8: bool = False,
) -> None:
    """Copy the rows of a trip out of the window as they arrive: compact row c to the rows `row_CK[c]` of `out`.

    Args:
        rows, tokens_RS: what this rank itself sent in the trip: its own rows are read from there.
        base_R1, counts_R: int32; row i of source r, i < counts_R[r], is compact row base_R1[r] + i.
        row_CK: int32, -1 = absent; None: row c of `out` is compact row c.
        slot_N, offsets_L1: with both, rows of `out` that are pads (slot_N < 0, before the last offset) become zeros; an
            `out` (without row_CK: a slot_N) with fewer rows than the last offset is reported as an overflow.
        out: `[N, width bytes]`, filled with 0xFF after a failure; with `fp8` bf16 (as `rows`), decoded on the way.
    """
    op = torch.ops.moe_layer.ep_take
    call_plain(op, peers, state, rows, tokens_RS, base_R1, counts_R, row_CK, slot_N, offsets_L1, trip, out, fp8)


@torch.library.custom_op("moe_layer::ep_take", mutates_args=("state", "out"))
def _ep_take(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    tokens: Tensor,
    base: Tensor,
    counts: Tensor,
    row_index: Tensor | None,
    slot: Tensor | None,
    offsets: Tensor | None,
    trip: Tensor,
    out: Tensor,
    fp8: bool,
) -> None:
    t = Trip(peers, state, trip)
    begin = base.tolist()
    try:
        t.start()
        t.headers()
        places = slot.shape[0] if slot is not None and row_index is None else out.shape[0]
        if offsets is not None and int(offsets[-1]) > places:
            raise t.fail(OVERFLOW, peer=t.me, wanted=int(offsets[-1]), seen=places)
        if slot is not None and offsets is not None and row_index is not None and out.numel():
            pads = (slot < 0) & (torch.arange(out.shape[0]) < offsets[-1])
            out[pads] = 0
        for source, count in enumerate(counts.tolist()):
            if source == t.me:
                own = rows.index_select(0, tokens[t.me, :count])
                arrived = encoded_rows(own, t.width) if fp8 else as_bytes(own)
            else:
                arrived = t.await_rows(source, count)
            arrived = as_bytes(decoded_rows(arrived, rows.shape[1])) if fp8 else arrived
            first = begin[source]
            if row_index is None:
                _store(out, arrived, torch.arange(first, first + count), torch.arange(count))
            else:
                index = row_index[first : first + count]
                place = (index >= 0).nonzero()
                _store(out, arrived, index[place[:, 0], place[:, 1]].long(), place[:, 0])
    except Failed:
        poison(out)
        return
    t.finish_receiving()


def _store(out: Tensor, arrived: Tensor, target: Tensor, source: Tensor) -> None:
    if out.numel():
        out.view(torch.uint8).view(out.shape[0], -1).index_copy_(0, target, arrived.index_select(0, source))


def ep_home(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    row_CK: Tensor,
    ids_CK: Tensor,
    base_R1: Tensor,
    position_TR: Tensor,
    ids_TK: Tensor,
    trip: Tensor,
    *,
    probs_N: Tensor | None = None,
    add: Tensor | None = None,
    dtype: torch.dtype,
    wire: torch.dtype,
    num_experts: int,
    tree_blocks: int,
    compact: bool = False,
) -> tuple[Tensor, Tensor]:
    """Sum what `ep_reduce_push` sent: each rank's partial row of a token, ascending ranks, pairwise; own rows are
    summed here and rounded to `wire` like the others.

    Args: as there; position_TR: int32, the token's place among the rows of each rank, -1 = none; add: `[T, D]`
    floating, joined in fp32 after the sum.

    Returns:
        `[T, D]` in `dtype`; fp32 `[T, K]` of the `probs_N` that came home, `[0]` without. NaN after a failure.
    """
    op, code, out = torch.ops.moe_layer.ep_home, WIRE_CODES[wire], WIRE_CODES[dtype]
    return call_plain(
        op,
        peers,
        state,
        rows,
        row_CK,
        ids_CK,
        base_R1,
        position_TR,
        ids_TK,
        probs_N,
        add,
        trip,
        out,
        code,
        num_experts,
        tree_blocks,
        compact,
    )


@torch.library.custom_op("moe_layer::ep_home", mutates_args=("state",))
def _ep_home(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    row_index: Tensor,
    ids: Tensor,
    base: Tensor,
    position: Tensor,
    own_ids: Tensor,
    probs: Tensor | None,
    add: Tensor | None,
    trip: Tensor,
    out_code: int,
    wire: int,
    num_experts: int,
    tree_blocks: int,
    compact: bool,
) -> tuple[Tensor, Tensor]:
    t = Trip(peers, state, trip)
    T, R, K = position.shape[0], t.ranks, row_index.shape[1]
    out = torch.empty(T, rows.shape[1], dtype=WIRES[out_code])
    d_weights = torch.zeros((T, K) if probs is not None else (0,))
    mine = slice(int(base[t.me]), int(base[t.me + 1]))
    own = partial_rows(rows, row_index, ids, num_experts, tree_blocks, compact)[mine].to(WIRES[wire])
    try:
        t.start()
        t.headers()
        blocks, words, first = [], [], [0]
        for source in range(R):
            count = int((position[:, source] >= 0).sum())
            if source == t.me:
                blocks.append(as_bytes(own))
            else:
                blocks.append(t.await_rows(source, count))
            if probs is not None:
                own_words = slot_values(probs, row_index[mine])
                words.append(own_words if source == t.me else t.meta(t.me, source, count, K).view(torch.float32))
            first.append(first[-1] + count)
        home = torch.cat(blocks).contiguous().view(WIRES[wire]).view(first[-1], rows.shape[1])
    except Failed:
        poison(out)
        poison(d_weights)
        return out, d_weights
    place = torch.where(position >= 0, position + torch.tensor(first[:-1], dtype=torch.int32), -1)
    rank_TR = torch.arange(R, dtype=torch.int32).expand(T, R)
    total = tree_reduce(home, place, ids_MK=rank_TR, num_experts=R, blocks=R)
    out.copy_(total if add is None else total + add.float())
    if probs is not None:
        owner = torch.where(own_ids >= 0, own_ids.long() * R // num_experts, 0)
        row = place.gather(1, owner)
        value = torch.cat(words)[row.clamp_min(0).long(), torch.arange(K)] if first[-1] else d_weights
        d_weights = torch.where((own_ids >= 0) & (row >= 0), value, 0.0)
    t.finish_receiving()
    return out, d_weights


@_ep_home.register_fake
def _(peers, state, rows, row_index, ids, base, position, own_ids, probs, add, trip, out_code, *static):  # type: ignore[no-untyped-def]
    T, K = position.shape[0], row_index.shape[1]
    out = rows.new_empty((T, rows.shape[1]), dtype=WIRES[out_code])
    return out, rows.new_empty((T, K) if probs is not None else (0,), dtype=torch.float32)


def ep_skip(peers: Tensor, state: Tensor, trip: Tensor) -> None:
    """Count a trip that nobody will take as received, and give its credits back."""
    call_plain(torch.ops.moe_layer.ep_skip, peers, state, trip)


@torch.library.custom_op("moe_layer::ep_skip", mutates_args=("state",))
def _ep_skip(peers: Tensor, state: Tensor, trip: Tensor) -> None:
    Trip(peers, state, trip).finish_receiving()
