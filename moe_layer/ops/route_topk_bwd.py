"""`moe_layer::route_topk_bwd`: from the gradients of `route_topk`'s outputs to that of the logits; the op's autograd.

Shapes and precision as in `route_topk.py`. `csrc/router_bwd*.cu` registers CUDA kernels for this schema.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.ops import route_topk_ref as ref
from moe_layer.ops._call import call_plain
from moe_layer.ops.route_topk_select import taken

BACKWARD_SCHEMA = (
    "(Tensor? d_weights, Tensor? d_score_sum, Tensor? d_z, Tensor? d_probs, Tensor? d_scores, Tensor logits,"
    " Tensor ids, Tensor? replay_ids, Tensor? cu_seqlens, *, str score_function, str softmax_order, bool renormalize,"
    " float scaling_factor, str weights_mode) -> Tensor"
)
# Rows that are not valid are recognised in backward by their ids, which are all -1.


@torch.library.custom_op("moe_layer::route_topk_bwd", mutates_args=(), schema=BACKWARD_SCHEMA)
def _op(
    d_weights: Tensor | None,
    d_score_sum: Tensor | None,
    d_z: Tensor | None,
    d_probs: Tensor | None,
    d_scores: Tensor | None,
    logits: Tensor,
    ids: Tensor,
    replay_ids: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    score_function: str,
    softmax_order: str,
    renormalize: bool,
    scaling_factor: float,
    weights_mode: str,
) -> Tensor:
    x_TE = logits.to(ref.compute_dtype(logits))
    d_w_TK = ref.weight_gradient(d_weights, d_probs, ids, x_TE.dtype)
    if d_w_TK is not None and weights_mode == "recorded" and replay_ids is not None:
        d_w_TK = d_w_TK.masked_fill(taken(replay_ids, ids), 0)
    dx_TE = ref.loss_sums_backward(d_score_sum, d_z, d_scores, x_TE, ids, cu_seqlens, score_function=score_function)
    dx_TE = ref.weights_backward(
        d_w_TK,
        dx_TE,
        x_TE,
        ids,
        score_function=score_function,
        softmax_order=softmax_order,
        renormalize=renormalize,
        scaling_factor=scaling_factor,
    )
    return dx_TE.to(logits.dtype)


@_op.register_fake
def _fake(
    d_weights: Tensor | None,
    d_score_sum: Tensor | None,
    d_z: Tensor | None,
    d_probs: Tensor | None,
    d_scores: Tensor | None,
    logits: Tensor,
    *_: Any,
    **__: Any,
) -> Tensor:
    return logits.new_empty(logits.shape)


def what_backward_reads(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any
) -> tuple[Tensor | None, ...]:
    """Tensors to save for `logits_gradient`, whose options go to ctx (`gate_topk` calls both too)."""
    logits, _, replay_ids, replay_weights, _, cu_seqlens = inputs
    ctx.set_materialize_grads(False)
    names = ("score_function", "softmax_order", "renormalize", "scaling_factor", "weights_mode")
    ctx.options = {name: keyword_only_inputs[name] for name in names}
    recorded = ctx.options["weights_mode"] == "recorded" and replay_weights is not None
    want_losses, has_aux = keyword_only_inputs["want_losses"], keyword_only_inputs["aux_counts"] != "none"
    ctx.loss_options = {name: keyword_only_inputs[name] for name in ("top_k", "aux_coeff", "z_coeff")}
    ctx.loss_options["has_z"] = keyword_only_inputs["want_z"]
    sums = (output[10], output[3] if has_aux else None) if want_losses else (None, None)
    return (logits, output[1], replay_ids if recorded else None, cu_seqlens, *sums)


def setup_context(ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Any) -> None:
    ctx.save_for_backward(*what_backward_reads(ctx, inputs, keyword_only_inputs, output))


def _loss_gradients(
    ctx: Any, d_summary: Tensor | None, d_scaled: Tensor | None, summary: Tensor | None, aux_counts: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """d_score_sum and d_z that the finished losses send."""
    if summary is None or (d_summary is None and d_scaled is None):
        return None, None
    d_score_sum, d_z = call_plain(
        torch.ops.moe_layer.batch_losses_bwd, d_summary, d_scaled, summary, aux_counts, **ctx.loss_options
    )
    return None if aux_counts is None else d_score_sum, d_z if ctx.loss_options["has_z"] else None


def _sum(one: Tensor | None, two: Tensor | None) -> Tensor | None:
    return one if two is None else two if one is None else one + two


def logits_gradient(ctx: Any, saved: tuple[Any, ...], grads: tuple[Tensor | None, ...]) -> Tensor | None:
    """d(logits) from what was saved and the gradients of `route_topk`'s outputs; None if there is none."""
    logits, ids, replay_ids, cu_seqlens, *sums = saved
    d_weights, _, _, _, d_score_sum, d_z, _, d_probs, d_scores, _, d_summary, d_scaled = (
        None if grad is None or (grad.numel() == 0 and grad.ndim == 1) else grad for grad in grads
    )
    more_score_sum, more_z = _loss_gradients(ctx, d_summary, d_scaled, *sums)
    present = [d_weights, _sum(d_score_sum, more_score_sum), _sum(d_z, more_z), d_probs, d_scores]
    if all(grad is None for grad in present):
        return None
    return call_plain(torch.ops.moe_layer.route_topk_bwd, *present, logits, ids, replay_ids, cu_seqlens, **ctx.options)


def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    dx = logits_gradient(ctx, ctx.saved_tensors, grads) if ctx.needs_input_grad[0] else None
    return (dx, None, None, None, None, None)
