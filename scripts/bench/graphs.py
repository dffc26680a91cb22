"""Capture of a benchmark's step in a CUDA graph."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def in_graph(step: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of `step`, captured after three runs on a side stream. It keeps `step` and all that it refers to: a
    graph reads its weights by their addresses."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog thread queries events meanwhile
        step()

    def replay(_kept: Callable[[], Any] = step) -> None:
        graph.replay()

    return replay
