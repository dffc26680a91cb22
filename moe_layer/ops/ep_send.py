"""The sending half of a trip, see moe_layer/ops/ep.py: `ep_plan`, `ep_push`, `ep_reduce_push`."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.ep_model import WIRE_CODES, WIRES, Failed, Trip, as_bytes, encoded_rows, partial_rows, slot_values
from moe_layer.ops.sort_slots import sort_slots


def ep_plan(ids_TK: Tensor, *, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Which tokens go to which rank, and in which order slots meet at an expert; nothing is read on the host.

    Args: int32 ids in [-1, num_experts).
    Returns: int32 tokens_RT (ascending tokens of each destination; past its count undefined), position_TR (place of
    the token in that list, -1 = not sent), counts_R; places_TK (each slot's place among the slots of its expert by
    (token, slot), -1 where absent), counts_E (slots of each expert).
    """
    return call_plain(torch.ops.moe_layer.ep_plan, ids_TK, num_experts, num_ranks)


@torch.library.custom_op("moe_layer::ep_plan", mutates_args=())
def _ep_plan(ids: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    T, K = ids.shape
    rank_TK = torch.where(ids >= 0, ids.long() * num_ranks // num_experts, num_ranks)
    goes_TR = torch.zeros(T, num_ranks + 1, dtype=torch.bool, device=ids.device).scatter_(1, rank_TK, True)[:, :-1]
    position_TR = torch.where(goes_TR, goes_TR.int().cumsum(0) - 1, -1)
    token_TR = torch.arange(T, device=ids.device).unsqueeze(1).expand(T, num_ranks)
    target_TR = torch.where(goes_TR, position_TR, T).long()
    tokens_RT = torch.zeros(num_ranks, T + 1, dtype=torch.int32, device=ids.device)
    tokens_RT.scatter_(1, target_TR.T, token_TR.T.int())
    order = sort_slots(ids, first_expert=0, num_local=num_experts, alignment=1, num_rows=T * K)
    first_TK = order.offsets_L1.index_select(0, ids.clamp_min(0).flatten()).view(T, K)
    place_TK = torch.where(order.row_CK >= 0, order.row_CK - first_TK, -1)
    return tokens_RT[:, :T].contiguous(), position_TR.int(), goes_TR.sum(0).int(), place_TK, order.counts_L


@_ep_plan.register_fake
def _(ids, num_experts, num_ranks):  # type: ignore[no-untyped-def]
    T, K = ids.shape
    shapes = ((num_ranks, T), (T, num_ranks), (num_ranks,), (T, K), (num_experts,))
    new = [ids.new_empty(shape, dtype=torch.int32) for shape in shapes]
    return tuple(new)


def ep_push(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    tokens_RS: Tensor,
    counts_R: Tensor,
    trip: Tensor,
    *,
    meta0: Tensor | None = None,
    places: Tensor | None = None,
    meta1: Tensor | None = None,
    counts_E: Tensor | None = None,
    blocks: int,
    fp8: bool = False,
    dense: bool = False,
) -> None:
    """Send `rows[tokens_RS[r, i]]` to rank r as its row i, i < counts_R[r]; words of meta0 and meta1 go with them.

    Args:
        peers: int64 `[R]`, addresses of the windows. state: int32. trip: int64 on the CPU, see TRIP_WORDS.
        rows: `[T, width bytes]` contiguous, any dtype; with `fp8` bf16, encoded on the way (ops/fp8_rows.py).
        tokens_RS, counts_R: int32. Rows of this rank itself are not copied; its header and counts are.
        meta0, places, meta1: int32 or fp32 `[T, M]`: a row's words are its token index, then these, in this order.
        counts_E: int32, with the words: each rank gets those of its own experts, before any row.
        blocks: thread blocks, which is the number of multiprocessors that the send occupies at most; 0: as many as
            serve the link.
        dense: headers and words alone, of a trip that `ep_push_rows` began.
    """
    op = torch.ops.moe_layer.ep_push
    call_plain(op, peers, state, rows, tokens_RS, counts_R, meta0, places, meta1, counts_E, trip, blocks, fp8, dense)


@torch.library.custom_op("moe_layer::ep_push", mutates_args=("state",))
def _ep_push(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    tokens: Tensor,
    counts: Tensor,
    meta0: Tensor | None,
    places: Tensor | None,
    meta1: Tensor | None,
    counts_E: Tensor | None,
    trip: Tensor,
    blocks: int,
    fp8: bool,
    dense: bool,
) -> None:
    t = Trip(peers, state, trip)
    try:
        t.start()
        if not dense:
            t.wait_credits()
    except Failed:
        return
    epoch, count_R = t.sent + (not dense), counts.tolist()
    for peer in range(t.ranks):
        if counts_E is not None:
            own = counts_E.view(t.ranks, -1)[peer]
            pairs = t.expert_counts(peer, t.me, own.numel())
            pairs[:, 0], pairs[:, 1] = own, epoch
    t.write_headers(count_R, epoch=epoch)
    for peer in range(t.ranks):
        index = tokens[peer, : count_R[peer]]
        extra = [m.view(torch.int32).index_select(0, index) for m in (meta0, places, meta1) if m is not None]
        if extra and peer != t.me:
            words = torch.cat([index.unsqueeze(1), *extra], dim=1)
            t.meta(peer, t.me, count_R[peer], words.shape[1]).copy_(words)
            t.words_ready(peer, t.me).copy_(epoch)
    if dense:
        return
    source = encoded_rows(rows, t.width) if fp8 else as_bytes(rows)
    t.send_rows(lambda peer, count: source.index_select(0, tokens[peer, :count]), count_R, epoch=epoch)
    t.sent.add_(1)


def ep_reduce_push(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    row_CK: Tensor,
    ids_CK: Tensor,
    base_R1: Tensor,
    trip: Tensor,
    *,
    probs_N: Tensor | None = None,
    wire: torch.dtype,
    num_experts: int,
    tree_blocks: int,
    compact: bool = False,
    blocks: int,
) -> None:
    """Send compact rows home: for c in [base_R1[r], base_R1[r+1]) the tree sum of `rows[row_CK[c]]`, rounded to `wire`.

    Args:
        rows: `[N, D]`, or with `compact` `[C, D]`, already summed. row_CK, ids_CK: as in `tree_reduce`.
        probs_N: optional fp32; `probs_N[row_CK[c]]` (0 where absent) travels as the row's K meta words.
    """
    code = WIRE_CODES[wire]
    op = torch.ops.moe_layer.ep_reduce_push
    call_plain(
        op, peers, state, rows, row_CK, ids_CK, base_R1, probs_N, trip, code, num_experts, tree_blocks, compact, blocks
    )


@torch.library.custom_op("moe_layer::ep_reduce_push", mutates_args=("state",))
def _ep_reduce_push(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    row_index: Tensor,
    ids: Tensor,
    base: Tensor,
    probs: Tensor | None,
    trip: Tensor,
    wire: int,
    num_experts: int,
    tree_blocks: int,
    compact: bool,
    blocks: int,
) -> None:
    t = Trip(peers, state, trip)
    try:
        t.start()
        t.wait_credits()
    except Failed:
        return
    begin = base.tolist()
    count_R = [begin[r + 1] - begin[r] for r in range(t.ranks)]
    part = partial_rows(rows, row_index, ids, num_experts, tree_blocks, compact)[: begin[-1]]
    source = as_bytes(part.to(WIRES[wire]))
    t.write_headers(count_R, epoch=t.sent + 1)
    for peer in range(t.ranks):
        if probs is not None and peer != t.me:
            words = slot_values(probs, row_index[begin[peer] : begin[peer + 1]])
            t.meta(peer, t.me, count_R[peer], words.shape[1]).copy_(words.view(torch.int32))
    t.send_rows(lambda peer, count: source[begin[peer] : begin[peer] + count], count_R, epoch=t.sent + 1)
    t.sent.add_(1)
