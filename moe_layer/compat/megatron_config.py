"""Our configuration from megatron-core's TransformerConfig, read by attribute: megatron is not imported.

Every MoE field that changes the computation is either translated or, away from its default, refused by name.
"""

from __future__ import annotations

from typing import Any

from moe_layer.config.model import (
    BalanceConfig,
    ExpertsConfig,
    LossesConfig,
    MoEConfig,
    RouterConfig,
    SharedExpertConfig,
)
from moe_layer.errors import ConfigError

_AUX = {"none": "none", "aux_loss": "batch", "seq_aux_loss": "sequence", "global_aux_loss": "global"}
_EXPERT_DEFAULTS: dict[str, Any] = {
    "gated_linear_unit": True,
    "moe_apply_probs_on_input": False,
    "moe_latent_size": None,
    "fp8": None,
    "fp4": None,
    "expert_tensor_parallel_size": 1,
    "delay_wgrad_compute": False,
    "activation_func_fp8_input_store": False,
}
_LAYER_DEFAULTS: dict[str, Any] = {
    "expert_model_parallel_size": 1,
    "tensor_model_parallel_size": 1,
    "context_parallel_size": 1,
    "sequence_parallel": False,
    "calculate_per_token_loss": False,
    "moe_enable_routing_replay": False,
    "moe_router_force_load_balancing": False,
    "moe_router_padding_for_quantization": False,
    "moe_input_jitter_eps": None,
    "moe_shared_expert_overlap": False,
}


def experts_config(config: Any) -> ExpertsConfig:
    """ExpertsConfig of a TransformerConfig.

    Raises:
        ConfigError: every field that the experts here cannot honour.
    """
    problems = _away_from(config, _EXPERT_DEFAULTS)
    activation, limit, alpha = _activation(config, problems)
    if problems:
        raise ConfigError(problems)
    return ExpertsConfig(
        intermediate_size=_get(config, "moe_ffn_hidden_size") or config.ffn_hidden_size,
        activation=activation,  # type: ignore[arg-type]
        clamp_limit=limit,
        clamp_alpha=alpha,
        bias=bool(_get(config, "add_bias_linear")),
        init_std=config.init_method_std,
    )


def moe_config(config: Any) -> MoEConfig:
    """MoEConfig of a TransformerConfig, for the whole-layer replacement on one rank.

    Raises:
        ConfigError: every field that cannot be honoured.
    """
    experts = experts_config(config)
    problems = _away_from(config, _LAYER_DEFAULTS)
    losses = _losses(config, problems)
    score, top_k = _get(config, "moe_router_score_function", "softmax"), config.moe_router_topk
    if score == "softmax" and top_k == 1 and not config.moe_router_pre_softmax:
        problems.append("moe_router_topk: 1 with softmax needs moe_router_pre_softmax, else every weight is 1")
    if _get(config, "moe_router_dtype") == "fp64":
        problems.append("moe_router_dtype: 'fp64' is not supported; use fp32")
    if problems:
        raise ConfigError(problems)
    groups = _get(config, "moe_router_num_groups")
    router = RouterConfig(
        num_experts=config.num_moe_experts,
        top_k=top_k,
        score_function=score,
        softmax_order="pre" if config.moe_router_pre_softmax else "post",
        renormalize=score != "softmax" or not config.moe_router_pre_softmax,
        scaling_factor=_get(config, "moe_router_topk_scaling_factor") or 1.0,
        num_groups=groups,
        group_topk=_get(config, "moe_router_group_topk") if groups else None,
        group_rule="sum_topk_per_group" if groups else "sum_top2",
        expert_bias=bool(_get(config, "moe_router_enable_expert_bias")),
        linear_bias=bool(_get(config, "add_bias_linear")),
        gate_dtype="fp32" if _get(config, "moe_router_dtype") == "fp32" else "input",
        **_capacity(config),
    )
    width = _get(config, "moe_shared_expert_intermediate_size")
    gate = bool(_get(config, "moe_shared_expert_gate"))
    return MoEConfig(
        hidden_size=config.hidden_size,
        router=router,
        experts=experts,
        shared_expert=SharedExpertConfig(intermediate_size=width, gate=gate) if width else None,
        losses=losses,
        balance=BalanceConfig(bias_update_rate=_get(config, "moe_router_bias_update_rate", 1e-3)),
    )


def recomputes_layer(config: Any) -> bool:
    """Whether Megatron would compute the whole MoE layer again in backward."""
    modules = _get(config, "recompute_modules") or ()
    return (_get(config, "recompute_granularity") == "selective" and "moe" in modules) or bool(
        _get(config, "moe_layer_recompute")
    )


def _capacity(config: Any) -> dict[str, Any]:
    """Megatron ignores the policy and the padding when there is no capacity."""
    factor = _get(config, "moe_expert_capacity_factor")
    if factor is None:
        return {}
    return {
        "capacity_factor": factor,
        "capacity_policy": _get(config, "moe_token_drop_policy", "probs"),
        "pad_to_capacity": bool(_get(config, "moe_pad_expert_input_to_capacity")),
    }


def _get(config: Any, name: str, default: Any = None) -> Any:
    return getattr(config, name, default)


def _away_from(config: Any, defaults: dict[str, Any]) -> list[str]:
    """One sentence for each field that has another value than the only one honoured here."""
    return [
        f"{name}: {found!r} is not supported by moe_layer's adapter; set {name} to {wanted!r}"
        for name, wanted in defaults.items()
        if (found := _get(config, name, wanted)) != wanted and not (wanted in (None, False, 1) and found is None)
    ]


def _activation(config: Any, problems: list[str]) -> tuple[str, float, float]:
    import torch.nn.functional as F

    function = _get(config, "activation_func")
    limit = _get(config, "activation_func_clamp_value")
    offset = _get(config, "glu_linear_offset", 0.0)
    name = getattr(function, "__name__", type(function).__name__)
    if function in (F.silu,) and limit is None and offset == 0.0:
        return "swiglu", 7.0, 1.702
    if name == "quick_gelu" and limit is not None and offset == 1.0:
        return "swiglu_clamped", float(limit), 1.702
    problems.append(
        f"activation_func {name} with clamp {limit} and linear offset {offset} is not supported; supported are silu "
        "without both, and quick_gelu with a clamp and offset 1.0 (gpt-oss)"
    )
    return "swiglu", 7.0, 1.702


def _losses(config: Any, problems: list[str]) -> LossesConfig:
    kind, coefficient = _get(config, "moe_router_load_balancing_type", "none"), _get(config, "moe_aux_loss_coeff", 0.0)
    if isinstance(kind, (list, tuple)):
        if len(kind) != 1:
            problems.append(f"moe_router_load_balancing_type: {kind!r}: one loss at a time is supported")
            return LossesConfig()
        (kind,), (coefficient,) = kind, coefficient
    if kind not in _AUX:
        problems.append(f"moe_router_load_balancing_type: {kind!r} is not supported; use one of {', '.join(_AUX)}")
        return LossesConfig()
    aux = _AUX[kind] if coefficient else "none"
    return LossesConfig(
        aux=aux,  # type: ignore[arg-type]
        aux_coeff=coefficient if aux != "none" else 0.0,
        z_coeff=_get(config, "moe_z_loss_coeff") or 0.0,
    )
