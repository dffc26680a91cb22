"""A hundred steps on one input, eager and in a CUDA graph, give one y, dx, d(probs) and gradient of every parameter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_layer import MoEConfig, MoELayer
from moe_layer.config import ExpertsConfig, LossesConfig, RouterConfig
from tests.gpu.test_layer_gpu import backends

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")]

RUNS = 100
SHAPES = {  # T, D, F, E, K
    "qwen3-30b-4k": (4096, 2048, 768, 128, 8),
    "ragged": (1003, 512, 256, 24, 3),
}


def make(backend: str, shape: tuple[int, ...]) -> tuple[MoELayer, Tensor, Tensor]:
    tokens, hidden, width, experts, top_k = shape
    config = MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        experts=ExpertsConfig(intermediate_size=width, backend=backend),
        losses=LossesConfig(aux="batch", aux_coeff=0.01, z_coeff=1e-3),
    )
    torch.manual_seed(5)
    layer = MoELayer(config, device="cuda", dtype=torch.bfloat16)
    x, upstream = torch.randn(2, tokens, hidden, device="cuda").bfloat16()
    return layer, x.requires_grad_(), upstream


def run(layer: MoELayer, x: Tensor, upstream: Tensor) -> dict[str, Tensor]:
    layer.zero_grad(set_to_none=True)
    x.grad = None
    routings = []
    with layer.router.register_forward_hook(lambda module, inputs, routing: routings.append(routing)):
        y = layer(x)
    (probs_TK,) = (routing.weights_TK for routing in routings)
    probs_TK.retain_grad()
    y.backward(upstream)
    found = {"y": y.detach(), "dx": x.grad, "dprobs": probs_TK.grad}
    found.update((name, p.grad) for name, p in layer.named_parameters())
    assert all(value is not None for value in found.values()), found
    return found


def differing(first: dict[str, Tensor], again: dict[str, Tensor]) -> list[str]:
    return [name for name in first if not torch.equal(first[name], again[name])]


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_hundred_eager_steps_have_the_same_bits(shape, backend):
    layer, x, upstream = make(backend, shape)
    first = {name: value.clone() for name, value in run(layer, x, upstream).items()}
    assert all(value.isfinite().all() and value.any() for value in first.values())
    for number in range(1, RUNS):
        assert not differing(first, run(layer, x, upstream)), number


@pytest.mark.parametrize("backend", backends())
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_a_hundred_replays_have_the_bits_of_an_eager_step(shape, backend):
    layer, x, upstream = make(backend, shape)
    eager = {name: value.clone() for name, value in run(layer, x, upstream).items()}
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run(layer, x, upstream)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = run(layer, x, upstream)
    for number in range(RUNS):
        for value in captured.values():
            value.fill_(float("nan"))  # what a replay leaves unwritten must not look right
        graph.replay()
        assert not differing(eager, captured), number
