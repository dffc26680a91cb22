"""The expert-parallel trips over memory that every rank can reach: five ops, each with a CPU body.

The bodies are the protocol's readable model: they work on raw addresses (`peers`), so threads of one process or
processes that share memory can play the ranks, and csrc/ep_*.cu are their twins over NVLink. What lies where, and the
words of a `trip`, are described in moe_layer/dispatch/window.py.

A trip moves rows from every rank to every rank through one *slot* of the windows:

    sender   waits for the slot's credit (the receiver has read the previous trip's rows), then writes into the
             receiver's window: a header, a few words per row (`meta`), the rows; after each chunk a flag.
    receiver waits for the header and compares it with its own; reads rows as their flags come; gives the credit back.

Flags are epochs: the number of trips made through the slot, counted in `state` on the device, so that nothing is reset
and a captured CUDA graph can be replayed. Every wait has a deadline. What goes wrong is kept in `state` (the first
report stays), later ops do nothing, and outputs are filled with 0xFF bytes, a NaN in every floating dtype.

Shape letters: T tokens, K slots, R ranks, S the longest list of rows, C compact rows, N expert-major rows, D hidden.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.tree_reduce import tree_reduce

TRIP_WORDS = (
    "me",  # this rank
    "slot",
    "ready",  # byte offset: a word a source, the epoch whose header is there
    "flags",  # byte offset: max_chunks words a source, the epoch whose rows are there
    "credit",  # byte offset: a word a destination, the epoch whose rows it has read
    "header",  # byte offset: HEADER_BYTES a source
    "meta",  # byte offset; meta_block bytes a source
    "data",  # byte offset; data_block bytes a source
    "meta_block",
    "data_block",
    "max_rows",
    "chunk_rows",
    "max_chunks",
    "deadline_ns",
    "width",  # bytes of a row on this trip; this and the next five are compared between the ranks
    "layer",
    "phase",
    "step",
    "config",
    "magic",
)
HEADER_BYTES = 64
COMPARED = ("width", "layer", "phase", "step", "config", "magic")
# state: error, peer, wanted, seen, phase, layer, step, 0; then by slot sent, received and the kernels' tickets
STATE_HEAD, SLOT_WORDS = 8, 8
TIMEOUT, MISMATCH, BAD_COUNT, OVERFLOW = 1, 2, 3, 4
WIRE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_WIRES = {code: dtype for dtype, code in WIRE_CODES.items()}


def ep_plan(ids_TK: Tensor, *, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    """Which tokens go to which rank, without reading anything on the host.

    Args: int32 ids in [-1, num_experts).
    Returns: int32 tokens_RT (ascending tokens of each destination; past its count undefined), position_TR (place of
    the token in that list, -1 = not sent), counts_R.
    """
    return call_plain(torch.ops.moe_layer.ep_plan, ids_TK, num_experts, num_ranks)


@torch.library.custom_op("moe_layer::ep_plan", mutates_args=())
def _ep_plan(ids: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor]:
    T = ids.shape[0]
    rank_TK = torch.where(ids >= 0, ids.long() * num_ranks // num_experts, num_ranks)
    goes_TR = torch.zeros(T, num_ranks + 1, dtype=torch.bool, device=ids.device).scatter_(1, rank_TK, True)[:, :-1]
    position_TR = torch.where(goes_TR, goes_TR.int().cumsum(0) - 1, -1)
    token_TR = torch.arange(T, device=ids.device).unsqueeze(1).expand(T, num_ranks)
    target_TR = torch.where(goes_TR, position_TR, T).long()
    tokens_RT = torch.zeros(num_ranks, T + 1, dtype=torch.int32, device=ids.device)
    tokens_RT.scatter_(1, target_TR.T, token_TR.T.int())
    return tokens_RT[:, :T].contiguous(), position_TR.int(), goes_TR.sum(0).int()


@_ep_plan.register_fake
def _(ids, num_experts, num_ranks):  # type: ignore[no-untyped-def]
    T = ids.shape[0]
    new = [ids.new_empty(shape, dtype=torch.int32) for shape in ((num_ranks, T), (T, num_ranks), (num_ranks,))]
    return tuple(new)


# ---- the CPU model's view of a trip -------------------------------------------------------------------------------


class _Failed(Exception):
    """The trip cannot go on; the reason is in `state`."""


class _Trip:
    """Names for the words of `trip`, views into the windows, waits."""

    def __init__(self, peers: Tensor, state: Tensor, trip: Tensor) -> None:
        self.peers, self.state = peers.tolist(), state
        self.words = dict(zip(TRIP_WORDS, trip.tolist(), strict=True))
        self.me, self.slot, self.width = self.words["me"], self.words["slot"], self.words["width"]
        self.ranks = len(self.peers)

    def ints(self, peer: int, offset: int, count: int) -> Tensor:
        return self.bytes(peer, offset, 4 * count).view(torch.int32)

    def bytes(self, peer: int, offset: int, count: int) -> Tensor:
        if count == 0:
            return torch.empty(0, dtype=torch.uint8)
        memory = (ctypes.c_uint8 * count).from_address(self.peers[peer] + offset)
        return torch.frombuffer(memory, dtype=torch.uint8)

    def word(self, peer: int, name: str, index: int) -> Tensor:
        return self.ints(peer, self.words[name] + 4 * index, 1)

    def meta(self, peer: int, source: int, rows: int, words: int) -> Tensor:
        return self.ints(peer, self.words["meta"] + source * self.words["meta_block"], rows * words).view(rows, words)

    def rows(self, peer: int, source: int, rows: int) -> Tensor:
        offset = self.words["data"] + source * self.words["data_block"]
        return self.bytes(peer, offset, rows * self.width).view(rows, self.width)

    def counter(self, which: int) -> Tensor:
        index = STATE_HEAD + SLOT_WORDS * self.slot + which
        return self.state[index : index + 1]

    @property
    def sent(self) -> Tensor:
        return self.counter(0)

    @property
    def received(self) -> Tensor:
        return self.counter(1)

    def start(self) -> None:
        if int(self.state[0]):
            raise _Failed

    def fail(self, code: int, *, peer: int, wanted: int, seen: int) -> _Failed:
        if not int(self.state[0]):
            w = self.words
            self.state[:7] = torch.tensor([code, peer, wanted, seen, w["phase"], w["layer"], w["step"]])
        return _Failed()

    def wait(self, peer: int, name: str, index: int, *, epoch: int) -> None:
        """Until this rank's word, written by `peer`, has reached the epoch (or passed it: epochs wrap)."""
        word = self.word(self.me, name, index)
        until = time.monotonic_ns() + self.words["deadline_ns"]
        while (int(word) - epoch + 2**31) % 2**32 < 2**31:
            if time.monotonic_ns() > until:
                raise self.fail(TIMEOUT, peer=peer, wanted=epoch, seen=int(word))
            time.sleep(1e-4)

    def wait_credits(self) -> None:
        for peer in range(self.ranks):
            self.wait(peer, "credit", peer, epoch=int(self.sent))

    def write_headers(self, counts: Sequence[int]) -> None:
        for peer in range(self.ranks):
            header = self.ints(peer, self.words["header"] + HEADER_BYTES * self.me, HEADER_BYTES // 4)
            header[: len(COMPARED)] = torch.tensor([self.words[name] for name in COMPARED]).int()
            header[len(COMPARED)] = counts[peer]
            self.word(peer, "ready", self.me).copy_(self.sent + 1)

    def headers(self) -> list[int]:
        """Rows from each rank, once all headers are there and agree with this rank's."""
        counts = []
        for peer in range(self.ranks):
            self.wait(peer, "ready", peer, epoch=int(self.received) + 1)
            header = self.ints(self.me, self.words["header"] + HEADER_BYTES * peer, HEADER_BYTES // 4).tolist()
            for name, seen in zip(COMPARED, header, strict=False):
                if seen != self.words[name]:
                    raise self.fail(MISMATCH, peer=peer, wanted=self.words[name], seen=seen)
            count = header[len(COMPARED)]
            if not 0 <= count <= self.words["max_rows"]:
                raise self.fail(BAD_COUNT, peer=peer, wanted=self.words["max_rows"], seen=count)
            counts.append(count)
        return counts

    def send_rows(self, rows_of: Callable[[int, int], Tensor], counts: Sequence[int]) -> None:
        """`rows_of(peer, count)`: uint8 [count, width]. Own rows stay at home."""
        chunk = self.words["chunk_rows"]
        for peer in range(self.ranks):
            if peer == self.me:
                continue
            rows = rows_of(peer, counts[peer])
            target = self.rows(peer, self.me, counts[peer])
            for first in range(0, counts[peer], chunk):
                target[first : first + chunk] = rows[first : first + chunk]
                self.word(peer, "flags", self.me * self.words["max_chunks"] + first // chunk).copy_(self.sent + 1)

    def await_rows(self, source: int, count: int) -> Tensor:
        """The rows of a source, uint8 [count, width], once they are all there."""
        chunk = self.words["chunk_rows"]
        for first in range(0, count, chunk):
            index = source * self.words["max_chunks"] + first // chunk
            self.wait(source, "flags", index, epoch=int(self.received) + 1)
        return self.rows(self.me, source, count)

    def finish_receiving(self) -> None:
        self.received.add_(1)
        for peer in range(self.ranks):
            self.word(peer, "credit", self.me).copy_(self.received)


def _as_bytes(rows: Tensor) -> Tensor:
    width = rows.shape[1] * rows.element_size()
    if rows.numel() == 0:
        return rows.new_empty(rows.shape[0], width, dtype=torch.uint8)
    return rows.contiguous().view(torch.uint8).view(rows.shape[0], width)


def _poison(tensor: Tensor) -> None:
    if tensor.numel():
        tensor.view(torch.uint8).fill_(0xFF)


# ---- sending --------------------------------------------------------------------------------------------------------


def ep_push(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    tokens_RS: Tensor,
    counts_R: Tensor,
    trip: Tensor,
    *,
    meta0: Tensor | None = None,
    meta1: Tensor | None = None,
    blocks: int,
) -> None:
    """Send `rows[tokens_RS[r, i]]` to rank r as its row i, i < counts_R[r]; words of meta0 and meta1 go before them.

    Args:
        peers: int64 `[R]`, addresses of the windows. state: int32. trip: int64 on the CPU, see TRIP_WORDS.
        rows: `[T, width bytes]` contiguous, any dtype.
        tokens_RS, counts_R: int32. A row of this rank itself is not copied; its header and meta words are.
        meta0, meta1: int32 or fp32 `[T, M]`: a row's words are its token index, then these.
        blocks: thread blocks, which is the number of multiprocessors that the send occupies at most.
    """
    call_plain(torch.ops.moe_layer.ep_push, peers, state, rows, tokens_RS, counts_R, meta0, meta1, trip, blocks)


@torch.library.custom_op("moe_layer::ep_push", mutates_args=("state",))
def _ep_push(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    tokens: Tensor,
    counts: Tensor,
    meta0: Tensor | None,
    meta1: Tensor | None,
    trip: Tensor,
    blocks: int,
) -> None:
    t = _Trip(peers, state, trip)
    try:
        t.start()
        t.wait_credits()
    except _Failed:
        return
    count_R = counts.tolist()
    for peer in range(t.ranks):
        index = tokens[peer, : count_R[peer]]
        extra = [m.view(torch.int32).index_select(0, index) for m in (meta0, meta1) if m is not None]
        if extra:
            words = torch.cat([index.unsqueeze(1), *extra], dim=1)
            t.meta(peer, t.me, count_R[peer], words.shape[1]).copy_(words)
    t.write_headers(count_R)
    source = _as_bytes(rows)
    t.send_rows(lambda peer, count: source.index_select(0, tokens[peer, :count]), count_R)
    t.sent.add_(1)


def ep_reduce_push(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    row_CK: Tensor,
    ids_CK: Tensor,
    base_R1: Tensor,
    trip: Tensor,
    *,
    probs_N: Tensor | None = None,
    wire: torch.dtype,
    num_experts: int,
    tree_blocks: int,
    compact: bool = False,
    blocks: int,
) -> None:
    """Send compact rows home: for c in [base_R1[r], base_R1[r+1]) the tree sum of `rows[row_CK[c]]`, rounded to `wire`.

    Args:
        rows: `[N, D]`, or with `compact` `[C, D]`, already summed. row_CK, ids_CK: as in `tree_reduce`.
        probs_N: optional fp32; `probs_N[row_CK[c]]` (0 where absent) travels as the row's K meta words.
    """
    code = WIRE_CODES[wire]
    op = torch.ops.moe_layer.ep_reduce_push
    call_plain(
        op, peers, state, rows, row_CK, ids_CK, base_R1, probs_N, trip, code, num_experts, tree_blocks, compact, blocks
    )


@torch.library.custom_op("moe_layer::ep_reduce_push", mutates_args=("state",))
def _ep_reduce_push(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    row_index: Tensor,
    ids: Tensor,
    base: Tensor,
    probs: Tensor | None,
    trip: Tensor,
    wire: int,
    num_experts: int,
    tree_blocks: int,
    compact: bool,
    blocks: int,
) -> None:
    t = _Trip(peers, state, trip)
    try:
        t.start()
        t.wait_credits()
    except _Failed:
        return
    begin = base.tolist()
    count_R = [begin[r + 1] - begin[r] for r in range(t.ranks)]
    part = _partial(rows, row_index, ids, num_experts, tree_blocks, compact)[: begin[-1]]
    source = _as_bytes(part.to(_WIRES[wire]))
    t.write_headers(count_R)
    for peer in range(t.ranks):
        if probs is not None and peer != t.me:
            words = _slots(probs, row_index[begin[peer] : begin[peer + 1]])
            t.meta(peer, t.me, count_R[peer], words.shape[1]).copy_(words.view(torch.int32))
    t.send_rows(lambda peer, count: source[begin[peer] : begin[peer] + count], count_R)
    t.sent.add_(1)


def _partial(rows: Tensor, row_index: Tensor, ids: Tensor, num_experts: int, blocks: int, compact: bool) -> Tensor:
    if compact:
        return rows
    return tree_reduce(rows, row_index, ids_MK=ids, num_experts=num_experts, blocks=blocks)


def _slots(values_N: Tensor, row_CK: Tensor) -> Tensor:
    """fp32 value of each slot's row, 0 where absent."""
    if values_N.numel() == 0:
        return torch.zeros(row_CK.shape)
    return torch.where(row_CK >= 0, values_N[row_CK.clamp_min(0).long()], 0.0)


# ---- receiving ------------------------------------------------------------------------------------------------------


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
    t = _Trip(peers, state, trip)
    try:
        t.start()
        count_R = t.headers()
    except _Failed:
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
) -> None:
    """Copy the rows of a trip out of the window as they arrive: compact row c to the rows `row_CK[c]` of `out`.

    Args:
        rows, tokens_RS: what this rank itself sent in the trip: its own rows are read from there.
        base_R1, counts_R: int32; row i of source r, i < counts_R[r], is compact row base_R1[r] + i.
        row_CK: int32, -1 = absent; None: row c of `out` is compact row c.
        slot_N, offsets_L1: with both, rows of `out` that are pads (slot_N < 0, before the last offset) become zeros; an
            `out` (without row_CK: a slot_N) with fewer rows than the last offset is reported as an overflow.
        out: `[N, width bytes]`, filled with 0xFF after a failure.
    """
    op = torch.ops.moe_layer.ep_take
    call_plain(op, peers, state, rows, tokens_RS, base_R1, counts_R, row_CK, slot_N, offsets_L1, trip, out)


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
) -> None:
    t = _Trip(peers, state, trip)
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
                arrived = _as_bytes(rows).index_select(0, tokens[t.me, :count])
            else:
                arrived = t.await_rows(source, count)
            first = begin[source]
            if row_index is None:
                _store(out, arrived, torch.arange(first, first + count), torch.arange(count))
            else:
                index = row_index[first : first + count]
                place = (index >= 0).nonzero()
                _store(out, arrived, index[place[:, 0], place[:, 1]].long(), place[:, 0])
    except _Failed:
        _poison(out)
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
    t = _Trip(peers, state, trip)
    T, R, K = position.shape[0], t.ranks, row_index.shape[1]
    out = torch.empty(T, rows.shape[1], dtype=_WIRES[out_code])
    d_weights = torch.zeros((T, K) if probs is not None else (0,))
    mine = slice(int(base[t.me]), int(base[t.me + 1]))
    own = _partial(rows, row_index, ids, num_experts, tree_blocks, compact)[mine].to(_WIRES[wire])
    try:
        t.start()
        t.headers()
        blocks, words, first = [], [], [0]
        for source in range(R):
            count = int((position[:, source] >= 0).sum())
            if source == t.me:
                blocks.append(_as_bytes(own))
            else:
                blocks.append(t.await_rows(source, count))
            if probs is not None:
                own_words = _slots(probs, row_index[mine])
                words.append(own_words if source == t.me else t.meta(t.me, source, count, K).view(torch.float32))
            first.append(first[-1] + count)
        home = torch.cat(blocks).contiguous().view(_WIRES[wire]).view(first[-1], rows.shape[1])
    except _Failed:
        _poison(out)
        _poison(d_weights)
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
    out = rows.new_empty((T, rows.shape[1]), dtype=_WIRES[out_code])
    return out, rows.new_empty((T, K) if probs is not None else (0,), dtype=torch.float32)


def ep_skip(peers: Tensor, state: Tensor, trip: Tensor) -> None:
    """Count a trip that nobody will take as received, and give its credits back."""
    call_plain(torch.ops.moe_layer.ep_skip, peers, state, trip)


@torch.library.custom_op("moe_layer::ep_skip", mutates_args=("state",))
def _ep_skip(peers: Tensor, state: Tensor, trip: Tensor) -> None:
    _Trip(peers, state, trip).finish_receiving()
