"""Dispatch over NCCL on two GPUs: the bits of one GPU, and a deadline that names the rank and aborts the group."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import DispatchTimeout
from moe_layer.parallel import compat
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import Case, assert_same_bits, joined, make_case, run_case
from tests.distributed.pool import Pool

pytestmark = [pytest.mark.gpu, pytest.mark.dist]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


def _on(case: Case, device: str) -> Case:
    return Case(**{f.name: getattr(case, f.name).to(device) for f in dataclasses.fields(case)})


def _context(deadline_s: float) -> ParallelContext:
    rank = dist.get_rank()
    torch.cuda.set_device(rank)
    group = compat.new_group([0, 1], backend="nccl", timeout_s=deadline_s + 30)
    store = compat.prefixed(compat.default_store(), "nccl")
    return ParallelContext(group, ep_rank=rank, ep_size=2, device=f"cuda:{rank}", store=store, owned=(group,))


def same_bits() -> list[str]:
    """Names of the combinations that were compared on this rank's own reference run."""
    context = _context(20.0)
    done = []
    for backend in ("all_to_all", "all_gather", "replicated"):
        for apply_probs in ("activation", "combine", "source"):
            for rows in ("expert_major", "compact"):
                case = _on(make_case(3, T=26, D=16, E=16, K=4), f"cuda:{context.ep_rank}")
                config = DispatchConfig(backend=backend, apply_probs=apply_probs, rows=rows)
                mine = run_case(case, config, context)
                moved = [dataclasses.asdict(mine)[name].cpu() for name in ("y", "dx", "dw", "d_experts")]
                every: list = [None, None]
                dist.all_gather_object(every, moved)
                whole = joined([type(mine)(*part) for part in every], replicated=backend == "replicated")
                want = run_case(case, DispatchConfig(apply_probs=apply_probs, rows=rows))
                want = type(want)(want.y.cpu(), want.dx.cpu(), want.dw.cpu(), want.d_experts.cpu())
                assert_same_bits(whole, want)
                done.append(f"{backend} {apply_probs} {rows}")
    context.close()
    return done


def absent_rank() -> tuple[str, float] | None:
    """Rank 1 stays away; rank 0 must raise in time."""
    context = _context(3.0)
    dispatcher = make_dispatcher(DispatchConfig(deadline_s=3.0), num_experts=8, top_k=2, context=context, layer_index=4)
    if context.ep_rank == 1:
        time.sleep(8)
        return None
    case = _on(make_case(0, T=6, D=8, E=8, K=2), "cuda:0")
    began = time.monotonic()
    try:
        dispatcher.dispatch(
            case.x_TD, Routing(ids_TK=case.ids_TK, weights_TK=case.w_TK, counts_E=torch.zeros(8, dtype=torch.int32))
        )
    except DispatchTimeout as error:
        return str(error), time.monotonic() - began
    return "no error", time.monotonic() - began


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    workers = Pool(2)
    yield workers
    workers.close()


@needs_two
def test_bits_of_one_gpu(pair: Pool) -> None:
    for done in pair.run(same_bits):
        assert len(done) == 18


@needs_two
def test_deadline_aborts_the_group(pair: Pool) -> None:
    """Last in the file: it leaves the pair without its NCCL group."""
    (text, seconds), _ = pair.run(absent_rank)
    assert "layer 4, step 0, phase dispatch" in text and "ranks [1] of 2 did not report" in text
    assert seconds < 3.0 + 2.0 + 1.5, seconds
