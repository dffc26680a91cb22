"""TransformerEngine's fused router functions under their own names, on this package's `route_topk`.

Replace `transformer_engine.pytorch.router` by this module. Signatures, returns and kinds of error are TE's:
RuntimeError where its C++ checks, ValueError and TypeError where its Python does. What differs, all of it deliberate:
any device; T = 0 and non-contiguous logits are accepted; equal keys always go to the lower expert index and a row
always names K distinct experts; the weight of a biased expert is its raw score, not (s+b)-b; dense indices are in
descending order of the selection key for every K; the auxiliary loss is summed in a fixed order. Quantile balancing
(`qb_*`) is refused.

T tokens (any leading dimensions), E experts, K = topk. Logits fp32, bf16 or fp16; arithmetic fp32; `probs` and
gradients in the logits' dtype, `scores` fp32.
"""

from __future__ import annotations

import enum

import torch
from torch import Tensor

from moe_layer.ops.copy_ids import check_id_buffer, copy_ids
from moe_layer.ops.kernels import note_first_cuda_use
from moe_layer.ops.route_topk import RouteTopk, route_topk

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)
_COUNTS = (torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float32)
_SCORES = ("softmax", "sigmoid", "sqrtsoftplus")


class RoutingMapFormat(enum.IntEnum):
    """Layout of a routing map: bool `[..., E]`, or uint8 `[..., ceil(E/8)]` with expert e at bit e%8 of byte e//8."""

    BYTEMAP = 0
    BITMAP_U8 = 1


def fused_topk_with_score_function(
    logits: Tensor,
    topk: int,
    use_pre_softmax: bool,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float | None,
    score_function: str,
    expert_bias: Tensor | None,
    routing_map_format: str | RoutingMapFormat | int = RoutingMapFormat.BYTEMAP,
    topk_indices: Tensor | None = None,
    qb_histogram: Tensor | None = None,
    qb_bin_bounds: Tensor | None = None,
    qb_histogram_mode: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Top-k experts and their weights as a dense matrix.

    Args:
        logits: `[..., E]`. topk: K.
        use_pre_softmax: softmax over all E, then top-k, without renormalisation; ignored by the other score functions.
        num_groups, group_topk: keep the `group_topk` best groups (sum of their K/group_topk best keys); None is off.
        scaling_factor: multiplies the weights; None is 1.0 (0.0 is zero).
        score_function: "softmax", "sigmoid" or "sqrtsoftplus"; the last two are divided by their sum when K > 1.
        expert_bias: fp32 `[E]`, sigmoid and sqrtsoftplus only; used for selection, gets no gradient.
        routing_map_format: enum, 0 or 1, "bytemap" or "bitmap_u8".
        topk_indices: contiguous int16, int32 or int64 `[..., K]` to be filled; not together with a bit map.

    Returns:
        (probs `[..., E]`, routing map), or (probs, `topk_indices`) when that buffer was given.

    Raises:
        RuntimeError: shapes, dtypes, devices, layouts or settings that do not fit, as TE raises it.
        ValueError, TypeError: `routing_map_format`, fp64 logits, and every `qb_` argument that is set.
    """
    map_format = _map_format(routing_map_format)
    for name, value in (
        ("qb_histogram", qb_histogram),
        ("qb_bin_bounds", qb_bin_bounds),
        ("qb_histogram_mode", qb_histogram_mode),
    ):
        if value is not None:
            raise ValueError(
                f"{name} is set, but quantile balancing is not supported; pass None for every qb_ argument"
            )
    _check_logits(logits, topk, score_function)
    num_experts = logits.shape[-1]
    if expert_bias is not None:
        _check_bias(expert_bias, logits, score_function)
    if topk_indices is not None:
        _check(map_format != "bitmap", "topk_indices cannot be combined with routing_map_format BITMAP_U8; use BYTEMAP")
        try:
            shape = (*logits.shape[:-1], topk)
            check_id_buffer(topk_indices, shape=shape, num_experts=num_experts, device=logits.device)
        except (ValueError, TypeError) as error:
            raise RuntimeError(f"topk_indices: {error}") from None
    pre = score_function == "softmax" and use_pre_softmax
    groups = _groups(num_experts, topk, num_groups, group_topk)
    out: RouteTopk = route_topk(
        logits,
        expert_bias,
        top_k=topk,
        score_function=score_function,
        softmax_order="pre" if pre else "post",
        renormalize=not pre,
        scaling_factor=1.0 if scaling_factor is None else scaling_factor,
        num_groups=groups[0],
        group_topk=groups[1],
        group_rule="sum_topk_per_group",
        want_probs=True,
        map_format="none" if topk_indices is not None else map_format,
    )
    if topk_indices is not None:
        return out.probs, copy_ids(out.ids, topk_indices, num_experts=num_experts)
    return out.probs, out.map


def fused_compute_score_for_moe_aux_loss(
    logits: Tensor,
    topk: int,
    score_function: str,
    routing_map_format: str | RoutingMapFormat | int = RoutingMapFormat.BYTEMAP,
) -> tuple[Tensor, Tensor]:
    """(routing map, scores fp32 `[..., E]`) for the auxiliary loss: no bias or groups, scores normalised over all E."""
    map_format = _map_format(routing_map_format)
    _check_logits(logits, topk, score_function)
    out = route_topk(logits, top_k=topk, score_function=score_function, want_scores=True, map_format=map_format)
    return out.map, out.scores


def fused_moe_aux_loss(
    probs: Tensor,
    tokens_per_expert: Tensor,
    total_num_tokens: int | Tensor,
    num_experts: int,
    topk: int,
    coeff: float,
) -> Tensor:
    """0-d loss E*coeff/(K*total^2) * sum_col tokens_per_expert[col] * sum_row probs[row, col], in the dtype of `probs`.

    Args:
        probs: fp32, bf16 or fp16 `[rows, cols]`; cols may be a multiple of E (one block per sequence).
        tokens_per_expert: int16, int32, int64, bf16 or fp32 `[cols]`; no gradient.
        total_num_tokens: int, or a 0-d int64 tensor on the device of `probs`, which is not read by the host.
    """
    _check(probs.ndim == 2, f"probs must be [rows, cols], got shape {tuple(probs.shape)}")
    _check(probs.dtype in _FLOATS, f"probs must be fp32, bf16 or fp16, got {probs.dtype}; cast it first")
    _check(topk > 0, f"topk must be greater than 0, got {topk}")
    _check(num_experts > 0, f"num_experts must be greater than 0, got {num_experts}")
    rows, cols = probs.shape
    _check(cols % num_experts == 0, f"probs has {cols} columns, which is no multiple of num_experts {num_experts}")
    shape = tuple(tokens_per_expert.shape)
    _check(shape == (cols,), f"tokens_per_expert must be [{cols}] to fit the columns of probs, got {shape}")
    _check(
        tokens_per_expert.dtype in _COUNTS,
        f"tokens_per_expert must be int16, int32, int64, bf16 or fp32, got {tokens_per_expert.dtype}",
    )
    _check(tokens_per_expert.device == probs.device, _devices("tokens_per_expert", tokens_per_expert, "probs", probs))
    if isinstance(total_num_tokens, Tensor):
        kind = (total_num_tokens.ndim, total_num_tokens.dtype)
        _check(kind == (0, torch.int64), f"total_num_tokens must be an int or a 0-d int64 tensor, got {kind}")
        _check(total_num_tokens.device == probs.device, _devices("total_num_tokens", total_num_tokens, "probs", probs))
        total = total_num_tokens.clamp(min=1).to(torch.float32)
    else:
        _check(total_num_tokens > 0 or rows == 0, f"total_num_tokens must be greater than 0, got {total_num_tokens}")
        total = max(int(total_num_tokens), 1)
    per_expert = probs.float().sum(dim=0) * tokens_per_expert.detach().float()
    return (per_expert.sum() * (num_experts * coeff / topk) / total / total).to(probs.dtype)


def _check(ok: bool, message: str) -> None:
    if not ok:
        raise RuntimeError(message)


def _devices(name: str, tensor: Tensor, other: str, reference: Tensor) -> str:
    return f"{name} is on {tensor.device} and {other} on {reference.device}; move one of them"


def _map_format(value: str | RoutingMapFormat | int) -> str:
    """ "bytemap" or "bitmap"; TE's own enum is recognised by its member name."""
    names = {"bytemap": "bytemap", "bitmap_u8": "bitmap"}
    if isinstance(value, str):
        if value not in names:
            raise ValueError(f"routing_map_format string must be 'bytemap' or 'bitmap_u8' (lowercase), got {value!r}")
        return names[value]
    if isinstance(value, int):
        if value not in (0, 1):
            raise ValueError(f"routing_map_format int must be 0 (bytemap) or 1 (bitmap_u8), got {value!r}")
        return "bitmap" if value == 1 else "bytemap"
    member = str(getattr(value, "name", "")).lower()
    if member not in names:
        raise TypeError(f"routing_map_format must be a RoutingMapFormat, an int or a string, got {value!r}")
    return names[member]


def _check_logits(logits: Tensor, topk: int, score_function: str) -> None:
    note_first_cuda_use("auto", logits)
    if logits.dtype == torch.float64:
        raise ValueError(
            "logits of dtype float64 are not supported by TransformerEngine's router; cast them to float32"
        )
    _check(logits.dtype in _FLOATS, f"logits must be fp32, bf16 or fp16, got {logits.dtype}")
    _check(logits.ndim >= 1 and logits.shape[-1] > 0, f"logits must be [..., E] with E > 0, got {tuple(logits.shape)}")
    _check(score_function in _SCORES, f"score_function must be one of {', '.join(_SCORES)}, got {score_function!r}")
    _check(0 < topk <= logits.shape[-1], f"topk must lie in 1..{logits.shape[-1]} (the number of experts), got {topk}")


def _check_bias(expert_bias: Tensor, logits: Tensor, score_function: str) -> None:
    _check(score_function != "softmax", "expert_bias needs score_function sigmoid or sqrtsoftplus, got softmax")
    _check(expert_bias.dtype == torch.float32, f"expert_bias must be float32, got {expert_bias.dtype}")
    shape = tuple(expert_bias.shape)
    _check(shape == (logits.shape[-1],), f"expert_bias must be [{logits.shape[-1]}], got {shape}")
    _check(expert_bias.device == logits.device, _devices("expert_bias", expert_bias, "logits", logits))


def _groups(num_experts: int, topk: int, num_groups: int | None, group_topk: int | None) -> tuple[int, int]:
    """(num_groups, group_topk), or (0, 0) without a positive group_topk, as TE reads it."""
    if group_topk is None or group_topk <= 0:
        return 0, 0
    groups = -1 if num_groups is None else num_groups
    _check(groups > 0, f"group_topk {group_topk} needs a positive num_groups, got {num_groups}")
    _check(num_experts % groups == 0, f"num_experts {num_experts} must be divisible by num_groups {groups}")
    _check(group_topk <= groups, f"group_topk {group_topk} must not exceed num_groups {groups}")
    _check(topk % group_topk == 0, f"topk {topk} must be divisible by group_topk {group_topk}")
    size = num_experts // groups
    _check(topk // group_topk <= size, f"topk/group_topk {topk // group_topk} must not exceed {size} experts per group")
    return groups, group_topk
