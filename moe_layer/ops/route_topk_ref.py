"""The arithmetic of `route_topk` in plain PyTorch: weights, loss sums and their closed-form gradients.

T tokens, E experts, K top-k, G groups, S sequences. Everything runs in the dtype of `x_TE` (fp32, or fp64), on any
device, without reading device memory on CUDA. Which experts a row gets is decided in `route_topk_select.py`.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_layer.ops.route_topk_select import Selected, score

EPS = 1e-20


class LossSums(NamedTuple):
    aux_counts_SE: Tensor
    score_sum_SE: Tensor
    z_sum: Tensor
    scores_TE: Tensor


def compute_dtype(logits: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def score_slope(x: Tensor, y: Tensor, score_function: str) -> Tensor:
    """d score / d logit at logit x with score y."""
    if score_function == "sigmoid":
        return y * (1 - y)
    return score(x, "sigmoid") / (2 * y + EPS)


# ---- weights ------------------------------------------------------------------------------------------------------


def _routed(ids_TK: Tensor) -> tuple[Tensor | None, Tensor]:
    """Mask of routed slots (None when the CPU sees that all are) and int64 ids that can be gathered with.

    A row is routed as a whole or not at all: ids are -1 in invalid rows only.
    """
    ids_TK = ids_TK.to(torch.int64)
    if ids_TK.device.type == "cpu" and bool((ids_TK[:, 0] >= 0).all()):
        return None, ids_TK
    return ids_TK >= 0, ids_TK.clamp(min=0)


def _masked(values: Tensor, mask: Tensor | None) -> Tensor:
    return values if mask is None else torch.where(mask, values, 0.0)


def _over_chosen(score_function: str, softmax_order: str, renormalize: bool) -> bool:
    """Softmax over the chosen K; "pre" with renormalisation is the same function of the logits, without underflow."""
    return score_function == "softmax" and (softmax_order == "post" or renormalize)


def softmax_chosen(x_TK: Tensor) -> Tensor:
    """Softmax over the K chosen logits; torch.softmax takes 0.14 ms for [2048, 4] on the CPU, this 0.05."""
    powers_TK = torch.exp(x_TK - x_TK.amax(dim=1, keepdim=True))
    return powers_TK / powers_TK.sum(dim=1, keepdim=True)


def softmax_backward(p_TJ: Tensor, g_TJ: Tensor) -> Tensor:
    """d logits of p = softmax(logits), given d p; rows may be the chosen K or all E.

    The exact gradient of a row sums to 0, and p sums to 1 only up to rounding: in a saturated row (one p near 1) the
    plain formula cancels down to that rounding. Taking the remaining sum out restores the digits: with logits 12 apart
    the error of a row falls from up to 1 (relative) to under 1e-5.
    """
    dx_TJ = p_TJ * (g_TJ - (g_TJ * p_TJ).sum(dim=1, keepdim=True))
    return dx_TJ - p_TJ * dx_TJ.sum(dim=1, keepdim=True)


def weights(
    x_TE: Tensor, ids_TK: Tensor, *, score_function: str, softmax_order: str, renormalize: bool, scaling_factor: float
) -> Tensor:
    """[T, K] combine weights of the chosen experts, 0 where the id is -1."""
    routed_TK, safe_TK = _routed(ids_TK)
    x_TK = x_TE.gather(1, safe_TK)
    if _over_chosen(score_function, softmax_order, renormalize):
        w_TK = softmax_chosen(x_TK)
    elif score_function == "softmax":
        w_TK = torch.softmax(x_TE, dim=1).gather(1, safe_TK)
    else:
        w_TK = score(x_TK, score_function)
        if renormalize and ids_TK.shape[1] > 1:
            w_TK = w_TK / (w_TK.sum(dim=1, keepdim=True) + EPS)
    if scaling_factor != 1.0:
        w_TK = w_TK * scaling_factor
    return _masked(w_TK, routed_TK)


def weight_gradient(
    d_weights: Tensor | None, d_probs: Tensor | None, ids_TK: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Gradient of the [T, K] weights: the direct one plus what arrives through the dense matrix; 0 at -1 slots."""
    routed_TK, safe_TK = _routed(ids_TK)
    total_TK = None if d_weights is None else d_weights.to(dtype)
    if d_probs is not None:
        dense_TK = d_probs.gather(1, safe_TK).to(dtype)
        total_TK = dense_TK if total_TK is None else total_TK + dense_TK
    return None if total_TK is None else _masked(total_TK, routed_TK)


def weights_backward(
    d_w_TK: Tensor | None,
    dx_TE: Tensor | None,
    x_TE: Tensor,
    ids_TK: Tensor,
    *,
    score_function: str,
    softmax_order: str,
    renormalize: bool,
    scaling_factor: float,
) -> Tensor:
    """dx_TE (or zeros) plus the gradient through the weights; reads K logits a row except for "pre" softmax."""
    if d_w_TK is None:
        return torch.zeros_like(x_TE) if dx_TE is None else dx_TE
    routed_TK, safe_TK = _routed(ids_TK)
    g_TK = d_w_TK * scaling_factor
    if score_function == "softmax" and not _over_chosen(score_function, softmax_order, renormalize):
        p_TE = torch.softmax(x_TE, dim=1)
        gp_TK = _masked(g_TK * p_TE.gather(1, safe_TK), routed_TK)
        through_TE = (-gp_TK.sum(dim=1, keepdim=True) * p_TE).scatter_add_(1, safe_TK, gp_TK)
        through_TE = through_TE - p_TE * through_TE.sum(dim=1, keepdim=True)  # see softmax_backward
        through_TE = _masked(through_TE, None if routed_TK is None else routed_TK[:, :1])
        return through_TE if dx_TE is None else dx_TE + through_TE
    x_TK = x_TE.gather(1, safe_TK)
    if score_function == "softmax":
        dx_TK = softmax_backward(softmax_chosen(x_TK), g_TK)
    else:
        y_TK = score(x_TK, score_function)
        u_TK = g_TK
        if renormalize and ids_TK.shape[1] > 1:
            total_T1 = y_TK.sum(dim=1, keepdim=True) + EPS
            u_TK = g_TK / total_T1 - (g_TK * y_TK).sum(dim=1, keepdim=True) / (total_T1 * total_T1)
        dx_TK = u_TK * score_slope(x_TK, y_TK, score_function)
    dx_TK = _masked(dx_TK, routed_TK)
    base_TE = torch.zeros_like(x_TE) if dx_TE is None else dx_TE
    return base_TE.scatter_add_(1, safe_TK, dx_TK)


def scatter_rows(values_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """[T, E] with values at their experts; -1 slots carry 0 and are added to expert 0, ids being distinct otherwise."""
    dense_TE = values_TK.new_zeros((values_TK.shape[0], num_experts))
    return dense_TE.scatter_add_(1, ids_TK.to(torch.int64).clamp(min=0), values_TK)


# ---- counts, maps and loss sums -----------------------------------------------------------------------------------


def count_ids(ids_TK: Tensor, num_experts: int, sequence_T: Tensor | None = None, sequences: int = 1) -> Tensor:
    """int32 [E], or [S, E] with the sequence of each row; -1 ids (and sequence -1) are not counted."""
    bins = num_experts * sequences
    bin_TK = ids_TK.to(torch.int64) + 1  # bin 0 collects what is not counted
    if sequence_T is not None:
        counted_TK = (sequence_T >= 0)[:, None] & (bin_TK > 0)
        bin_TK = torch.where(counted_TK, bin_TK + sequence_T[:, None] * num_experts, 0)
    if ids_TK.device.type == "cpu":
        counts = torch.bincount(bin_TK.flatten(), minlength=bins + 1).to(torch.int32)
    else:  # bincount reads its maximum back to the host on CUDA
        flat = bin_TK.flatten()
        counts = torch.zeros(bins + 1, dtype=torch.int32, device=flat.device)
        counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    counts = counts[1:].clone()
    return counts if sequence_T is None else counts.view(sequences, num_experts)


def routing_map(ids_TK: Tensor, num_experts: int, map_format: str) -> Tensor:
    """bool [T, E], uint8 [T, ceil(E/8)] LSB first, or empty."""
    if map_format == "none":
        return torch.empty(0, dtype=torch.bool, device=ids_TK.device)
    num_tokens = ids_TK.shape[0]
    width = num_experts if map_format == "bytemap" else (num_experts + 7) // 8 * 8
    chosen = torch.zeros((num_tokens, width + 1), dtype=torch.bool, device=ids_TK.device)
    chosen.scatter_(1, torch.where(ids_TK >= 0, ids_TK, width).to(torch.int64), True)
    chosen = chosen[:, :width]
    if map_format == "bytemap":
        return chosen.contiguous()
    bits = 1 << torch.arange(8, dtype=torch.uint8, device=ids_TK.device)
    return (chosen.reshape(num_tokens, width // 8, 8) * bits).sum(dim=2, dtype=torch.uint8)


def sequence_of_rows(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the sequence of each token, -1 for tokens before the first or after the last boundary."""
    token_T = torch.arange(num_tokens, device=cu_seqlens.device, dtype=cu_seqlens.dtype)
    index_T = torch.searchsorted(cu_seqlens.contiguous(), token_T, right=True) - 1
    return torch.where(index_T < cu_seqlens.shape[0] - 1, index_T, -1)


def normalised_scores(x_TE: Tensor, score_function: str) -> Tensor:
    """Scores divided by their sum over all E (softmax is by itself)."""
    if score_function == "softmax":
        return torch.softmax(x_TE, dim=1)
    y_TE = score(x_TE, score_function)
    return y_TE / (y_TE.sum(dim=1, keepdim=True) + EPS)


def loss_sums(
    x_TE: Tensor,
    selected: Selected,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    *,
    score_function: str,
    aux_counts: str,
    want_z: bool,
    want_scores: bool,
) -> LossSums:
    """What the auxiliary losses need, summed over valid tokens; empty where nobody asked."""
    num_tokens, num_experts = x_TE.shape
    empty = [x_TE.new_empty(0, dtype=torch.int32), x_TE.new_empty(0), x_TE.new_empty(0), x_TE.new_empty(0)]
    scores_TE = empty[3]
    if aux_counts != "none" or want_scores:
        scores_TE = normalised_scores(x_TE, score_function)
        scores_TE = scores_TE if valid is None else torch.where(valid[:, None], scores_TE, 0.0)
        if want_scores:
            empty[3] = scores_TE
    if aux_counts != "none":
        ids_TK = selected.ids_TK if aux_counts == "effective" else selected.live_TK
        if valid is not None:
            ids_TK = torch.where(valid[:, None], ids_TK, -1)
        if cu_seqlens is None:
            empty[0] = count_ids(ids_TK, num_experts)[None]
            empty[1] = scores_TE.sum(dim=0, keepdim=True)
        else:
            sequence_T = sequence_of_rows(cu_seqlens, num_tokens)
            empty[0] = count_ids(ids_TK, num_experts, sequence_T, cu_seqlens.shape[0] - 1)
            empty[1] = segment_sums(scores_TE, cu_seqlens)
    if want_z:
        squared_T = torch.logsumexp(x_TE, dim=1).square()
        empty[2] = (squared_T if valid is None else torch.where(valid, squared_T, 0.0)).sum(dim=0, keepdim=True)
    return LossSums(*empty)


def segment_sums(rows_TE: Tensor, cu_seqlens: Tensor) -> Tensor:
    """[S, E] sums of the rows of each sequence, in row order (no atomics; a NaN stays in its own sequence)."""
    if rows_TE.shape[0] == 0 or cu_seqlens.shape[0] == 1:
        return rows_TE.new_zeros((cu_seqlens.shape[0] - 1, rows_TE.shape[1]))
    num_tokens = rows_TE.shape[0]
    # Rising and inside [0, T] whatever was passed: segment_reduce does not check on CUDA.
    bounds = torch.cummax(cu_seqlens.to(torch.int64).clamp(0, num_tokens), dim=0).values
    edges = torch.nn.functional.pad(torch.nn.functional.pad(bounds, (1, 0)), (0, 1), value=num_tokens)
    sums_SE = torch.segment_reduce(rows_TE, "sum", lengths=torch.diff(edges), axis=0, unsafe=True, initial=0.0)
    return sums_SE[1:-1].clone()


def loss_sums_backward(
    d_score_sum: Tensor | None,
    d_z: Tensor | None,
    d_scores: Tensor | None,
    x_TE: Tensor,
    ids_TK: Tensor,
    cu_seqlens: Tensor | None,
    *,
    score_function: str,
) -> Tensor | None:
    """dx_TE through scores, score sums and z; rows whose ids are -1 get zeros. None when nothing arrives."""
    g_TE = None
    if d_score_sum is not None:
        if cu_seqlens is None:
            g_TE = d_score_sum.to(x_TE.dtype).expand_as(x_TE)
        else:
            sequence_T = sequence_of_rows(cu_seqlens, x_TE.shape[0])
            padded = torch.cat([d_score_sum.to(x_TE.dtype), x_TE.new_zeros((1, x_TE.shape[1]))])
            g_TE = padded[sequence_T]  # sequence -1 is the row of zeros
    if d_scores is not None:
        g_TE = d_scores.to(x_TE.dtype) if g_TE is None else g_TE + d_scores
    dx_TE = None
    if g_TE is not None:
        dx_TE = _scores_backward(g_TE, x_TE, score_function)
    if d_z is not None:
        lse_T1 = torch.logsumexp(x_TE, dim=1, keepdim=True)
        z_TE = (2 * d_z.to(x_TE.dtype)) * lse_T1 * torch.exp(x_TE - lse_T1)
        dx_TE = z_TE if dx_TE is None else dx_TE + z_TE
    return None if dx_TE is None else torch.where(ids_TK[:, :1] >= 0, dx_TE, 0.0)


def _scores_backward(g_TE: Tensor, x_TE: Tensor, score_function: str) -> Tensor:
    if score_function == "softmax":
        return softmax_backward(torch.softmax(x_TE, dim=1), g_TE)
    y_TE = score(x_TE, score_function)
    total_T1 = y_TE.sum(dim=1, keepdim=True) + EPS
    u_TE = g_TE / total_T1 - (g_TE * y_TE).sum(dim=1, keepdim=True) / (total_T1 * total_T1)
    return u_TE * score_slope(x_TE, y_TE, score_function)
