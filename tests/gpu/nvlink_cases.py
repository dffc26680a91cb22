"""What the nvlink tests on two, four and eight GPUs run on each rank."""

from __future__ import annotations

import dataclasses
import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import CapacityError
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Received, Routing
from tests.distributed.cases import Case, GatherCompact, assert_same_bits, make_case, run_case


def _on(case: Case, device: str) -> Case:
    return Case(**{f.name: getattr(case, f.name).to(device) for f in dataclasses.fields(case)})


def _config(**keys: Any) -> DispatchConfig:
    return DispatchConfig(**{"backend": "nvlink", "max_tokens_per_rank": 200, "deadline_s": 5.0, **keys})


def _experts(received: Received, scale_E: Tensor) -> Tensor:
    """Something that depends on the expert, without reading counts on the host."""
    rows = received.rows if received.index_N is None else GatherCompact.apply(received.rows, received)
    place_N = torch.arange(received.probs_N.shape[0], device=rows.device)
    expert_N = torch.searchsorted(received.offsets_L1[1:].contiguous(), place_N, right=True)
    expert_N = (expert_N + received.first_expert).clamp_max(scale_E.shape[0] - 1)
    assert received.act_probs_N is not None
    live_N = (place_N < received.offsets_L1[-1]).unsqueeze(1)
    rows = torch.where(live_N, rows, 0.0)  # the tail is not written
    return (torch.tanh(rows * scale_E[expert_N, None]) * received.act_probs_N[:, None]).to(rows.dtype)


def graph_case(context: ParallelContext, device: str, push: str) -> str:
    """Capture forward and backward once, replay with other routings; compare with eager dropless calls. What begins
    before the routing (dense push) does."""
    E, K, T, D = 8, 3, 48, 64
    scale_E = torch.linspace(0.5, 2.0, E, device=device)
    static = {"x": torch.zeros(T, D, device=device), "w": torch.zeros(T, K, device=device)}
    ids = torch.zeros(T, K, dtype=torch.int32, device=device)
    dy = torch.zeros(T, D, device=device)

    def step(config: DispatchConfig) -> Callable[[], tuple[Tensor, ...]]:
        dispatcher = make_dispatcher(config, num_experts=E, top_k=K, context=context)

        def run() -> tuple[Tensor, ...]:
            x, w = (static[n].detach().requires_grad_() for n in ("x", "w"))
            begun = dispatcher.dispatch_begin(x)
            assert (begun is not None) == (config.push == "dense")
            received = dispatcher.dispatch(x, Routing(ids_TK=ids, weights_TK=w, counts_E=ids), begun=begun)
            y = dispatcher.combine(_experts(received, scale_E), received)
            return (y, *torch.autograd.grad(y, (x, w), dy))

        return run

    fixed = step(_config(capacity="static", static_factor=2.0, max_tokens_per_rank=T, push=push))
    live = step(_config(max_tokens_per_rank=T, push="slots"))

    def fill(seed: int) -> None:
        case = make_case(seed * 8 + context.ep_rank, T=T, D=D, E=E, K=K)
        static["x"].copy_(case.x_TD)
        static["w"].copy_(case.w_TK)
        ids.copy_(case.ids_TK)
        dy.copy_(case.dy_TD)

    fill(0)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        fixed()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = fixed()
    for seed in range(1, 11):
        fill(seed)
        graph.replay()
        torch.cuda.synchronize()
        got = [t.clone() for t in out]
        for a, b in zip(got, live(), strict=True):
            assert torch.isfinite(a).all() and torch.equal(a, b), f"replay {seed}"
    return "10 routings"


def overflow_case(context: ParallelContext, device: str, push: str) -> str:
    case = _on(make_case(3, T=24, D=16, E=8, K=3, absent=0.0), device)
    config = _config(capacity="static", static_factor=0.3, max_tokens_per_rank=24, push=push)
    dispatcher = make_dispatcher(config, num_experts=8, top_k=3, context=context)
    received = dispatcher.dispatch(case.x_TD, Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8))
    torch.cuda.synchronize()
    assert received.rows.isnan().all() and int(received.offsets_L1[-1]) <= received.rows.shape[0]
    try:
        dispatcher.check()
    except CapacityError as error:
        return str(error)
    return "no error"


def bits_case(context: ParallelContext, device: str, push: str, *, large: bool) -> list[str]:
    done = []
    for dtype in (torch.float32, torch.bfloat16):
        for apply_probs in ("activation", "combine", "source"):
            for rows in ("expert_major", "compact"):
                if large and apply_probs != "activation":
                    continue
                T, D = (6000, 2048) if large else (52, 16)  # large: a dense push is cut into pieces
                case = _on(make_case(3, T=T, D=D, E=16, K=4, dtype=dtype), device)
                keys = {"apply_probs": apply_probs, "rows": rows}
                nvlink = _config(**keys, max_tokens_per_rank=T // 2, deadline_s=10.0, push=push)
                for _turn in range(3):
                    got = run_case(case, nvlink, context)
                    want = run_case(case, DispatchConfig(backend="all_to_all", **keys), context)
                    assert_same_bits(got, want)
                done.append(f"{dtype} {apply_probs} {rows}")
    return done


def handles_case(context: ParallelContext, device: str, push: str) -> str:
    """Two micro-batches in flight, received in the other order; their backwards in both orders. Two that
    nobody receives give their slots back."""
    E, K, D = 8, 3, 64
    scale_E = torch.linspace(0.5, 2.0, E, device=device)
    dispatcher = make_dispatcher(_config(deadline_s=10.0, push=push), num_experts=E, top_k=K, context=context)
    for order in ((0, 1), (1, 0)):
        xs, ys = [], []
        cases = [_on(make_case(9 + i + 2 * context.ep_rank, T=40, D=D, E=E, K=K), device) for i in range(2)]
        for case in cases:
            xs.append(case.x_TD.clone().requires_grad_())
        routings = [Routing.from_ids(case.ids_TK, case.w_TK, num_experts=E) for case in cases]
        handles = [dispatcher.dispatch_send(x, r) for x, r in zip(xs, routings, strict=True)]
        received = {i: dispatcher.dispatch_recv(*handles[i]) for i in (1, 0)}
        sent = {i: dispatcher.combine_send(_experts(received[i], scale_E), received[i]) for i in (0, 1)}
        ys = {i: dispatcher.combine_recv(*sent[i]) for i in (1, 0)}
        for i in order:
            ys[i].backward(cases[i].dy_TD)
        for i in range(2):
            x = cases[i].x_TD.clone().requires_grad_()
            one = dispatcher.dispatch(x, routings[i])
            y = dispatcher.combine(_experts(one, scale_E), one)
            y.backward(cases[i].dy_TD)
            assert torch.equal(y, ys[i]) and torch.equal(x.grad, xs[i].grad)
    with pytest.raises(CapacityError, match="ring_depth"):
        _ = [dispatcher.dispatch_send(xs[0], routings[0]) for _ in range(3)]
    gc.collect()
    with torch.no_grad():
        for i in (0, 1, 0):
            one = dispatcher.dispatch(xs[i], routings[i])
            assert torch.equal(dispatcher.combine(_experts(one, scale_E), one), ys[i])
    return "two orders"


def make_dispatcher_alone(config: DispatchConfig, context: ParallelContext, *, num_experts: int, top_k: int) -> Any:
    """A dispatcher without the collective comparison, which the absent rank would miss too."""
    from moe_layer.dispatch.nvlink import NvlinkDispatcher
    from moe_layer.dispatch.wire import Link

    link = Link(context, layer=0, config_hash=1, deadline_s=config.deadline_s)
    return NvlinkDispatcher(config, num_experts=num_experts, top_k=top_k, link=link)
