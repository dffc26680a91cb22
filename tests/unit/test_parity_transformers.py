"""MoELayer computes what transformers' blocks compute: y and all gradients in fp32, through the checkpoint mappings."""

from __future__ import annotations

import pytest
import torch

from moe_layer.checkpoint import import_block, moe_config_from_transformers, transformers_mapping
from moe_layer.layer import MoELayer
from tests.unit.hf_blocks import FAMILIES, hf_block
from tests.unit.parity import assert_close, gradients

pytest.importorskip("transformers", reason="the blocks of transformers are the oracle")


@pytest.mark.parametrize("tokens", [(2, 17), (1, 1), (3, 64)])
@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_block_and_layer_agree(family: str, seed: int, tokens: tuple[int, int]) -> None:
    block = hf_block(family, seed=seed)
    config = moe_config_from_transformers(block.config)
    layer = MoELayer(config)
    mapping = transformers_mapping(config, family, stored=False)
    import_block(layer, mapping, block.module.state_dict())
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(*tokens, config.hidden_size, generator=generator)
    dy = torch.randn(x.shape, generator=generator)
    expected = gradients(block, x, dy, dict(block.module.named_parameters()))
    ours = gradients(layer, x, dy, dict(layer.named_parameters()))
    theirs = mapping_of_gradients(mapping, ours, block)
    assert_close(theirs | {"y": ours["y"], "dx": ours["dx"]}, expected)


def mapping_of_gradients(mapping, ours, block):
    """Our parameter gradients in the layout of theirs (gradients permute as parameters do)."""
    buffers = {name: torch.zeros(shape) for name, shape in mapping.ours.items() if name not in ours}
    parameters = {name: tensor for name, tensor in ours.items() if name not in ("y", "dx")}
    names = dict(block.module.named_parameters())
    return {name: tensor for name, tensor in mapping.from_ours(parameters | buffers).items() if name in names}


@pytest.mark.parametrize(("order", "renormalize"), [(True, False), (False, True)])
def test_qwen3_without_renormalisation_and_olmoe_with(order: bool, renormalize: bool) -> None:
    """The two settings of norm_topk_prob in both families that have it."""
    for family, flag in (("qwen3_moe", order), ("olmoe", renormalize)):
        block = hf_block(family, norm_topk_prob=flag)
        config = moe_config_from_transformers(block.config)
        assert config.router.renormalize is flag
        layer = MoELayer(config)
        import_block(layer, transformers_mapping(config, family, stored=False), block.module.state_dict())
        x = torch.randn(2, 9, config.hidden_size)
        dy = torch.randn_like(x)
        expected = gradients(block, x, dy, {})
        assert_close(gradients(layer, x, dy, {}), expected)


@pytest.mark.parametrize("changes", [dict(n_group=1, topk_group=1), dict(norm_topk_prob=False), dict(topk_group=1)])
def test_deepseek_variants(changes: dict) -> None:
    block = hf_block("deepseek_v3", **changes)
    config = moe_config_from_transformers(block.config)
    layer = MoELayer(config)
    import_block(layer, transformers_mapping(config, "deepseek_v3", stored=False), block.module.state_dict())
    x = torch.randn(2, 9, config.hidden_size)
    dy = torch.randn_like(x)
    assert_close(gradients(layer, x, dy, {}), gradients(block, x, dy, {}))


def test_the_clamps_of_gpt_oss_are_active_in_this_test() -> None:
    """Otherwise parity would not see them: both limits must bite for part of the rows."""
    block = hf_block("gpt_oss")
    x = torch.randn(64, 32)
    weight, bias = block.module.experts.gate_up_proj[0], block.module.experts.gate_up_proj_bias[0]
    h = x @ weight + bias
    limit = block.config.swiglu_limit
    assert 0.05 < (h[:, ::2] > limit).float().mean() < 0.95
    assert 0.05 < (h[:, 1::2].abs() > limit).float().mean() < 0.95
