"""Options of single calls on a GPU: no host synchronisation, and `num_tokens` may change between replays of a graph."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.types import Received, Routing

pytestmark = pytest.mark.gpu
T, D, E, K = 96, 128, 8, 2


@contextmanager
def no_host_sync() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def inputs() -> tuple[Tensor, Routing, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    x = torch.randn(T, D, device="cuda", generator=generator).bfloat16()
    ids = torch.rand(T, E, device="cuda", generator=generator).topk(K).indices
    weights = torch.rand(T, K, device="cuda", generator=generator)
    matrix = torch.randn(D, D, device="cuda", generator=generator).bfloat16() * D**-0.5
    return x, Routing.from_ids(ids, weights, num_experts=E), matrix


def experts(received: Received, matrix: Tensor) -> Tensor:
    rows = received.rows
    if received.index_N is not None and rows.shape[0]:  # no token at all: every row of a static buffer is tail
        rows = rows.index_select(0, received.index_N)
    elif received.index_N is not None:
        rows = rows.new_zeros(received.index_N.shape[0], rows.shape[1])
    return (torch.tanh(rows @ matrix) * received.probs_N.unsqueeze(1)).to(rows.dtype)


@pytest.mark.parametrize("rows", ["expert_major", "compact"])
@pytest.mark.parametrize("capacity", ["dropless", "static"])
def test_num_tokens_in_a_graph(rows: str, capacity: str) -> None:
    """One capture; replays with 0, 1, 50 and 96 real tokens give the bits of a batch of that length."""
    x, routing, matrix = inputs()
    dispatcher = make_dispatcher(
        DispatchConfig(rows=rows, capacity=capacity, max_tokens_per_rank=T if capacity == "static" else None),
        num_experts=E,
        top_k=K,
        context=None,
    )
    real = torch.tensor(T, device="cuda")

    def step() -> Tensor:
        received = dispatcher.dispatch(x, routing, num_tokens=real)
        return dispatcher.combine(experts(received, matrix), received)

    with torch.no_grad():
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side), no_host_sync():
            step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = step()
        for n in (0, 1, 50, T):
            real.fill_(n)
            graph.replay()
            short = Routing(ids_TK=routing.ids_TK[:n], weights_TK=routing.weights_TK[:n], counts_E=routing.counts_E)
            received = dispatcher.dispatch(x[:n].contiguous(), short)
            want = dispatcher.combine(experts(received, matrix), received)
            assert torch.equal(y[:n], want) and not y[n:].any(), n


@pytest.mark.parametrize("rows", ["expert_major", "compact"])
def test_quantised_rows_and_buffers(rows: str) -> None:
    """Bytes and scales arrive untouched, y lands in the caller's buffer, gradients are those without it."""
    x, routing, matrix = inputs()
    scale = x.float().view(T, 1, D).abs().amax(2) / 448.0
    x8 = (x.float() / scale).to(torch.float8_e4m3fn)
    dispatcher = make_dispatcher(DispatchConfig(rows=rows), num_experts=E, top_k=K, context=None)
    received = dispatcher.dispatch(x8, routing, x_scale=scale)
    index = received.src_N3[:, 1].long() if rows == "expert_major" else torch.arange(T, device="cuda")
    assert torch.equal(received.rows.view(torch.uint8), x8.view(torch.uint8)[index])
    assert torch.equal(received.scales, scale[index])

    found = []
    for buffer in (None, torch.empty(T * K + 7, D, device="cuda", dtype=torch.bfloat16)):
        leaf = x.clone().requires_grad_()
        got = dispatcher.dispatch(leaf, routing, out=buffer)
        y = dispatcher.combine(experts(got, matrix), got, out=None if buffer is None else torch.empty_like(x))
        y.backward(torch.ones_like(y))
        assert leaf.grad is not None and (buffer is None or got.rows.data_ptr() == buffer.data_ptr())
        found.append((y.detach().clone(), leaf.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
