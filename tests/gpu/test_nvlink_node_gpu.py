"""The nvlink dispatcher on four and on eight GPUs of one host: the cases of two, and a rank that is killed."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from moe_layer.errors import DispatchTimeout
from moe_layer.parallel import compat
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import make_case, run_case
from tests.distributed.pool import Pool
from tests.gpu import nvlink_cases as cases
from tests.gpu.test_nvlink_gpu import both_pushes

KILLED = 2
pytestmark = [pytest.mark.gpu, pytest.mark.dist]
SIZES = [
    pytest.param(n, marks=pytest.mark.skipif(torch.cuda.device_count() < n, reason=f"needs {n} CUDA GPUs"))
    for n in (4, 8)
]


def _context(name: str, deadline_s: float) -> ParallelContext:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.cuda.set_device(rank)
    group = compat.new_group(list(range(size)), backend="nccl", timeout_s=deadline_s + 30)
    store = compat.prefixed(compat.default_store(), name)
    return ParallelContext(group, ep_rank=rank, ep_size=size, device=f"cuda:{rank}", store=store, owned=(group,))


def on_node(name: str, push: str) -> Any:
    """A case of the two-GPU tests on this rank's GPU."""
    context = _context(f"{name}-{push}", 20.0)
    device = f"cuda:{context.ep_rank}"
    try:
        if name in ("bits", "large"):
            return cases.bits_case(context, device, push, large=name == "large")
        return {"graph": cases.graph_case, "overflow": cases.overflow_case, "handles": cases.handles_case}[name](
            context, device, push
        )
    finally:
        context.close()


def killed_rank() -> tuple[str, float]:
    """One rank dies between two dispatches; what the others are told, and after how many seconds."""
    context = _context("killed", 2.0)
    case = cases._on(make_case(2, T=16, D=16, E=8, K=2), f"cuda:{context.ep_rank}")
    config = cases._config(deadline_s=2.0)
    run_case(case, config, context)
    torch.cuda.synchronize()
    if context.ep_rank == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    dispatcher = cases.make_dispatcher_alone(config, context, num_experts=8, top_k=2)
    start = time.monotonic()
    with pytest.raises(DispatchTimeout) as found:
        dispatcher.dispatch(case.x_TD, Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8))
    return str(found.value), time.monotonic() - start


@pytest.fixture(scope="module", params=SIZES)
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    pool = Pool(request.param)
    yield pool
    pool.close()


@both_pushes
@pytest.mark.parametrize("name", ["bits", "large", "graph", "handles", "overflow"])
def test_node(pool: Pool, name: str, push: str) -> None:
    for answer in pool.run(on_node, name, push, timeout_s=80.0):
        if name == "overflow":
            assert "raise dispatch.static_factor" in answer
        else:
            assert answer


def test_a_killed_rank_is_named_in_time(pool: Pool) -> None:
    answers = pool.run(killed_rank, timeout_s=60.0, lost=KILLED)
    for rank, answer in enumerate(answers):
        if rank == KILLED:
            continue
        text, seconds = answer
        assert f"rank {KILLED} reached epoch" in text and seconds < 4.5, (rank, text, seconds)
