"""Several ranks on one GPU in one process: threads build their windows in ordinary device memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_layer.parallel.context import ParallelContext
from tests.distributed.ranks import ThreadRanks


class _Done:
    def wait(self, *_: Any) -> None:
        return None

    def is_completed(self) -> bool:
        return True


class _ThroughCpu:
    """A gloo group that is handed CUDA tensors."""

    def __init__(self, group: Any) -> None:
        self._group = group

    def _allgather_base(self, out: Tensor, source: Tensor) -> _Done:
        host = torch.empty_like(out, device="cpu")
        self._group._allgather_base(host, source.cpu()).wait()
        out.copy_(host)
        return _Done()

    def alltoall_base(self, out: Tensor, source: Tensor, out_rows: list[int], in_rows: list[int]) -> _Done:
        host = torch.empty_like(out, device="cpu")
        self._group.alltoall_base(host, source.cpu(), out_rows, in_rows).wait()
        out.copy_(host)
        return _Done()


def run_on_gpu(ranks: ThreadRanks, size: int, fn: Callable[[ParallelContext], Any]) -> list[Any]:
    """`fn(context)` on `size` ranks of cuda:0, in rank order."""

    def one(context: ParallelContext) -> Any:
        group = _ThroughCpu(context.ep_group)
        return fn(ParallelContext(group, ep_rank=context.ep_rank, ep_size=size, device="cuda:0", store=context.store))

    return ranks.run(size, one)
