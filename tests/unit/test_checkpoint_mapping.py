"""Mappings of transformers and Megatron blocks: exact layout, bitwise round trips, strict on both sides, EP shares."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch

from moe_layer.checkpoint import (
    BlockMapping,
    block_shapes,
    expert_range,
    family_named,
    megatron_mapping,
    moe_config_from_transformers,
    open_files,
    transformers_mapping,
)
from moe_layer.errors import CheckpointError, ConfigError
from tests.unit.hf_blocks import FAMILIES, HfBlock, hf_block, hf_model

pytest.importorskip("transformers", reason="the layouts are checked against transformers' own modules")


def ours_of(block: HfBlock) -> tuple[dict[str, torch.Tensor], BlockMapping]:
    config = moe_config_from_transformers(block.config)
    mapping = transformers_mapping(config, block.config.model_type, stored=False)
    return mapping.to_ours(block.module.state_dict()), mapping


def assert_equal(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> None:
    assert set(left) == set(right)
    for name, tensor in left.items():
        assert tensor.dtype == right[name].dtype, name
        assert tensor.shape == right[name].shape, name
        assert torch.equal(tensor, right[name]), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_round_trips_are_bitwise(family: str, dtype: torch.dtype) -> None:
    block = hf_block(family, dtype=dtype)
    ours, mapping = ours_of(block)
    assert {name: tuple(t.shape) for name, t in ours.items()} == block_shapes(
        moe_config_from_transformers(block.config)
    )
    assert_equal(mapping.from_ours(ours), block.module.state_dict())
    config = moe_config_from_transformers(block.config)
    for other in (
        transformers_mapping(config, family, stored=True),
        megatron_mapping(config, "sequential"),
        megatron_mapping(config, "grouped"),
    ):
        assert_equal(other.to_ours(other.from_ours(ours)), ours)


def test_gpt_oss_gate_and_up_columns_are_separated() -> None:
    block = hf_block("gpt_oss")
    ours, _ = ours_of(block)
    theirs = block.module.state_dict()["experts.gate_up_proj"]
    assert torch.equal(ours["experts.gate_up_proj"][3, 5], theirs[3, :, 10])
    assert torch.equal(ours["experts.gate_up_proj"][3, 24 + 5], theirs[3, :, 11])
    bias = block.module.state_dict()["experts.gate_up_proj_bias"]
    assert torch.equal(ours["experts.gate_up_proj_bias"], torch.cat([bias[:, ::2], bias[:, 1::2]], dim=1))
    assert torch.equal(ours["experts.down_proj"], block.module.state_dict()["experts.down_proj"].transpose(1, 2))


def test_mixtral_and_megatron_names_hold_the_right_rows() -> None:
    block = hf_block("mixtral")
    ours, _ = ours_of(block)
    config = moe_config_from_transformers(block.config)
    stored = transformers_mapping(config, "mixtral", stored=True).from_ours(ours)
    gate_up, down = ours["experts.gate_up_proj"], ours["experts.down_proj"]
    assert torch.equal(stored["experts.6.w1.weight"], gate_up[6, :24])
    assert torch.equal(stored["experts.6.w3.weight"], gate_up[6, 24:])
    assert torch.equal(stored["experts.6.w2.weight"], down[6])
    sequential = megatron_mapping(config, "sequential").from_ours(ours)
    assert torch.equal(sequential["experts.local_experts.6.linear_fc1.weight"], gate_up[6])
    grouped = megatron_mapping(config, "grouped").from_ours(ours)
    assert torch.equal(grouped["experts.linear_fc2.weight6"], down[6])


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_models_are_read_as_transformers_reads_them(family: str, tmp_path) -> None:
    model = hf_model(family)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    config = moe_config_from_transformers(json.loads((tmp_path / "config.json").read_text()))
    assert config == moe_config_from_transformers(model.config)
    memory, stored = (transformers_mapping(config, family, stored=flag) for flag in (False, True))
    source = open_files(tmp_path).select(family_named(family).stored_prefix.format(layer=1))
    expected = memory.to_ours(model.model.layers[1].mlp.state_dict())
    assert_equal(stored.to_ours(source), expected)
    for rank in range(4):
        share = expert_range(config.router.num_experts, rank, 4)
        part = stored.to_ours(source, experts=share)
        for name, tensor in expected.items():
            rows = tensor[share.start : share.stop] if name.startswith("experts.") else tensor
            assert torch.equal(part[name], rows), name


def damaged(tensors: dict[str, torch.Tensor], how: str) -> tuple[dict[str, torch.Tensor], str]:
    """A copy with one thing wrong, and the name that the error must mention."""
    name = sorted(tensors)[len(tensors) // 2]
    copy = dict(tensors)
    if how == "missing":
        del copy[name]
    elif how == "extra":
        copy["experts.99.surprise"] = torch.zeros(1)
        name = "experts.99.surprise"
    elif how == "transposed":
        name = next(n for n, t in copy.items() if t.ndim > 1 and t.shape[-1] != t.shape[-2])
        copy[name] = copy[name].transpose(-1, -2)
    elif how == "short":
        copy[name] = copy[name][:-1]
    return copy, name


@pytest.mark.parametrize("how", ["missing", "extra", "transposed", "short"])
@pytest.mark.parametrize("family", FAMILIES)
def test_both_sides_are_strict_and_name_the_tensor(family: str, how: str) -> None:
    block = hf_block(family)
    ours, memory = ours_of(block)
    config = moe_config_from_transformers(block.config)
    for mapping in (memory, transformers_mapping(config, family, stored=True), megatron_mapping(config, "grouped")):
        wrong, name = damaged(mapping.from_ours(ours), how)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            mapping.to_ours(wrong)
        wrong, name = damaged(ours, how)
        with pytest.raises(CheckpointError, match=name.replace(".", r"\.")):
            mapping.from_ours(wrong)


def test_message_counts_tensors_and_names_the_first() -> None:
    block = hf_block("mixtral")
    ours, _ = ours_of(block)
    mapping = transformers_mapping(moe_config_from_transformers(block.config), "mixtral", stored=True)
    theirs = {n: t for n, t in mapping.from_ours(ours).items() if not n.startswith("experts.7.")}
    with pytest.raises(CheckpointError) as caught:
        mapping.to_ours(theirs)
    text = str(caught.value)
    assert "expected 25 tensors, found 22; 3 missing: experts.7.w1.weight [24, 32]" in text


def test_mixed_dtypes_in_one_parameter_are_refused() -> None:
    block = hf_block("mixtral")
    ours, _ = ours_of(block)
    mapping = transformers_mapping(moe_config_from_transformers(block.config), "mixtral", stored=True)
    theirs = mapping.from_ours(ours)
    theirs["experts.5.w3.weight"] = theirs["experts.5.w3.weight"].bfloat16()
    with pytest.raises(CheckpointError, match=r"experts\.5\.w3\.weight is torch\.bfloat16"):
        mapping.to_ours(theirs)


@pytest.mark.parametrize(("rank", "size"), [(0, 3), (4, 4), (-1, 2), (0, 0)])
def test_expert_range_rejects_impossible_shares(rank: int, size: int) -> None:
    with pytest.raises(CheckpointError, match="must divide them"):
        expert_range(8, rank, size)


def test_a_part_without_a_name_in_the_family_is_refused() -> None:
    config = moe_config_from_transformers(hf_block("deepseek_v3").config)
    with pytest.raises(CheckpointError, match=r"mixtral has no name for shared_expert\.gate_proj"):
        transformers_mapping(config, "mixtral", stored=False)
    gated = moe_config_from_transformers(hf_block("qwen3_next").config)
    with pytest.raises(CheckpointError, match="deepseek_v3 has no name for shared_expert_gate"):
        transformers_mapping(gated, "deepseek_v3", stored=False)
    biased = moe_config_from_transformers(hf_block("gpt_oss").config)
    with pytest.raises(CheckpointError, match=r"no name for experts\.gate_up_proj_bias"):
        transformers_mapping(dataclasses.replace(biased), "qwen3_moe", stored=True)


@pytest.mark.parametrize(
    ("values", "error", "message"),
    [
        ({"model_type": "llama"}, CheckpointError, "model_type 'llama' is not known"),
        ({}, CheckpointError, "has no model_type"),
        ({"model_type": "mixtral", "hidden_size": 8}, CheckpointError, "has no intermediate_size"),
        ({"model_type": "mixtral", "router_jitter_noise": 0.1}, ConfigError, "router_jitter_noise 0.1"),
        ({"model_type": "deepseek_v3", "scoring_func": "softmax"}, ConfigError, "scoring_func 'softmax'"),
        ({"hidden_act": "relu"}, ConfigError, "hidden_act 'relu'"),
        ({"num_experts_per_tok": 1, "norm_topk_prob": True}, ConfigError, "norm_topk_prob: false"),
    ],
)
def test_configs_that_cannot_be_honoured(values: dict, error: type[Exception], message: str) -> None:
    base = dict(model_type="qwen3_moe", hidden_size=8, moe_intermediate_size=8, num_experts=4, num_experts_per_tok=2)
    complete = base | values if values and "model_type" not in values else dict(num_experts_per_tok=2) | values
    with pytest.raises(error, match=message):
        moe_config_from_transformers(complete)
