"""Several ranks on one GPU in one process: threads, each with its own stream, and windows in ordinary device memory.

All ranks' kernels must be on the GPU at once, since some wait for others: cases are small, so their grids are too. A
kernel that is loaded lazily while another one spins would wait for it: `warm` runs everything at one rank first.
"""

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


def run_on_gpu(
    ranks: ThreadRanks, size: int, fn: Callable[[ParallelContext], Any], *, fresh: bool = False
) -> list[Any]:
    """`fn(context)` on `size` ranks of cuda:0, in rank order; errors are returned with `fresh`, else raised."""

    def one(context: ParallelContext) -> Any:
        moved = ParallelContext(
            _ThroughCpu(context.ep_group),
            ep_rank=context.ep_rank,
            ep_size=size,
            device="cuda:0",
            store=context.store,
        )
        with torch.cuda.stream(torch.cuda.Stream()):
            result = fn(moved)
            torch.cuda.current_stream().synchronize()
        return result

    return ranks.run(size, one, fresh=fresh)
