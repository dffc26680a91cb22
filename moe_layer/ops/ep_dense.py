"""Dense push, see moe_layer/ops/ep.py: all rows of a rank go to every peer, token t as row t, before anybody knows
which of them are needed: `ep_push_rows`. The words that say so follow by `ep_push(dense=True)`.

Shape letters: T tokens, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.ep_model import Failed, Trip, as_bytes, encoded_rows


def ep_push_rows(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    trip: Tensor,
    *,
    encoded: Tensor | None = None,
    addresses: Tensor,
    streams: tuple[int, int, int] = (0, 0, 0),
) -> None:
    """Begin a dense trip: wait until every peer has read the slot's last one, count this one as sent, copy all rows
    into each peer's window, `chunk_rows` of them under a flag, first half of them, then half of what is left.

    Copies cannot be held back once they are in a CUDA stream. A rank that must go on without its credits notes that in
    all windows: `ep_take` looks there once it has read, and fails instead of trusting rows that may be overwritten.

    Args:
        rows: `[T, width bytes]` contiguous, any dtype; with `encoded` bf16.
        encoded: uint8 `[T, width]`, written: e4m3 rows (ops/fp8_rows.py), which travel in place of `rows`.
        addresses: int64 on the CPU, the same as `peers`: copies are issued by the host.
        streams: handles of CUDA streams, 0: the current one. The stream of the words, which then waits for the credits;
            that of the flags, which is the last to end; that of the copies.
    """
    op = torch.ops.moe_layer.ep_push_rows
    call_plain(op, peers, state, rows, encoded, trip, addresses, *streams)


@torch.library.custom_op("moe_layer::ep_push_rows", mutates_args=("state", "encoded"))
def _ep_push_rows(
    peers: Tensor,
    state: Tensor,
    rows: Tensor,
    encoded: Tensor | None,
    trip: Tensor,
    addresses: Tensor,
    words_stream: int,
    flags_stream: int,
    copies_stream: int,
) -> None:
    t = Trip(peers, state, trip)
    try:
        t.start()
        t.wait_credits()
    except Failed:
        t.give_up()
        return
    t.sent.add_(1)
    source = as_bytes(rows) if encoded is None else encoded.copy_(encoded_rows(rows, t.width))
    t.send_rows(lambda peer, count: source, [rows.shape[0]] * t.ranks, epoch=t.sent)
