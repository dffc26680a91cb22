"""Argument checks of `route_topk`: everything that can be known without reading device memory."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
MAX_EXPERTS = 1 << 20
"""The packed selection key of the reference keeps 20 bits for the expert id."""

CHOICES = {
    "score_function": ("softmax", "sigmoid", "sqrtsoftplus"),
    "softmax_order": ("pre", "post"),
    "group_rule": ("sum_top2", "sum_topk_per_group"),
    "weights_mode": ("live", "recorded", "straight_through"),
    "aux_counts": ("none", "live", "effective"),
    "map_format": ("none", "bytemap", "bitmap"),
}


def check_arguments(
    logits: Tensor,
    expert_bias: Tensor | None,
    *,
    replay_ids: Tensor | None,
    replay_weights: Tensor | None,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    top_k: int,
    num_groups: int,
    group_topk: int,
    **names: str,
) -> None:
    """Raise TypeError or ValueError with the name, the value and the remedy; returns nothing."""
    for name, value in names.items():
        if value not in CHOICES[name]:
            raise ValueError(f"{name} must be one of {', '.join(CHOICES[name])}, got {value!r}")
    if logits.dtype not in FLOATS:
        raise TypeError(f"logits must be fp32, bf16, fp16 or fp64, got {logits.dtype}; cast them first")
    if logits.ndim < 1:
        raise ValueError("logits must be [..., E], got a 0-d tensor")
    num_experts = logits.shape[-1]
    if not 1 <= num_experts <= MAX_EXPERTS:
        raise ValueError(f"logits must have 1 to {MAX_EXPERTS} experts in the last dimension, got {num_experts}")
    if not 1 <= top_k <= num_experts:
        raise ValueError(f"top_k must lie in 1..{num_experts} (the number of experts), got {top_k}")
    check_groups(num_experts, top_k=top_k, num_groups=num_groups, group_topk=group_topk, rule=names["group_rule"])
    lead = tuple(logits.shape[:-1])
    if expert_bias is not None:
        _match("expert_bias", expert_bias, (num_experts,), (torch.float32, logits.dtype), logits)
        if expert_bias.dtype not in (torch.float32, torch.float64):
            raise TypeError(
                f"expert_bias must be fp32, got {expert_bias.dtype}; keep it in fp32 when you cast the model"
            )
    if replay_ids is not None:
        _match("replay_ids", replay_ids, (*lead, top_k), INTEGERS, logits)
    if replay_weights is not None:
        _match("replay_weights", replay_weights, (*lead, top_k), FLOATS, logits)
    if names["weights_mode"] != "live" and replay_ids is not None and replay_weights is None:
        raise ValueError(
            f"weights_mode {names['weights_mode']!r} needs replay_weights, got None; pass them or use 'live'"
        )
    if valid is not None:
        _match("valid", valid, lead, (torch.bool,), logits)
    if cu_seqlens is not None:
        if cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise TypeError(f"cu_seqlens must be int32 or int64, got {cu_seqlens.dtype}")
        if cu_seqlens.ndim != 1 or cu_seqlens.shape[0] < 1:
            raise ValueError(f"cu_seqlens must be [S+1], got {tuple(cu_seqlens.shape)}")
        if cu_seqlens.device != logits.device:
            raise ValueError(f"cu_seqlens is on {cu_seqlens.device} and logits on {logits.device}; move one of them")


def check_losses(*, aux_counts: str, want_z: bool, cu_seqlens: Tensor | None) -> None:
    """Whether there are losses of one batch to finish."""
    if aux_counts == "none" and not want_z:
        raise ValueError("loss_coeffs needs sums to finish: set aux_counts to 'live' or 'effective', or want_z to True")
    if cu_seqlens is not None:
        raise ValueError(
            "loss_coeffs finishes the losses of one batch, cu_seqlens asks for sums of every sequence; leave one out"
        )


def check_groups(num_experts: int, *, top_k: int, num_groups: int, group_topk: int, rule: str) -> None:
    """Group sizes that can be honoured; `num_groups` 0 switches groups off."""
    if num_groups == 0 and group_topk == 0:
        return
    if num_groups < 1 or num_experts % num_groups:
        raise ValueError(f"num_groups must divide the {num_experts} experts, got {num_groups}")
    if not 1 <= group_topk <= num_groups:
        raise ValueError(f"group_topk must lie in 1..{num_groups} (num_groups), got {group_topk}")
    size = num_experts // num_groups
    if top_k > group_topk * size:
        raise ValueError(
            f"top_k {top_k} exceeds the {group_topk * size} experts of group_topk={group_topk} groups of {size}; "
            "raise group_topk or lower top_k"
        )
    if rule == "sum_topk_per_group" and top_k % group_topk:
        raise ValueError(
            f"group_rule sum_topk_per_group needs top_k divisible by group_topk, got {top_k} and {group_topk}"
        )
    if rule == "sum_top2" and size < 2:
        raise ValueError(f"group_rule sum_top2 needs at least 2 experts in a group, got {size}; use fewer groups")


def _match(name: str, tensor: Tensor, shape: tuple[int, ...], dtypes: tuple[torch.dtype, ...], logits: Tensor) -> None:
    if tensor.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must have dtype {wanted}, got {tensor.dtype}")
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{name} must have shape {tuple(shape)} to fit the logits, got {tuple(tensor.shape)}")
    if tensor.device != logits.device:
        raise ValueError(f"{name} is on {tensor.device} and logits on {logits.device}; move one of them")
