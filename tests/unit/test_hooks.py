"""`step_hooks`: the layers' step hooks around an optimizer's steps."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from moe_layer import ConfigError, RoutingError, step_hooks
from moe_layer.config import BalanceConfig, RouterConfig
from tests.unit.test_layer import D, E, K, make_config, make_layer


def model() -> nn.Sequential:
    """Two layers whose biases move by 0.5 a step; NaN logits are an error."""
    router = RouterConfig(num_experts=E, top_k=K, score_function="sigmoid", expert_bias=True, nonfinite="raise")
    config = make_config(router=router, balance=BalanceConfig(bias_update_rate=0.5))
    return nn.Sequential(nn.Linear(D, D, dtype=torch.float64), make_layer(config), make_layer(config, seed=1))


def backward(net: nn.Module) -> None:
    net(torch.randn(7, D, dtype=torch.float64)).sum().backward()


@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, lambda optimizer: SimpleNamespace(optimizer=optimizer)])
def test_a_step_moves_the_biases_of_every_layer_once(wrap: Callable[[Any], Any]) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1e-3)
    hooks = step_hooks(net, wrap(optimizer))
    backward(net)
    assert not net[1].router.expert_bias.any()
    optimizer.step()
    assert all((layer.router.expert_bias.abs() == 0.5).all() for layer in net[1:])
    hooks.remove()
    before = net[1].router.expert_bias.clone()
    backward(net)
    optimizer.step()
    assert torch.equal(net[1].router.expert_bias, before)


@pytest.mark.parametrize("check", [True, False])
def test_a_finding_stops_the_step(check: bool) -> None:
    net = model()
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    step_hooks(net, optimizer, check=check)
    backward(net)
    before = net[0].weight.clone()
    net[2].router.faults[5] = 3  # what device code writes
    if check:
        with pytest.raises(RoutingError, match="3 rows have NaN or infinite router logits"):
            optimizer.step()
    else:
        optimizer.step()
    assert torch.equal(net[0].weight, before) == check


def test_a_model_without_layers_is_refused() -> None:
    net = nn.Linear(2, 2)
    with pytest.raises(ConfigError, match="Linear contains no MoELayer"):
        step_hooks(net, torch.optim.SGD(net.parameters(), lr=1.0))
