"""The expert-parallel trips over memory that every rank can reach: ten ops, each with a CPU body.

The bodies are the protocol's readable model: they work on raw addresses (`peers`), so threads of one process or
processes that share memory can play the ranks, and csrc/ep_*.cu are their twins over NVLink. What lies where, and the
words of a `trip`, are described in moe_layer/dispatch/window.py.

A trip moves rows from every rank to every rank through one *slot* of the windows:

    sender   waits for the slot's credit (the receiver has read the previous trip's rows), then writes into the
             receiver's window: counts and a header, the rows with a few words each (`meta`); after each chunk a flag.
    receiver waits for the header and compares it with its own; reads rows as their flags come; gives the credit back.

In a *dense* push the rows go first, all of them, token t as row t (`ep_push_rows`); the words that say which
ones are needed follow (`ep_push(dense=True)`).

Flags are epochs: the number of trips made through the slot, counted in `state` on the device, so that nothing is reset
and a captured CUDA graph can be replayed. Headers and counts carry the epoch in every word, and need no flag. Every
wait has a deadline. What goes wrong is kept in `state` (the first report stays), later ops do nothing, and outputs are
filled with 0xFF bytes, a NaN in every floating dtype.

Shape letters: T tokens, K slots, R ranks, S the longest list of rows, C compact rows, N expert-major rows, D hidden.

The model of a trip is ep_model.py; the ops are in ep_send, ep_dense, ep_arrange, ep_expand and ep_receive.
"""

from moe_layer.ops.ep_arrange import Arranged, ep_arrange, ep_await
from moe_layer.ops.ep_dense import ep_push_rows
from moe_layer.ops.ep_expand import Expanded, ep_expand
from moe_layer.ops.ep_model import (
    BAD_COUNT,
    COMPARED,
    GAVE_UP,
    HEADER_BYTES,
    MISMATCH,
    OVERFLOW,
    PEER_OVERFLOW,
    SLOT_WORDS,
    STATE_HEAD,
    TIMEOUT,
    TRIP_WORDS,
)
from moe_layer.ops.ep_receive import ep_home, ep_skip, ep_take
from moe_layer.ops.ep_send import ep_plan, ep_push, ep_reduce_push

__all__ = [
    "BAD_COUNT",
    "COMPARED",
    "GAVE_UP",
    "HEADER_BYTES",
    "MISMATCH",
    "OVERFLOW",
    "PEER_OVERFLOW",
    "SLOT_WORDS",
    "STATE_HEAD",
    "TIMEOUT",
    "TRIP_WORDS",
    "Arranged",
    "Expanded",
    "ep_arrange",
    "ep_await",
    "ep_expand",
    "ep_home",
    "ep_plan",
    "ep_push",
    "ep_push_rows",
    "ep_reduce_push",
    "ep_skip",
    "ep_take",
]
