"""The nvlink dispatcher: its kernels with several ranks on one GPU, then on two GPUs over NVLink."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import CapacityError, DispatchTimeout, RankMismatch
from moe_layer.ops import ep
from moe_layer.ops.kernels import require_kernels
from moe_layer.parallel import compat
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Received, Routing
from tests.distributed.cases import Case, Result, apply_experts, assert_same_bits, joined, make_case, run_case
from tests.distributed.pool import Pool
from tests.distributed.ranks import ThreadRanks
from tests.gpu.virtual_ranks import run_on_gpu

pytestmark = pytest.mark.gpu
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


def _on(case: Case, device: str) -> Case:
    return Case(**{f.name: getattr(case, f.name).to(device) for f in dataclasses.fields(case)})


def _cpu(result: Result) -> Result:
    return Result(**{f.name: getattr(result, f.name).cpu() for f in dataclasses.fields(result)})


def _config(**keys: Any) -> DispatchConfig:
    return DispatchConfig(**{"backend": "nvlink", "max_tokens_per_rank": 64, "deadline_s": 5.0, **keys})


@pytest.fixture(scope="module")
def virtual() -> Iterator[ThreadRanks]:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA GPU")
    require_kernels("cuda")
    ranks = ThreadRanks()
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # loads every kernel while nothing spins
        for D in (16, 6):
            case = _on(make_case(0, T=26, D=D, E=16, K=4, dtype=dtype), "cuda")
            for keys in ({}, {"rows": "compact"}, {"alignment": 8}, {"apply_probs": "source"}):
                config = _config(**keys)
                run_on_gpu(ranks, 1, lambda c, case=case, config=config: _alone(case, config, c))
    yield ranks
    ranks.close()


def _alone(case: Case, config: DispatchConfig, context: ParallelContext) -> None:
    """Forward and backward through a window of one rank (make_dispatcher would serve one rank without any)."""
    dispatcher = make_dispatcher_alone(config, context, num_experts=16, top_k=4)
    x = case.x_TD.clone().requires_grad_()
    received = dispatcher.dispatch(x, Routing.from_ids(case.ids_TK, case.w_TK, num_experts=16))
    dispatcher.combine(apply_experts(received, case.experts), received, add=case.x_TD).backward(case.dy_TD)


# ---- one GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_plan_is_the_reference(ranks: int) -> None:
    require_kernels("cuda")
    for T, K, E in ((0, 2, 8), (1, 1, 8), (37, 4, 16), (4097, 8, 64), (20000, 6, 64)):
        ids = torch.rand(T, E).topk(K).indices.int().where(torch.rand(T, K) < 0.8, -1)
        want = ep.ep_plan(ids, num_experts=E, num_ranks=ranks)
        got = ep.ep_plan(ids.cuda(), num_experts=E, num_ranks=ranks)
        assert torch.equal(got[1].cpu(), want[1]) and torch.equal(got[2].cpu(), want[2])
        for r in range(ranks):
            n = int(want[2][r])
            assert torch.equal(got[0][r, :n].cpu(), want[0][r, :n])


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
@pytest.mark.parametrize("apply_probs", ["activation", "combine", "source"])
def test_bits_on_virtual_ranks(virtual: ThreadRanks, size: int, rows: str, apply_probs: str) -> None:
    case = _on(make_case(size, T=26, D=16, E=16, K=4), "cuda")
    want = run_case(case, DispatchConfig(apply_probs=apply_probs))
    config = _config(rows=rows, apply_probs=apply_probs)
    got = joined([_cpu(r) for r in run_on_gpu(virtual, size, lambda c: run_case(case, config, c))])
    assert_same_bits(got, _cpu(want))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("wire", ["input", "bf16", "fp32"])
def test_formats_on_virtual_ranks(virtual: ThreadRanks, dtype: torch.dtype, wire: str) -> None:
    """The same bits as all_to_all on the CPU's ranks for the same rows, any wire."""
    case = _on(make_case(7, T=40, D=64, E=8, K=3, dtype=dtype), "cuda")
    keys = {"combine_format": wire, "apply_probs": "activation"}
    want = run_on_gpu(virtual, 2, lambda c: run_case(case, DispatchConfig(backend="all_to_all", **keys), c))
    got = run_on_gpu(virtual, 2, lambda c: run_case(case, _config(**keys), c))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(_cpu(a), _cpu(b))


@pytest.mark.parametrize("alignment", [8, 128])
def test_pads_are_zero(virtual: ThreadRanks, alignment: int) -> None:
    case = _on(make_case(1, T=30, D=16, E=8, K=3), "cuda")
    want = run_case(case, DispatchConfig())
    config = _config(alignment=alignment)
    got = joined([_cpu(r) for r in run_on_gpu(virtual, 2, lambda c: run_case(case, config, c))])
    assert_same_bits(got, _cpu(want))


def test_uneven_and_empty_ranks_step_after_step(virtual: ThreadRanks) -> None:
    g = torch.Generator().manual_seed(0)
    for step in range(12):
        T = int(torch.randint(0, 60, (), generator=g)) if step % 4 else 0
        cuts = [0, *sorted(torch.randint(0, T + 1, (1,), generator=g).tolist()), T]
        case = _on(make_case(step, T=T, D=16, E=8, K=3, absent=0.3), "cuda")
        want = run_case(case, DispatchConfig())
        run = lambda c, case=case, cuts=cuts: run_case(case, _config(), c, cuts=cuts)  # noqa: E731
        assert_same_bits(joined([_cpu(r) for r in run_on_gpu(virtual, 2, run)]), _cpu(want))


@pytest.mark.parametrize("D", [2, 6, 2048, 7168])
def test_widths(virtual: ThreadRanks, D: int) -> None:
    """Rows of fewer than 16 bytes, of no whole units, of many."""
    case = _on(make_case(1, T=48, D=D, E=8, K=3, dtype=torch.bfloat16), "cuda")
    case = dataclasses.replace(case, experts=case.experts[..., :1, :1].expand(8, 2, D, D)) if D > 1000 else case
    keys = {"backend": "all_to_all"}
    want = run_on_gpu(virtual, 2, lambda c: run_case(case, DispatchConfig(**keys), c))
    got = run_on_gpu(virtual, 2, lambda c: run_case(case, _config(), c))
    for a, b in zip(got, want, strict=True):
        assert_same_bits(_cpu(a), _cpu(b))


def test_absent_rank_is_named(virtual: ThreadRanks) -> None:
    case = _on(make_case(2, T=8, D=16, E=8, K=2), "cuda")

    def one(context: ParallelContext) -> Any:
        config = _config(deadline_s=0.5)
        run_case(case, config, context)
        dispatcher = make_dispatcher(config, num_experts=8, top_k=2, context=context)
        if context.ep_rank == 1:
            time.sleep(1.5)
            return None
        start = time.monotonic()
        with pytest.raises(DispatchTimeout, match="rank 1 reached epoch"):
            dispatcher.dispatch(case.x_TD, Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8))
        return time.monotonic() - start

    waited = run_on_gpu(virtual, 2, one, fresh=True)
    assert isinstance(waited[0], float) and waited[0] < 2.5, waited


def test_another_layer_is_a_mismatch(virtual: ThreadRanks) -> None:
    case = _on(make_case(2, T=8, D=16, E=8, K=2), "cuda")

    def one(context: ParallelContext) -> None:
        config = _config(deadline_s=2.0)
        layers = [make_dispatcher(config, num_experts=8, top_k=2, context=context, layer_index=i) for i in range(2)]
        routing = Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8)
        layers[context.ep_rank].dispatch(case.x_TD, routing)

    for error in run_on_gpu(virtual, 2, one, fresh=True):
        assert isinstance(error, (RankMismatch, DispatchTimeout)), error


# ---- static capacity and CUDA graphs --------------------------------------------------------------------------------


def _experts(received: Received, scale_E: Tensor) -> Tensor:
    """Something that depends on the expert, without reading counts on the host."""
    rows = received.rows
    place_N = torch.arange(received.probs_N.shape[0], device=rows.device)
    expert_N = torch.searchsorted(received.offsets_L1[1:].contiguous(), place_N, right=True)
    expert_N = (expert_N + received.first_expert).clamp_max(scale_E.shape[0] - 1)
    assert received.act_probs_N is not None
    live_N = (place_N < received.offsets_L1[-1]).unsqueeze(1)
    rows = torch.where(live_N, rows, 0.0)  # the tail is not written
    return torch.tanh(rows * scale_E[expert_N, None]) * received.act_probs_N[:, None].to(rows.dtype)


def graph_case(context: ParallelContext, device: str) -> str:
    """Capture forward and backward once, replay with other routings; compare with eager dropless calls."""
    E, K, T, D = 8, 3, 48, 64
    scale_E = torch.linspace(0.5, 2.0, E, device=device)
    static = {"x": torch.zeros(T, D, device=device), "w": torch.zeros(T, K, device=device)}
    ids = torch.zeros(T, K, dtype=torch.int32, device=device)
    dy = torch.zeros(T, D, device=device)

    def step(config: DispatchConfig) -> Callable[[], tuple[Tensor, ...]]:
        dispatcher = make_dispatcher(config, num_experts=E, top_k=K, context=context)

        def run() -> tuple[Tensor, ...]:
            x, w = (static[n].detach().requires_grad_() for n in ("x", "w"))
            received = dispatcher.dispatch(x, Routing(ids_TK=ids, weights_TK=w, counts_E=ids))
            y = dispatcher.combine(_experts(received, scale_E), received)
            return (y, *torch.autograd.grad(y, (x, w), dy))

        return run

    fixed = step(_config(capacity="static", static_factor=2.0, max_tokens_per_rank=T))
    live = step(_config(max_tokens_per_rank=T))

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


def overflow_case(context: ParallelContext, device: str) -> str:
    case = _on(make_case(3, T=24, D=16, E=8, K=3, absent=0.0), device)
    config = _config(capacity="static", static_factor=0.3, max_tokens_per_rank=24)
    dispatcher = make_dispatcher(config, num_experts=8, top_k=3, context=context)
    received = dispatcher.dispatch(case.x_TD, Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8))
    torch.cuda.synchronize()
    assert received.rows.isnan().all()
    try:
        dispatcher.check()
    except CapacityError as error:
        return str(error)
    return "no error"


# ---- two GPUs -------------------------------------------------------------------------------------------------------


def _context(deadline_s: float) -> ParallelContext:
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    group = compat.new_group([0, 1], backend="nccl", timeout_s=deadline_s + 30)
    store = compat.prefixed(compat.default_store(), "nvlink")
    return ParallelContext(group, ep_rank=rank, ep_size=2, device=f"cuda:{rank}", store=store, owned=(group,))


def on_two(name: str) -> Any:
    """One of the cases below, on this rank's GPU."""
    context = _context(20.0)
    device = f"cuda:{context.ep_rank}"
    try:
        if name == "graph":
            return graph_case(context, device)
        if name == "overflow":
            return overflow_case(context, device)
        if name == "handles":
            return handles_case(context, device)
        return bits_case(context, device, large=name == "large")
    finally:
        context.close()


def bits_case(context: ParallelContext, device: str, *, large: bool) -> list[str]:
    done = []
    for dtype in (torch.float32, torch.bfloat16):
        for apply_probs in ("activation", "combine", "source"):
            for rows in ("expert_major", "compact"):
                if large and apply_probs != "activation":
                    continue
                T, D = (6000, 512) if large else (52, 16)
                case = _on(make_case(3, T=T, D=D, E=16, K=4, dtype=dtype), device)
                keys = {"apply_probs": apply_probs, "rows": rows}
                nvlink = _config(**keys, max_tokens_per_rank=T // 2, deadline_s=10.0)
                for _turn in range(3):
                    got = run_case(case, nvlink, context)
                    want = run_case(case, DispatchConfig(backend="all_to_all", **keys), context)
                    assert_same_bits(got, want)
                done.append(f"{dtype} {apply_probs} {rows}")
    return done


def handles_case(context: ParallelContext, device: str) -> str:
    """Two micro-batches in flight, received in the other order; their backwards in both orders."""
    E, K, D = 8, 3, 64
    scale_E = torch.linspace(0.5, 2.0, E, device=device)
    dispatcher = make_dispatcher(_config(deadline_s=10.0), num_experts=E, top_k=K, context=context)
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
    return "two orders"


def absent_rank() -> tuple[str, float] | None:
    context = _context(2.0)
    case = _on(make_case(2, T=8, D=16, E=8, K=2), f"cuda:{context.ep_rank}")
    config = _config(deadline_s=2.0)
    run_case(case, config, context)
    if context.ep_rank == 1:
        time.sleep(5)
        return None
    dispatcher = make_dispatcher_alone(config, context, num_experts=8, top_k=2)
    start = time.monotonic()
    try:
        dispatcher.dispatch(case.x_TD, Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8))
    except DispatchTimeout as error:
        return str(error), time.monotonic() - start
    return None


def make_dispatcher_alone(config: DispatchConfig, context: ParallelContext, *, num_experts: int, top_k: int) -> Any:
    """A dispatcher without the collective comparison, which the absent rank would miss too."""
    from moe_layer.dispatch.nvlink import NvlinkDispatcher
    from moe_layer.dispatch.wire import Link

    link = Link(context, layer=0, config_hash=1, deadline_s=config.deadline_s)
    return NvlinkDispatcher(config, num_experts=num_experts, top_k=top_k, link=link)


@pytest.fixture()
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@needs_two
@pytest.mark.dist
@pytest.mark.parametrize("name", ["bits", "large", "graph", "handles", "overflow"])
def test_two_gpus(pool: Pool, name: str) -> None:
    for answer in pool.run(on_two, name, timeout_s=80.0):
        if name == "overflow":
            assert "raise dispatch.static_factor" in answer
        else:
            assert answer


@needs_two
@pytest.mark.dist
def test_absent_rank_on_two_gpus(pool: Pool) -> None:
    found = pool.run(absent_rank, timeout_s=60.0)[0]
    assert found is not None
    text, seconds = found
    assert "rank 1 reached epoch" in text and seconds < 4.5, found
