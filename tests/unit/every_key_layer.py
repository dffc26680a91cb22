"""Cases of the keys below `moe:`, observed on a small layer (24 tokens, D 32, E 8, K 2)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.config import MoEConfig
from moe_layer.errors import CapacityError, RoutingError
from moe_layer.layer import MoELayer
from moe_layer.types import RoutingDecision
from tests.unit.every_key import Case


def _layer(config: MoEConfig, dtype: torch.dtype = torch.float32) -> tuple[MoELayer, Tensor]:
    torch.manual_seed(1)
    layer = MoELayer(config, dtype=dtype)
    x = torch.randn(2, 12, config.hidden_size, dtype=dtype, requires_grad=True)
    return layer, x


def _plain(value: Any) -> Any:
    """Tensors as nested lists, so that == compares them."""
    if isinstance(value, Tensor):
        return str(value.dtype), value.detach().tolist()
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return value


def _numbers(layer: MoELayer, x: Tensor, **options: Any) -> Any:
    y, routing = layer(x, return_routing=True, **options)
    y.float().square().sum().backward()
    found = {
        "y": y,
        "dx": x.grad,
        "ids": routing.ids_TK,
        "weights": routing.weights_TK,
        "logits": routing.stats["logits"],
    }
    found |= {f"d {name}": parameter.grad for name, parameter in layer.named_parameters()}
    return _plain({**found, **routing.losses, **{f"{k} unscaled": v for k, v in routing.losses_unscaled.items()}})


def numbers(config: MoEConfig) -> Any:
    """Output, routing, losses and every gradient."""
    return _numbers(*_layer(config))


def numbers_bf16(config: MoEConfig) -> Any:
    return _numbers(*_layer(config, torch.bfloat16))


def numbers_fp64(config: MoEConfig) -> Any:
    return _numbers(*_layer(config, torch.float64))


def state(config: MoEConfig) -> Any:
    """Names and shapes of the state dict."""
    return {name: tuple(value.shape) for name, value in _layer(config)[0].state_dict().items()}


def received(config: MoEConfig) -> Any:
    """What the dispatcher delivers to the experts."""
    layer, x = _layer(config)
    x_TD = x.flatten(0, 1)
    got = layer.dispatcher.dispatch(x_TD, layer.router(x_TD))
    offsets = got.offsets_L1.tolist()
    return tuple(got.rows.shape), got.index_N is None, got.act_probs_N is None, offsets, tuple(got.probs_N.shape)


def dispatched(config: MoEConfig) -> Any:
    """Tokens of each dispatch of one pass."""
    layer, x = _layer(config)
    dispatch, tokens = layer.dispatcher.dispatch, []

    def count(x_TD: Tensor, *arguments: Any, **options: Any) -> Any:
        tokens.append(x_TD.shape[0])
        return dispatch(x_TD, *arguments, **options)

    layer.dispatcher.dispatch = count  # type: ignore[method-assign]
    layer(x)
    return tokens


def received_or_overflow(config: MoEConfig) -> Any:
    try:
        return received(config)
    except CapacityError:
        return "overflow"


def saved_bytes(config: MoEConfig) -> int:
    """Bytes that the forward pass keeps for the backward pass."""
    layer, x = _layer(config)
    seen: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        seen[tensor.data_ptr()] = tensor.nbytes
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        layer(x)
    return sum(seen.values())


def bias_after_a_step(config: MoEConfig) -> Any:
    layer, x = _layer(config)
    layer(x).sum().backward()
    layer.update_bias()
    return _plain(layer.router.expert_bias)


def with_nan(config: MoEConfig) -> str:
    layer, x = _layer(config)
    layer(x.detach().index_fill(1, torch.tensor([3]), float("nan")))
    layer.check()
    return "ran"


def replayed(config: MoEConfig) -> Any:
    layer, x = _layer(config)
    ids = torch.tensor([5, 2]).expand(2, 12, 2)
    return _numbers(layer, x, replay=RoutingDecision(ids, weights=torch.full((2, 12, 2), 0.25)))


def replayed_with_gaps(config: MoEConfig) -> Any:
    layer, x = _layer(config)
    return _numbers(layer, x, replay=torch.tensor([5, -1]).expand(2, 12, 2))


def replayed_with_duplicates(config: MoEConfig) -> Any:
    layer, x = _layer(config)
    return _numbers(layer, x, replay=torch.tensor([5, 5]).expand(2, 12, 2))


def forced_counts(config: MoEConfig) -> Any:
    """What a replayed pass adds to the counter of the bias update."""
    layer, x = _layer(config)
    layer(x, replay=torch.tensor([5, 2]).expand(2, 12, 2)).sum().backward()
    return _plain(layer.router.tokens_per_expert)


def replayed_or_refused(config: MoEConfig) -> str:
    try:
        replayed(config)
    except RoutingError as error:
        return str(error)
    return "ran"


def evaluated(config: MoEConfig) -> Any:
    layer, x = _layer(config)
    with torch.no_grad():
        return _plain(layer(x))


GROUPS = ("router.num_groups=4", "router.group_topk=2")
BIAS = ("router.score_function=sigmoid", "router.expert_bias=true")
PRE = ("router.softmax_order=pre", "router.renormalize=false")
SHARED = ("shared_expert.intermediate_size=16",)
AUX = ("losses.aux=batch", "losses.aux_coeff=0.1")
STATIC = ("dispatch.capacity=static",)
CLAMPED = ("experts.activation=swiglu_clamped", "experts.init_std=0.5")

LAYER_CASES = (
    Case("moe.hidden_size", "64", state),
    Case("moe.router.num_experts", "16", state),
    Case("moe.router.top_k", "3", numbers),
    Case("moe.router.score_function", "sigmoid", numbers),
    Case("moe.router.softmax_order", "pre", numbers, (*GROUPS, "experts.init_std=1.0")),
    Case("moe.router.renormalize", "false", numbers, ("router.softmax_order=pre",)),
    Case("moe.router.scaling_factor", "2.0", numbers),
    Case("moe.router.num_groups", "2", numbers, GROUPS),
    Case("moe.router.group_topk", "1", numbers, GROUPS),
    Case("moe.router.group_rule", "sum_topk_per_group", numbers, GROUPS),
    Case("moe.router.expert_bias", "true", state, ("router.score_function=sigmoid",)),
    Case("moe.router.linear_bias", "true", state),
    Case("moe.router.gate_dtype", "input", numbers_bf16),
    Case("moe.router.jitter_eps", "0.2", numbers),
    Case("moe.router.capacity_factor", "0.5", numbers),
    Case("moe.router.pad_to_capacity", "true", received, ("router.capacity_factor=1.5",)),
    Case("moe.router.capacity_policy", "position", numbers, ("router.capacity_factor=0.5",)),
    Case("moe.router.force_uniform", "true", numbers),
    Case("moe.router.nonfinite", "raise", with_nan, raises="rows have NaN or infinite router logits"),
    Case("moe.experts.intermediate_size", "32", state),
    Case("moe.experts.activation", "geglu", numbers),
    Case("moe.experts.activation", "swiglu_clamped", numbers),
    Case("moe.experts.clamp_limit", "0.1", numbers, CLAMPED),
    Case("moe.experts.clamp_alpha", "3.0", numbers, CLAMPED),
    Case("moe.experts.bias", "true", state),
    Case("moe.experts.backend", "grouped_mm", numbers_fp64, raises="experts.backend is grouped_mm, but"),
    Case("moe.experts.backend", "transformer_engine", numbers, raises="experts.backend is transformer_engine, but"),
    Case("moe.experts.recompute", "h", saved_bytes),
    Case("moe.experts.init_std", "0.1", numbers),
    Case("moe.experts.weight_format", "int8", evaluated),
    Case("moe.experts.weight_format", "fp8_1x128", evaluated),
    Case("moe.experts.weight_format", "fp8_1x128", numbers, raises="has no backward"),
    Case("moe.shared_expert.intermediate_size", "32", state, SHARED),
    Case("moe.shared_expert.gate", "true", state, SHARED),
    Case("moe.losses.aux", "batch", numbers),
    Case("moe.losses.aux", "sequence", numbers, AUX),
    Case("moe.losses.aux_coeff", "0.2", numbers, AUX),
    Case("moe.losses.z_coeff", "0.1", numbers),
    Case("moe.losses.counts", "effective", numbers, (*AUX, "router.num_groups=4", "router.group_topk=1")),
    Case("moe.balance.bias_update_rate", "0.1", bias_after_a_step, BIAS),
    Case("moe.balance.zero_mean", "true", bias_after_a_step, BIAS),
    Case("moe.dispatch.rows", "expert_major", received),
    Case("moe.dispatch.alignment", "8", received),
    Case("moe.dispatch.apply_probs", "combine", received),
    Case("moe.dispatch.dispatch_format", "fp8_1x128", numbers),
    Case("moe.dispatch.combine_format", "bf16", numbers),
    Case(
        "moe.dispatch.capacity",
        "static",
        received,
        ("dispatch.alignment=8",),
        raises="static dispatch buffer of 48 rows",
    ),
    Case("moe.dispatch.static_factor", "2.0", received, STATIC),
    Case("moe.dispatch.overflow", "drop", received_or_overflow, (*STATIC, "dispatch.static_factor=0.5")),
    Case("moe.dispatch.max_tokens_per_rank", "48", received, STATIC),
    Case("moe.dispatch.chunks", "5", dispatched),
    Case("moe.replay.weights", "recorded", replayed),
    Case("moe.replay.weights", "straight_through", replayed),
    Case("moe.replay.on_missing", "raise", replayed_with_gaps, raises="replay slots are -1"),
    Case("moe.replay.on_duplicate", "raise", replayed_with_duplicates, raises="replay slots repeat an expert"),
    Case("moe.replay.aux_map", "effective", replayed, AUX),
    Case("moe.replay.aux_map", "off", replayed, AUX),
    Case("moe.replay.aux_map", "live", replayed, (*AUX, "losses.counts=effective")),
    Case("moe.replay.bias_counts", "live", forced_counts),
    Case("moe.replay.bias_counts", "off", forced_counts),
    Case("moe.replay.renormalize", "always", replayed, PRE),
    Case("moe.replay.renormalize", "never", replayed, ("router.softmax_order=pre",)),
    Case("moe.replay.allow_capacity", "true", replayed_or_refused, ("router.capacity_factor=0.5",)),
)
