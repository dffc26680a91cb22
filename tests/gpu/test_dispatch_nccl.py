"""Over NCCL on two GPUs: the bits of one GPU, FSDP2 beside the experts, a missing rank that is named in time."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.distributed as dist

from moe_layer.config.model import DispatchConfig
from moe_layer.parallel import compat
from moe_layer.parallel.context import ParallelContext
from tests.distributed.cases import Case, assert_same_bits, joined, make_case, run_case
from tests.distributed.pool import Pool
from tests.gpu.nccl_pair import DEADLINE_S, EXIT_CODE, Outcome, run_pair

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
    for backend, domain in (("all_to_all", None), ("all_to_all", 1), ("all_gather", None), ("replicated", None)):
        for apply_probs in ("activation", "combine", "source"):
            for rows in ("expert_major", "compact"):
                case = _on(make_case(3, T=26, D=16, E=16, K=4), f"cuda:{context.ep_rank}")
                config = DispatchConfig(backend=backend, apply_probs=apply_probs, rows=rows, p2p_world_size=domain)
                mine = run_case(case, config, context)
                moved = [dataclasses.asdict(mine)[name].cpu() for name in ("y", "dx", "dw", "d_experts")]
                every: list = [None, None]
                dist.all_gather_object(every, moved)
                whole = joined([type(mine)(*part) for part in every], replicated=backend == "replicated")
                want = run_case(case, DispatchConfig(apply_probs=apply_probs, rows=rows))
                want = type(want)(want.y.cpu(), want.dx.cpu(), want.dw.cpu(), want.d_experts.cpu())
                assert_same_bits(whole, want)
                done.append(f"{backend} {domain} {apply_probs} {rows}")
    context.close()
    return done


@needs_two
def test_bits_of_one_gpu(pair: Pool) -> None:
    for done in pair.run(same_bits):
        assert len(done) == 24


@pytest.fixture(scope="module")
def outcome() -> Outcome:
    return run_pair("cuda", limit_s=50.0)


@needs_two
def test_fsdp_beside_experts_over_nccl(outcome: Outcome) -> None:
    """ep 2, everything else under FSDP2: gradients and norm of one GPU (fp32)."""
    for rank in (0, 1):
        errors = outcome.found[rank, "fsdp_and_experts"]
        assert isinstance(errors, dict), errors
        assert len(errors) > 12 and max(errors.values()) < 1e-4, errors


@needs_two
def test_options_of_a_call(outcome: Outcome) -> None:
    for rank in (0, 1):
        done = outcome.found[rank, "call_options"]
        assert done == [f"{b} {r}" for b in ("all_to_all", "nvlink") for r in ("expert_major", "compact")], done


@needs_two
def test_a_missing_rank_ends_in_an_error_and_the_process_exits(outcome: Outcome) -> None:
    text, seconds = outcome.found[0, "missing_rank"]
    assert "layer 4, step 0, phase dispatch" in text and "ranks [1] of 2 did not report" in text
    assert seconds < DEADLINE_S + 2.0, seconds
    assert outcome.exit_codes[0] == EXIT_CODE and outcome.exit_after_error_s < 8.0, outcome
