"""What the layer says about input it cannot use, and the `raise` policies."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from moe_layer import RoutingDecision, RoutingError
from moe_layer.config import LossesConfig, ReplayConfig, RouterConfig
from tests.unit.test_layer import D, E, K, make_config, make_layer


def _decision(**parts):
    return {"x": torch.zeros(3, D), "replay": RoutingDecision(torch.zeros(3, K, dtype=torch.int32), **parts)}


BAD = {
    "hidden": (lambda: {"x": torch.zeros(3, D + 1)}, r"x must be \[\.\.\., 16\] \(hidden_size\), got \(3, 17\)"),
    "int": (lambda: {"x": torch.zeros(3, D, dtype=torch.int64)}, "x must be floating, got torch.int64"),
    "dtype": (
        lambda: {"x": torch.zeros(3, D).bfloat16()},
        r"x is torch.bfloat16 and the experts' weights torch.float32; convert one of them with .to\(\), or run under",
    ),
    "valid": (lambda: {"x": torch.zeros(3, D), "valid": torch.ones(3)}, r"valid must be bool \(3,\)"),
    "valid_shape": (lambda: {"x": torch.zeros(3, D), "valid": torch.ones(4, dtype=torch.bool)}, r"valid must be bool"),
    "replay_shape": (
        lambda: {"x": torch.zeros(2, 3, D), "replay": torch.zeros(5, K, dtype=torch.int32)},
        r"replay ids must be \(2, 3, 3\) or \(6, 3\), got \(5, 3\)",
    ),
    "replay_dtype": (lambda: {"x": torch.zeros(3, D), "replay": torch.zeros(3, K)}, "replay ids must be integers"),
    "replay_list": (
        lambda: {"x": torch.zeros(3, D), "replay": RoutingDecision([[0] * K] * 3)},
        "RoutingDecision's ids must be an integer tensor, got list",
    ),
    "replay_range": (
        lambda: {"x": torch.zeros(3, D), "replay": torch.full((3, K), E)},
        r"replay ids outside \[0, 8\)",
    ),
    "replay_valid": (lambda: _decision(valid=[True] * 3), r"replay valid must be bool \(3,\), got list"),
    "replay_weights": (lambda: _decision(weights=[[1.0]]), r"replay weights must be floating \(3, 3\) or .*got list"),
    "meta_device": (lambda: {"x": torch.zeros(3, D, device="meta")}, "x is on meta and the layer on cpu"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_names_the_argument(case):
    make, text = BAD[case]
    layer = make_layer(make_config(), dtype=torch.float32)
    with pytest.raises(RoutingError, match=text):
        layer(**make())


@pytest.mark.parametrize(
    ("experts", "narrow", "wide"), [(129, torch.int8, torch.uint8), (257, torch.uint8, torch.int16)]
)
def test_replayed_ids_that_wrapped_around(experts, narrow, wide):
    """Expert 200 as int8 is -56, which would be filled live; expert 256 as uint8 is expert 0."""
    layer = make_layer(make_config(router=RouterConfig(num_experts=experts, top_k=K)))
    ids = torch.tensor([[experts - 1, 3, 4]])
    x = torch.ones(1, D, dtype=torch.float64)
    with pytest.raises(RoutingError, match=f"{narrow}, which cannot name all {experts} experts"):
        layer(x, replay=ids.to(narrow))
    _, routing = layer(x, replay=ids.to(wide), return_routing=True)
    assert torch.equal(routing.ids_TK, ids.int())


@pytest.mark.parametrize(
    ("replay", "router", "ids", "x_value", "text"),
    [
        (ReplayConfig(on_missing="raise"), {}, [[0, -1, 2]], 1.0, "on_missing: live"),
        (ReplayConfig(on_duplicate="raise"), {}, [[0, 0, 2]], 1.0, "on_duplicate: refill"),
        (ReplayConfig(), {"nonfinite": "raise"}, None, float("nan"), "nonfinite: count"),
    ],
)
def test_raise_policies(replay, router, ids, x_value, text):
    layer = make_layer(make_config(replay=replay, router=RouterConfig(num_experts=E, top_k=K, **router)))
    x = torch.full((1, D), x_value, dtype=torch.float64)
    ids = None if ids is None else torch.tensor(ids)
    with pytest.raises(RoutingError, match=text):
        layer(x, replay=ids)
    tolerant = make_layer(make_config(router=dataclasses.replace(layer.config.router, nonfinite="count")))
    tolerant(x, replay=ids)
    tolerant.check()


def test_sequence_loss_needs_sequences():
    layer = make_layer(make_config(losses=LossesConfig(aux="sequence", aux_coeff=1.0)))
    with pytest.raises(RoutingError, match=r"needs x of shape \[B, S, D\] or cu_seqlens"):
        layer(torch.zeros(6, D, dtype=torch.float64))
    _, by_shape = layer(torch.ones(2, 3, D, dtype=torch.float64), return_routing=True)
    bounds = torch.tensor([0, 3, 6], dtype=torch.int32)
    _, by_bounds = layer(torch.ones(6, D, dtype=torch.float64), cu_seqlens=bounds, return_routing=True)
    assert torch.equal(by_shape.losses["aux"], by_bounds.losses["aux"])
    with pytest.raises(RoutingError, match=r"needs cu_seqlens \[S\+1\]"):
        layer.router(torch.zeros(6, D, dtype=torch.float64))  # it sees tokens only, and would take all for one sequence
    layer.warmup()  # without a loss any shape will do
    assert layer.eval()(torch.ones(6, D, dtype=torch.float64)).shape == (6, D)
