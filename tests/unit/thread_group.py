"""A process group played by threads: what is summed is real, the transport is a list and a barrier."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor


class ThreadGroup:
    """Stands in for `torch.distributed` inside one module while `run` plays the ranks."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.barrier = threading.Barrier(world, timeout=30)
        self.slots: list[Tensor | None] = [None] * world
        self.local = threading.local()
        self.calls = 0

    def get_world_size(self, group: Any = None) -> int:
        return self.world

    def all_reduce(self, tensor: Tensor, group: Any = None) -> None:
        rank = self.local.rank
        self.slots[rank] = tensor.clone()
        self.calls += rank == 0
        self.barrier.wait()
        total = torch.stack(self.slots).sum(dim=0)
        self.barrier.wait()
        tensor.copy_(total)

    def run(self, monkeypatch: pytest.MonkeyPatch, module: Any, work: Callable[[int], Any]) -> list[Any]:
        """`work(rank)` on every rank at once, with `module.dist` replaced by this object."""
        monkeypatch.setattr(module, "dist", self)
        results: list[Any] = [None] * self.world

        def body(rank: int) -> None:
            self.local.rank = rank
            results[rank] = work(rank)

        threads = [threading.Thread(target=body, args=(rank,)) for rank in range(self.world)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results
