"""Windows: the memory through which the ranks of one NVLink domain (or one host's CPU) hand rows to each other.

Every rank owns one window of the same layout and can write into all of them. A window has `2 * depth` slots, `depth`
for trips outwards (dispatch, and d(sum) in combine's backward) and `depth` for trips home. A slot holds, per source
rank: the words that say what has arrived, a header, `meta` words and rows for `max_tokens` tokens.

    offset        0: words (credit, flags) of all slots, zeroed once, epochs ever after; the faults of all ranks
    then, by slot  : headers | meta | rows

Slots are taken and released in program order, which is the same on all ranks; `state` (device memory, next to the
window) counts the trips made through each. The protocol itself is moe_layer/ops/ep.py.

Letters: R ranks, T tokens.
"""

from __future__ import annotations

import functools
import math
import weakref
import zlib
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_layer.dispatch.memory import share_memory
from moe_layer.dispatch.wire import GRACE_S, PHASES, Link, Position
from moe_layer.errors import CapacityError, DispatchTimeout, RankMismatch
from moe_layer.ops import ep

_ALIGN = 256
_MAGIC = zlib.crc32(b"moe_layer window 4") & 0x7FFFFFFF
_PIECES, _PIECE_BYTES = 8, 4 * 2**20  # of a dense push: at most so many copies, none smaller
_ROOM = ("max_tokens", "row_bytes", "meta_words", "depth", "experts")  # the sizes of a window, in their order


@dataclass(frozen=True)
class WindowSize:
    """What a window must hold.

    Attributes:
        ranks: R. max_tokens: T, most tokens that a rank sends in one trip.
        row_bytes: widest row of any trip. meta_words: 32-bit words that travel beside a row.
        depth: trips of one direction that may be between their send and their recv.
        experts: of a rank, where the rows' words come with a count for each.
    """

    ranks: int
    max_tokens: int
    row_bytes: int
    meta_words: int
    depth: int
    experts: int = 0

    def chunk_rows(self, *, home: bool) -> int:
        """Rows that arrive under one flag: enough chunks to keep every multiprocessor busy, few enough words.

        Home, all multiprocessors send, each a chunk at a time that takes it a while to sum: what is in their hands when
        the last rows arrive is what remains to be done.
        """
        return min(64, max(1, self.max_tokens // 2048) if home else max(4, self.max_tokens // 256))

    def piece_rows(self, width: int) -> int:
        """Rows of `width` bytes that a dense push copies at a time, under one flag."""
        pieces = min(_PIECES, max(1, self.max_tokens * width // _PIECE_BYTES))
        return max(-(-self.max_tokens // pieces), self.chunk_rows(home=False))

    def max_chunks(self, *, home: bool) -> int:
        return -(-self.max_tokens // self.chunk_rows(home=home))

    @property
    def data_block(self) -> int:
        return _round(self.max_tokens * self.row_bytes)

    @property
    def meta_block(self) -> int:
        return _round(4 * (self.max_tokens * self.meta_words + 2 * self.experts))

    @property
    def word_bytes(self) -> int:
        return _round(4 * self.ranks * (1 + max(self.max_chunks(home=home) for home in (False, True))))

    @property
    def fault(self) -> int:
        """Where the words lie by which ranks tell each other of an overflow, and that they go on without credits."""
        return 2 * self.depth * self.word_bytes

    @property
    def first_slot(self) -> int:
        return self.fault + _round(8 * self.ranks)

    @property
    def slot_bytes(self) -> int:
        return _round(self.ranks * ep.HEADER_BYTES) + self.ranks * (self.meta_block + self.data_block)

    @property
    def num_bytes(self) -> int:
        """Bytes of one rank's window."""
        return self.first_slot + 2 * self.depth * self.slot_bytes

    def holds(self, other: WindowSize) -> bool:
        return all(getattr(self, name) >= getattr(other, name) for name in _ROOM)

    def joined(self, other: WindowSize) -> WindowSize:
        """Room for both."""
        return WindowSize(self.ranks, *(max(getattr(self, name), getattr(other, name)) for name in _ROOM))

    def offsets(self, slot: int) -> dict[str, int]:
        """Where a slot's parts lie, under the names of `ep.TRIP_WORDS`."""
        credit, home = slot * self.word_bytes, slot >= self.depth
        header = self.first_slot + slot * self.slot_bytes
        meta = header + _round(self.ranks * ep.HEADER_BYTES)
        return {
            "slot": slot,
            "credit": credit,
            "flags": credit + 4 * self.ranks,
            "header": header,
            "meta": meta,
            "data": meta + self.ranks * self.meta_block,
            "meta_block": self.meta_block,
            "data_block": self.data_block,
            "max_rows": self.max_tokens,
            "chunk_rows": self.chunk_rows(home=home),
            "max_chunks": self.max_chunks(home=home),
            "fault": self.fault,
        }


class Trip:
    """One slot between a send and its recv. `words` is what the ops read; forgetting a trip gives its slot back."""

    def __init__(self, window: Window, slot: int, words: Tensor, at: Position) -> None:
        self.window, self.slot, self.words, self.at = window, slot, words, at
        self.sent: Any = None  # CUDA event behind the send
        self.copied: Any = None  # another behind the copies of a dense push
        self.sender: Any = None  # stream that the send was called from
        self.held: list[Tensor] = []  # what the send reads
        self._drop = weakref.finalize(self, window.abandon, slot, words, self.held)
        self._drop.atexit = False  # type: ignore[misc]

    def taken(self) -> None:
        """The recv was issued: the slot may be used again."""
        if self._drop.detach() is not None:
            self.window.free[self.slot >= self.window.size.depth].append(self.slot)


class Window:
    """This rank's window and the addresses of all."""

    def __init__(self, size: WindowSize, link: Link) -> None:
        self.size, self.rank, self.device = size, link.rank, link.context.device
        self.memory, peers, self._keep = share_memory(size.num_bytes, link)
        self.addresses = torch.tensor(peers, dtype=torch.int64)
        self.peers = self.addresses.to(self.device)
        self.state = torch.zeros(ep.STATE_HEAD + 2 * size.depth * ep.SLOT_WORDS, dtype=torch.int32, device=self.device)
        self.free = ([*range(size.depth)], [*range(size.depth, 2 * size.depth)])
        self._abandoned: dict[int, Tensor] = {}
        on_gpu = self.device.type == "cuda"
        self.stream = torch.cuda.Stream(self.device, priority=-1) if on_gpu else None
        self._events: dict[int, Any] = {}  # by slot: what a send waits for, and its end
        self._words: dict[int, Any] = {}  # by slot: a trip's words, as tensor and as numpy array
        self.copies: list[Any] = []  # of dense pushes, made by the first one: streams of the flags, of the copies
        self._copied: dict[int, Any] = {}  # by slot: the end of its copies

    def begin(self, at: Position, *, width: int, link: Link, home: bool, dtypes: int = 0, dense: bool = False) -> Trip:
        """Take a slot for a trip of rows of `width` bytes and such `dtypes` (`wire.dtypes_word`), which are compared as
        part of the configuration; `dense`: for `push_rows`.

        Raises:
            CapacityError: `ring_depth` trips of this direction are under way already.
        """
        free = self.free[home]
        if not free:
            raise CapacityError(
                f"{self.size.depth} trips are between their send and their recv at {at}; raise dispatch.ring_depth or "
                "receive one first"
            )
        free.sort()
        slot = free.pop(0)
        if slot in self._abandoned:
            # Its copies may still fly, and must not overwrite what comes next. (A capture begins when all is done.)
            if self.copies and not torch.cuda.is_current_stream_capturing():
                torch.cuda.current_stream(self.device).wait_stream(self.copies[0])
            ep.ep_skip(self.peers, self.state, self._abandoned.pop(slot))
        of_trip = (
            width,
            at.layer,
            PHASES.index(at.phase),
            at.step & 0x7FFFFFFF,
            (link.config_hash + dtypes) & 0x7FFFFFFF,
            _MAGIC,
        )  # in the order of ep.COMPARED, with which the words of a trip end
        piece_rows = self.size.piece_rows(width) if dense else 0
        words = [*_slot_words(self.size, slot, self.rank, piece_rows), int(link.deadline_s * 1e9), *of_trip]
        return Trip(self, slot, self._write(slot, words), at)

    def _write(self, slot: int, words: list[int]) -> Tensor:
        """The tensor of a slot's words, which only the ops of its trip read: made once, written through numpy."""
        if slot not in self._words:
            tensor = torch.empty(len(words), dtype=torch.int64)
            self._words[slot] = tensor, tensor.numpy()
        tensor, array = self._words[slot]
        array[:] = words
        return tensor

    def send(self, trip: Trip, op: Any, *args: Any, **options: Any) -> None:
        """Run an op of a send: on the window's own stream, so that computation goes on beside it.

        The trip holds the op's tensors until it is received, where the caller's stream waits for the send: less work
        for the host than `record_stream`, and their memory is free at once.
        """
        if self.stream is None:
            op(*args, **options)
            return
        trip.sender = torch.cuda.current_stream(self.stream.device_index)
        if trip.slot not in self._events:
            self._events[trip.slot] = torch.cuda.Event(), torch.cuda.Event()
        begin, trip.sent = self._events[trip.slot]
        begin.record(trip.sender)
        self.stream.wait_event(begin)
        with torch.cuda.device(self.stream.device_index):
            torch.cuda.set_stream(self.stream)  # `with torch.cuda.stream` takes the host far longer
            try:
                op(*args, **options)
            finally:
                torch.cuda.set_stream(trip.sender)
        trip.sent.record(self.stream)
        trip.held += [value for value in (*args, *options.values()) if isinstance(value, Tensor) and value.is_cuda]

    def push_rows(self, trip: Trip, rows: Tensor, encoded: Tensor | None) -> None:
        """Begin a dense trip with its rows; its words follow by `send`. See `ep_push_rows`."""
        streams = (0, 0, 0)
        if self.stream is not None:
            if not self.copies:
                self.copies = [torch.cuda.Stream(self.device, priority=priority) for priority in (-1, 0)]
            streams = (self.stream.cuda_stream, self.copies[0].cuda_stream, self.copies[1].cuda_stream)
            trip.held += [tensor for tensor in (rows, encoded) if tensor is not None]
        ep.ep_push_rows(
            self.peers, self.state, rows, trip.words, encoded=encoded, addresses=self.addresses, streams=streams
        )
        if self.copies:
            trip.copied = self._copied.setdefault(trip.slot, torch.cuda.Event())
            trip.copied.record(self.copies[0])

    def take(
        self, trip: Trip, rows: Tensor, tokens_RS: Tensor, base_R1: Tensor, counts_R: Tensor, **options: Any
    ) -> None:
        """`ep_take`, and the end of the trip."""
        ep.ep_take(self.peers, self.state, rows, tokens_RS, base_R1, counts_R, trip.words, **options)
        self.received(trip)

    def received(self, trip: Trip) -> None:
        """The ops that receive a trip were issued; this stream also waits for the trip's own send."""
        trip.taken()
        if self.stream is not None and trip.sent is not None:
            stream = torch.cuda.current_stream(self.stream.device_index)
            stream.wait_event(trip.sent)
            if trip.copied is not None:
                stream.wait_event(trip.copied)
            if stream != trip.sender:  # who frees what the send read has not waited for it
                self._release(trip.held)
            trip.held.clear()

    def abandon(self, slot: int, words: Tensor, held: list[Tensor]) -> None:
        """A handle was dropped between send and recv (on every rank, or the next trip's deadline tells)."""
        self._abandoned[slot] = words
        self._release(held)
        self.free[slot >= self.size.depth].append(slot)

    def _release(self, held: list[Tensor]) -> None:
        """Let the allocator wait for the send before it gives this memory away."""
        if self.stream is not None:
            for tensor in held:
                for stream in (self.stream, *self.copies):
                    tensor.record_stream(stream)

    def check(self, link: Link, state: list[int] | None = None) -> None:
        """Raise what the ops found, if anything. Synchronises unless the words of `state` are given.

        Raises:
            DispatchTimeout, RankMismatch, CapacityError.
        """
        found = (self.state[: ep.STATE_HEAD].tolist() if state is None else state)[: ep.STATE_HEAD]
        error, peer, wanted, seen, phase, layer, step, field = found
        if not error:
            return
        at = Position(layer, step, PHASES[phase])
        if error == ep.TIMEOUT:
            raise link.context.fail(
                str(at),
                f"deadline {link.deadline_s:g} s; rank {peer} reached epoch {seen} of {wanted}",
                grace_s=min(GRACE_S, link.deadline_s),
            )
        link.context.failure = link.context.failure or f"{at}: see the first error"
        if error == ep.MISMATCH:
            name = ep.COMPARED[field]
            theirs, ours = (PHASES[i] if name == "phase" and 0 <= i < len(PHASES) else i for i in (seen, wanted))
            name = "config hash (with the rows' dtypes)" if name == "config" else name
            raise RankMismatch(
                f"rank {peer} is elsewhere at {at}: its {name} is {theirs} where this rank's is {ours}; every rank "
                "must run the same layers in the same order with the same shapes, dtypes and configuration"
            )
        if error == ep.PEER_OVERFLOW:
            raise CapacityError(
                f"the static dispatch buffer of rank {peer} overflowed, which this rank learnt at {at}; raise "
                "dispatch.static_factor or set dispatch.overflow drop"
            )
        if error == ep.BAD_COUNT:
            raise RankMismatch(
                f"rank {peer} announced {seen} rows at {at}, at most {wanted} fit; its memory is damaged"
            )
        if error == ep.GAVE_UP:
            raise DispatchTimeout(
                f"rank {peer} went on after an error of its own without waiting until its rows were read here at {at}: "
                "they may be overwritten; see that rank's error"
            )
        raise CapacityError(
            f"static dispatch buffer of {seen} rows overflowed at {at}: {wanted} rows arrived; raise "
            "dispatch.static_factor or set dispatch.overflow drop"
        )


@functools.lru_cache(maxsize=256)
def _slot_words(size: WindowSize, slot: int, rank: int, piece_rows: int) -> list[int]:
    """The words of a trip that its slot decides; the deadline and the compared ones follow them. `piece_rows`: rows
    under a flag, where it is not the size that decides it."""
    words = size.offsets(slot) | {"me": rank}
    if piece_rows:
        words["chunk_rows"] = piece_rows
    return [words[name] for name in ep.TRIP_WORDS[: -1 - len(ep.COMPARED)]]


def window_for(link: Link, need: WindowSize) -> Window:
    """The group's window; collective when it must be made or made larger, which static facts alone decide."""
    window = link.context.window
    if window is None or not window.size.holds(need):
        if torch.device(link.context.device).type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise CapacityError("the dispatch window must be made before CUDA graph capture; run one step first")
        window = Window(need if window is None else window.size.joined(need), link)
        link.context.window = window
    return window


def _round(count: int) -> int:
    return -(-count // _ALIGN) * _ALIGN


def padded_width(num_bytes: int) -> int:
    """Row widths are whole 16-byte units."""
    return math.ceil(num_bytes / 16) * 16
