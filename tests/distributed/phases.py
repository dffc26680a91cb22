"""Any number of ranks of the nvlink dispatcher in one thread: every phase for all ranks before the next one begins.

A rank then never waits for what another has yet to send, so that nothing has to run at the same time: one small GPU
plays eight ranks, a sanitizer may make every launch wait for its end, and a CPU needs neither threads nor groups.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.nvlink import NvlinkDispatcher
from moe_layer.dispatch.window import Window, WindowSize
from moe_layer.dispatch.wire import Link
from moe_layer.ops import ep
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Received, Routing
from tests.distributed.cases import Case, Result, apply_experts, even_cuts


def make_links(ranks: int, device: str, deadline_s: float = 10.0) -> list[Link]:
    """Without a group: nothing but the windows joins the ranks."""
    contexts = [ParallelContext(None, ep_rank=r, ep_size=ranks, device=device) for r in range(ranks)]
    return [Link(context, layer=0, config_hash=1, deadline_s=deadline_s) for context in contexts]


def open_windows(size: WindowSize, links: list[Link], memories: list[Tensor] | None = None) -> list[Window]:
    """The ranks' windows in `memories` (uint8, zeroed; made here by default), bound to the links."""
    device = links[0].context.device
    if memories is None:
        memories = [torch.zeros(size.num_bytes, dtype=torch.uint8, device=device) for _ in links]
    addresses = torch.tensor([memory.data_ptr() for memory in memories], dtype=torch.int64)
    peers = addresses.to(device)
    windows = []
    for link, memory in zip(links, memories, strict=True):
        window = Window.__new__(Window)
        window.size, window.rank, window.device = size, link.rank, device
        window.memory, window.peers, window.addresses, window._keep = memory, peers, addresses, None
        words = ep.STATE_HEAD + 2 * size.depth * ep.SLOT_WORDS
        window.state = torch.zeros(words, dtype=torch.int32, device=device)
        window.free = ([*range(size.depth)], [*range(size.depth, 2 * size.depth)])
        window._abandoned, window._events, window._words, window._copied = {}, {}, {}, {}
        window.stream, window.copies = None, []
        link.context.window = window
        windows.append(window)
    return windows


class PhaseRanks:
    """Dispatchers of all ranks over windows that are wide enough for any option."""

    def __init__(self, config: DispatchConfig, case: Case, ranks: int, *, device: str = "cpu") -> None:
        assert config.max_tokens_per_rank is not None
        width = case.x_TD.shape[1] * 8 + 16 * case.top_k + 64
        words = 1 + 3 * case.top_k
        size = WindowSize(
            ranks,
            config.max_tokens_per_rank * (case.top_k if config.apply_probs == "source" else 1),
            width // 16 * 16 + 16,
            words,
            config.ring_depth,
            case.num_experts // ranks,
        )
        self.links = make_links(ranks, device, config.deadline_s)
        self.windows = open_windows(size, self.links)
        shape: dict[str, Any] = {"num_experts": case.num_experts, "top_k": case.top_k}
        self.dispatchers = [NvlinkDispatcher(config, **shape, link=link) for link in self.links]

    def dispatch(self, xs: list[Tensor], routings: list[Routing]) -> list[Received]:
        sent = [d.dispatch_send(x, r) for d, x, r in zip(self.dispatchers, xs, routings, strict=True)]
        return [d.dispatch_recv(*half) for d, half in zip(self.dispatchers, sent, strict=True)]

    def combine(self, rows: list[Tensor], received: list[Received]) -> list[Tensor]:
        sent = [d.combine_send(a, b) for d, a, b in zip(self.dispatchers, rows, received, strict=True)]
        return [d.combine_recv(*half) for d, half in zip(self.dispatchers, sent, strict=True)]

    def run(self, case: Case, cuts: list[int] | None = None) -> list[Result]:
        """Forward and backward. The engine takes nodes in reverse order of creation: phase by phase too."""
        R = len(self.links)
        cuts = cuts or even_cuts(case.x_TD.shape[0], R)
        L = case.num_experts // R
        mine = [slice(cuts[r], cuts[r + 1]) for r in range(R)]
        xs = [case.x_TD[s].clone().requires_grad_() for s in mine]
        ws = [case.w_TK[s].clone().requires_grad_() for s in mine]
        experts = [case.experts[r * L : (r + 1) * L].clone().requires_grad_() for r in range(R)]
        counts = torch.zeros(case.num_experts, dtype=torch.int32)
        routings = [
            Routing(ids_TK=case.ids_TK[s], weights_TK=w, counts_E=counts) for s, w in zip(mine, ws, strict=True)
        ]
        received = self.dispatch(xs, routings)
        ys = self.combine([apply_experts(a, e) for a, e in zip(received, experts, strict=True)], received)
        torch.autograd.backward(ys, [case.dy_TD[s] for s in mine])
        for d in self.dispatchers:
            d.check()
        parts = zip(ys, xs, ws, experts, strict=True)
        return [Result(y.detach(), x.grad, w.grad, e.grad) for y, x, w, e in parts]  # type: ignore[arg-type]


def large_case(
    device: str, *, tokens: int, max_tokens: int, hidden: int, dtype: torch.dtype, push: str = "slots"
) -> None:
    """Rank 0 sends `tokens` rows to rank 1's only expert, rank 1 sixteen to rank 0's; both get theirs back as they are.

    The windows are as large as `max_tokens` says: on a CPU their pages exist only where somebody writes.
    """
    config = DispatchConfig(backend="nvlink", max_tokens_per_rank=max_tokens, ring_depth=1, deadline_s=30.0, push=push)  # type: ignore[arg-type]
    size = WindowSize(2, max_tokens, hidden * dtype.itemsize, 4, 1, 1)
    links = make_links(2, device, config.deadline_s)
    memories = None
    if device == "cpu":
        memories = [torch.from_numpy(np.zeros(size.num_bytes, dtype=np.uint8)) for _ in links]
    open_windows(size, links, memories)
    ranks = [NvlinkDispatcher(config, num_experts=2, top_k=1, link=link) for link in links]
    xs = [torch.empty(n, hidden, dtype=dtype, device=device).normal_() for n in (tokens, 16)]
    routings = [
        Routing.from_ids(
            torch.full((x.shape[0], 1), 1 - r, device=device), torch.ones(x.shape[0], 1, device=device), num_experts=2
        )
        for r, x in enumerate(xs)
    ]
    with torch.no_grad():
        sent = [d.dispatch_send(x, r) for d, x, r in zip(ranks, xs, routings, strict=True)]
        received = [d.dispatch_recv(*half) for d, half in zip(ranks, sent, strict=True)]
        assert torch.equal(received[1].rows, xs[0]) and torch.equal(received[0].rows, xs[1])
        back = [d.combine_send(one.rows, one) for d, one in zip(ranks, received, strict=True)]
        for d, half, x in zip(ranks, back, xs, strict=True):
            assert torch.equal(d.combine_recv(*half), x)
