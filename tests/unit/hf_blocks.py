"""Tiny transformers MoE blocks with random weights, shared by the parity and compatibility tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

FAMILIES = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss", "qwen3_next")
_BASE = dict(
    hidden_size=32,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=2,
    head_dim=16,
    vocab_size=64,
    max_position_embeddings=64,
    bos_token_id=None,
    eos_token_id=None,
    pad_token_id=None,
)
_MLA = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4)
_GDN = dict(linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
_ROPE = dict(rope_type="default", rope_theta=10000.0)
_SETTINGS: dict[str, dict[str, Any]] = {
    "mixtral": dict(num_local_experts=8, num_experts_per_tok=2),
    "qwen3_moe": dict(num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, norm_topk_prob=True),
    "olmoe": dict(num_experts=8, num_experts_per_tok=3, norm_topk_prob=False),
    "deepseek_v3": dict(
        n_routed_experts=16, num_experts_per_tok=4, n_group=4, topk_group=2, moe_intermediate_size=24,
        n_shared_experts=2, routed_scaling_factor=2.5, first_k_dense_replace=0, num_mtp_layers=0, **_MLA,
    ),
    "gpt_oss": dict(
        num_local_experts=8, num_experts_per_tok=2, swiglu_limit=0.6, layer_types=["full_attention"] * 2,
        rope_parameters=_ROPE,
    ),
    "qwen3_next": dict(
        num_experts=8, num_experts_per_tok=3, moe_intermediate_size=24, shared_expert_intermediate_size=16, **_GDN
    ),
}  # fmt: skip


@dataclass(frozen=True)
class HfBlock:
    """A block of a transformers model, its config, and a call that returns only y."""

    config: Any
    module: nn.Module

    def __call__(self, x_BSD: Tensor) -> Tensor:
        y = self.module(x_BSD)
        return y[0] if isinstance(y, tuple) else y


def hf_config(family: str, **changes: Any) -> Any:
    """The family's tiny config."""
    import transformers

    classes = {
        "mixtral": "MixtralConfig",
        "qwen3_moe": "Qwen3MoeConfig",
        "olmoe": "OlmoeConfig",
        "deepseek_v3": "DeepseekV3Config",
        "gpt_oss": "GptOssConfig",
        "qwen3_next": "Qwen3NextConfig",
    }
    settings = _BASE | _SETTINGS[family] | changes
    if family in ("olmoe", "deepseek_v3"):
        settings.pop("head_dim")
    config = getattr(transformers, classes[family])(**settings)
    config._experts_implementation = "eager"
    return config


def hf_block(family: str, *, dtype: torch.dtype = torch.float32, seed: int = 0, **changes: Any) -> HfBlock:
    """One block with random weights, biases and correction bias."""
    config = hf_config(family, **changes)
    module = _block_class(family)(config)
    if family == "gpt_oss":
        module.experts.limit = config.swiglu_limit  # transformers 5.7 has 7.0 whatever the config says
    randomize(module, seed=seed)
    return HfBlock(config, module.to(dtype))


def hf_model(family: str, *, seed: int = 0, **changes: Any) -> nn.Module:
    """A two-layer causal language model with random weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(hf_config(family, **changes), experts_implementation="eager")
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            randomize(module, seed=seed)
    return model


def randomize(module: nn.Module, *, seed: int) -> None:
    """Normal weights and correction biases, large enough that routing is uneven.

    Router weights are smaller: for a token whose best expert takes 99.9% the router gradient is a difference of nearly
    equal numbers, and transformers' own fp32 result is then off by 1e-4 (measured against fp64).
    """
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in module.state_dict().items():
            std = 0.1 if name in ("gate.weight", "router.weight") else 0.3
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * std)


def _block_class(family: str) -> Callable[[Any], nn.Module]:
    import importlib

    names = {
        "mixtral": "MixtralSparseMoeBlock",
        "qwen3_moe": "Qwen3MoeSparseMoeBlock",
        "olmoe": "OlmoeSparseMoeBlock",
        "deepseek_v3": "DeepseekV3MoE",
        "gpt_oss": "GptOssMLP",
        "qwen3_next": "Qwen3NextSparseMoeBlock",
    }
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    return getattr(module, names[family])
