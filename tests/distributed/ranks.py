"""Several ranks in one process: threads with their own gloo groups over loopback. A case takes a few tens of
milliseconds."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from moe_layer.parallel.context import ParallelContext


class ThreadRanks:
    """Groups of 2, 4, 8 (any size) thread ranks, connected once and reused by all cases.

    `run(ranks, fn)` calls `fn(context)` on every rank and returns the results in rank order.
    """

    def __init__(self, most: int = 8) -> None:
        self._threads = ThreadPoolExecutor(most)
        self._contexts: dict[int, list[ParallelContext]] = {}

    def run(self, ranks: int, fn: Callable[[ParallelContext], Any], *, fresh: bool = False) -> list[Any]:
        """`fresh`: on groups of their own, for cases that break them; errors are then returned, not raised."""
        if fresh:
            return self._call(self.connect(ranks), fn)
        if ranks not in self._contexts:
            self._contexts[ranks] = self.connect(ranks)
        results = self._call(self._contexts[ranks], fn)
        errors = [r for r in results if isinstance(r, BaseException)]
        if errors:
            self._contexts.pop(ranks)
            raise AssertionError("\n".join("".join(traceback.format_exception(error)) for error in errors))
        return results

    def connect(self, ranks: int) -> list[ParallelContext]:
        """New groups over a store in memory."""
        store = dist.HashStore()

        def one(rank: int) -> ParallelContext:
            group = dist.ProcessGroupGloo(dist.PrefixStore("gloo", store), rank, ranks, timedelta(seconds=30))
            reports = dist.PrefixStore("reports", store)
            return ParallelContext(group, ep_rank=rank, ep_size=ranks, store=reports)

        return [f.result() for f in [self._threads.submit(one, rank) for rank in range(ranks)]]

    def _call(self, contexts: list[ParallelContext], fn: Callable[[ParallelContext], Any]) -> list[Any]:
        def one(context: ParallelContext) -> Any:
            try:
                return fn(context)
            except Exception as error:  # handed to the test, which decides what it means
                return error

        return [f.result(timeout=60) for f in [self._threads.submit(one, context) for context in contexts]]

    def close(self) -> None:
        self._contexts.clear()
        self._threads.shutdown(wait=False)
