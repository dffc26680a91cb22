"""A trip on the CPU: the readable model of csrc/ep.cuh. The protocol is described in moe_layer/ops/ep.py."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_layer.ops.fp8_rows import fp8_decode, fp8_encode
from moe_layer.ops.tree_reduce import tree_reduce

TRIP_WORDS = (
    "me",  # this rank
    "slot",
    "flags",  # byte offset: max_chunks words a source, the epoch whose rows are there
    "credit",  # byte offset: a word a destination, the epoch whose rows it has read
    "header",  # byte offset: HEADER_BYTES a source
    "meta",  # byte offset; meta_block bytes a source: the words of its rows; at the end counts of its slots by expert
    "data",  # byte offset; data_block bytes a source
    "meta_block",
    "data_block",
    "max_rows",
    "chunk_rows",
    "max_chunks",
    # byte offset, the same in all slots: a word a source, not 0 once that rank's rows have overflowed, then a word a
    # source, not 0 once that rank went on without a credit (ep_push_rows)
    "fault",
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
# state: error, peer, wanted, seen, phase, layer, step, index into COMPARED; then by slot sent, received and the
# kernels' tickets
STATE_HEAD, SLOT_WORDS = 8, 8
TIMEOUT, MISMATCH, BAD_COUNT, OVERFLOW, PEER_OVERFLOW, GAVE_UP = 1, 2, 3, 4, 5, 6
WIRE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
WIRES = {code: dtype for dtype, code in WIRE_CODES.items()}


class Failed(Exception):
    """The trip cannot go on; the reason is in `state`."""


class Trip:
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

    def header(self, peer: int, source: int) -> Tensor:
        """Pairs of a value and its epoch, which arrive together: COMPARED, the number of rows."""
        pairs = self.ints(peer, self.words["header"] + HEADER_BYTES * source, HEADER_BYTES // 4).view(-1, 2)
        return pairs[: len(COMPARED) + 1]

    def expert_counts(self, peer: int, source: int, num_local: int) -> Tensor:
        """The last pairs of the source's block: how many slots of each of the peer's experts it sends."""
        end = self.words["meta"] + (source + 1) * self.words["meta_block"]
        return self.ints(peer, end - 8 * num_local, 2 * num_local).view(-1, 2)

    def read_pairs(self, source: int, pairs: Tensor) -> list[int]:
        """The values, once all their epochs have come."""
        for word in pairs[:, 1]:
            self.await_word(source, word, epoch=int(self.received) + 1)
        return pairs[:, 0].tolist()

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
            raise Failed

    def fail(self, code: int, *, peer: int, wanted: int, seen: int, field: int = 0) -> Failed:
        if not int(self.state[0]):
            w = self.words
            self.state[:8] = torch.tensor([code, peer, wanted, seen, w["phase"], w["layer"], w["step"], field])
        return Failed()

    def overflow(self, *, wanted: int, rows: int) -> None:
        """What this rank found concerns all: peers that wait for it need not wait for their deadline."""
        self.fail(OVERFLOW, peer=self.me, wanted=wanted, seen=rows)
        for peer in range(self.ranks):
            self.word(peer, "fault", self.me).fill_(OVERFLOW)

    def wait(self, peer: int, name: str, index: int, *, epoch: int) -> None:
        """Until this rank's word, written by `peer`, has reached the epoch (or passed it: epochs wrap)."""
        self.await_word(peer, self.word(self.me, name, index), epoch=epoch)

    def await_word(self, peer: int, word: Tensor, *, epoch: int) -> None:
        until = time.monotonic_ns() + self.words["deadline_ns"]
        while (int(word) - epoch + 2**31) % 2**32 < 2**31:
            if int(self.word(self.me, "fault", peer)):
                raise self.fail(PEER_OVERFLOW, peer=peer, wanted=epoch, seen=int(word))
            if time.monotonic_ns() > until:
                raise self.fail(TIMEOUT, peer=peer, wanted=epoch, seen=int(word))
            time.sleep(1e-4)

    def wait_credits(self) -> None:
        for peer in range(self.ranks):
            self.wait(peer, "credit", peer, epoch=int(self.sent))

    def write_headers(self, counts: Sequence[int], *, epoch: Tensor) -> None:
        for peer in range(self.ranks):
            header = self.header(peer, self.me)
            header[:, 0] = torch.tensor([*(self.words[name] for name in COMPARED), counts[peer]]).int()
            header[:, 1] = epoch

    def words_ready(self, peer: int, source: int) -> Tensor:
        """Of a dense push: the epoch whose words are there. The last word of the source's header."""
        return self.word(peer, "header", (source + 1) * HEADER_BYTES // 4 - 1)

    def headers(self) -> list[int]:
        """Rows from each rank, once all headers are there and agree with this rank's."""
        counts = []
        for peer in range(self.ranks):
            header = self.read_pairs(peer, self.header(self.me, peer))
            for field, name in enumerate(COMPARED):
                if header[field] != self.words[name]:
                    raise self.fail(MISMATCH, peer=peer, wanted=self.words[name], seen=header[field], field=field)
            count = header[len(COMPARED)]
            if not 0 <= count <= self.words["max_rows"]:
                raise self.fail(BAD_COUNT, peer=peer, wanted=self.words["max_rows"], seen=count)
            counts.append(count)
        return counts

    def send_rows(self, rows_of: Callable[[int, int], Tensor], counts: Sequence[int], *, epoch: Tensor) -> None:
        """`rows_of(peer, count)`: uint8 [count, width]. Own rows stay at home."""
        chunk = self.words["chunk_rows"]
        for peer in range(self.ranks):
            if peer == self.me:
                continue
            rows = rows_of(peer, counts[peer])
            target = self.rows(peer, self.me, counts[peer])
            for first in range(0, counts[peer], chunk):
                target[first : first + chunk] = rows[first : first + chunk]
                self.word(peer, "flags", self.me * self.words["max_chunks"] + first // chunk).copy_(epoch)

    def await_rows(self, source: int, count: int, tokens: Tensor | None = None) -> Tensor:
        """Rows of a source, uint8 [count, width], once they are all there: the first ones, or those of the tokens
        (int32 [count], dense push)."""
        chunk, most = self.words["chunk_rows"], self.words["max_rows"]
        index = torch.arange(count) if tokens is None else tokens.long()
        for bad in index[(index < 0) | (index >= most)][:1].tolist():
            raise self.fail(BAD_COUNT, peer=source, wanted=most, seen=bad)
        for piece in (index // chunk).unique().tolist():
            flag = source * self.words["max_chunks"] + piece
            self.wait(source, "flags", flag, epoch=int(self.received) + 1)
        return self.rows(self.me, source, int(index.max()) + 1 if count else 0).index_select(0, index)

    def give_up(self) -> None:
        """Tell all ranks that this one goes on without credits."""
        for peer in range(self.ranks):
            self.word(peer, "fault", self.ranks + self.me).fill_(1)

    def check_peers(self) -> None:
        """After everything has been read: nobody went on without this rank's credit, so nothing was overwritten."""
        for peer in range(self.ranks):
            if int(self.word(self.me, "fault", self.ranks + peer)):
                code = PEER_OVERFLOW if int(self.word(self.me, "fault", peer)) else GAVE_UP
                raise self.fail(code, peer=peer, wanted=int(self.received) + 1, seen=0)

    def finish_receiving(self) -> None:
        self.received.add_(1)
        for peer in range(self.ranks):
            self.word(peer, "credit", self.me).copy_(self.received)


def as_bytes(rows: Tensor) -> Tensor:
    width = rows.shape[1] * rows.element_size()
    if rows.numel() == 0:
        return rows.new_empty(rows.shape[0], width, dtype=torch.uint8)
    return rows.contiguous().view(torch.uint8).view(rows.shape[0], width)


def encoded_rows(rows: Tensor, width: int) -> Tensor:
    """bf16 rows as they travel under fp8: values, scales, zeros up to the width."""
    values, scales = fp8_encode(rows)
    pad = rows.new_zeros(rows.shape[0], width - values.shape[1] - 4 * scales.shape[1], dtype=torch.uint8)
    return torch.cat((values, as_bytes(scales), pad), dim=1)


def decoded_rows(arrived: Tensor, hidden: int) -> Tensor:
    """What `encoded_rows` made, as bf16 rows of `hidden` columns."""
    blocks = -(-hidden // 128)
    scales = arrived[:, hidden : hidden + 4 * blocks].contiguous().view(torch.float32)
    return fp8_decode(arrived[:, :hidden].contiguous(), scales.view(-1, blocks), dtype=torch.bfloat16)


def poison(tensor: Tensor) -> None:
    if tensor.numel():
        tensor.view(torch.uint8).fill_(0xFF)


def partial_rows(rows: Tensor, row_index: Tensor, ids: Tensor, num_experts: int, blocks: int, compact: bool) -> Tensor:
    if compact:
        return rows
    return tree_reduce(rows, row_index, ids_MK=ids, num_experts=num_experts, blocks=blocks)


def slot_values(values_N: Tensor, row_CK: Tensor) -> Tensor:
    """fp32 value of each slot's row, 0 where absent."""
    if values_N.numel() == 0:
        return torch.zeros(row_CK.shape)
    return torch.where(row_CK >= 0, values_N[row_CK.clamp_min(0).long()], 0.0)
