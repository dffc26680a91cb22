"""MoEConfig from a transformers config, without importing transformers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from moe_layer.checkpoint.layouts import family_named
from moe_layer.config.model import ExpertsConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_layer.errors import CheckpointError, ConfigError

_MISSING = object()
_EXPERT_COUNT = ("num_experts", "num_local_experts", "n_routed_experts")


def moe_config_from_transformers(hf_config: Any) -> MoEConfig:
    """The layer configuration that computes what this model's MoE block computes.

    Auxiliary losses are off: transformers computes its own from the recorded router logits.

    Args:
        hf_config: a transformers config object, or the dict of its config.json. `model_type` decides the family.

    Raises:
        CheckpointError: unknown `model_type`, or a field is absent.
        ConfigError: a value this layer cannot honour (activation, router jitter, scoring function), named.
    """
    get = _reader(hf_config)
    model_type = get("model_type")
    family_named(model_type)
    builders: dict[str, Callable[[_Get], MoEConfig]] = {
        "mixtral": _mixtral,
        "qwen3_moe": _qwen3_moe,
        "olmoe": _olmoe,
        "qwen3_next": _qwen3_next,
        "deepseek_v3": _deepseek_v3,
        "kimi_k2": _deepseek_v3,
        "gpt_oss": _gpt_oss,
    }
    return builders[model_type](get)


_Get = Callable[..., Any]


def _reader(hf_config: Any) -> _Get:
    """A function (name, *alternatives, default=...) -> value that knows dicts and config objects."""

    def get(*names: str, default: Any = _MISSING) -> Any:
        for name in names:
            found = hf_config.get(name) if isinstance(hf_config, Mapping) else getattr(hf_config, name, None)
            if found is not None:
                return found
        if default is not _MISSING:
            return default
        raise CheckpointError(f"the transformers config has no {' or '.join(names)}; is it the config of a MoE model?")

    return get


def _activation(get: _Get) -> str:
    name = get("hidden_act", default="silu")
    known = {"silu": "swiglu", "swish": "swiglu", "gelu_pytorch_tanh": "geglu"}
    if name not in known:
        raise ConfigError(f"hidden_act {name!r} is not supported; supported are {', '.join(known)}")
    return known[name]


def _moe(get: _Get, router: dict[str, Any], *, width: int, shared: SharedExpertConfig | None = None) -> MoEConfig:
    router_config = RouterConfig(num_experts=get(*_EXPERT_COUNT), top_k=get("num_experts_per_tok"), **router)
    experts = ExpertsConfig(
        intermediate_size=width,
        activation=_activation(get),  # type: ignore[arg-type]
        init_std=get("initializer_range", default=0.02),
    )
    return MoEConfig(hidden_size=get("hidden_size"), router=router_config, experts=experts, shared_expert=shared)


def _softmax_pre(get: _Get, *, renormalize: bool) -> dict[str, Any]:
    top_k = get("num_experts_per_tok")
    if renormalize and top_k == 1:
        raise ConfigError(
            "num_experts_per_tok: 1 with renormalised weights makes every weight 1 and the router's gradient 0; "
            "set norm_topk_prob: false"
        )
    return {"score_function": "softmax", "softmax_order": "pre", "renormalize": renormalize, "gate_dtype": "input"}


def _mixtral(get: _Get) -> MoEConfig:
    jitter = get("router_jitter_noise", default=0.0)
    if jitter:
        raise ConfigError(
            f"router_jitter_noise {jitter}: transformers multiplies the experts' input by the noise too, this layer "
            "only the router's; set it to 0"
        )
    return _moe(get, _softmax_pre(get, renormalize=True), width=get("intermediate_size"))


def _qwen3_moe(get: _Get) -> MoEConfig:
    renormalize = get("norm_topk_prob", default=False)
    return _moe(get, _softmax_pre(get, renormalize=renormalize), width=get("moe_intermediate_size"))


def _olmoe(get: _Get) -> MoEConfig:
    renormalize = get("norm_topk_prob", default=False)
    return _moe(get, _softmax_pre(get, renormalize=renormalize), width=get("intermediate_size"))


def _qwen3_next(get: _Get) -> MoEConfig:
    shared = SharedExpertConfig(intermediate_size=get("shared_expert_intermediate_size"), gate=True)
    router = _softmax_pre(get, renormalize=get("norm_topk_prob", default=True))
    return _moe(get, router, width=get("moe_intermediate_size"), shared=shared)


def _deepseek_v3(get: _Get) -> MoEConfig:
    scoring, method = get("scoring_func", default="sigmoid"), get("topk_method", default="noaux_tc")
    if scoring != "sigmoid" or method != "noaux_tc":
        raise ConfigError(
            f"scoring_func {scoring!r} with topk_method {method!r} is not supported; 'sigmoid' with 'noaux_tc' is"
        )
    groups = get("n_group", default=1)
    router = {
        "score_function": "sigmoid",
        "renormalize": get("norm_topk_prob", default=True),
        "scaling_factor": get("routed_scaling_factor", default=1.0),
        "num_groups": groups if groups > 1 else None,
        "group_topk": get("topk_group", default=1) if groups > 1 else None,
        "group_rule": "sum_top2",
        "expert_bias": True,
        "gate_dtype": "fp32",
    }
    width, count = get("moe_intermediate_size"), get("n_shared_experts", default=0)
    shared = SharedExpertConfig(intermediate_size=width * count) if count else None
    return _moe(get, router, width=width, shared=shared)


def _gpt_oss(get: _Get) -> MoEConfig:
    router = RouterConfig(
        num_experts=get(*_EXPERT_COUNT),
        top_k=get("num_experts_per_tok", "experts_per_token"),
        score_function="softmax",
        softmax_order="post",
        linear_bias=True,
        gate_dtype="input",
    )
    experts = ExpertsConfig(
        intermediate_size=get("intermediate_size"),
        activation="swiglu_clamped",
        clamp_limit=get("swiglu_limit", default=7.0),
        clamp_alpha=get("swiglu_alpha", default=1.702),
        bias=True,
        init_std=get("initializer_range", default=0.02),
    )
    return MoEConfig(hidden_size=get("hidden_size"), router=router, experts=experts)
