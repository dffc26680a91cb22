"""Impossible combinations: each rule with its exact sentence, and the nearest allowed neighbour that must pass."""

# ruff: noqa: E501 (sentences stay whole, so that they can be searched for)
from __future__ import annotations

from pathlib import Path

import pytest

from moe_layer.config import (
    DispatchConfig,
    ExpertsConfig,
    LossesConfig,
    ModelConfig,
    MoEConfig,
    RouterConfig,
    TrainConfig,
    load_config,
)
from moe_layer.errors import ConfigError
from tests.unit.config_cases import LAYER, RUN, problems, write

# (overrides of the small layer, problems without "FILE:LINE:COLUMN: component: ")
LAYER_RULES: list[tuple[list[str], list[str]]] = [
    (
        ["experts.recompute=fp8_h", "experts.intermediate_size=31"],
        ["recompute (fp8_h) needs an even intermediate_size, got 31; round it up or use recompute h"],
    ),
    (["experts.recompute=fp8_h", "experts.intermediate_size=30"], []),
    (["router.top_k=9"], ["top_k (9) must not exceed num_experts (8); lower top_k or add experts"]),
    (["router.top_k=8"], []),
    (
        ["router.top_k=1"],
        [
            "top_k (1) with score_function softmax needs softmax_order pre and renormalize false, got softmax_order post and "
            "renormalize true: every weight would be 1 and the router would get no gradient"
        ],
    ),
    (
        ["router.top_k=1", "router.softmax_order=pre"],
        [
            "top_k (1) with score_function softmax needs softmax_order pre and renormalize false, got softmax_order pre and "
            "renormalize true: every weight would be 1 and the router would get no gradient"
        ],
    ),
    (["router.top_k=1", "router.softmax_order=pre", "router.renormalize=false"], []),
    (["router.top_k=1", "router.score_function=sigmoid"], []),
    (
        ["router.renormalize=false"],
        [
            "renormalize (false) contradicts softmax_order post, whose weights always sum to 1; set renormalize true or "
            "softmax_order pre"
        ],
    ),
    (["router.renormalize=false", "router.softmax_order=pre"], []),
    (
        ["router.score_function=sigmoid", "router.softmax_order=pre"],
        ["softmax_order (pre) has no effect without score_function softmax; set that, or leave softmax_order at post"],
    ),
    (
        ["router.expert_bias=true"],
        [
            "expert_bias (true) cannot be used with softmax_order post, which selects by logits; use softmax_order pre or "
            "score_function sigmoid"
        ],
    ),
    (["router.expert_bias=true", "router.softmax_order=pre"], []),
    (["router.expert_bias=true", "router.score_function=sqrtsoftplus"], []),
    (
        ["router.num_groups=4"],
        ["num_groups is set alone (num_groups 4, group_topk null); set both or neither"],
    ),
    (
        ["router.group_topk=4"],
        ["group_topk is set alone (num_groups null, group_topk 4); set both or neither"],
    ),
    (["router.num_groups=3", "router.group_topk=2"], ["num_groups (3) must divide num_experts (8); try 1 or 2"]),
    (
        ["router.num_groups=4", "router.group_topk=5"],
        ["group_topk (5) must not exceed num_groups (4); lower group_topk"],
    ),
    (
        ["router.num_groups=4", "router.group_topk=1", "router.top_k=3"],
        ["top_k (3) does not fit into group_topk (1) groups of 2 experts; raise group_topk to 2"],
    ),
    (["router.num_groups=4", "router.group_topk=2", "router.top_k=4"], []),
    (
        ["router.num_groups=4", "router.group_topk=2", "router.top_k=3", "router.group_rule=sum_topk_per_group"],
        [
            "top_k (3) must be divisible by group_topk (2) under group_rule sum_topk_per_group; use group_rule sum_top2 or "
            "another group_topk"
        ],
    ),
    (["router.num_groups=4", "router.group_topk=2", "router.top_k=2", "router.group_rule=sum_topk_per_group"], []),
    (
        ["router.num_groups=8", "router.group_topk=2"],
        ["num_groups (8) leaves 1 expert a group, group_rule sum_top2 needs 2; lower num_groups"],
    ),
    (
        ["router.group_rule=sum_topk_per_group"],
        [
            "group_rule (sum_topk_per_group) has no effect without num_groups and group_topk; set that, or leave group_rule "
            "at sum_top2"
        ],
    ),
    (
        ["router.pad_to_capacity=true", "router.capacity_policy=position"],
        [
            "capacity_policy (position) has no effect without capacity_factor; set that, or leave capacity_policy at probs",
            "pad_to_capacity (true) has no effect without capacity_factor; set that, or leave pad_to_capacity at false",
        ],
    ),
    (["router.pad_to_capacity=true", "router.capacity_factor=1.25", "router.capacity_policy=position"], []),
    (
        ["router.pad_to_capacity=true", "router.capacity_factor=1.25", "dispatch.alignment=16"],
        [
            "dispatch.alignment (16) contradicts router.pad_to_capacity, which gives every expert capacity rows; "
            "set it to 1"
        ],
    ),
    (
        ["experts.clamp_limit=5", "experts.clamp_alpha=2"],
        [
            "clamp_limit (5.0) has no effect without activation swiglu_clamped; set that, or leave clamp_limit at 7.0",
            "clamp_alpha (2.0) has no effect without activation swiglu_clamped; set that, or leave clamp_alpha at 1.702",
        ],
    ),
    (["experts.clamp_limit=5", "experts.activation=swiglu_clamped"], []),
    (
        ["losses.aux_coeff=0.1", "losses.counts=effective", "losses.aux_group=local"],
        [
            f"{name} ({value}) has no effect without aux batch, sequence or global; set that, or leave {name} at {default}"
            for name, value, default in (
                ("aux_coeff", "0.1", "0.0"),
                ("counts", "effective", "live"),
                ("aux_group", "local", "data"),
            )
        ],
    ),
    (["losses.aux=batch", "losses.aux_coeff=0.1", "losses.counts=effective", "losses.aux_group=local"], []),
    (
        ["balance.bias_update_rate=0.01", "balance.zero_mean=true"],
        [
            "balance.bias_update_rate (0.01) has no effect without router.expert_bias true; set that, or leave "
            "bias_update_rate at 0.001",
            "balance.zero_mean (true) has no effect without router.expert_bias true; set that, or leave zero_mean at false",
        ],
    ),
    (["balance.zero_mean=true", "router.expert_bias=true", "router.score_function=sigmoid"], []),
    (
        ["dispatch.rows=compact", "dispatch.alignment=8"],
        ["alignment (8) must be 1 with rows compact; use rows expert_major for padded experts"],
    ),
    (["dispatch.rows=compact"], []),
    (["dispatch.alignment=8"], []),
    (
        ["dispatch.static_factor=1.5", "dispatch.overflow=drop", "dispatch.max_tokens_per_rank=64"],
        [
            "static_factor (1.5) has no effect without capacity static; set that, or leave static_factor at 1.0",
            "overflow (drop) has no effect without capacity static; set that, or leave overflow at error",
            "max_tokens_per_rank (64) has no effect without capacity static or backend nvlink; set that, or leave "
            "max_tokens_per_rank at null",
        ],
    ),
    (["dispatch.static_factor=1.5", "dispatch.overflow=drop", "dispatch.capacity=static"], []),
    (
        ["router.fused_gate=true", "router.gate_dtype=fp32"],
        ["fused_gate (true) has no effect without gate_dtype fp32_out; set that, or leave fused_gate at false"],
    ),
    (
        ["dispatch.reduce=false"],
        ["reduce (false) has no effect without backend replicated; set that, or leave reduce at true"],
    ),
    (["dispatch.reduce=false", "dispatch.backend=replicated"], []),
    (
        ["dispatch.ring_depth=3", "dispatch.sm_budget=8"],
        [
            "ring_depth (3) has no effect without backend nvlink; set that, or leave ring_depth at 2",
            "sm_budget (8) has no effect without backend nvlink; set that, or leave sm_budget at null",
        ],
    ),
    (
        ["dispatch.backend=nvlink"],
        [
            "max_tokens_per_rank is required by backend nvlink, whose buffers it sizes; set it to the most tokens that "
            "a rank sends"
        ],
    ),
    (["dispatch.backend=nvlink", "dispatch.max_tokens_per_rank=64", "dispatch.ring_depth=3"], []),
    (
        ["router.capacity_factor=1.5", "replay.weights=recorded", "replay.on_missing=raise"],
        [
            f"replay.{name} ({value}) cannot be combined with router.capacity_factor (1.5): capacity would drop replayed "
            f"slots; set router.capacity_factor null, or replay.allow_capacity true"
            for name, value in (("weights", "recorded"), ("on_missing", "raise"))
        ],
    ),
    (["replay.weights=recorded", "replay.on_duplicate=raise"], []),
    (["router.capacity_factor=1.5", "replay.weights=recorded", "replay.allow_capacity=true"], []),
    (
        ["replay.allow_capacity=true", "replay.aux_map=off", "replay.renormalize=always"],
        [
            "replay.allow_capacity (true) has no effect without router.capacity_factor; set that, or leave allow_capacity at "
            "false",
            "replay.aux_map (off) has no effect without losses.aux batch, sequence or global; set that, or leave aux_map at "
            "losses",
            "replay.renormalize (always) is what the router does anyway; leave it at router",
        ],
    ),
    (
        ["replay.renormalize=never"],
        [
            "replay.renormalize (never) contradicts router.softmax_order post, whose weights always sum to 1; use "
            "router.softmax_order pre"
        ],
    ),
    (
        ["router.top_k=1", "router.softmax_order=pre", "router.renormalize=false", "replay.renormalize=always"],
        ["replay.renormalize (always) with router.top_k 1 would make every weight 1; leave it at router"],
    ),
    (
        ["experts.weight_format=int8", "experts.backend=grouped_mm", "experts.recompute=h"],
        [
            "backend (grouped_mm) cannot run weight_format int8; use backend auto",
            "recompute (h) has no effect without weight_format input, since quantised experts have no backward; set that, or "
            "leave recompute at none",
        ],
    ),
]

RUN_RULES: list[tuple[list[str], list[str]]] = [
    (["model.num_kv_heads=3"], ["num_kv_heads (3) must divide num_heads (4); try 1, 2 or 4"]),
    (["model.num_kv_heads=2"], []),
    (
        ["model.dense_layers=2", "model.dense_intermediate_size=64"],
        ["dense_layers (2) must be smaller than num_layers (2), or no MoE layer is left; lower dense_layers"],
    ),
    (
        ["model.dense_layers=1"],
        ["dense_intermediate_size (null) is needed by dense_layers (1); set those MLPs' width"],
    ),
    (
        ["model.dense_intermediate_size=64"],
        [
            "dense_intermediate_size (64) has no effect without dense_layers; set that, or leave dense_intermediate_size at "
            "null"
        ],
    ),
    (["model.dense_layers=1", "model.dense_intermediate_size=64"], []),
    (
        ["data.max_bytes=512"],
        [
            "max_bytes (512) must exceed twice the sequence_length (256): training and validation need a sequence each; "
            "raise max_bytes"
        ],
    ),
    (
        ["name=../x"],
        [
            "name ('../x') must consist of letters, digits, '_', '-' and '.', since it names the run's directory; choose another"
        ],
    ),
    (["name=my-run_2.b"], []),
    (
        ["moe.experts.weight_format=int8"],
        ["moe.experts.weight_format (int8) has no backward; train with input"],
    ),
    (
        ["moe.dispatch.backend=replicated", "moe.dispatch.reduce=false"],
        ["moe.dispatch.reduce (false) leaves each rank a partial sum, which the trainer does not add up; use true"],
    ),
    (["moe.dispatch.backend=replicated", "parallel.ep=2", "train.global_batch=8", "train.micro_batch=8"], []),
    (
        ["moe.dispatch.backend=all_gather", "parallel.ep=2", "train.global_batch=8", "train.micro_batch=8"],
        [
            "train.global_batch (8) must be divisible by train.micro_batch (8) times the 2 ranks of parallel.ep (2) and "
            "parallel.dp (null); raise global_batch to 16 or lower micro_batch"
        ],
    ),
    (
        ["model.embedding_std=1"],
        ["embedding_std (1) would scale the logits too, since tie_embeddings is true; set tie_embeddings to false"],
    ),
    (["model.embedding_std=1", "model.tie_embeddings=false"], []),
    (["optimizer.min_lr=0.01"], ["min_lr (0.01) must not exceed lr (0.003); lower min_lr"]),
    (
        ["optimizer.warmup_steps=201"],
        ["optimizer.warmup_steps (201) must not exceed train.steps (200); lower warmup_steps"],
    ),
    (
        ["train.global_batch=12", "train.micro_batch=8"],
        ["global_batch (12) must be divisible by micro_batch (8); try micro_batch 1, 2, 3, 4 or 6"],
    ),
    (["train.global_batch=12", "train.micro_batch=6"], []),
    (
        ["train.device=cpu", "optimizer.name=apex_fused_adam"],
        ["optimizer.name (apex_fused_adam) needs a GPU but train.device is cpu; use adamw or auto"],
    ),
    (
        ["train.device=cpu", "moe.kernels=cuda"],
        ["moe.kernels (cuda) needs a GPU but train.device is cpu; use auto or reference"],
    ),
    (
        ["model.num_heads=5"],
        [
            "moe.hidden_size (32) must be divisible by 2 * model.num_heads (5), since rotary embeddings pair the dimensions "
            "of a head; try num_heads 1, 2, 4, 8 or 16"
        ],
    ),
    (
        ["moe.router.num_experts=60", "parallel.ep=8", "train.micro_batch=1"],
        ["moe.router.num_experts (60) must be divisible by parallel.ep (8); try 1, 2, 3, 4, 5 or 6"],
    ),
    (["moe.router.num_experts=60", "parallel.ep=6", "train.global_batch=6", "train.micro_batch=1"], []),
    (
        ["parallel.ep=2", "train.micro_batch=8", "moe.dispatch.backend=local"],
        ["moe.dispatch.backend (local) works on one rank but parallel.ep is 2; use auto or all_to_all"],
    ),
    (
        ["parallel.ep=2", "parallel.dp=2", "train.micro_batch=8"],
        [
            "train.global_batch (16) must be divisible by train.micro_batch (8) times the 4 ranks of parallel.ep (2) and "
            "parallel.dp (2); raise global_batch to 32 or lower micro_batch"
        ],
    ),
    (["parallel.ep=2", "parallel.dp=2", "train.micro_batch=4"], []),
]


def _check(text: str, overrides: list[str], expected: list[str], directory: Path) -> None:
    if not expected:
        load_config(write(directory, text), overrides)
        return
    found = problems(directory, text, *overrides)
    assert len(found) == len(expected), found
    for problem, sentence in zip(found, expected, strict=True):
        assert problem.endswith(sentence), f"\n{problem}\n{sentence}"
        assert problem.startswith(("x.yaml:", "override "))


@pytest.mark.parametrize(("overrides", "expected"), LAYER_RULES, ids=[" ".join(case[0]) for case in LAYER_RULES])
def test_layer_rules(tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    _check(LAYER, overrides, expected, tmp_path)


@pytest.mark.parametrize(("overrides", "expected"), RUN_RULES, ids=[" ".join(case[0]) for case in RUN_RULES])
def test_run_rules(tmp_path: Path, overrides: list[str], expected: list[str]) -> None:
    _check(RUN, overrides, expected, tmp_path)


def test_a_rule_points_at_the_line_of_its_key(tmp_path: Path) -> None:
    text = LAYER.replace("top_k: 2", "top_k: 9")
    assert problems(tmp_path, text) == [
        "x.yaml:4:10: router: top_k (9) must not exceed num_experts (8); lower top_k or add experts"
    ]
    text = RUN + "parallel:\n  ep: 3\ntrain:\n  micro_batch: 4\n  global_batch: 12\n"
    assert problems(tmp_path, text) == [
        "x.yaml:8:18: moe.router.num_experts (8) must be divisible by parallel.ep (3); try 1 or 2"
    ]


def test_the_same_rules_hold_in_python() -> None:
    with pytest.raises(ConfigError, match=r"^top_k \(3\) must not exceed num_experts \(2\)"):
        RouterConfig(num_experts=2, top_k=3)
    with pytest.raises(ConfigError, match=r"num_experts: expected an integer >= 1 and <= 1048576, got '8'"):
        RouterConfig(num_experts="8", top_k=True)  # type: ignore[arg-type]
    with pytest.raises(ConfigError) as caught:
        DispatchConfig(backend="infiniband", alignment=3, deadline_s=float("nan"))  # type: ignore[arg-type]
    assert caught.value.problems == (
        "backend: expected one of auto, local, replicated, all_gather, all_to_all, nvlink, nccl_ep, deep_ep, got 'infiniband'",
        "alignment: expected one of 1, 8, 16, 128, got 3",
        "deadline_s: expected a number > 0, got nan",
    )
    with pytest.raises(ConfigError, match="router: expected a mapping with the keys num_experts"):
        MoEConfig(hidden_size=8, router={}, experts=ExpertsConfig(intermediate_size=8))  # type: ignore[arg-type]


def test_equal_numbers_make_equal_configs() -> None:
    whole, fraction = LossesConfig(aux="batch", aux_coeff=1), LossesConfig(aux="batch", aux_coeff=1.0)
    assert whole == fraction and type(whole.aux_coeff) is float


def test_one_component_reports_all_its_problems() -> None:
    with pytest.raises(ConfigError) as caught:
        ModelConfig(num_layers=1, num_heads=4, num_kv_heads=3, dense_layers=1)
    assert len(caught.value.problems) == 3


def test_train_config_is_frozen(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, RUN), kind=TrainConfig)
    with pytest.raises(AttributeError):
        config.seed = 3  # type: ignore[misc]
