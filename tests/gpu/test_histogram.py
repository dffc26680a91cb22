"""The first kernel of csrc: the library is loaded, launched on torch's stream, bit-equal to its reference."""

from __future__ import annotations

import pytest
import torch

from moe_layer.ops import _ext
from moe_layer.ops.histogram import expert_histogram, reference


@pytest.fixture(autouse=True)
def _kernels() -> None:
    status = _ext.status()
    assert status.loaded, status.sentence()


# 8192 and 8193 are the two sides of the shared-memory limit; 40960 * 8 ids need more than one block.
@pytest.mark.parametrize("num_experts", [1, 8, 60, 256, 8192, 8193, 40000])
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (37, 3), (4096, 8), (40960, 8)], ids=str)
def test_equals_reference(num_experts: int, shape: tuple[int, int]) -> None:
    ids = torch.randint(-2, num_experts + 2, shape, dtype=torch.int32, device="cuda")
    counts_E = expert_histogram(ids, num_experts=num_experts)
    assert torch.equal(counts_E.cpu(), reference(ids.cpu(), num_experts))
    assert torch.equal(counts_E, expert_histogram(ids, num_experts=num_experts))


def test_all_tokens_on_one_expert() -> None:
    ids = torch.full((100_000,), 3, dtype=torch.int32, device="cuda")
    assert expert_histogram(ids, num_experts=4).tolist() == [0, 0, 0, 100_000]


def test_the_kernel_runs_and_not_the_reference() -> None:
    ids = torch.zeros(64, dtype=torch.int32, device="cuda")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        expert_histogram(ids, num_experts=4)
        torch.cuda.synchronize()
    assert any("histogram_kernel" in event.key for event in profile.key_averages())


def test_runs_on_the_current_stream_and_in_a_graph() -> None:
    ids = torch.zeros(1024, dtype=torch.int32, device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        counts_E = expert_histogram(ids, num_experts=8)
    ids.copy_(torch.arange(1024, device="cuda") % 8)
    graph.replay()
    assert counts_E.tolist() == [128] * 8


def test_opcheck_on_cuda() -> None:
    ids = torch.randint(-1, 9, (11, 3), dtype=torch.int32, device="cuda")
    torch.library.opcheck(torch.ops.moe_layer.expert_histogram.default, (ids, 9))


def test_strided_ids_are_an_error_of_the_raw_op() -> None:
    ids = torch.zeros(8, 8, dtype=torch.int32, device="cuda").t()[:, ::2]
    with pytest.raises(RuntimeError, match="ids must be contiguous"):
        torch.ops.moe_layer.expert_histogram(ids, 4)
