"""Forced ids and recording under expert parallelism on a GPU: virtual ranks, each on a stream of its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from moe_layer import MoELayer, RoutingSession, RoutingTrace
from moe_layer.compat.mojo_opset import MojoMoE
from moe_layer.config import MoEConfig
from moe_layer.parallel.context import ParallelContext
from tests.distributed.cases import even_cuts
from tests.distributed.ranks import ThreadRanks
from tests.distributed.test_replay_sharded import D, T, config, forced, sharded_layer
from tests.gpu.virtual_ranks import run_on_gpu

pytestmark = pytest.mark.gpu

BACKENDS = ("all_to_all", "all_gather", "replicated")


@pytest.fixture(scope="module")
def virtual() -> Iterator[ThreadRanks]:
    ranks = ThreadRanks()
    yield ranks
    ranks.close()


def settings(backend: str, weight_format: str) -> MoEConfig:
    """With the per-expert loop, which takes any dtype and no compilation (quantised experts have their own)."""
    found = config(backend, weight_format)
    experts = found.experts if weight_format != "input" else replace(found.experts, backend="reference")
    return replace(found, experts=experts)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("weight_format", "dtype"),
    [("input", torch.float32), ("input", torch.bfloat16), ("input", torch.float16), ("int8", torch.bfloat16),
     ("fp8_1x128", torch.bfloat16)],
)  # fmt: skip
def test_forced_ids_and_recording(
    virtual: ThreadRanks, backend: str, size: int, weight_format: str, dtype: torch.dtype
) -> None:
    """Ids from the host in int16, with gaps: the routing of one rank, outputs within the rounding of the dtype."""
    torch.manual_seed(0)
    whole = MoELayer(settings("auto", weight_format)).to("cuda", dtype)
    x = torch.randn(T, D).to("cuda", dtype)
    cuts = [0, *even_cuts(T, size)[1:]]
    with torch.no_grad(), RoutingSession(whole) as session, session.record(weights=True) as recording:
        y = MojoMoE(whole)(x, forced())
    torch.cuda.synchronize()

    def one(context: ParallelContext) -> tuple[Tensor, RoutingTrace]:
        layer = sharded_layer(whole, settings(backend, weight_format), context).to("cuda", dtype)
        mine = slice(0, T) if backend == "replicated" else slice(cuts[context.ep_rank], cuts[context.ep_rank + 1])
        with torch.no_grad(), RoutingSession(layer) as session, session.record(weights=True) as recorded:
            out = MojoMoE(layer)(x[mine], forced()[mine].to(torch.int16))
        return out, recorded.trace(torch.arange(T)[mine], num_tokens=T)

    found = run_on_gpu(virtual, size, one)
    joined = found[0][0] if backend == "replicated" else torch.cat([out for out, _ in found])
    trace = found[0][1]
    for _, other in found[1:]:
        trace = trace.merged(other)
    expected = recording.trace()
    assert torch.equal(trace.wide_ids(), expected.wide_ids()) and joined.dtype == dtype
    assert trace.weights is not None and expected.weights is not None
    torch.testing.assert_close(trace.weights, expected.weights, rtol=1e-5 if dtype == torch.float32 else 1e-2, atol=0)
    limit = (1e-5 if dtype == torch.float32 else 4 * torch.finfo(dtype).eps) * float(y.abs().max())
    torch.testing.assert_close(joined, y, rtol=0, atol=limit if weight_format == "input" else 4 * limit)
