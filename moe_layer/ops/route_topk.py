"""`moe_layer::route_topk`: logits -> top-k expert ids, weights, counts and loss sums, in one functional op.

T tokens, E experts, K top-k, S sequences. Precision: logits of any floating dtype are widened on load and all
arithmetic runs in fp32 (fp64 for fp64 logits); weights, scores and sums are returned in that dtype, dense
probabilities and the gradient of the logits in the logits' own dtype.

The order of a row: finite experts by descending key, then experts whose key is not finite; equal keys by ascending
expert id. The readable reference lives in `route_topk_select.py` and `route_topk_ref.py`; `csrc/router_*.cu` registers
CUDA kernels for these two schemas. The schemas are settled; a change is announced here:

* `route_topk_into` is `route_topk` with a buffer that takes the ids as well.
* `want_losses`, `aux_coeff` and `z_coeff` ask for two more outputs, those of `batch_losses`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from moe_layer.ops import batch_losses
from moe_layer.ops import route_topk_ref as ref
from moe_layer.ops._call import call_plain, refuse_second_derivative
from moe_layer.ops.copy_ids import check_id_buffer
from moe_layer.ops.kernels import load_kernels
from moe_layer.ops.route_topk_bwd import backward, setup_context
from moe_layer.ops.route_topk_check import check_arguments, check_losses
from moe_layer.ops.route_topk_result import NUM_EVENTS, RouteTopk
from moe_layer.ops.route_topk_select import select, taken

FORWARD_SCHEMA = (
    "(Tensor logits, Tensor? expert_bias, Tensor? replay_ids, Tensor? replay_weights, Tensor? valid,"
    " Tensor? cu_seqlens, *, int top_k, str score_function, str softmax_order, bool renormalize,"
    " float scaling_factor, int num_groups, int group_topk, str group_rule, str weights_mode, str aux_counts,"
    " bool want_z, bool want_probs, bool want_scores, str map_format, bool want_losses, float aux_coeff, float z_coeff)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)"
)


@torch.library.custom_op("moe_layer::route_topk", mutates_args=(), schema=FORWARD_SCHEMA)
def _op(
    logits: Tensor,
    expert_bias: Tensor | None,
    replay_ids: Tensor | None,
    replay_weights: Tensor | None,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    top_k: int,
    score_function: str,
    softmax_order: str,
    renormalize: bool,
    scaling_factor: float,
    num_groups: int,
    group_topk: int,
    group_rule: str,
    weights_mode: str,
    aux_counts: str,
    want_z: bool,
    want_probs: bool,
    want_scores: bool,
    map_format: str,
    want_losses: bool,
    aux_coeff: float,
    z_coeff: float,
) -> tuple[Tensor, ...]:
    x_TE = logits.to(ref.compute_dtype(logits))
    selected = select(
        x_TE,
        expert_bias,
        replay_ids,
        valid,
        top_k=top_k,
        score_function=score_function,
        softmax_order=softmax_order,
        num_groups=num_groups,
        group_topk=group_topk,
        group_rule=group_rule,
        want_live=aux_counts == "live",
    )
    weights_TK = ref.weights(
        x_TE,
        selected.ids_TK,
        score_function=score_function,
        softmax_order=softmax_order,
        renormalize=renormalize,
        scaling_factor=scaling_factor,
    )
    if weights_mode != "live" and replay_ids is not None and replay_weights is not None:
        weights_TK = torch.where(taken(replay_ids, selected.ids_TK), replay_weights.to(x_TE.dtype), weights_TK)
    num_experts = x_TE.shape[1]
    sums = ref.loss_sums(
        x_TE,
        selected,
        valid,
        cu_seqlens,
        score_function=score_function,
        aux_counts=aux_counts,
        want_z=want_z,
        want_scores=want_scores,
    )
    probs_TE = logits.new_empty(0)
    if want_probs:
        probs_TE = ref.scatter_rows(weights_TK, selected.ids_TK, num_experts).to(logits.dtype)
    counts_E = ref.count_ids(selected.ids_TK, num_experts)
    summary, scaled = x_TE.new_empty(0), x_TE.new_empty(0)
    if want_losses:
        aux = (None, None) if aux_counts == "none" else (sums.aux_counts_SE, sums.score_sum_SE)
        summary, scaled = batch_losses._op._init_fn(
            counts_E, *aux, sums.z_sum if want_z else None, top_k=top_k, aux_coeff=aux_coeff, z_coeff=z_coeff
        )
    return (
        weights_TK,
        selected.ids_TK.to(torch.int32),
        counts_E,
        sums.aux_counts_SE,
        sums.score_sum_SE,
        sums.z_sum,
        selected.events,
        probs_TE,
        sums.scores_TE,
        ref.routing_map(selected.ids_TK, num_experts, map_format),
        summary,
        scaled,
    )


@_op.register_fake
def _fake(
    logits: Tensor,
    expert_bias: Tensor | None,
    replay_ids: Tensor | None,
    replay_weights: Tensor | None,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    top_k: int,
    aux_counts: str,
    want_z: bool,
    want_probs: bool,
    want_scores: bool,
    map_format: str,
    want_losses: bool,
    **_: Any,
) -> tuple[Tensor, ...]:
    num_tokens, num_experts = logits.shape
    sequences = 1 if cu_seqlens is None else cu_seqlens.shape[0] - 1
    wide = ref.compute_dtype(logits)
    aux_shape = (0,) if aux_counts == "none" else (sequences, num_experts)
    dense = (num_tokens, num_experts)
    map_shape = {"none": (0,), "bytemap": dense, "bitmap": (num_tokens, (num_experts + 7) // 8)}[map_format]
    return (
        logits.new_empty((num_tokens, top_k), dtype=wide),
        logits.new_empty((num_tokens, top_k), dtype=torch.int32),
        logits.new_empty((num_experts,), dtype=torch.int32),
        logits.new_empty(aux_shape, dtype=torch.int32),
        logits.new_empty(aux_shape, dtype=wide),
        logits.new_empty((1 if want_z else 0,), dtype=wide),
        logits.new_empty((NUM_EVENTS,), dtype=torch.int32),
        logits.new_empty(dense if want_probs else (0,)),
        logits.new_empty(dense if want_scores else (0,), dtype=wide),
        logits.new_empty(map_shape, dtype=torch.uint8 if map_format == "bitmap" else torch.bool),
        logits.new_empty(len(batch_losses.SUMMARY) if want_losses else 0, dtype=wide),
        logits.new_empty((aux_counts != "none") + want_z if want_losses else 0, dtype=wide),
    )


@torch.library.custom_op(
    "moe_layer::route_topk_into",
    mutates_args=("id_buffer",),
    schema=FORWARD_SCHEMA.replace("Tensor? cu_seqlens,", "Tensor? cu_seqlens, Tensor(a!) id_buffer,"),
)
def _into_op(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
    """`route_topk` that also writes the ids into the caller's buffer, in the same pass on CUDA; no autograd of its own,
    because a custom op with autograd may not mutate its arguments."""
    *inputs, id_buffer = tensors
    outputs = _op._init_fn(*inputs, **options)
    id_buffer.copy_(outputs[1])
    return outputs


@_into_op.register_fake
def _into_fake(*tensors: Any, **options: Any) -> tuple[Tensor, ...]:
    return _fake(*tensors[:-1], **options)


def _call(tensors: tuple[Any, ...], options: dict[str, Any], id_buffer: Tensor | None) -> tuple[Tensor, ...]:
    """The op below autograd, with or without a buffer."""
    if id_buffer is None:
        return call_plain(torch.ops.moe_layer.route_topk, *tensors, **options)
    return call_plain(torch.ops.moe_layer.route_topk_into, *tensors, id_buffer, **options)


_op.register_autograd(backward, setup_context=setup_context)


class _EagerDoor(torch.autograd.Function):
    """The op's autograd for eager mode, from the same two functions.

    `register_autograd` fills in defaults by copying the schema once per argument and access: 0.4 ms a call with the 20
    arguments of this op, more than the routing itself on a small layer. torch.compile takes the op's own autograd.
    """

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        # No separate setup_context: with one, every apply() inspects this signature, which costs 0.1 ms.
        *tensors, options, buffers = inputs
        output = _call(tuple(tensors), options, *buffers)
        setup_context(ctx, tuple(tensors), options, output)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_derivative()
        return (*backward(ctx, *grads), None, None)


def route_topk(
    logits: Tensor,
    expert_bias: Tensor | None = None,
    *,
    top_k: int,
    score_function: str = "softmax",
    softmax_order: str = "post",
    renormalize: bool = True,
    scaling_factor: float = 1.0,
    num_groups: int = 0,
    group_topk: int = 0,
    group_rule: str = "sum_top2",
    replay_ids: Tensor | None = None,
    replay_weights: Tensor | None = None,
    weights_mode: str = "live",
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aux_counts: str = "none",
    want_z: bool = False,
    want_probs: bool = False,
    want_scores: bool = False,
    map_format: str = "none",
    loss_coeffs: tuple[float, float] | None = None,
    id_buffer: Tensor | None = None,
) -> RouteTopk:
    """Choose K of E experts for every token and weigh them; differentiable in `logits`.

    Args:
        logits: `[..., E]` fp32, bf16, fp16 or fp64, any strides; T = 0 is allowed.
        expert_bias: fp32 `[E]` (fp64 allowed with fp64 logits), added to the score for selection only; no gradient.
        top_k: experts per token, at most E.
        score_function: "softmax", "sigmoid" or "sqrtsoftplus".
        softmax_order: "pre" (over E, then top-k) or "post" (over the chosen K).
        renormalize: divide the chosen scores by their sum; "post" always does, sigmoid and sqrtsoftplus not for K = 1.
        scaling_factor: multiplies the weights.
        num_groups, group_topk: cut E into groups and allow `group_topk` of them per token; 0 is off.
        group_rule: score of a group, its two best keys ("sum_top2") or its K/group_topk best ("sum_topk_per_group").
        replay_ids: integer `[..., K]`; ids to honour, negative or out of range ones are filled with live experts.
        replay_weights: floating `[..., K]`, for weights_mode other than "live".
        weights_mode: "live", "recorded" (replayed slots take the recorded weight, without gradient) or
            "straight_through" (recorded in value, live in gradient).
        valid: bool `[...]`; rows where it is False get id -1 and weight 0 and count nowhere.
        cu_seqlens: integer `[S+1]` boundaries of sequences in the flattened tokens, for per-sequence sums.
        aux_counts: "none", "live" (unbiased, ungrouped live top-k) or "effective" (the ids returned).
        want_z, want_probs, want_scores: ask for `z_sum`, `probs`, `scores`.
        map_format: "none", "bytemap" or "bitmap".
        loss_coeffs: coefficients of the load-balancing loss (there if `aux_counts` is not "none") and of the z-loss
            (there if `want_z`); asks for the finished losses of the batch, `losses` and `scaled_losses`, as
            `batch_losses` makes them of the sums. Not with `cu_seqlens`; on CUDA not of fp64 logits.
        id_buffer: int16, int32 or int64 `[..., K]`, contiguous; the ids are written into it as well (recording).

    Raises:
        TypeError: a wrong dtype. ValueError: a wrong shape, device, size or name.
    """
    check_arguments(
        logits,
        expert_bias,
        replay_ids=replay_ids,
        replay_weights=replay_weights,
        valid=valid,
        cu_seqlens=cu_seqlens,
        top_k=top_k,
        score_function=score_function,
        softmax_order=softmax_order,
        num_groups=num_groups,
        group_topk=group_topk,
        group_rule=group_rule,
        weights_mode=weights_mode,
        aux_counts=aux_counts,
        map_format=map_format,
    )
    if loss_coeffs is not None:
        check_losses(aux_counts=aux_counts, want_z=want_z, cu_seqlens=cu_seqlens)
    load_kernels(logits)
    aux_coeff, z_coeff = (0.0, 0.0) if loss_coeffs is None else loss_coeffs
    lead = logits.shape[:-1]
    num_tokens = math.prod(lead)  # Size.numel() would make a constant of it under torch.export

    def rows(tensor: Tensor | None) -> Tensor | None:
        return tensor if tensor is None or tensor.ndim == 2 else tensor.reshape(num_tokens, tensor.shape[-1])

    flat_valid = None if valid is None else valid.reshape(num_tokens)
    tensors = (rows(logits), expert_bias, rows(replay_ids), rows(replay_weights), flat_valid, cu_seqlens)
    options = {
        "top_k": top_k,
        "score_function": score_function,
        "softmax_order": softmax_order,
        "renormalize": renormalize,
        "scaling_factor": float(scaling_factor),
        "num_groups": num_groups,
        "group_topk": group_topk,
        "group_rule": group_rule,
        "weights_mode": weights_mode,
        "aux_counts": aux_counts,
        "want_z": want_z,
        "want_probs": want_probs,
        "want_scores": want_scores,
        "map_format": map_format,
        "want_losses": loss_coeffs is not None,
        "aux_coeff": float(aux_coeff),
        "z_coeff": float(z_coeff),
    }
    if id_buffer is not None:
        check_id_buffer(id_buffer, shape=(*lead, top_k), num_experts=logits.shape[-1], device=logits.device)
    if torch.compiler.is_compiling():
        result = RouteTopk(*torch.ops.moe_layer.route_topk(*tensors, **options))
        if id_buffer is not None:
            torch.ops.moe_layer.copy_ids(result.ids, rows(id_buffer))
    elif torch.is_grad_enabled() and logits.requires_grad:
        result = RouteTopk(*_EagerDoor.apply(*tensors, options, (rows(id_buffer),)))
    else:
        result = RouteTopk(*_call(tensors, options, rows(id_buffer)))
    if logits.ndim == 2:
        return result
    dense = {
        name: getattr(result, name).reshape(*lead, getattr(result, name).shape[-1])
        for name, wanted in (("probs", want_probs), ("scores", want_scores), ("map", map_format != "none"))
        if wanted
    }
    return result._replace(weights=result.weights.reshape(*lead, top_k), ids=result.ids.reshape(*lead, top_k), **dense)
