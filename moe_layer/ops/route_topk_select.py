"""Which experts a row gets: keys, order, groups, replayed ids and the events, in plain PyTorch.

T tokens, E experts, K top-k, G groups. The order of a row: finite experts by descending key, then those whose key or
logit is not finite; equal keys by ascending expert id. Nothing reads device memory on CUDA. On the CPU a read is free,
so rows that are all finite take a shorter way to the same ids.

Scores are composed of exp, log1p, sqrt and division: `torch.sigmoid` rounds differently in its vector body and its
scalar tail on the CPU, so equal inputs would get unequal keys depending on where they stand.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ID_BITS = 20
"""Low bits of a packed key: room for 2^20 experts under 32 bits of key and 2 of class."""
FEW = 10
"""Up to this top_k the CPU takes maxima one by one: T 2048, E 16, K 4 in 0.18 ms; packed 0.32, stable sort 0.56."""
BROKEN_KEY = -1e30
"""A group's sum counts this for a key that is not finite, so that groups with more finite experts come first."""


class Selected(NamedTuple):
    """ids_TK int64 (-1 in invalid rows), live_TK the unbiased ungrouped ids (empty unless asked), events int32 [8]."""

    ids_TK: Tensor
    live_TK: Tensor
    events: Tensor


def score(x: Tensor, score_function: str) -> Tensor:
    """Elementwise score (sigmoid or sqrtsoftplus)."""
    if score_function == "sigmoid":
        return 1 / (1 + torch.exp(-x))
    return torch.where(x > 20, x, torch.log1p(torch.exp(torch.clamp(x, max=20)))).sqrt()


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
    if ok_TE is None and key_TE.device.type == "cpu" and top_k <= FEW:
        return _repeated_max(key_TE, blocked_TE, top_k)
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


def _repeated_max(key_TE: Tensor, blocked_TE: Tensor | None, top_k: int) -> Tensor:
    """`best` for finite keys by top_k passes; torch.max returns the first of equal maxima (documented)."""
    key_TE = key_TE.clone() if blocked_TE is None else key_TE.masked_fill(blocked_TE, -torch.inf)
    ids_TK = torch.empty((key_TE.shape[0], top_k), dtype=torch.int64, device=key_TE.device)
    for slot in range(top_k):
        id_T1 = torch.max(key_TE, dim=1, keepdim=True).indices
        ids_TK[:, slot : slot + 1] = id_T1
        if slot + 1 < top_k:
            key_TE.scatter_(1, id_T1, -torch.inf)
    return ids_TK


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
    rest_TGm = usable_TE.view(num_tokens, num_groups, size).clone()
    total_TG = torch.zeros((), dtype=key_TE.dtype, device=key_TE.device)
    for index in range(count):
        top_TG1, at_TG1 = torch.max(rest_TGm, dim=2, keepdim=True)
        total_TG = total_TG + top_TG1[..., 0]
        if index + 1 < count:
            rest_TGm.scatter_(2, at_TG1, -torch.inf)
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
    # Open groups hold at least K experts, so there are always enough left that are neither taken nor closed.
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
