"""Timing of collective work for `scripts/bench/dispatch.py`: aligned starts, slowest rank counts, medians."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist

SLEEP_CYCLES = 4_000_000  # about 2 ms: longer than the host takes to queue one dispatch


@dataclass
class Samples:
    """Milliseconds of one case on this rank: on the device with the host ahead, and until the host call returned."""

    device_ms: list[float] = field(default_factory=list)
    host_ms: list[float] = field(default_factory=list)


class Meter:
    """Measures calls that all ranks make together.

    Before each call the ranks meet in a tiny all-reduce on the same stream. With `ahead` the stream first sleeps, so
    that the host has queued a whole call before it begins and launch costs do not count (a call that reads from the
    device waits the sleep out, and pays for its own gaps).
    """

    def __init__(self, device: torch.device, group: Any) -> None:
        self.device, self.group = device, group
        self._word = torch.zeros(1, device=device)

    def sample(self, call: Callable[[], Any], into: Samples, *, ahead: bool) -> Any:
        """One call; its device time (`ahead`) or host time is added to `into`."""
        if self.device.type == "cpu":
            dist.all_reduce(self._word, group=self.group)
            began = time.perf_counter()
            result = call()
            into.device_ms.append((time.perf_counter() - began) * 1e3)
            into.host_ms.append(into.device_ms[-1])
            return result
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        if ahead:
            torch.cuda._sleep(SLEEP_CYCLES)
        dist.all_reduce(self._word, group=self.group)
        start.record()
        began = time.perf_counter()
        result = call()
        host_ms = (time.perf_counter() - began) * 1e3
        end.record()
        end.synchronize()
        if ahead:
            into.device_ms.append(start.elapsed_time(end))
        else:
            into.host_ms.append(host_ms)
        return result

    def step(self, call: Callable[[], Any], into: Samples) -> None:
        """One call without the sleep: its time between two events, and the host's share."""
        if self.device.type == "cpu":
            self.sample(call, into, ahead=False)
            return
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        dist.all_reduce(self._word, group=self.group)
        start.record()
        began = time.perf_counter()
        call()
        into.host_ms.append((time.perf_counter() - began) * 1e3)
        end.record()
        end.synchronize()
        into.device_ms.append(start.elapsed_time(end))

    def medians(self, cases: dict[str, Samples]) -> dict[str, tuple[float, float]]:
        """Name -> (device, host) milliseconds: the slowest rank of every sample, then the median. Collective."""
        mine = {name: (samples.device_ms, samples.host_ms) for name, samples in cases.items()}
        every: list[Any] = [None] * dist.get_world_size(self.group)
        dist.all_gather_object(every, mine, group=self.group)
        found = {}
        for name in mine:
            slowest = [[max(values) for values in zip(*(rank[name][i] for rank in every), strict=True)] for i in (0, 1)]
            found[name] = (statistics.median(slowest[0]), statistics.median(slowest[1]))
        return found
