"""torch.compile of the whole layer on a GPU: one graph, the eager values, other lengths, checkpointing; no fp64."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.gpu.test_layer_gpu import D, E, K, backends, make, relative, step

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("backend", [*backends(), "auto"])
def test_compiled_layer_has_the_eager_values(backend: str) -> None:
    """Forced ids, as another GEMM order may turn a near tie."""
    torch._dynamo.reset()
    layer = make(backend)
    compiled = torch.compile(layer, fullgraph=True, dynamic=True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*lru_cache.*")  # Dynamo traced into one of our cached functions
        for tokens in (300, 128, 7):
            x, upstream = torch.randn(2, tokens, D, device="cuda").bfloat16()
            ids = torch.rand(tokens, E, device="cuda").topk(K, dim=1).indices
            want = step(layer, x, upstream, ids)
            layer.zero_grad(set_to_none=True)
            leaf = x.detach().requires_grad_()
            y = compiled(leaf, replay=ids)
            y.backward(upstream)
            got = [y.detach(), leaf.grad, *(p.grad for p in layer.parameters())]
            for a, b in zip(got, want, strict=True):
                assert relative(a, b) < 1e-2, tokens


@pytest.mark.parametrize("backend", backends())
def test_compiled_and_checkpointed(backend: str) -> None:
    torch._dynamo.reset()
    layer = make(backend)
    x, upstream = torch.randn(2, 300, D, device="cuda").bfloat16()
    want = step(layer, x, upstream)
    layer.zero_grad(set_to_none=True)
    leaf = x.detach().requires_grad_()
    y = torch.compile(lambda t: checkpoint(layer, t, use_reentrant=False))(leaf)
    y.backward(upstream)
    assert relative(y, want[0]) < 2e-2 and relative(leaf.grad, want[1]) < 2e-2


def test_float64_is_refused_with_a_remedy() -> None:
    layer = make("auto", torch.float64)
    with pytest.raises(TypeError, match=r"rows are float64.*MOE_LAYER_CUDA=0"):
        layer(torch.randn(5, D, device="cuda", dtype=torch.float64))
