"""The ops of an expert-parallel trip on a window of one rank: torch's own checks, epochs, credits, damage."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from moe_layer.dispatch.window import Trip, Window, WindowSize
from moe_layer.dispatch.wire import Link
from moe_layer.errors import CapacityError, DispatchTimeout, RankMismatch
from moe_layer.ops import ep
from moe_layer.ops.sort_slots import sort_slots
from moe_layer.parallel.context import ParallelContext
from tests.distributed.ranks import ThreadRanks

check = torch.library.opcheck
T, K, D, E = 5, 2, 4, 4
DEADLINE_S = 0.05


def link_of(context: ParallelContext) -> Link:
    return Link(context, layer=3, config_hash=1, deadline_s=DEADLINE_S)


@pytest.fixture(scope="module")
def one() -> Iterator[Link]:
    ranks = ThreadRanks(1)
    yield ranks.run(1, link_of)[0]
    ranks.close()


@pytest.fixture()
def window(one: Link) -> Window:
    one.context.failure = None
    one.deadline_s = 10.0  # to make it; a machine may be busy
    window = Window(WindowSize(1, T, 4 * D, 1 + 3 * K, 2, E), one)
    one.deadline_s = DEADLINE_S
    return window


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    ids = torch.tensor([[0, 1], [2, -1], [3, 0], [-1, -1], [1, 2]], dtype=torch.int32)
    return torch.randn(T, D), ids, torch.rand(T, K)


def test_opcheck(window: Window, one: Link) -> None:
    x, ids, weights = inputs()
    check(torch.ops.moe_layer.ep_plan.default, (ids, E, 1))
    tokens, position, counts, places, counts_E = ep.ep_plan(ids, num_experts=E, num_ranks=1)
    trip = window.begin(one.at("dispatch"), width=4 * D, link=one, home=False)
    w = (window.peers, window.state)
    check(
        torch.ops.moe_layer.ep_push.default,
        (*w, x, tokens, counts, ids, places, weights, counts_E, trip.words, 1, False, False),
    )
    check(torch.ops.moe_layer.ep_await.default, (*w, trip.words))
    check(torch.ops.moe_layer.ep_arrange.default, (*w, trip.words, T * K, K, E, 1))
    a = ep.ep_arrange(*w, trip.words, num_rows=T * K, slots=K, num_local=E, alignment=1)
    own = (ids, places, weights, a.base_R1, a.counts_R, a.first_RL, a.offsets_L1)
    check(
        torch.ops.moe_layer.ep_expand.default,
        (*w, x, tokens, *own, trip.words, torch.zeros(T * K, D), 0, T, T * K, False, False, False),
    )
    base = torch.tensor([0, 4], dtype=torch.int32)
    row_CK = torch.tensor([[0, 1], [2, -1], [3, 4], [5, 6]], dtype=torch.int32)
    ids_CK = ids[[0, 1, 2, 4]]
    check(
        torch.ops.moe_layer.ep_take.default,
        (*w, x, tokens, base, counts, row_CK, None, None, trip.words, torch.zeros(7, D), False, None),
    )
    back = window.begin(one.at("combine"), width=4 * D, link=one, home=True)
    rows, probs = torch.randn(7, D), torch.rand(7)
    check(
        torch.ops.moe_layer.ep_reduce_push.default,
        (*w, rows, row_CK, ids_CK, base, probs, back.words, 0, E, 4, False, 1),
    )
    check(
        torch.ops.moe_layer.ep_home.default,
        (*w, rows, row_CK, ids_CK, base, position, ids, probs, x, back.words, 0, 0, E, 4, False),
    )
    check(torch.ops.moe_layer.ep_skip.default, (*w, trip.words))
    dense = window.begin(one.at("dispatch"), width=4 * D, link=one, home=False, dense=True)
    check(torch.ops.moe_layer.ep_push_rows.default, (*w, x, None, dense.words, window.addresses, 0, 0, 0))


@dataclass
class Sent:
    """What one rank sends to itself, and the own words that its recv reads."""

    trip: Trip
    tokens: Tensor
    counts: Tensor
    x: Tensor
    words: tuple[Tensor, Tensor, Tensor]


def push(window: Window, link: Link, x: Tensor, ids: Tensor, weights: Tensor) -> Sent:
    tokens, _, counts, places, counts_E = ep.ep_plan(ids, num_experts=E, num_ranks=1)
    trip = window.begin(link.at("dispatch"), width=4 * D, link=link, home=False)
    extra = {"meta0": ids, "places": places, "meta1": weights, "counts_E": counts_E}
    ep.ep_push(window.peers, window.state, x, tokens, counts, trip.words, **extra, blocks=1)
    return Sent(trip, tokens, counts, x, (ids, places, weights))


def take(window: Window, sent: Sent, out: Tensor) -> None:
    base_R1 = torch.tensor([0, 4], dtype=torch.int32)
    window.take(sent.trip, sent.x, sent.tokens, base_R1, sent.counts, out=out)


def arrange(window: Window, sent: Sent, *, num_rows: int = T * K, alignment: int = 1) -> ep.Arranged:
    words = sent.trip.words
    return ep.ep_arrange(
        window.peers, window.state, words, num_rows=num_rows, slots=K, num_local=E, alignment=alignment
    )


def expand(window: Window, sent: Sent, arranged: ep.Arranged, out: Tensor, *, compact: bool = True) -> ep.Expanded:
    got = ep.ep_expand(
        window.peers,
        window.state,
        sent.x,
        sent.tokens,
        sent.words,
        arranged,
        sent.trip.words,
        first_expert=0,
        num_compact=T,
        num_rows=T * K if compact else out.shape[0],
        compact=compact,
        out=out,
    )
    window.received(sent.trip)
    return got


def test_slots_are_reused_for_ever(window: Window, one: Link) -> None:
    """Epochs count up; rows, ids and weights of each trip arrive; credits come back."""
    x, ids, weights = inputs()
    for _ in range(9):
        x = x + 1
        sent = push(window, one, x, ids, weights)
        arranged = arrange(window, sent)
        assert arranged.counts_R.tolist() == [4] and arranged.base_R1.tolist() == [0, 4]
        out = torch.full((T, D), 7.0)
        got = expand(window, sent, arranged, out)
        assert got.token_C.tolist() == [0, 1, 2, 4, -1]
        assert torch.equal(got.ids_CK[:4], ids[[0, 1, 2, 4]])
        assert torch.equal(out[:4], x[[0, 1, 2, 4]]) and (out[4] == 7).all()
    assert window.state[ep.STATE_HEAD : ep.STATE_HEAD + 2].tolist() == [9, 9]


@pytest.mark.parametrize("alignment", [1, 4])
def test_rows_are_those_of_sort_slots(window: Window, one: Link, alignment: int) -> None:
    """Places and counts that travelled give the order that sorting the slots gives."""
    x, ids, weights = inputs()
    ids[1, 1] = 2  # an expert twice
    sent = push(window, one, x, ids, weights)
    N = T * K + 3 * E
    arranged, out = arrange(window, sent, num_rows=N, alignment=alignment), torch.full((N, D), 7.0)
    got = expand(window, sent, arranged, out, compact=False)
    compact = torch.cat((ids[[0, 1, 2, 4]], torch.full((1, K), -1, dtype=torch.int32)))
    want = sort_slots(compact, first_expert=0, num_local=E, alignment=alignment, num_rows=N)
    for name in ("row_CK", "slot_N"):
        assert torch.equal(getattr(got, name), getattr(want, name)), name
    assert torch.equal(arranged.offsets_L1, want.offsets_L1) and torch.equal(arranged.counts_L, want.counts_L)
    live = got.slot_N >= 0
    token_N = got.token_C[got.slot_N[live].long() // K].long()
    assert torch.equal(out[live], x[token_N])
    end = int(want.offsets_L1[-1])
    assert (out[:end][~live[:end]] == 0).all() and (out[end:] == 7).all()
    assert torch.equal(got.probs_N[live], weights[[0, 1, 2, 4]].flatten()[got.slot_N[live].long()])
    assert (got.probs_N[~live] == 0).all()
    window.check(one)


@pytest.mark.parametrize("damage", [-1, 10**6])
def test_a_count_of_slots_that_cannot_be_is_refused(window: Window, one: Link, damage: int) -> None:
    x, ids, weights = inputs()
    sent = push(window, one, x, ids, weights)
    where = window.size.offsets(0)
    window.memory[where["meta"] :][: where["meta_block"]].view(torch.int32)[-4] = damage
    arranged, out = arrange(window, sent), torch.zeros(T, D)
    assert arranged.offsets_L1.tolist() == [0] * (E + 1)
    got = expand(window, sent, arranged, out)
    assert (got.row_CK == -1).all() and (got.index_N == 0).all() and out.isnan().all()
    with pytest.raises(RankMismatch, match=rf"announced {damage} rows"):
        window.check(one)


def test_epochs_wrap(window: Window, one: Link) -> None:
    near_end = torch.iinfo(torch.int32).max
    where = window.size.offsets(0)
    window.memory[where["credit"] :][:4].view(torch.int32).fill_(near_end)
    window.memory[where["header"] :][: ep.HEADER_BYTES].view(torch.int32)[1::2] = near_end
    window.state[ep.STATE_HEAD : ep.STATE_HEAD + 2] = near_end
    x, ids, weights = inputs()
    for _ in range(3):
        sent = push(window, one, x, ids, weights)
        out = torch.zeros(T, D)
        take(window, sent, out)
        window.check(one)
        assert torch.equal(out[:4], x[[0, 1, 2, 4]])
    assert int(window.state[ep.STATE_HEAD]) == torch.iinfo(torch.int32).min + 2


def test_ring_is_bounded_and_dropped_handles_come_back(window: Window, one: Link) -> None:
    x, ids, weights = inputs()
    trips = [push(window, one, x, ids, weights) for _ in range(2)]
    with pytest.raises(CapacityError, match=r"2 trips .* layer 3, step 0, phase dispatch; raise dispatch.ring_depth"):
        push(window, one, x, ids, weights)
    trips.clear()
    for _ in range(5):
        push(window, one, x, ids, weights)  # dropped at once
    window.check(one)


def test_a_send_waits_for_the_credit(window: Window, one: Link) -> None:
    x, ids, weights = inputs()
    push(window, one, x, ids, weights).trip.taken()  # the host believes it, the device knows better
    push(window, one, x, ids, weights)
    with pytest.raises(DispatchTimeout, match="rank 0 reached epoch 0 of 1"):
        window.check(one)


@pytest.mark.parametrize("part", ["header", "flags"])
def test_nothing_arrives(window: Window, one: Link, part: str) -> None:
    """Another rank's word stays behind: the output is NaN, the error typed and sticky."""
    x, ids, _weights = inputs()
    size = WindowSize(2, T, 4 * D, 1 + 3 * K, 2)
    pair = Window.__new__(Window)
    pair.__dict__ = {**window.__dict__, "size": size, "memory": torch.zeros(size.num_bytes, dtype=torch.uint8)}
    pair.peers = torch.tensor([pair.memory.data_ptr()] * 2)
    tokens, _, counts, *_ = ep.ep_plan(ids, num_experts=E, num_ranks=2)
    trip = pair.begin(one.at("dispatch"), width=4 * D, link=one, home=False)
    ep.ep_push(pair.peers, pair.state, x, tokens, counts, trip.words, blocks=1)
    where = size.offsets(0)
    if part == "flags":  # the header of rank 1 is there, its rows are not
        header = pair.memory[where["header"] :][:128].view(torch.int32)
        header[16:32] = header[0:16]
    out = torch.zeros(2 * T, D)
    base = torch.tensor([0, T, 2 * T], dtype=torch.int32)
    pair.take(trip, x, tokens, base, torch.tensor([int(counts[0]), 3], dtype=torch.int32), out=out)
    assert out.isnan().all()
    with pytest.raises(DispatchTimeout, match="rank 1 reached epoch 0 of 1"):
        pair.check(one)
    one.context.failure = None
    again = torch.zeros(2 * T, D)
    ep.ep_take(pair.peers, pair.state, x, tokens, base, counts, trip.words, out=again)
    assert again.isnan().all()


@pytest.mark.parametrize("word,name", [(1, "layer"), (2, "phase"), (3, "step"), (0, "width")])
def test_another_header_is_a_mismatch(window: Window, one: Link, word: int, name: str) -> None:
    x, ids, weights = inputs()
    sent = push(window, one, x, ids, weights)
    window.memory[window.size.offsets(0)["header"] :][:64].view(torch.int32)[2 * word] += 1
    out = torch.zeros(T, D)
    take(window, sent, out)
    assert out.isnan().all()
    with pytest.raises(RankMismatch, match=rf"rank 0 is elsewhere at layer 3.*: its {name} is "):
        window.check(one)


def test_a_count_that_cannot_be_is_refused(window: Window, one: Link) -> None:
    x, ids, weights = inputs()
    trip = push(window, one, x, ids, weights).trip
    window.memory[window.size.offsets(0)["header"] :][:64].view(torch.int32)[2 * 6] = 10**6
    counts, _ = ep.ep_await(window.peers, window.state, trip.words)
    assert counts.tolist() == [0]
    with pytest.raises(RankMismatch, match="1000000 rows"):
        window.check(one)


def test_sizes_add_up() -> None:
    """Regions of the slots do not overlap and end with the window."""
    for size in (WindowSize(2, 100, 48, 9, 2), WindowSize(8, 4096, 14336, 17, 3, 32), WindowSize(1, 1, 16, 1, 1)):
        spans = []
        for slot in range(2 * size.depth):
            at = size.offsets(slot)
            R = size.ranks
            spans += [
                (at["credit"], 4 * R),
                (at["flags"], 4 * R * at["max_chunks"]),
                (at["header"], ep.HEADER_BYTES * R),
                (at["meta"], size.meta_block * R),
                (at["data"], size.data_block * R),
            ]
            assert at["data"] % 16 == 0 and size.data_block >= size.max_tokens * size.row_bytes
        spans.sort()
        assert all(a + n <= b for (a, n), (b, _) in itertools.pairwise(spans))
        assert spans[-1][0] + spans[-1][1] == size.num_bytes
