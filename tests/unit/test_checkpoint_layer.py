"""Saving and loading a MoELayer: bitwise, strict, and without touching the layer when the file does not fit."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch

from moe_layer.checkpoint import (
    assign,
    block_shapes,
    export_block,
    import_block,
    load_layer,
    megatron_mapping,
    save_layer,
    transformers_mapping,
)
from moe_layer.config.model import ExpertsConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_layer.errors import CheckpointError
from moe_layer.layer import MoELayer

CONFIGS = {
    "plain": MoEConfig(
        hidden_size=8, router=RouterConfig(num_experts=4, top_k=2), experts=ExpertsConfig(intermediate_size=6)
    ),
    "everything": MoEConfig(
        hidden_size=8,
        router=RouterConfig(num_experts=4, top_k=2, score_function="sigmoid", expert_bias=True, linear_bias=True),
        experts=ExpertsConfig(intermediate_size=6, bias=True),
        shared_expert=SharedExpertConfig(intermediate_size=5, gate=True),
    ),
}


def random_layer(config: MoEConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> MoELayer:
    layer = MoELayer(config, dtype=dtype)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer


def state(layer: MoELayer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in layer.state_dict().items()}


@pytest.mark.parametrize("name", CONFIGS)
def test_block_shapes_are_the_layers_state_dict(name: str) -> None:
    layer = MoELayer(CONFIGS[name], device="meta")
    assert {key: tuple(t.shape) for key, t in layer.state_dict().items()} == block_shapes(CONFIGS[name])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CONFIGS)
def test_save_and_load_are_bitwise(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    first = random_layer(CONFIGS[name], seed=1, dtype=dtype)
    second = random_layer(CONFIGS[name], seed=2, dtype=dtype)
    save_layer(first, tmp_path / "layer.safetensors")
    load_layer(second, tmp_path / "layer.safetensors")
    saved = state(first)
    for key, tensor in state(second).items():
        assert tensor.dtype == saved[key].dtype
        assert torch.equal(tensor, saved[key]), key
    if name == "everything":
        assert second.router.expert_bias.dtype == torch.float32


def test_export_and_import_through_other_programs() -> None:
    config = dataclasses.replace(CONFIGS["everything"], experts=ExpertsConfig(intermediate_size=6))
    for mapping in (
        megatron_mapping(config, "sequential"),
        megatron_mapping(config, "grouped"),
        transformers_mapping(config, "qwen3_next", stored=True),
    ):
        first, second = random_layer(config, seed=1), random_layer(config, seed=2)
        import_block(second, mapping, export_block(first, mapping))
        saved = state(first)
        assert all(torch.equal(tensor, saved[key]) for key, tensor in state(second).items())


def test_a_file_that_does_not_fit_leaves_the_layer_unchanged(tmp_path: Path) -> None:
    wider = dataclasses.replace(CONFIGS["plain"], experts=ExpertsConfig(intermediate_size=7))
    save_layer(random_layer(wider, seed=1), tmp_path / "wider.safetensors")
    layer = random_layer(CONFIGS["plain"], seed=2)
    before = state(layer)
    with pytest.raises(
        CheckpointError, match=r"2 misshapen: experts\.gate_up_proj is \[4, 14, 8\], must be \[4, 12, 8\]"
    ):
        load_layer(layer, tmp_path / "wider.safetensors")
    tensors = state(layer)
    tensors["router.wieght"] = tensors.pop("router.weight")
    with pytest.raises(CheckpointError, match=r"1 missing: router\.weight \[4, 8\]; 1 unexpected: router\.wieght"):
        assign(layer, tensors)
    assert all(torch.equal(tensor, before[key]) for key, tensor in state(layer).items())
