"""The nvlink dispatcher: its kernels with several ranks on one GPU, then on two GPUs over NVLink."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.dispatch.window import window_for
from moe_layer.errors import DispatchTimeout
from moe_layer.ops import ep
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.kernels import require_kernels
from moe_layer.parallel import compat
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import Case, make_case, run_case
from tests.distributed.pool import Pool
from tests.distributed.ranks import ThreadRanks
from tests.gpu.nccl_pair import DEADLINE_S, EXIT_CODE, run_pair
from tests.gpu.nvlink_cases import (
    _config,
    _experts,
    _on,
    bits_case,
    graph_case,
    handles_case,
    make_dispatcher_alone,
    overflow_case,
)
from tests.gpu.virtual_ranks import run_on_gpu

pytestmark = pytest.mark.gpu
both_pushes = pytest.mark.parametrize("push", ["slots", "dense"])
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


# ---- one GPU --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_plan_is_the_reference(ranks: int) -> None:
    require_kernels("cuda")
    for T, K, E in ((0, 2, 8), (1, 1, 8), (37, 4, 16), (4097, 8, 64), (20000, 6, 64)):
        ids = torch.rand(T, E).topk(K).indices.int().where(torch.rand(T, K) < 0.8, -1)
        want = ep.ep_plan(ids, num_experts=E, num_ranks=ranks)
        got = ep.ep_plan(ids.cuda(), num_experts=E, num_ranks=ranks)
        assert all(torch.equal(got[i].cpu(), want[i]) for i in range(1, 5))
        for r in range(ranks):
            n = int(want[2][r])
            assert torch.equal(got[0][r, :n].cpu(), want[0][r, :n])


@pytest.fixture(scope="module")
def threads() -> Iterator[ThreadRanks]:
    require_kernels("cuda")
    ranks = ThreadRanks()
    yield ranks
    ranks.close()


@both_pushes
@pytest.mark.parametrize("size", [1, 2, 3, 4, 8])
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_bits_on_virtual_ranks(threads: ThreadRanks, size: int, rows: str, dtype: torch.dtype, push: str) -> None:
    wire = "fp32" if dtype != torch.float32 else "input"
    case = _on(make_case(size, T=150, D=1032 if size == 2 else 16, E=24, K=4, dtype=dtype), "cuda")
    config = _config(rows=rows, combine_format=wire, push=push)
    got = play(threads, case, config, size)
    want = play(threads, case, DispatchConfig(combine_format=wire), 1)
    # the tree of 3 ranks is another one; compact rows have one gradient a token and rank, in their dtype
    exact = size != 3 and (rows == "expert_major" or dtype == torch.float32)
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        assert torch.equal(a, b) if exact else torch.allclose(a.float(), b.float(), atol=1e-2, rtol=1e-2), name


@both_pushes
@pytest.mark.parametrize("size", [2, 4])
def test_fp8_on_virtual_ranks(threads: ThreadRanks, size: int, push: str) -> None:
    """Encoded and decoded in the kernels: the bits of the Python format at one rank, infinities and NaN included, and
    blocks whose scale is the smallest one or larger than most."""
    case = _on(make_case(size, T=64, D=640, E=16, K=4, dtype=torch.bfloat16), "cuda")
    case.x_TD[3, 5], case.x_TD[4, 7], case.x_TD[5] = torch.inf, torch.nan, 0.0
    case.x_TD[6] *= 1e-36
    case.x_TD[7, :200] *= 1e30
    keys = {"dispatch_format": "fp8_1x128", "combine_format": "fp32"}
    got, want = (
        play(threads, case, c, n) for c, n in ((_config(push=push, **keys), size), (DispatchConfig(**keys), 1))
    )
    for name, a, b in zip(("y", "dx", "dw"), got, want, strict=True):
        assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) and torch.equal(a.isnan(), b.isnan()), name


@both_pushes
def test_slots_are_reused(threads: ThreadRanks, push: str) -> None:
    """Other sizes trip after trip through the same windows, zero tokens included."""
    for seed, T in enumerate((40, 0, 7, 150, 1, 64)):
        case = _on(make_case(seed, T=T, D=16, E=8, K=3, absent=0.3), "cuda")
        got, want = play(threads, case, _config(push=push), 2), play(threads, case, DispatchConfig(), 1)
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)), T


@both_pushes
@pytest.mark.parametrize("alignment", [8, 128])
def test_pads_are_zero(threads: ThreadRanks, alignment: int, push: str) -> None:
    case = _on(make_case(1, T=30, D=16, E=8, K=3), "cuda")
    config = _config(alignment=alignment, push=push)
    got, want = play(threads, case, config, 2), play(threads, case, DispatchConfig(), 1)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


def play(threads: ThreadRanks, case: Case, config: DispatchConfig, size: int) -> tuple[Tensor, Tensor, Tensor]:
    """y, dx, dw of all ranks joined: each phase for every rank, then the next, so that no kernel waits for another."""
    T, R, E = case.x_TD.shape[0], size, case.num_experts
    scale_E = torch.linspace(0.5, 2.0, E, device="cuda")
    cuts = [T * r // R for r in range(R + 1)]
    shares = [slice(cuts[r], cuts[r + 1]) for r in range(R)]
    if config.backend != "nvlink":
        dispatcher = make_dispatcher(config, num_experts=E, top_k=case.top_k, context=None)
        x, w = case.x_TD.clone().requires_grad_(), case.w_TK.clone().requires_grad_()
        received = dispatcher.dispatch(x, Routing.from_ids(case.ids_TK, w, num_experts=E))
        y = dispatcher.combine(_experts(received, scale_E), received)
        return (y.detach(), *torch.autograd.grad(y, (x, w), case.dy_TD))

    def build(context: ParallelContext) -> Any:
        dispatcher = make_dispatcher_alone(config, context, num_experts=E, top_k=case.top_k)
        window_for(dispatcher.link, dispatcher.window_size(case.x_TD.shape[1], case.x_TD.dtype))
        return dispatcher

    ranks = run_on_gpu(threads, R, build)
    with torch.no_grad():
        routings = [Routing.from_ids(case.ids_TK[s], case.w_TK[s], num_experts=E) for s in shares]
        handles = [d.dispatch_send(case.x_TD[s], r) for d, s, r in zip(ranks, shares, routings, strict=True)]
        received = [d.dispatch_recv(*h) for d, h in zip(ranks, handles, strict=True)]
    leaves, outs = [], []
    for one in received:
        rows, probs = one.rows.clone().requires_grad_(), one.probs_N.clone().requires_grad_()
        leaves.append((rows, probs))
        outs.append(_experts(dataclasses.replace(one, rows=rows, act_probs_N=probs), scale_E))
    with torch.no_grad():
        sent = [d.combine_send(out.detach(), one) for d, out, one in zip(ranks, outs, received, strict=True)]
        y = torch.cat([d.combine_recv(*s) for d, s in zip(ranks, sent, strict=True)])
        calls = [one.state for one in received]
        dy = [case.dy_TD[s].contiguous().clone() for s in shares]
        for call, share in zip(calls, dy, strict=True):
            call.push("combine backward", share)
        d_outs = []
        for call, share, out in zip(calls, dy, outs, strict=True):
            compact = config.rows == "compact"
            part = torch.empty(call.row_CK.shape[0] if compact else out.shape[0], out.shape[1], dtype=out.dtype).cuda()
            call.take("combine backward", share, part)
            d_outs.append(
                gather_rows(part, torch.where(call.slot_N >= 0, call.slot_N // case.top_k, -1)) if compact else part
            )
    grads = []
    for out, d_out, leaf, one in zip(outs, d_outs, leaves, received, strict=True):
        d_rows, d_probs = torch.autograd.grad(out, leaf, d_out)
        if one.index_N is not None and d_rows.shape[0] != one.row_CK.shape[0]:
            raise AssertionError("compact rows have one gradient a token")
        grads.append((d_rows, d_probs))
    with torch.no_grad():
        for call, (d_rows, d_probs) in zip(calls, grads, strict=True):
            call.reduce_push("dispatch backward", d_rows, compact=config.rows == "compact", probs_N=d_probs)
        home = [
            call.home("dispatch backward", d_rows, compact=config.rows == "compact", probs_N=d_probs, add=None)
            for call, (d_rows, d_probs) in zip(calls, grads, strict=True)
        ]
    for dispatcher in ranks:
        dispatcher.check()
        dispatcher.link.context.close()
    return y, torch.cat([h[0] for h in home]), torch.cat([h[1] for h in home])


# ---- two GPUs -------------------------------------------------------------------------------------------------------


def _context(deadline_s: float) -> ParallelContext:
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    group = compat.new_group([0, 1], backend="nccl", timeout_s=deadline_s + 30)
    store = compat.prefixed(compat.default_store(), "nvlink")
    return ParallelContext(group, ep_rank=rank, ep_size=2, device=f"cuda:{rank}", store=store, owned=(group,))


def on_two(name: str, push: str) -> Any:
    """One of the cases below, on this rank's GPU."""
    context = _context(20.0)
    device = f"cuda:{context.ep_rank}"
    try:
        if name == "graph":
            return graph_case(context, device, push)
        if name == "overflow":
            return overflow_case(context, device, push)
        if name == "handles":
            return handles_case(context, device, push)
        return bits_case(context, device, push, large=name == "large")
    finally:
        context.close()


def absent_rank(push: str) -> tuple[str, float] | None:
    context = _context(2.0)
    case = _on(make_case(2, T=8, D=16, E=8, K=2), f"cuda:{context.ep_rank}")
    config = _config(deadline_s=2.0, push=push)
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


@pytest.fixture()
def pool() -> Iterator[Pool]:
    pool = Pool(2)
    yield pool
    pool.close()


@needs_two
@pytest.mark.dist
@both_pushes
@pytest.mark.parametrize("name", ["bits", "large", "graph", "handles", "overflow"])
def test_two_gpus(pool: Pool, name: str, push: str) -> None:
    for answer in pool.run(on_two, name, push, timeout_s=80.0):
        if name == "overflow":
            assert "raise dispatch.static_factor" in answer
        else:
            assert answer


@needs_two
@pytest.mark.dist
@both_pushes
def test_absent_rank_on_two_gpus(pool: Pool, push: str) -> None:
    found = pool.run(absent_rank, push, timeout_s=60.0)[0]
    assert found is not None
    text, seconds = found
    assert "rank 1 reached epoch" in text and seconds < 4.5, found


@needs_two
@pytest.mark.dist
def test_a_missing_rank_ends_in_an_error_and_the_process_exits() -> None:
    """A trained layer first (FSDP2 beside it), then rank 1 stays away: rank 0 raises in time and its process ends."""
    outcome = run_pair("cuda", limit_s=50.0, backend="nvlink")
    for rank in (0, 1):
        errors = outcome.found[rank, "fsdp_and_experts"]
        assert isinstance(errors, dict) and max(errors.values()) < 1e-4, errors
    text, seconds = outcome.found[0, "missing_rank"]
    assert "layer 4, step 0, phase dispatch" in text and "ranks [1] of 2 did not report" in text
    assert "rank 1 reached epoch" in text and seconds < DEADLINE_S + 2.0, (text, seconds)
    assert outcome.exit_codes[0] == EXIT_CODE and outcome.exit_after_error_s < 8.0, outcome
