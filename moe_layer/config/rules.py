"""What makes a configuration impossible: one function per component, each problem one sentence with values and remedy.

A sentence begins with the key it is about (relative to its component), so that the loader can point at its line.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from moe_layer.config.types import canonical, default_of, field_types
from moe_layer.errors import ConfigError

if TYPE_CHECKING:
    from moe_layer.config import model, train

Problems = Iterator[str]


def check(config: Any, rule: Callable[[Any], Problems] | None = None) -> None:
    """Type and range of every field, then the component's cross-field rule; numbers take their field's own type.

    Raises:
        ConfigError: every problem of this component.
    """
    problems: list[str] = []
    for name, kind in field_types(type(config)).items():
        value = getattr(config, name)
        try:
            # frozen dataclasses have no other door; 2 becomes 2.0 so that equal configs have equal hashes
            object.__setattr__(config, name, canonical(kind, value))
        except TypeError as error:
            problems.append(f"{name}: expected {error}, got {value!r}")
    if not problems and rule is not None:
        problems = list(rule(config))
    if problems:
        raise ConfigError(problems)


def _changed(config: Any, *names: str) -> list[str]:
    """Those of the named fields that are not at their default."""
    return [name for name in names if getattr(config, name) != default_of(type(config), name)]


def _ineffective(config: Any, names: tuple[str, ...], needs: str, *, prefix: str = "") -> Problems:
    for name in _changed(config, *names):
        yield (
            f"{prefix}{name} ({_show(getattr(config, name))}) has no effect without {needs}; "
            f"set that, or leave {name} at {_show(default_of(type(config), name))}"
        )


def _show(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else "null" if value is None else str(value)


def router(c: model.RouterConfig) -> Problems:
    """top_k, score function, groups, bias, capacity."""
    if c.top_k > c.num_experts:
        yield f"top_k ({c.top_k}) must not exceed num_experts ({c.num_experts}); lower top_k or add experts"
    yield from _softmax(c)
    yield from _groups(c)
    if c.capacity_factor is None:
        yield from _ineffective(c, ("capacity_policy", "pad_to_capacity"), "capacity_factor")
    if c.gate_dtype != "fp32_out":
        yield from _ineffective(c, ("fused_gate",), "gate_dtype fp32_out")


def _softmax(c: model.RouterConfig) -> Problems:
    if c.score_function != "softmax":
        yield from _ineffective(c, ("softmax_order",), "score_function softmax")
        return
    if c.top_k == 1 and (c.softmax_order == "post" or c.renormalize):
        yield (
            f"top_k (1) with score_function softmax needs softmax_order pre and renormalize false, got softmax_order "
            f"{c.softmax_order} and renormalize {_show(c.renormalize)}: every weight would be 1 and the "
            f"router would get no gradient"
        )
    elif c.softmax_order == "post" and not c.renormalize:
        yield (
            "renormalize (false) contradicts softmax_order post, whose weights always sum to 1; set renormalize true "
            "or softmax_order pre"
        )
    if c.softmax_order == "post" and c.expert_bias:
        yield (
            "expert_bias (true) cannot be used with softmax_order post, which selects by logits; use softmax_order pre "
            "or score_function sigmoid"
        )


def _groups(c: model.RouterConfig) -> Problems:
    groups, chosen = c.num_groups, c.group_topk
    if groups is None and chosen is None:
        yield from _ineffective(c, ("group_rule",), "num_groups and group_topk")
        return
    if groups is None or chosen is None:
        yield (
            f"{'num_groups' if groups is not None else 'group_topk'} is set alone (num_groups {_show(groups)}, "
            f"group_topk {_show(chosen)}); set both or neither"
        )
        return
    if c.num_experts % groups:
        yield (
            f"num_groups ({groups}) must divide num_experts ({c.num_experts}); "
            f"try {_listed(_divisors(c.num_experts, groups))}"
        )
        return
    size = c.num_experts // groups
    if chosen > groups:
        yield f"group_topk ({chosen}) must not exceed num_groups ({groups}); lower group_topk"
    elif c.top_k > chosen * size:
        yield (
            f"top_k ({c.top_k}) does not fit into group_topk ({chosen}) groups of {size} experts; raise group_topk to "
            f"{-(-c.top_k // size)}"
        )
    if c.group_rule == "sum_topk_per_group" and c.top_k % chosen:
        yield (
            f"top_k ({c.top_k}) must be divisible by group_topk ({chosen}) under group_rule sum_topk_per_group; "
            f"use group_rule sum_top2 or another group_topk"
        )
    if c.group_rule == "sum_top2" and size < 2:
        yield f"num_groups ({groups}) leaves 1 expert a group, group_rule sum_top2 needs 2; lower num_groups"


def _divisors(number: int, below: int) -> list[int]:
    # bounded: an absurd num_experts must not make the message slow
    return [n for n in range(1, min(below, 4096)) if number % n == 0][-8:]


def _listed(numbers: list[int]) -> str:
    if len(numbers) < 2:
        return str(numbers[0]) if numbers else "1"
    return f"{', '.join(map(str, numbers[:-1]))} or {numbers[-1]}"


def experts(c: model.ExpertsConfig) -> Problems:
    """Clamp settings belong to one activation; quantised experts have one implementation and no backward."""
    if c.activation != "swiglu_clamped":
        yield from _ineffective(c, ("clamp_limit", "clamp_alpha"), "activation swiglu_clamped")
    if c.recompute == "fp8_h" and c.intermediate_size % 2:
        yield (
            f"recompute (fp8_h) needs an even intermediate_size, got {c.intermediate_size}; "
            "round it up or use recompute h"
        )
    if c.backend != "transformer_engine":
        yield from _ineffective(c, ("fp8_recipe",), "backend transformer_engine")
    elif c.recompute != "none":
        yield (
            f"recompute ({c.recompute}) cannot be had with backend transformer_engine, which keeps what its GEMMs need "
            "itself; use recompute none or backend auto"
        )
    if c.weight_format != "input" and c.backend not in ("auto", "reference"):
        yield f"backend ({c.backend}) cannot run weight_format {c.weight_format}; use backend auto"
    if c.weight_format != "input":
        yield from _ineffective(c, ("recompute",), "weight_format input, since quantised experts have no backward")


def losses(c: model.LossesConfig) -> Problems:
    """Settings of a loss that is off."""
    if c.aux == "none":
        yield from _ineffective(c, ("aux_coeff", "counts", "aux_group"), "aux batch, sequence or global")


_LIBRARIES = ("nccl_ep", "deep_ep")
_BUFFERED = ("nvlink", *_LIBRARIES)


def _library(c: model.DispatchConfig) -> Problems:
    """Another library's kernels move bf16 rows and add them up at home."""
    for key, value, allowed in (
        ("apply_probs", c.apply_probs, ("activation", "combine")),
        ("dispatch_format", c.dispatch_format, ("input",)),
        ("combine_format", c.combine_format, ("input", "bf16")),
        ("capacity", c.capacity, ("dropless",)),
    ):
        if value not in allowed:
            yield (
                f"{key} ({value}) cannot be had with backend {c.backend}, which moves bf16 rows and adds them up at "
                f"home; set it to {_show(allowed[0])} or use backend all_to_all"
            )


def dispatch(c: model.DispatchConfig) -> Problems:
    """Layout, static capacity, replicated."""
    if c.rows == "compact" and c.alignment != 1:
        yield f"alignment ({c.alignment}) must be 1 with rows compact; use rows expert_major for padded experts"
    if c.capacity == "dropless":
        yield from _ineffective(c, ("static_factor", "overflow"), "capacity static")
        if c.backend not in _BUFFERED:
            yield from _ineffective(c, ("max_tokens_per_rank",), "capacity static or backend nvlink")
    if c.backend != "nvlink":
        yield from _ineffective(c, ("ring_depth", "push", "sm_budget"), "backend nvlink")
    if c.backend in _BUFFERED and c.max_tokens_per_rank is None:
        yield (
            f"max_tokens_per_rank is required by backend {c.backend}, whose buffers it sizes; set it to the most "
            "tokens that a rank sends"
        )
    if c.backend in _LIBRARIES:
        yield from _library(c)
    if c.backend != "replicated":
        yield from _ineffective(c, ("reduce",), "backend replicated")
    if c.backend not in ("auto", "all_to_all"):
        yield from _ineffective(c, ("p2p_world_size",), "backend all_to_all")


def moe(c: model.MoEConfig) -> Problems:
    """Rules between components of the layer."""
    if not c.router.expert_bias:
        yield from _ineffective(
            c.balance, ("bias_update_rate", "zero_mean"), "router.expert_bias true", prefix="balance."
        )
    yield from _replay(c)
    yield from _padded(c)
    yield from _packed(c)


def _packed(c: model.MoEConfig) -> Problems:
    """One grouped GEMM has one width, one activation, one set of biases and one weight format."""
    shared, e = c.shared_expert, c.experts
    if shared is None or shared.mode != "packed":
        return
    if shared.intermediate_size != e.intermediate_size:
        yield (
            f"shared_expert.mode (packed) needs shared_expert.intermediate_size ({shared.intermediate_size}) equal to "
            f"experts.intermediate_size ({e.intermediate_size}); make them equal or use mode overlap"
        )
    if e.backend == "transformer_engine":
        yield (
            "shared_expert.mode (packed) cannot be had with experts.backend transformer_engine, whose GEMMs take the "
            "routed experts alone; use mode overlap"
        )
    for key, value, wanted in (
        ("activation", e.activation, "swiglu"),
        ("bias", e.bias, False),
        ("weight_format", e.weight_format, "input"),
    ):
        if value != wanted:
            yield (
                f"shared_expert.mode (packed) needs experts.{key} {_show(wanted)}, got {_show(value)}, since the "
                f"shared expert is a plain SwiGLU MLP; use mode overlap"
            )


def _padded(c: model.MoEConfig) -> Problems:
    """Drop-and-pad fixes every expert's rows itself."""
    if not c.router.pad_to_capacity:
        return
    d = c.dispatch
    for key, value, wanted in (
        ("rows", d.rows, ("auto", "expert_major")),
        ("alignment", d.alignment, (1,)),
        ("capacity", d.capacity, ("dropless",)),
        ("chunks", d.chunks, (1,)),
    ):
        if value not in wanted:
            yield (
                f"dispatch.{key} ({value}) contradicts router.pad_to_capacity, which gives every expert capacity rows; "
                f"set it to {wanted[-1]}"
            )


def _replay(c: model.MoEConfig) -> Problems:
    if c.router.capacity_factor is None:
        yield from _ineffective(c.replay, ("allow_capacity",), "router.capacity_factor", prefix="replay.")
    elif not c.replay.allow_capacity:
        for name in _changed(c.replay, *(n for n in field_types(type(c.replay)) if n != "allow_capacity")):
            yield (
                f"replay.{name} ({getattr(c.replay, name)}) cannot be combined with router.capacity_factor "
                f"({c.router.capacity_factor}): capacity would drop replayed slots; set router.capacity_factor null, "
                f"or replay.allow_capacity true"
            )
    if c.losses.aux == "none":
        yield from _ineffective(c.replay, ("aux_map",), "losses.aux batch, sequence or global", prefix="replay.")
    renormalize = c.replay.renormalize
    if renormalize == ("always" if c.router.renormalize else "never"):
        yield f"replay.renormalize ({renormalize}) is what the router does anyway; leave it at router"
    elif renormalize == "never" and c.router.score_function == "softmax" and c.router.softmax_order == "post":
        yield (
            "replay.renormalize (never) contradicts router.softmax_order post, whose weights always sum to 1; use "
            "router.softmax_order pre"
        )
    elif renormalize == "always" and c.router.top_k == 1:
        yield "replay.renormalize (always) with router.top_k 1 would make every weight 1; leave it at router"


def model_(c: train.ModelConfig) -> Problems:
    """Heads and dense layers."""
    if c.num_kv_heads is not None and c.num_heads % c.num_kv_heads:
        yield (
            f"num_kv_heads ({c.num_kv_heads}) must divide num_heads ({c.num_heads}); "
            f"try {_listed(_divisors(c.num_heads, c.num_heads + 1))}"
        )
    if c.dense_layers >= c.num_layers:
        yield (
            f"dense_layers ({c.dense_layers}) must be smaller than num_layers ({c.num_layers}), or no MoE layer is "
            f"left; lower dense_layers"
        )
    if c.dense_layers and c.dense_intermediate_size is None:
        yield f"dense_intermediate_size (null) is needed by dense_layers ({c.dense_layers}); set those MLPs' width"
    if not c.dense_layers:
        yield from _ineffective(c, ("dense_intermediate_size",), "dense_layers")
    if c.embedding_std is not None and c.tie_embeddings:
        yield (
            f"embedding_std ({c.embedding_std:g}) would scale the logits too, since tie_embeddings is true; "
            "set tie_embeddings to false"
        )


def data(c: train.DataConfig) -> Problems:
    """There must be text for one sequence of each part."""
    if c.max_bytes <= 2 * c.sequence_length:
        yield (
            f"max_bytes ({c.max_bytes}) must exceed twice the sequence_length ({c.sequence_length}): training and "
            f"validation need a sequence each; raise max_bytes"
        )


def optimizer(c: train.OptimizerConfig) -> Problems:
    """The cosine goes down."""
    if c.min_lr > c.lr:
        yield f"min_lr ({c.min_lr}) must not exceed lr ({c.lr}); lower min_lr"


def loop(c: train.LoopConfig) -> Problems:
    """Accumulation and device."""
    if c.global_batch % c.micro_batch:
        yield (
            f"global_batch ({c.global_batch}) must be divisible by micro_batch ({c.micro_batch}); "
            f"try micro_batch {_listed(_divisors(c.global_batch, c.micro_batch))}"
        )


def train_(c: train.TrainConfig) -> Problems:
    """Rules between the model, the layer and the parallel layout (all of them independent of the world size)."""
    if not re.fullmatch(r"[\w-][\w.-]*", c.name):
        yield (
            f"name ({c.name!r}) must consist of letters, digits, '_', '-' and '.', since it names the run's directory; "
            f"choose another"
        )
    yield from _shape(c)
    yield from _parallel(c)
    if c.optimizer.warmup_steps > c.train.steps:
        yield (
            f"optimizer.warmup_steps ({c.optimizer.warmup_steps}) must not exceed train.steps ({c.train.steps}); "
            f"lower warmup_steps"
        )
    if c.moe.experts.weight_format != "input":
        yield f"moe.experts.weight_format ({c.moe.experts.weight_format}) has no backward; train with input"
    if c.train.device == "cpu" and c.optimizer.name == "apex_fused_adam":
        yield "optimizer.name (apex_fused_adam) needs a GPU but train.device is cpu; use adamw or auto"
    if c.train.device == "cpu" and c.moe.kernels == "cuda":
        yield "moe.kernels (cuda) needs a GPU but train.device is cpu; use auto or reference"


def _shape(c: train.TrainConfig) -> Problems:
    width, heads = c.moe.hidden_size, c.model.num_heads
    if width % (2 * heads):
        fits = [n for n in _divisors(width, min(width, 256) + 1) if width % (2 * n) == 0]
        yield (
            f"moe.hidden_size ({width}) must be divisible by 2 * model.num_heads ({heads}), since rotary embeddings "
            f"pair the dimensions of a head; try num_heads {_listed(fits)}"
        )


def _parallel(c: train.TrainConfig) -> Problems:
    ep, experts_ = c.parallel.ep, c.moe.router.num_experts
    if experts_ % ep:
        yield (
            f"moe.router.num_experts ({experts_}) must be divisible by parallel.ep ({ep}); "
            f"try {_listed(_divisors(experts_, ep))}"
        )
    if ep > 1 and c.moe.dispatch.backend == "local":
        yield f"moe.dispatch.backend (local) works on one rank but parallel.ep is {ep}; use auto or all_to_all"
    replicated = c.moe.dispatch.backend == "replicated"
    if replicated and not c.moe.dispatch.reduce:
        yield "moe.dispatch.reduce (false) leaves each rank a partial sum, which the trainer does not add up; use true"
    ranks = (1 if replicated else ep) * (c.parallel.dp or 1)  # with tokens of their own
    if c.train.global_batch % (c.train.micro_batch * ranks):
        yield (
            f"train.global_batch ({c.train.global_batch}) must be divisible by train.micro_batch "
            f"({c.train.micro_batch}) times the {ranks} ranks of parallel.ep ({ep}) and "
            f"parallel.dp ({_show(c.parallel.dp)}); raise global_batch to {c.train.micro_batch * ranks} "
            f"or lower micro_batch"
        )
