"""Helpful sentences for names and values that people bring from other frameworks, and for near misses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from difflib import get_close_matches

from moe_layer.config.types import field_types

REJECTED: tuple[tuple[str, str], ...] = (
    (
        r"sinkhorn",
        "Sinkhorn routing is not in this version; use router.score_function: sigmoid with router.expert_bias: true, "
        "or losses.aux",
    ),
    (
        r"quantile|^qb_",
        "quantile balancing is not in this version; use router.expert_bias: true with balance.bias_update_rate, "
        "or losses.aux",
    ),
    (r"latent", "latent MoE is not in this version; experts work at hidden_size, so remove this"),
    (r"nvfp4|mxfp|fp4", "NVFP4 and MXFP formats are not in this version; use input, fp8_1x128, bf16 or fp32"),
    (
        r"expert_tensor_parallel|expert_tp|(^|_)etp(_|$)",
        "expert tensor parallelism is not in this version; shard whole experts with parallel.ep",
    ),
)

SYNONYMS = {
    "num_local_experts": "num_experts",
    "n_routed_experts": "num_experts",
    "num_moe_experts": "num_experts",
    "num_experts_per_tok": "top_k",
    "moe_router_topk": "top_k",
    "topk": "top_k",
    "moe_top_k": "top_k",
    "norm_topk_prob": "renormalize",
    "scoring_func": "score_function",
    "moe_router_score_function": "score_function",
    "routed_scaling_factor": "scaling_factor",
    "moe_router_topk_scaling_factor": "scaling_factor",
    "n_group": "num_groups",
    "topk_group": "group_topk",
    "moe_router_num_groups": "num_groups",
    "moe_router_group_topk": "group_topk",
    "moe_router_dtype": "gate_dtype",
    "moe_router_enable_expert_bias": "expert_bias",
    "e_score_correction_bias": "expert_bias",
    "moe_router_pre_softmax": "softmax_order",
    "moe_router_load_balancing_type": "aux",
    "moe_aux_loss_coeff": "aux_coeff",
    "router_aux_loss_coef": "aux_coeff",
    "moe_z_loss_coeff": "z_coeff",
    "moe_router_bias_update_rate": "bias_update_rate",
    "moe_intermediate_size": "intermediate_size",
    "moe_ffn_hidden_size": "intermediate_size",
    "router_jitter_noise": "jitter_eps",
    "moe_input_jitter_eps": "jitter_eps",
    "moe_expert_capacity_factor": "capacity_factor",
    "shared_expert_intermediate_size": "shared_expert.intermediate_size",
    "n_shared_experts": "shared_expert.intermediate_size",
    "expert_model_parallel_size": "ep",
    "num_hidden_layers": "num_layers",
    "num_attention_heads": "num_heads",
    "num_key_value_heads": "num_kv_heads",
    "learning_rate": "lr",
    "seq_len": "sequence_length",
    "batch_size": "global_batch",
}


def rejection(text: str) -> str | None:
    """The sentence for a feature that this version rejects by name (or a misplaced `base`), when `text` names one."""
    lowered = text.lower()
    if text == "base":
        return "base: belongs at the top of a file or directly under moe:, not here"
    return next((sentence for pattern, sentence in REJECTED if re.search(pattern, lowered)), None)


def leaf_keys(config: type, prefix: str = "") -> list[str]:
    """Dotted names of every value below a config class."""
    keys: list[str] = []
    for name, kind in field_types(config).items():
        keys += leaf_keys(kind.config, f"{prefix}{name}.") if kind.config else [prefix + name]
    return keys


def suggest(word: str, choices: Iterable[str]) -> str | None:
    """The closest choice, or None."""
    by_lower = {choice.lower(): choice for choice in choices}
    for name, choice in by_lower.items():
        if len(word) > 3 and name.startswith(word.lower()):
            return choice
    found = get_close_matches(word.lower().replace("-", "_"), list(by_lower), n=1, cutoff=0.6)
    return by_lower[found[0]] if found else None


def suggest_key(word: str, *, config: type, path: str, root: type) -> str | None:
    """A key that `word` may stand for: a sibling by its bare name, else a key elsewhere by its dotted path."""
    siblings = list(field_types(config))
    wanted = SYNONYMS.get(word.lower(), word)
    if wanted in siblings:
        return wanted
    near = suggest(word, siblings)
    if near is not None and wanted == word:
        return near
    leaves = leaf_keys(root)
    if not any(key.rpartition(".")[2] == wanted for key in leaves):
        wanted = suggest(wanted, [key.rpartition(".")[2] for key in leaves]) or wanted
    everywhere = [key for key in leaves if key == wanted or key.endswith("." + wanted)]
    inside = [key for key in everywhere if key.startswith(path + ".")] if path else []
    return (inside or everywhere or [None])[0]
