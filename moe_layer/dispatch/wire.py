"""Messages between the ranks of an EP group: headers, uneven exchanges of rows, waits with a deadline, typed errors.

Every trip (dispatch, combine and their backward passes) begins with one 64-byte header to each peer. Collectives of a
group pair up by order of issue; the header has the same size everywhere, so a rank that is in another layer, step or
phase is recognised before a payload of the wrong size could be delivered as if it were right.

Shape letters: R ranks, n rows on the wire.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Literal

import torch
from torch import Tensor

from moe_layer.errors import CapacityError, DispatchTimeout, RankMismatch
from moe_layer.parallel import compat
from moe_layer.parallel.context import ParallelContext

Phase = Literal["dispatch", "combine", "combine backward", "dispatch backward", "overflow", "bind"]

_MAGIC = int.from_bytes(b"MoELayer", "big")
PHASES: tuple[Phase, ...] = ("dispatch", "combine", "combine backward", "dispatch backward", "overflow", "bind")
_FIELDS = ("magic", "layer", "step", "phase", "tokens", "config", "rows", "row_bytes", "dtypes")  # the last two in one
_DTYPES = (
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8, torch.int16),
    *(torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2),
)
GRACE_S = 1.25  # how long a survivor waits for the others' reports: less than the 2 s allowed past the deadline


@dataclass(frozen=True)
class Position:
    """Where a rank is: named in headers and errors."""

    layer: int
    step: int
    phase: Phase

    def __str__(self) -> str:
        return f"layer {self.layer}, step {self.step}, phase {self.phase}"


class Link:
    """One layer's connection to its EP group."""

    def __init__(self, context: ParallelContext, *, layer: int, config_hash: int, deadline_s: float) -> None:
        self.context = context
        self.group = context.ep_group
        self.rank, self.size = context.ep_rank, context.ep_size
        self.layer, self.config_hash, self.deadline_s = layer, config_hash, deadline_s

    def at(self, phase: Phase) -> Position:
        return Position(self.layer, self.context.step, phase)

    def check(self) -> None:
        """Raise DispatchTimeout when the group is unusable."""
        if self.context.failure is not None:
            raise DispatchTimeout(f"the EP group is unusable since {self.context.failure}")

    def exchange_headers(
        self, at: Position, *, tokens: int, rows_R: Sequence[int], row: Sequence[Tensor]
    ) -> list[list[int]]:
        """Tell every rank how many rows it gets; returns `(tokens, rows)` of every source rank.

        `row`: the tensors of the trip, whose rows have the same size and dtypes everywhere.

        Raises:
            RankMismatch: a peer is elsewhere, has another configuration, another row size or other dtypes.
            CapacityError: a peer's static buffer overflowed.
            DispatchTimeout: a peer did not answer.
        """
        mine = [_MAGIC, at.layer, at.step, PHASES.index(at.phase), tokens, self.config_hash]
        layout = row_bytes(row) | dtypes_word([tensor.dtype for tensor in row]) << 32
        out = torch.tensor([[*mine, rows, layout] for rows in rows_R], dtype=torch.int64, device=self.context.device)
        got = torch.empty_like(out)
        ones = [1] * self.size
        self.wait(
            self.start(lambda: compat.all_to_all(self.group, got, out, out_rows=ones, in_rows=ones), at), at, read=True
        )
        headers = [[*header, layout & 0xFFFFFFFF, layout >> 32] for *header, layout in got.tolist()]
        self._check_headers(headers, at=at, row=row)
        return [[header[4], header[6]] for header in headers]

    def report_overflow(self, at: Position, *, tokens: int) -> None:
        """Send headers that make every peer raise at its next trip, before this rank raises itself."""
        over = Position(at.layer, at.step, "overflow")
        try:
            self.exchange_headers(over, tokens=tokens, rows_R=[0] * self.size, row=[])
        except (RankMismatch, CapacityError, DispatchTimeout):
            self.context.failure = f"{at}: this rank's static buffer overflowed"

    def exchange_rows(
        self, at: Position, rows: Tensor, *, send_R: Sequence[int], recv_R: Sequence[int]
    ) -> tuple[Tensor, Any]:
        """Start moving `rows` `[sum(send_R), ...]`, grouped by destination; returns the target `[sum(recv_R), ...]` and
        the work."""
        source = rows.contiguous()
        target = source.new_empty(sum(recv_R), *source.shape[1:])
        out_b, in_b = _as_bytes(target), _as_bytes(source)
        work = self.start(
            lambda: compat.all_to_all(self.group, out_b, in_b, out_rows=list(recv_R), in_rows=list(send_R)), at
        )
        return target, work

    def all_gather_rows(self, at: Position, rows: Tensor) -> tuple[Tensor, Any]:
        """Start gathering `[n, ...]` from every rank; returns `[R, n, ...]` and the work."""
        source = rows.contiguous()
        target = source.new_empty(self.size, *source.shape)
        if source.numel() == 0:
            return target, None
        out_b, in_b = _as_bytes(target.flatten(0, 1)), _as_bytes(source)
        return target, self.start(lambda: compat.all_gather(self.group, out_b, in_b), at)

    def start(self, begin: Any, at: Position) -> Any:
        """Issue a collective; a connection that is gone already shows here."""
        self.check()
        try:
            return begin()
        except RuntimeError as error:
            raise self._failed(at, error) from error

    def wait(self, work: Any, at: Position, *, read: bool = False) -> None:
        """Wait for one collective; `read` says that the host is about to look at the result.

        Raises:
            DispatchTimeout: the deadline passed or a connection broke.
        """
        if work is None:
            return
        try:
            if self.context.device.type == "cpu":
                work.wait(timedelta(seconds=self.deadline_s))
                return
            until = time.monotonic() + self.deadline_s
            while read and not work.is_completed():
                if time.monotonic() > until:
                    raise RuntimeError("the NCCL operation did not complete")
            work.wait()
        except RuntimeError as error:
            raise self._failed(at, error) from error

    def _failed(self, at: Position, error: RuntimeError) -> DispatchTimeout:
        reason = " ".join(str(error).split())[:160]
        return self.context.fail(
            str(at), f"deadline {self.deadline_s:g} s; {reason}", grace_s=min(GRACE_S, self.deadline_s)
        )

    def _check_headers(self, headers: list[list[int]], *, at: Position, row: Sequence[Tensor]) -> None:
        over = [rank for rank, header in enumerate(headers) if header[3] == PHASES.index("overflow")]
        if over and at.phase != "overflow":
            self.context.failure = f"{at}: static buffers of ranks {over} overflowed"
            raise CapacityError(
                f"static dispatch buffers of ranks {over} overflowed before {at}; raise dispatch.static_factor or set "
                "dispatch.overflow drop"
            )
        layout = (row_bytes(row), dtypes_word([tensor.dtype for tensor in row]))
        want = (_MAGIC, at.layer, at.step, PHASES.index(at.phase), None, self.config_hash, None, *layout)
        for index, name in enumerate(_FIELDS):
            found = [header[index] for header in headers]
            if want[index] is not None and any(value != want[index] for value in found):
                self.context.failure = f"{at}: ranks disagree about the {name}"
                shown = [_shown(name, value) for value in found]
                raise RankMismatch(
                    f"ranks disagree about the {name} at {at}: "
                    + ", ".join(f"rank {rank} has {value}" for rank, value in enumerate(shown))
                    + "; every rank must run the same layers in the same order with the same shapes"
                )


def _shown(name: str, value: int) -> object:
    if name == "phase" and 0 <= value < len(PHASES):
        return PHASES[value]
    if name != "dtypes":
        return value
    digits = [value >> shift & 31 for shift in range(0, 30, 5)]
    return " ".join(str(_DTYPES[at - 1]).removeprefix("torch.") for at in digits if 0 < at <= len(_DTYPES))


def row_bytes(tensors: Sequence[Tensor]) -> int:
    """Bytes that one row of a trip takes; part of the header."""
    return sum(tensor.shape[1:].numel() * tensor.element_size() for tensor in tensors)


def dtypes_word(dtypes: Sequence[torch.dtype]) -> int:
    """A trip's first six dtypes, 5 bits each: rows of bf16 and of fp16 have one size."""
    return sum((_DTYPES.index(one) + 1 if one in _DTYPES else 31) << 5 * at for at, one in enumerate(dtypes[:6]))


def _as_bytes(rows: Tensor) -> Tensor:
    """`[n, ...]` contiguous as uint8 `[n, bytes]`: every dtype travels, whatever the collective library supports."""
    width = rows.shape[1:].numel()
    if rows.numel() == 0:
        return rows.new_empty(rows.shape[0], width * rows.element_size(), dtype=torch.uint8)
    return rows.view(rows.shape[0], width).view(torch.uint8)
