"""The arithmetic of `route_topk` in plain PyTorch: selection, weights, loss sums and their closed-form gradients.

T tokens, E experts, K top-k, G groups, S sequences. Everything runs in the dtype of `x_TE` (fp32, or fp64), on any
device, without reading device memory on CUDA. On the CPU a read is free, so ordinary rows take a shorter way.

Scores are composed of exp, log1p, sqrt and division: `torch.sigmoid` rounds differently in its vector body and its
scalar tail on the CPU, so equal inputs would get unequal keys depending on where they stand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EPS = 1e-20
ID_BITS = 20
FEW = 16
"""Up to this many experts are taken by repeated maximum on the CPU, measured faster than torch.topk there."""
BROKEN_KEY = -1e30
"""A group's sum counts this for a key that is not finite, so that groups with more finite experts come first."""


class Selected(NamedTuple):
    """ids_TK int64 (-1 in invalid rows), live_TK the unbiased ungrouped ids (empty unless asked), events int32 [8]."""

    ids_TK: Tensor
    live_TK: Tensor
    events: Tensor


class LossSums(NamedTuple):
    aux_counts_SE: Tensor
    score_sum_SE: Tensor
    z_sum: Tensor
    scores_TE: Tensor


def compute_dtype(logits: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if logits.dtype == torch.float64 else torch.float32


def score(x: Tensor, score_function: str) -> Tensor:
    """Elementwise score (sigmoid or sqrtsoftplus)."""
    if score_function == "sigmoid":
        return 1 / (1 + torch.exp(-x))
    return torch.where(x > 20, x, torch.log1p(torch.exp(torch.clamp(x, max=20)))).sqrt()


def score_slope(x: Tensor, y: Tensor, score_function: str) -> Tensor:
    """d score / d logit at logit x with score y."""
    if score_function == "sigmoid":
        return y * (1 - y)
    return score(x, "sigmoid") / (2 * y + EPS)


# ---- selection ----------------------------------------------------------------------------------------------------


def select(
    x_TE: Tensor,
    expert_bias: Tensor | None,
    replay_ids: Tensor | None,
    valid: Tensor | None,
    *,
    top_k: int,
    score_function: str,
    softmax_order: str,
    num_groups: int,
    group_topk: int,
    group_rule: str,
    want_live: bool,
) -> Selected:
    """Effective ids of every row, the live ids the aux loss counts, and the events."""
    finite_TE = _finite_unless_all(x_TE)
    plain = expert_bias is None and num_groups == 0
    key_TE = x_TE
    if not plain:
        key_TE = selection_key(x_TE, finite_TE, expert_bias, score_function, softmax_order)
    ok_TE = finite_TE if plain else _and_finite(finite_TE, key_TE)
    blocked_TE = None
    if num_groups:
        blocked_TE = blocked_by_groups(key_TE, ok_TE, num_groups, group_topk, group_rule, top_k)
    ids_TK = None
    if replay_ids is None:
        ids_TK = best(key_TE, ok_TE, blocked_TE, top_k)
        filled = None
    else:
        ids_TK, filled = replay(replay_ids, key_TE, ok_TE, blocked_TE)
    live_TK = ids_TK.new_empty(0)
    if want_live:
        live_TK = ids_TK if plain and replay_ids is None else best(x_TE, finite_TE, None, top_k)
    if valid is not None:
        ids_TK = torch.where(valid[:, None], ids_TK, -1)
    return Selected(ids_TK, live_TK, count_events(replay_ids, filled, finite_TE, valid, x_TE))


def _finite_unless_all(x_TE: Tensor) -> Tensor | None:
    """Mask of finite entries; None when the CPU can see that all are (a finite sum has finite terms)."""
    if x_TE.device.type == "cpu" and bool(torch.isfinite(x_TE.sum())):
        return None
    return torch.isfinite(x_TE)


def _and_finite(finite_TE: Tensor | None, key_TE: Tensor) -> Tensor | None:
    ok_TE = _finite_unless_all(key_TE)
    if ok_TE is None or finite_TE is None:
        return finite_TE if ok_TE is None else ok_TE
    return ok_TE & finite_TE


def selection_key(
    x_TE: Tensor, finite_TE: Tensor | None, expert_bias: Tensor | None, score_function: str, softmax_order: str
) -> Tensor:
    """Key of every expert with a bias or groups: score (+ bias). The softmax runs over the finite logits of the row."""
    if score_function != "softmax":
        key_TE = score(x_TE, score_function)
    elif softmax_order == "post":
        key_TE = x_TE
    else:
        key_TE = x_TE if finite_TE is None else x_TE.masked_fill(~finite_TE, -torch.inf)
        key_TE = torch.softmax(key_TE, dim=1)
    return key_TE if expert_bias is None else key_TE + expert_bias.to(key_TE.dtype)


def best(key_TE: Tensor, ok_TE: Tensor | None, blocked_TE: Tensor | None, top_k: int) -> Tensor:
    """int64 [T, K]: finite keys descending, then the others; blocked ones last; equal keys by ascending id.

    `ok_TE` None means that every key is finite, `blocked_TE` None that nobody is blocked.
    """
    num_experts = key_TE.shape[1]
    if key_TE.dtype == torch.float32:
        return _packed_best(key_TE, ok_TE, blocked_TE, top_k)
    rank_TE = torch.zeros_like(key_TE, dtype=torch.int8)
    if ok_TE is not None:
        rank_TE = rank_TE + (~ok_TE).to(torch.int8)
        key_TE = torch.where(ok_TE, key_TE, 0)
    if blocked_TE is not None:
        rank_TE = torch.where(blocked_TE, 2, rank_TE)
    order_TE = torch.sort(key_TE, dim=1, descending=True, stable=True).indices
    second_TE = torch.sort(rank_TE.gather(1, order_TE), dim=1, stable=True).indices
    return order_TE.gather(1, second_TE)[:, : min(top_k, num_experts)].contiguous()


def _packed_best(key_TE: Tensor, ok_TE: Tensor | None, blocked_TE: Tensor | None, top_k: int) -> Tensor:
    """`best` for fp32: class, key and id packed in one int64, all different, so torch.topk has nothing to choose."""
    key_TE = key_TE + 0.0  # -0.0 becomes 0.0: they are equal, their bits must be too
    if ok_TE is not None:
        key_TE = torch.where(ok_TE, key_TE, 0.0)
    bits_TE = key_TE.contiguous().view(torch.int32)
    ordered_TE = bits_TE ^ ((bits_TE >> 31) & 0x7FFFFFFF)
    packed_TE = ordered_TE.to(torch.int64) << ID_BITS
    if ok_TE is not None:
        packed_TE = torch.where(ok_TE, packed_TE, packed_TE - (1 << (33 + ID_BITS)))
    if blocked_TE is not None:
        packed_TE = torch.where(blocked_TE, packed_TE - (1 << (35 + ID_BITS)), packed_TE)
    last = (1 << ID_BITS) - 1
    packed_TE = packed_TE | (last - torch.arange(key_TE.shape[1], device=key_TE.device))
    return last - (torch.topk(packed_TE, top_k, dim=1).values & last)


def blocked_by_groups(
    key_TE: Tensor, ok_TE: Tensor | None, num_groups: int, group_topk: int, rule: str, top_k: int
) -> Tensor:
    """bool [T, E]: experts outside the row's best groups. Sums run from the largest key down."""
    num_tokens, num_experts = key_TE.shape
    size = num_experts // num_groups
    count = 2 if rule == "sum_top2" else top_k // group_topk
    usable_TE = key_TE if ok_TE is None else torch.where(ok_TE, key_TE, BROKEN_KEY)
    top_TGn = torch.topk(usable_TE.view(num_tokens, num_groups, size), count, dim=2).values
    total_TG = top_TGn[..., 0]
    for index in range(1, count):
        total_TG = total_TG + top_TGn[..., index]
    kept_Tg = torch.sort(total_TG, dim=1, descending=True, stable=True).indices[:, :group_topk]
    blocked_TG = torch.ones_like(total_TG, dtype=torch.bool).scatter_(1, kept_Tg, False)
    return blocked_TG.repeat_interleave(size, dim=1)


def replay(
    replay_ids: Tensor, key_TE: Tensor, ok_TE: Tensor | None, blocked_TE: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Replayed ids in their slots, other slots filled with the best live experts left; and int8 slot states.

    States: 0 replayed, 1 missing, 2 duplicate of an earlier slot, 3 out of range.
    """
    num_tokens, num_experts = key_TE.shape
    wanted_TK = replay_ids.to(torch.int64)
    top_k = wanted_TK.shape[1]
    state_TK = torch.zeros_like(wanted_TK, dtype=torch.int8)
    state_TK = torch.where(wanted_TK < 0, 1, torch.where(wanted_TK >= num_experts, 3, state_TK))
    for slot in range(1, top_k):
        seen_T = (wanted_TK[:, :slot] == wanted_TK[:, slot : slot + 1]).any(dim=1)
        state_TK[:, slot] = torch.where(seen_T & (state_TK[:, slot] == 0), 2, state_TK[:, slot])
    fill_TK = state_TK != 0
    if key_TE.device.type == "cpu" and not bool(fill_TK.any()):
        return wanted_TK, state_TK
    taken_TE1 = torch.zeros((num_tokens, num_experts + 1), dtype=torch.bool, device=key_TE.device)
    taken_TE1.scatter_(1, torch.where(fill_TK, num_experts, wanted_TK), True)
    taken_TE = taken_TE1[:, :num_experts]
    # A taken expert ranks below an expert of a closed group: closing everything but the taken ones is the last resort.
    closed_TE = taken_TE if blocked_TE is None else taken_TE | blocked_TE
    live_TK = best(key_TE, ok_TE, closed_TE, top_k)
    nth_TK = torch.cumsum(fill_TK, dim=1) - 1
    filled_TK = live_TK.gather(1, nth_TK.clamp_(min=0))
    return torch.where(fill_TK, filled_TK, wanted_TK), state_TK


def taken(replay_ids: Tensor, ids_TK: Tensor) -> Tensor:
    """bool [T, K]: slots whose id came from the replay row (a filled slot never equals what was recorded there)."""
    return (replay_ids.to(torch.int64) == ids_TK.to(torch.int64)) & (ids_TK >= 0)


def count_events(
    replay_ids: Tensor | None, state_TK: Tensor | None, finite_TE: Tensor | None, valid: Tensor | None, x_TE: Tensor
) -> Tensor:
    """int32 [8] over valid rows: rows replayed, slots replayed, missing, duplicates, out of range, non-finite rows."""
    events = torch.zeros(8, dtype=torch.int32, device=x_TE.device)
    if state_TK is not None:
        live_T1 = None if valid is None else valid[:, None]
        for position, state in enumerate((0, 1, 2, 3), start=1):
            hit_TK = state_TK == state
            hit_TK = hit_TK if live_T1 is None else hit_TK & live_T1
            if state == 0:
                events[0] = hit_TK.any(dim=1).sum()
            events[position] = hit_TK.sum()
    if finite_TE is not None:
        broken_T = ~finite_TE.all(dim=1)
        events[5] = (broken_T if valid is None else broken_T & valid).sum()
    return events


# ---- weights ------------------------------------------------------------------------------------------------------


def _routed(ids_TK: Tensor) -> tuple[Tensor, Tensor]:
    ids_TK = ids_TK.to(torch.int64)
    return ids_TK >= 0, ids_TK.clamp(min=0)


def _over_chosen(score_function: str, softmax_order: str, renormalize: bool) -> bool:
    """Softmax over the chosen K; "pre" with renormalisation is the same function of the logits, without underflow."""
    return score_function == "softmax" and (softmax_order == "post" or renormalize)


def weights(
    x_TE: Tensor, ids_TK: Tensor, *, score_function: str, softmax_order: str, renormalize: bool, scaling_factor: float
) -> Tensor:
    """[T, K] combine weights of the chosen experts, 0 where the id is -1."""
    routed_TK, safe_TK = _routed(ids_TK)
    x_TK = x_TE.gather(1, safe_TK)
    if _over_chosen(score_function, softmax_order, renormalize):
        w_TK = torch.softmax(x_TK, dim=1)
    elif score_function == "softmax":
        w_TK = torch.softmax(x_TE, dim=1).gather(1, safe_TK)
    else:
        w_TK = score(x_TK, score_function)
        if renormalize and ids_TK.shape[1] > 1:
            w_TK = w_TK / (w_TK.sum(dim=1, keepdim=True) + EPS)
    if scaling_factor != 1.0:
        w_TK = w_TK * scaling_factor
    return torch.where(routed_TK, w_TK, 0.0)


def weight_gradient(
    d_weights: Tensor | None, d_probs: Tensor | None, ids_TK: Tensor, dtype: torch.dtype
) -> Tensor | None:
    """Gradient of the [T, K] weights: the direct one plus what arrives through the dense matrix; 0 at -1 slots."""
    if d_weights is None and d_probs is None:
        return None
    routed_TK, safe_TK = _routed(ids_TK)
    total_TK = None if d_weights is None else d_weights.to(dtype)
    if d_probs is not None:
        dense_TK = d_probs.gather(1, safe_TK).to(dtype)
        total_TK = dense_TK if total_TK is None else total_TK + dense_TK
    return torch.where(routed_TK, total_TK, 0.0)


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
        gp_TK = torch.where(routed_TK, g_TK * p_TE.gather(1, safe_TK), 0.0)
        through_TE = (-gp_TK.sum(dim=1, keepdim=True) * p_TE).scatter_add_(1, safe_TK, gp_TK)
        through_TE = torch.where(routed_TK[:, :1], through_TE, 0.0)
        return through_TE if dx_TE is None else dx_TE + through_TE
    x_TK = x_TE.gather(1, safe_TK)
    if score_function == "softmax":
        p_TK = torch.softmax(x_TK, dim=1)
        dx_TK = p_TK * (g_TK - (g_TK * p_TK).sum(dim=1, keepdim=True))
    else:
        y_TK = score(x_TK, score_function)
        u_TK = g_TK
        if renormalize and ids_TK.shape[1] > 1:
            total_T1 = y_TK.sum(dim=1, keepdim=True) + EPS
            u_TK = g_TK / total_T1 - (g_TK * y_TK).sum(dim=1, keepdim=True) / (total_T1 * total_T1)
        dx_TK = u_TK * score_slope(x_TK, y_TK, score_function)
    dx_TK = torch.where(routed_TK, dx_TK, 0.0)
    base_TE = torch.zeros_like(x_TE) if dx_TE is None else dx_TE
    return base_TE.scatter_add_(1, safe_TK, dx_TK)


def scatter_rows(values_TK: Tensor, ids_TK: Tensor, num_experts: int) -> Tensor:
    """[T, E] with values at their experts; -1 slots carry 0 and are added to expert 0, ids being distinct otherwise."""
    dense_TE = values_TK.new_zeros((values_TK.shape[0], num_experts))
    return dense_TE.scatter_add_(1, ids_TK.to(torch.int64).clamp(min=0), values_TK)


# ---- counts, maps and loss sums -----------------------------------------------------------------------------------


def count_ids(ids_TK: Tensor, num_experts: int, sequence_T: Tensor | None = None, sequences: int = 1) -> Tensor:
    """int32 [E], or [S, E] with the sequence of each row; -1 ids (and sequence -1) are not counted."""
    flat = ids_TK.to(torch.int64)
    bins = num_experts * sequences
    if sequence_T is not None:
        flat = torch.where((sequence_T >= 0)[:, None] & (flat >= 0), flat + sequence_T[:, None] * num_experts, bins)
    else:
        flat = torch.where(flat >= 0, flat, bins)
    flat = flat.flatten()
    counts = torch.zeros(bins + 1, dtype=torch.int32, device=ids_TK.device)
    counts.index_add_(0, flat, torch.ones_like(flat, dtype=torch.int32))
    return counts[:bins].clone() if sequence_T is None else counts[:bins].view(sequences, num_experts).clone()


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
    return (chosen.reshape(num_tokens, -1, 8) * bits).sum(dim=2, dtype=torch.uint8)


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
    lengths = torch.diff(cu_seqlens.to(torch.int64))
    body_TE = rows_TE
    if rows_TE.device.type == "cpu":
        body_TE = rows_TE[int(cu_seqlens[0]) : int(cu_seqlens[-1])].contiguous()
    return torch.segment_reduce(body_TE, "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0)


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
    if d_score_sum is None and d_z is None and d_scores is None:
        return None
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
    return torch.where(ids_TK[:, :1] >= 0, dx_TE, 0.0)


def _scores_backward(g_TE: Tensor, x_TE: Tensor, score_function: str) -> Tensor:
    if score_function == "softmax":
        p_TE = torch.softmax(x_TE, dim=1)
        return p_TE * (g_TE - (g_TE * p_TE).sum(dim=1, keepdim=True))
    y_TE = score(x_TE, score_function)
    total_T1 = y_TE.sum(dim=1, keepdim=True) + EPS
    u_TE = g_TE / total_T1 - (g_TE * y_TE).sum(dim=1, keepdim=True) / (total_T1 * total_T1)
    return u_TE * score_slope(x_TE, y_TE, score_function)
