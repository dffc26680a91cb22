"""What a layer holds: counters, copies and dtype moves, meta construction, printing, the keys of its state dict."""

from __future__ import annotations

import copy
import pickle

import torch

from moe_layer import MoELayer
from moe_layer.config import (
    ExpertsConfig,
    RouterConfig,
    SharedExpertConfig,
)
from tests.unit.test_layer import LOSSES, D, E, F, K, make_config, make_layer


def test_counters_stand_still_without_backward():
    layer = make_layer(make_config())
    with torch.no_grad():
        layer(torch.randn(4, D, dtype=torch.float64))
    layer.eval()
    layer(torch.randn(4, D, dtype=torch.float64)).sum().backward()
    assert not layer.router.tokens_per_expert.any()


def test_copies_and_dtype_moves():
    router = RouterConfig(num_experts=E, top_k=K, score_function="sigmoid", expert_bias=True)
    layer = make_layer(make_config(router=router), dtype=torch.float32)
    layer.router.expert_bias.normal_()
    x = torch.randn(5, D)
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert torch.equal(twin(x), layer(x))
    bias = layer.router.expert_bias.clone()
    layer.to(torch.bfloat16)
    assert layer.router.weight.dtype == torch.bfloat16
    assert torch.equal(layer.router.expert_bias, bias) and layer.router.tokens_per_expert.dtype == torch.int64
    assert layer.half().router.expert_bias.dtype == torch.float32


def test_meta_construction_then_reset_is_the_eager_construction():
    config = make_config(shared_expert=SharedExpertConfig(intermediate_size=4, gate=True), losses=LOSSES)
    meta = MoELayer(config, device="meta")
    assert all(p.is_meta for p in meta.parameters())
    meta.to_empty(device="cpu")
    torch.manual_seed(3)
    meta.reset_parameters()
    torch.manual_seed(3)
    eager = MoELayer(config)
    eager.load_state_dict(meta.state_dict())
    x = torch.randn(5, D)
    assert torch.equal(meta(x), eager(x))


def test_printing_a_layer_says_how_it_routes():
    assert "(router): Router(num_experts=8, top_k=3, score_function=softmax)" in repr(make_layer(make_config()))


def test_state_dict_keys_are_the_contract():
    router = RouterConfig(num_experts=E, top_k=K, score_function="sigmoid", expert_bias=True, linear_bias=True)
    experts = ExpertsConfig(intermediate_size=F, bias=True)
    shared = SharedExpertConfig(intermediate_size=4, gate=True)
    shapes = {
        n: tuple(t.shape)
        for n, t in make_layer(make_config(router=router, experts=experts, shared_expert=shared)).state_dict().items()
    }
    assert shapes == {
        "router.weight": (E, D),
        "router.bias": (E,),
        "router.expert_bias": (E,),
        "experts.gate_up_proj": (E, 2 * F, D),
        "experts.down_proj": (E, D, F),
        "experts.gate_up_proj_bias": (E, 2 * F),
        "experts.down_proj_bias": (E, D),
        "shared_expert.gate_proj.weight": (4, D),
        "shared_expert.up_proj.weight": (4, D),
        "shared_expert.down_proj.weight": (D, 4),
        "shared_expert_gate.weight": (1, D),
    }
