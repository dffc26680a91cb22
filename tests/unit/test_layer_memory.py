"""A layer that gets its memory after its construction: counters, loss scale and biases start as in any other layer."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_layer import MoEConfig, MoELayer
from moe_layer.config import BalanceConfig, RouterConfig, SharedExpertConfig
from tests.unit.test_layer import LOSSES, D, E, F, K, make_config, make_layer

CONFIG = make_config(
    router=RouterConfig(num_experts=E, top_k=K, score_function="sigmoid", expert_bias=True),
    losses=LOSSES,
    balance=BalanceConfig(bias_update_rate=0.25),
)


@pytest.fixture(autouse=True)
def memory_without_values() -> Iterator[None]:
    """torch.empty gives NaN and the largest integers, where it would give what was there by chance."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def to_empty(meta: nn.Module, saved: dict[str, Tensor]) -> None:
    meta.to_empty(device="cpu").load_state_dict(saved)


def assign(meta: nn.Module, saved: dict[str, Tensor]) -> None:
    meta.load_state_dict(saved, assign=True)


def assign_strictly_cast(meta: nn.Module, saved: dict[str, Tensor]) -> None:
    """A checkpoint in which somebody cast everything to bf16."""
    saved = {name: value.bfloat16() if "expert_bias" in name else value for name, value in saved.items()}
    meta.load_state_dict(saved, assign=True)


def one_by_one(meta: nn.Module, saved: dict[str, Tensor]) -> None:
    """As transformers' from_pretrained does it."""
    for path, module in meta.named_modules():
        prefix = f"{path}." if path else ""
        for name, parameter in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(saved[prefix + name], parameter.requires_grad))
        for name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, name, saved.get(prefix + name, torch.empty_like(buffer, device="cpu")))


def two_steps(layer: nn.Module) -> dict[str, Any]:
    """What two steps leave behind."""
    moe = next(module for module in layer.modules() if isinstance(module, MoELayer))
    x = torch.randn(9, D, generator=torch.Generator().manual_seed(4)).to(moe.router.weight.dtype)
    for _ in range(2):
        layer(x).square().sum().backward()
        moe.check()
        moe.update_bias()
    found = {f"grad {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return found | moe.collect_stats() | dict(layer.named_buffers())


def assert_same(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, msg=lambda text, n=name: f"{n}: {text}")


def parameters_alone(meta: nn.Module, saved: dict[str, Tensor]) -> None:
    """As accelerate's load_checkpoint_and_dispatch does it, which then moves the model."""
    for path, module in meta.named_modules():
        prefix = f"{path}." if path else ""
        for holder in (module._parameters, module._buffers):
            for name, value in holder.items():
                if value is not None and prefix + name in saved:
                    new = saved[prefix + name]
                    holder[name] = nn.Parameter(new) if holder is module._parameters else new
    meta.to("cpu")


PACKED = dataclasses.replace(CONFIG, shared_expert=SharedExpertConfig(intermediate_size=F, mode="packed"))
CASES = [
    *((CONFIG, fill) for fill in (to_empty, assign, assign_strictly_cast, one_by_one, parameters_alone)),
    *((PACKED, fill) for fill in (to_empty, assign)),
]


@pytest.mark.parametrize(("config", "fill"), CASES)
def test_memory_after_construction(config: MoEConfig, fill: Callable[[nn.Module, dict[str, Tensor]], None]) -> None:
    layer = make_layer(config)
    layer.router.expert_bias.normal_().copy_(layer.router.expert_bias.bfloat16())
    meta = MoELayer(config, device="meta", dtype=torch.float64)
    fill(meta, copy.deepcopy(layer.state_dict()))
    assert_same(two_steps(meta), two_steps(layer))


def test_from_pretrained(tmp_path: Path) -> None:
    """The layer in somebody's own transformers model."""
    transformers = pytest.importorskip("transformers")

    class Model(transformers.PreTrainedModel):
        config_class = transformers.PretrainedConfig
        base_model_prefix = "model"

        def __init__(self, config: Any) -> None:
            super().__init__(config)
            self.moe = MoELayer(CONFIG)
            self.post_init()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.moe(x)

    model = Model(transformers.PretrainedConfig())
    model.moe.router.expert_bias.normal_()
    model.save_pretrained(tmp_path)
    assert_same(two_steps(Model.from_pretrained(tmp_path).train()), two_steps(model))


def test_weights_that_are_there_only_while_their_module_runs() -> None:
    """As accelerate's cpu_offload does it."""
    config = dataclasses.replace(CONFIG, shared_expert=SharedExpertConfig(intermediate_size=F, gate=True))
    layer = make_layer(config).eval()
    x = torch.randn(9, D, dtype=torch.float64)
    y = layer(x)
    for module in list(layer.modules()):
        weights = dict(module.named_parameters(recurse=False))
        if not weights:
            continue

        def bring(owner: nn.Module, _: Any, weights: dict[str, nn.Parameter] = weights) -> None:
            owner._parameters.update(weights)

        def take(owner: nn.Module, *_: Any) -> None:
            for name, value in owner.named_parameters(recurse=False):
                owner._parameters[name] = nn.Parameter(value.to("meta"))

        module._hf_hook = None  # type: ignore[assignment]
        take(module)
        module.register_forward_pre_hook(bring)
        module.register_forward_hook(take)
    with torch.no_grad():
        assert torch.equal(layer(x), y)
    assert all(parameter.is_meta for parameter in layer.parameters())
