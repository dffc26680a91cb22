"""Rows that arrive with words, see moe_layer/ops/ep.py: `ep_expand`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.ep_arrange import Arranged
from moe_layer.ops.ep_model import HEADER_BYTES, Failed, Trip, poison
from moe_layer.ops.ep_receive import arrived_rows, store_rows


class Expanded(NamedTuple):
    """Compact rows in (source, token) order and the rows of their slots. int32 but for the probabilities.

    token_C, rank_C: where a compact row comes from; ids_CK: ids of local experts; row_CK: the slot's row; -1 in all
    four: none. slot_N: flat slot `c*K + k` of each row, -1 for pads and the tail; probs_N: fp32, 0 there; index_N:
    `[0]` unless `compact`: compact row of each row, 0 for pads and the tail.
    """

    token_C: Tensor
    rank_C: Tensor
    ids_CK: Tensor
    row_CK: Tensor
    slot_N: Tensor
    probs_N: Tensor
    index_N: Tensor


def ep_expand(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    tokens_RS: Tensor,
    words: tuple[Tensor, Tensor, Tensor],
    arranged: Arranged,
    trip: Tensor,
    *,
    first_expert: int,
    num_compact: int,
    num_rows: int,
    compact: bool,
    out: Tensor,
    fp8: bool = False,
    dense: bool = False,
) -> Expanded:
    """`ep_take` of rows that come with words: every slot gets its row, by (expert, source, token, slot), which is the
    order of `sort_slots`, and its weight.

    Args:
        rows, tokens_RS: what this rank itself sent in the trip, and
        words: ids_TK, places_TK (int32) and weights_TK (fp32): the words of its own rows.
        arranged: what `ep_arrange` found. num_compact, num_rows: C and N, of the outputs.
        compact: rows stay as they come.
        out: `[N, width bytes]`, pads become zeros; with `compact` `[C, width bytes]`. As in `ep_take` otherwise.
        dense: of a dense push; its rows lie where their tokens say.

    After a failure the tables are as if nothing had come.
    """
    a = arranged
    op = torch.ops.moe_layer.ep_expand
    sizes = (first_expert, num_compact, num_rows, compact, fp8, dense)
    given = (*words, a.base_R1, a.counts_R, a.first_RL, a.offsets_L1)
    return Expanded(*call_plain(op, peers, state, rows, tokens_RS, *given, trip, out, *sizes))


@torch.library.custom_op("moe_layer::ep_expand", mutates_args=("state", "out"))
def _ep_expand(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    tokens: Tensor,
    ids_TK: Tensor,
    places_TK: Tensor,
    weights_TK: Tensor,
    base: Tensor,
    counts: Tensor,
    first_RL: Tensor,
    offsets: Tensor,
    trip: Tensor,
    out: Tensor,
    first_expert: int,
    num_compact: int,
    num_rows: int,
    compact: bool,
    fp8: bool,
    dense: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    t, K, L = Trip(peers, state, trip), ids_TK.shape[1], first_RL.shape[1]
    tables = _no_rows(num_compact, num_rows, K, compact)
    token, rank, ids, row, slot, probs, index = tables
    try:
        t.start()
        if not compact and out.numel():
            for e in range(L):
                out[int(first_RL[-1, e]) : int(offsets[e + 1])] = 0
        for source, count in enumerate(counts.tolist()):
            words = t.meta(t.me, source, count, 1 + 3 * K)
            if dense and source != t.me:
                t.wait(source, "header", (source + 1) * HEADER_BYTES // 4 - 1, epoch=int(t.received) + 1)
            places = words[:, 0] if dense else None
            arrived = arrived_rows(t, rows, tokens, source=source, count=count, fp8=fp8, places=places)
            mine = slice(int(base[source]), int(base[source]) + count)
            if source == t.me:
                token[mine] = tokens[t.me, :count]
                expert, place, weight = (w.index_select(0, token[mine]) for w in (ids_TK, places_TK, weights_TK))
            else:
                token[mine] = words[:, 0]
                expert, place, weight = (words[:, 1 + i * K : 1 + (i + 1) * K] for i in range(3))
                weight = weight.contiguous().view(torch.float32)
            rank[mine] = source
            local = (expert >= first_expert) & (expert < first_expert + L)
            ids[mine] = torch.where(local, expert, -1)
            e = torch.where(local, expert - first_expert, 0).long()
            at, end = first_RL[source][e] + place, first_RL[source + 1][e]
            fits = local & (place >= 0) & (at < end) & (at < num_rows)
            row[mine] = torch.where(fits, at, -1).int()
            flat = torch.arange(mine.start * K, mine.stop * K, dtype=torch.int32).view(count, K)
            target = at[fits].long()
            slot[target], probs[target] = flat[fits], weight[fits]
            if compact:
                index[target] = flat[fits] // K
                store_rows(out, arrived, torch.arange(mine.start, mine.stop), torch.arange(count))
            else:
                store_rows(out, arrived, target, fits.nonzero()[:, 0])
        t.check_peers()
    except Failed:
        poison(out)
        return _no_rows(num_compact, num_rows, K, compact)
    t.finish_receiving()
    return tables


def _no_rows(
    num_compact: int, num_rows: int, slots: int, compact: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The tables when nothing has come."""
    token, rank = (torch.full((num_compact,), -1, dtype=torch.int32) for _ in range(2))
    ids, row = (torch.full((num_compact, slots), -1, dtype=torch.int32) for _ in range(2))
    slot, probs = torch.full((num_rows,), -1, dtype=torch.int32), torch.zeros(num_rows)
    return token, rank, ids, row, slot, probs, torch.zeros(num_rows * compact, dtype=torch.int32)


@_ep_expand.register_fake
def _(peers, state, rows, tokens, ids_TK, *rest):  # type: ignore[no-untyped-def]
    _, num_compact, num_rows, compact, *_ = rest[-6:]
    C, N, K = (num_compact,), (num_rows,), ids_TK.shape[1]
    shapes = (C, C, (*C, K), (*C, K), N, N, (num_rows * compact,))
    new = [peers.new_empty(shape, dtype=torch.float32 if i == 5 else torch.int32) for i, shape in enumerate(shapes)]
    return tuple(new)
