"""`dispatch.chunks` on a GPU: the values of one part, errors of the summed dW against fp64, graphs, memory, no sync."""

from __future__ import annotations

import pytest
import torch

from moe_layer.config import DispatchConfig, LossesConfig, SharedExpertConfig
from tests.gpu.test_layer_gpu import D, E, K, backends, capture, make, relative, step

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]
MATRICES = ("experts.gate_up_proj", "experts.down_proj")


def chunked(backend: str, count: int, like=None, *, rows: str = "auto", **changes):
    layer = make(backend, dispatch=DispatchConfig(chunks=count, rows=rows), **changes)
    if like is not None:
        layer.load_state_dict(like.state_dict())
    return layer


def inputs(T: int):
    torch.manual_seed(5)
    return torch.randn(2, T, D, device="cuda").bfloat16()


@pytest.mark.parametrize("rows", ["auto", "expert_major"])
@pytest.mark.parametrize("T", [700, 3])
@pytest.mark.parametrize("count", [2, 4])
@pytest.mark.parametrize("backend", backends())
def test_error_of_weight_gradients_stays_below_twice_that_of_one_part(backend, count, T, rows):
    """Everything but dW to the last bit or two, dW against fp64; some experts have no rows in a part."""
    whole = chunked(backend, 1, rows=rows)
    several = chunked(backend, count, whole, rows=rows)
    exact = make("reference").double().cpu()
    exact.load_state_dict(whole.state_dict())
    x, upstream = inputs(T)
    ids = whole(x, return_routing=True)[1].ids_TK
    want = [v.cuda() for v in step(exact, x.double().cpu(), upstream.double().cpu(), ids.cpu())]
    one, more = step(whole, x, upstream, ids), step(several, x, upstream, ids)
    names = ["y", "dx", *(name for name, _ in whole.named_parameters())]
    for name, a, b, c in zip(names, more, one, want, strict=True):
        if name in MATRICES:
            assert relative(a, c) <= 2 * relative(b, c), (name, relative(a, c), relative(b, c))
        else:
            assert relative(a, b) < 1e-3, (name, relative(a, b))
            assert relative(a, c) <= 1.1 * relative(b, c) + 1e-6, (name, relative(a, c), relative(b, c))


@pytest.mark.parametrize("mode", ["overlap", "packed"])
@pytest.mark.parametrize("backend", backends())
def test_shared_expert(backend, mode):
    shared = SharedExpertConfig(intermediate_size=128, gate=True, mode=mode)
    whole = chunked(backend, 1, shared_expert=shared)
    several = chunked(backend, 3, whole, shared_expert=shared)
    x, upstream = inputs(500)
    one, more = step(whole, x, upstream), step(several, x, upstream)
    for name, a, b in zip(("y", "dx", *dict(whole.named_parameters())), more, one, strict=True):
        assert relative(a, b) < 8e-3, (name, relative(a, b))


@pytest.mark.parametrize("backend", backends())
def test_main_grad_is_as_exact_as_in_one_part(backend):
    """Sums in fp32: the parts add nothing but the order of addition."""
    whole, x_and_upstream = chunked(backend, 1), inputs(700)
    several = chunked(backend, 4, whole)
    for layer in (whole, several):
        for name in MATRICES:
            parameter = layer.get_parameter(name)
            parameter.main_grad = torch.ones(parameter.shape, device="cuda")
        layer(x_and_upstream[0]).backward(x_and_upstream[1])
    for name in MATRICES:
        got, want = several.get_parameter(name), whole.get_parameter(name)
        assert got.grad is None and got.grad_added_to_main_grad
        assert relative(got.main_grad - 1, want.main_grad - 1) < 5e-3


@pytest.mark.parametrize("backend", backends())
def test_same_bits_without_synchronisation_and_in_a_graph(backend):
    layer = chunked(backend, 3)
    x, upstream = inputs(300)
    first = step(layer, x, upstream)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = step(layer, x, upstream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))

    x = x.detach().clone().requires_grad_()
    graph, captured = capture(layer, x, upstream)
    for seed in range(3):
        torch.manual_seed(seed)
        x.data.copy_(torch.randn(300, D, device="cuda"))
        graph.replay()
        got = [value.clone() for value in captured]
        twin = chunked(backend, 3, layer)
        assert all(torch.equal(a, b) for a, b in zip(got, step(twin, x, upstream), strict=True))


@pytest.mark.parametrize("backend", backends())
def test_one_part_is_alive_at_a_time(backend):
    """The peak above what is kept falls by most of what three of four parts would have needed."""
    T = 16384
    x, upstream = inputs(T)
    x.requires_grad_()
    peaks = {}
    for count in (1, 4):
        layer = chunked(backend, count, losses=LossesConfig())
        layer(x).backward(upstream)
        x.grad = None
        layer.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        y = layer(x)
        forward = torch.cuda.max_memory_allocated() - before
        torch.cuda.reset_peak_memory_stats()
        y.backward(upstream)
        peaks[count] = (forward, torch.cuda.max_memory_allocated() - before)
        del y, layer
        x.grad = None
    rows = T * K * D * 2  # the least that a part's transients hold in either direction: one [N, D] in bf16
    for one, four in zip(peaks[1], peaks[4], strict=True):
        assert four < one - 0.5 * rows, (peaks, rows)


def test_no_tokens_and_idle_experts():
    layer = chunked(backends()[0], 2)
    step(layer, torch.zeros(0, D, device="cuda").bfloat16(), torch.zeros(0, D, device="cuda").bfloat16())
    assert all(p.grad is not None and not p.grad.any() for p in layer.parameters())
    x, upstream = inputs(9)
    step(layer, x, upstream, torch.arange(K, device="cuda").expand(9, K))
    grad = layer.experts.gate_up_proj.grad
    assert grad[:K].abs().sum() > 0 and not grad[K:].any() and E > K
