"""The receiving half of a trip, see moe_layer/ops/ep.py: `ep_take`, `ep_home`, `ep_skip`."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.ep_model import (
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
    token_C: Tensor | None = None,
) -> None:
    """Copy the rows of a trip out of the window as they arrive: compact row c to the rows `row_CK[c]` of `out`.

    Args:
        rows, tokens_RS: what this rank itself sent in the trip: its own rows are read from there.
        base_R1, counts_R: int32; row i of source r, i < counts_R[r], is compact row base_R1[r] + i.
        row_CK: int32, -1 = absent; None: row c of `out` is compact row c.
        slot_N, offsets_L1: with both, rows of `out` that are pads (slot_N < 0, before the last offset) become zeros.
        out: `[N, width bytes]`, filled with 0xFF after a failure; with `fp8` bf16 (as `rows`), decoded on the way.
        token_C: int32, of a dense push: compact row c lies in the window as row `token_C[c]` of its source.
    """
    op = torch.ops.moe_layer.ep_take
    call_plain(
        op, peers, state, rows, tokens_RS, base_R1, counts_R, row_CK, slot_N, offsets_L1, trip, out, fp8, token_C
    )


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
    token: Tensor | None,
) -> None:
    t = Trip(peers, state, trip)
    begin = base.tolist()
    try:
        t.start()
        t.headers()
        if slot is not None and offsets is not None and out.numel():
            pads = (slot[: out.shape[0]] < 0) & (torch.arange(out.shape[0]) < offsets[-1])
            out[pads] = 0
        for source, count in enumerate(counts.tolist()):
            mine = None if token is None else token[begin[source] : begin[source] + count]
            arrived = arrived_rows(t, rows, tokens, source=source, count=count, fp8=fp8, places=mine)
            first = begin[source]
            if row_index is None:
                store_rows(out, arrived, torch.arange(first, first + count), torch.arange(count))
            else:
                index = row_index[first : first + count]
                place = (index >= 0).nonzero()
                store_rows(out, arrived, index[place[:, 0], place[:, 1]].long(), place[:, 0])
        t.check_peers()
    except Failed:
        poison(out)
        return
    t.finish_receiving()


def arrived_rows(
    t: Trip, rows: Tensor, tokens: Tensor, *, source: int, count: int, fp8: bool, places: Tensor | None = None
) -> Tensor:
    """The rows of a source as bytes (of a dense push those at `places`); the own ones take the same roundings."""
    if source == t.me:
        own = rows.index_select(0, tokens[t.me, :count])
        arrived = encoded_rows(own, t.width) if fp8 else as_bytes(own)
    else:
        arrived = t.await_rows(source, count, places)
    return as_bytes(decoded_rows(arrived, rows.shape[1])) if fp8 else arrived


def store_rows(out: Tensor, arrived: Tensor, target: Tensor, source: Tensor) -> None:
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
