"""`num_tokens`, `x_scale` and `out` on every backend: against the same call without them, bit for bit."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import CapacityError, ConfigError, RoutingError
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Received, Routing
from tests.distributed.cases import (
    Case,
    Result,
    apply_experts,
    assert_same_bits,
    even_cuts,
    joined,
    make_case,
    run_case,
)
from tests.distributed.ranks import ThreadRanks

CASE = make_case(2, T=26, D=16, E=8, K=3)
BACKENDS: dict[str, dict[str, Any]] = {
    "local": {"backend": "local"},
    "all_to_all": {"backend": "all_to_all"},
    "domains": {"backend": "all_to_all", "p2p_world_size": 2},
    "all_gather": {"backend": "all_gather"},
    "replicated": {"backend": "replicated"},
    "nvlink": {"backend": "nvlink", "max_tokens_per_rank": 40},
}
ROWS = ("expert_major", "compact")


def call(ranks: ThreadRanks, backend: str, fn: Callable[[ParallelContext | None], Any]) -> list[Any]:
    return [fn(None)] if backend == "local" else ranks.run(4, fn)


def share(case: Case, backend: str, context: ParallelContext | None) -> tuple[slice, slice]:
    """This rank's tokens and experts."""
    if context is None:
        return slice(None), slice(None)
    cuts, r, L = even_cuts(case.x_TD.shape[0], 4), context.ep_rank, case.num_experts // 4
    mine = slice(None) if backend == "replicated" else slice(cuts[r], cuts[r + 1])
    return mine, slice(r * L, (r + 1) * L)


def make(backend: str, context: ParallelContext | None, **options: Any) -> Any:
    config = DispatchConfig(**{**BACKENDS[backend], **options})
    return make_dispatcher(config, num_experts=CASE.num_experts, top_k=CASE.top_k, context=context)


def routing_of(ids: Tensor, weights: Tensor) -> Routing:
    return Routing(ids_TK=ids, weights_TK=weights, counts_E=torch.zeros(CASE.num_experts, dtype=torch.int32))


def padded_run(backend: str, rows: str, halves: bool, context: ParallelContext | None) -> tuple[Result, bool]:
    """The share of CASE inside a batch with five rows of garbage behind it; and whether their gradients are zero."""
    mine, owned = share(CASE, backend, context)
    n = CASE.x_TD[mine].shape[0]

    def behind(values: Tensor, fill: float) -> Tensor:
        return torch.cat((values[mine], values.new_full((5, values.shape[1]), fill))).requires_grad_(fill != 1)

    x, w, ids = behind(CASE.x_TD, 1e30), behind(CASE.w_TK, torch.nan), behind(CASE.ids_TK.float(), 1).int()
    experts = CASE.experts[owned].clone().requires_grad_()
    dispatcher, real = make(backend, context, rows=rows), torch.tensor(n)
    routing = routing_of(ids, w)
    if halves:
        received = dispatcher.dispatch_recv(*dispatcher.dispatch_send(x, routing, num_tokens=real))
    else:
        received = dispatcher.dispatch(x, routing, num_tokens=real)
    y = dispatcher.combine(apply_experts(received, experts), received)
    y.backward(torch.cat((CASE.dy_TD[mine], torch.ones(5, CASE.dy_TD.shape[1]))))
    assert x.grad is not None and w.grad is not None and experts.grad is not None
    padding = (y[n:], x.grad[n:], w.grad[n:])
    return Result(y[:n].detach(), x.grad[:n], w.grad[:n], experts.grad), not any(part.any() for part in padding)


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_num_tokens(ranks: ThreadRanks, backend: str, rows: str, halves: bool) -> None:
    """Garbage in the padding reaches nobody; everything else has the bits of the batch without padding."""
    want = run_case(CASE, DispatchConfig(rows=rows))
    results = call(ranks, backend, lambda context: padded_run(backend, rows, halves, context))
    assert all(zero for _, zero in results)
    assert_same_bits(joined([result for result, _ in results], replicated=backend == "replicated"), want)


@pytest.mark.parametrize(
    ("num_tokens", "text"),
    [
        (torch.tensor(27), r"num_tokens is 27, it must lie in \[0, 26\]"),
        (torch.tensor(-1), "num_tokens is -1"),
        (torch.tensor(3.0), "must be a 0-d integer tensor, got torch.float32"),
        (torch.tensor([1, 2]), r"got torch.int64 \(2,\)"),
        (3, "got 3"),
    ],
)
def test_bad_num_tokens(num_tokens: Any, text: str) -> None:
    with pytest.raises(RoutingError, match=text):
        make("local", None).dispatch(CASE.x_TD, routing_of(CASE.ids_TK, CASE.w_TK), num_tokens=num_tokens)


def test_num_tokens_and_a_plan() -> None:
    dispatcher = make("local", None)
    with pytest.raises(RoutingError, match="num_tokens and plan were both passed"):
        dispatcher.dispatch(
            CASE.x_TD,
            routing_of(CASE.ids_TK, CASE.w_TK),
            dispatcher.prepare(CASE.ids_TK),
            num_tokens=torch.tensor(3),
        )


def quantised(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """CASE's x in one byte an element, with two scales a token (fp32)."""
    blocks = CASE.x_TD.view(26, 2, 8)
    scale = blocks.abs().amax(2) / (100.0 if dtype == torch.int8 else 400.0)
    return (blocks / scale.unsqueeze(2)).flatten(1).to(dtype), scale


def exact(rows: Tensor, scales: Tensor) -> Tensor:
    return (rows.float().view(-1, 2, 8) * scales.unsqueeze(2)).flatten(1)


def from_scales(
    backend: str, rows: str, dtype: torch.dtype, probs: str, context: ParallelContext | None
) -> tuple[Result, bool]:
    """The share of CASE with quantised x, dequantised where it arrives; and whether bytes and scales arrived intact."""
    mine, owned = share(CASE, backend, context)
    x, scale = quantised(dtype)
    w = CASE.w_TK[mine].clone().requires_grad_()
    experts = CASE.experts[owned].clone().requires_grad_()
    dispatcher = make(backend, context, rows=rows, apply_probs=probs)
    received = dispatcher.dispatch(x[mine], routing_of(CASE.ids_TK[mine], w), x_scale=scale[mine])
    assert received.rows.dtype == dtype and received.rows.shape[0] == received.scales.shape[0]
    index = received.index_N
    arrived, scales = received.rows.view(torch.uint8), received.scales
    if index is not None:
        arrived, scales = arrived[index.long()], scales[index.long()]
    first = even_cuts(26, 4) if backend not in ("local", "replicated") else [0] * 5
    intact = True
    for row, (rank, token, _) in enumerate(received.src_N3.tolist()):
        if rank >= 0:
            t = first[rank] + token
            intact &= torch.equal(arrived[row], x[t].view(torch.uint8)) and torch.equal(scales[row], scale[t])
    deq = exact(received.rows, received.scales)
    y = dispatcher.combine(apply_experts(_with_rows(received, deq), experts), received)
    assert y.dtype == torch.float32
    y.backward(CASE.dy_TD[mine])
    assert w.grad is not None and experts.grad is not None
    return Result(y.detach(), torch.zeros(0), w.grad, experts.grad), intact


def _with_rows(received: Received, rows: Tensor) -> Received:
    from dataclasses import replace

    return replace(received, rows=rows)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_x_scale(ranks: ThreadRanks, backend: str, rows: str, dtype: torch.dtype) -> None:
    """Bytes and scales arrive untouched; y, dprobs and dW are those of the dequantised x."""
    x, scale = quantised(dtype)
    for probs in ("activation", "source"):
        whole = Case(exact(x, scale), CASE.ids_TK, CASE.w_TK, CASE.dy_TD, CASE.experts)
        want = run_case(whole, DispatchConfig(rows=rows, apply_probs=probs))
        results = call(ranks, backend, lambda context, probs=probs: from_scales(backend, rows, dtype, probs, context))
        assert all(intact for _, intact in results)
        got = joined([result for result, _ in results], replicated=backend == "replicated")
        assert_same_bits(Result(got.y, want.dx, got.dw, got.d_experts), want)


def test_bad_scales() -> None:
    x, scale = quantised(torch.int8)
    routing = routing_of(CASE.ids_TK, CASE.w_TK)
    for arguments, text in (
        ((CASE.x_TD, scale), "x is torch.float32"),
        ((x, scale[:3]), r"x_scale must be \[26, S\]"),
        ((x, scale[:, 0]), r"x_scale must be \[26, S\]"),
    ):
        with pytest.raises(RoutingError, match=text):
            make("local", None).dispatch(arguments[0], routing, x_scale=arguments[1])
    with pytest.raises(RoutingError, match="gradients end where you quantised"):
        leaf = x.to(torch.float8_e4m3fn).requires_grad_()
        make("local", None).dispatch(leaf, routing, x_scale=scale)


def test_one_place_quantises() -> None:
    from moe_layer.dispatch.formats import InputFormat

    dispatcher = make_dispatcher(
        DispatchConfig(), num_experts=8, top_k=3, context=None, token_format=InputFormat(16, torch.int8)
    )
    x, scale = quantised(torch.int8)
    with pytest.raises(ConfigError, match="x_scale was passed to a dispatcher with a token_format"):
        dispatcher.dispatch(x, routing_of(CASE.ids_TK, CASE.w_TK), x_scale=scale)


def into_buffers(backend: str, rows: str, context: ParallelContext | None) -> Result:
    mine, owned = share(CASE, backend, context)
    x, w = (values[mine].clone().requires_grad_() for values in (CASE.x_TD, CASE.w_TK))
    experts = CASE.experts[owned].clone().requires_grad_()
    dispatcher = make(backend, context, rows=rows)
    row_buffer, y_buffer = torch.full((200, 16), 7.0), torch.full((30, 16), 7.0)
    received = dispatcher.dispatch(x, routing_of(CASE.ids_TK[mine], w), out=row_buffer)
    N = received.rows.shape[0]
    assert received.rows.data_ptr() == row_buffer.data_ptr() and bool((row_buffer[N:] == 7).all())
    y = dispatcher.combine(apply_experts(received, experts), received, out=y_buffer)
    T = x.shape[0]
    assert y.data_ptr() == y_buffer.data_ptr() and bool((y_buffer[T:] == 7).all())
    y.backward(CASE.dy_TD[mine])
    assert x.grad is not None and w.grad is not None and experts.grad is not None
    return Result(y_buffer[:T].clone(), x.grad, w.grad, experts.grad)


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_out(ranks: ThreadRanks, backend: str, rows: str) -> None:
    """Rows and y lie in the caller's memory, the rest of it is untouched, and gradients flow through both."""
    want = run_case(CASE, DispatchConfig(rows=rows))
    results = call(ranks, backend, lambda context: into_buffers(backend, rows, context))
    assert_same_bits(joined(results, replicated=backend == "replicated"), want)


@pytest.mark.parametrize(
    ("buffer", "error", "text"),
    [
        (torch.empty(3, 16), CapacityError, "out holds 3 rows, 26 are needed"),
        (torch.empty(99, 8), RoutingError, r"out must be \[rows, 16\] torch.float32"),
        (torch.empty(99, 16, dtype=torch.bfloat16), RoutingError, r"got \(99, 16\) torch.bfloat16"),
        (torch.empty(99, 16, requires_grad=True), RoutingError, "out requires grad"),
    ],
)
def test_bad_buffers(buffer: Tensor, error: type[Exception], text: str) -> None:
    dispatcher, routing = make("local", None, rows="compact"), routing_of(CASE.ids_TK, CASE.w_TK)
    with pytest.raises(error, match=text):
        dispatcher.dispatch(CASE.x_TD, routing, out=buffer)
    received = dispatcher.dispatch(CASE.x_TD, routing)
    with pytest.raises(error, match=text):
        dispatcher.combine(torch.zeros(received.probs_N.shape[0], 16), received, out=buffer)
