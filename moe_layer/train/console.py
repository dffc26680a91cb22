"""Rank 0's terminal: log lines, a progress bar if a person is watching, and a polite end on SIGINT or SIGTERM."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any


class Console:
    """Prints on the main rank only. The bar is rich's if installed, a plain one otherwise, none when stdout is no
    terminal."""

    def __init__(self, *, is_main: bool, steps: int, first: int = 0) -> None:
        self._is_main = is_main
        self._steps, self._at = steps, first
        self._rich: Any = None
        self._task: Any = None
        self._plain = is_main and sys.stdout.isatty()
        if self._plain:
            self._start_rich(first)

    def line(self, text: str) -> None:
        """One line of the log."""
        if not self._is_main:
            return
        if self._rich is not None:
            self._rich.console.print(text, markup=False, highlight=False, soft_wrap=True)
        elif self._plain:
            print(f"\r\x1b[K{text}", flush=True)
            self._draw()
        else:
            print(text, flush=True)

    def advance(self, step: int) -> None:
        """Steps done so far."""
        self._at = step
        if self._rich is not None:
            self._rich.update(self._task, completed=step)
        elif self._plain:
            self._draw()

    def close(self) -> None:
        """Remove the bar."""
        if self._rich is not None:
            self._rich.stop()
            self._rich = None
        elif self._plain:
            print("\r\x1b[K", end="", flush=True)
        self._plain = False

    def _start_rich(self, first: int) -> None:
        try:
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
        except ImportError:
            return
        columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        self._rich = Progress(*columns, transient=True)
        self._task = self._rich.add_task("train", total=self._steps, completed=first)
        self._rich.start()
        self._plain = False

    def _draw(self) -> None:
        width = 40
        full = width * self._at // max(1, self._steps)
        print(f"\r[{'#' * full}{'.' * (width - full)}] {self._at}/{self._steps}", end="", flush=True)


class StopRequest:
    """`signum` of the first SIGINT or SIGTERM, 0 before."""

    def __init__(self) -> None:
        self.signum = 0

    def handle(self, signum: int, frame: FrameType | None) -> None:
        """Note the first signal; a second one ends the program at once."""
        if self.signum:
            raise KeyboardInterrupt
        self.signum = signum


@contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Inside, SIGINT and SIGTERM only set a flag; the loop finishes its step, saves and leaves."""
    request = StopRequest()
    before = {s: signal.signal(s, request.handle) for s in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield request
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)
