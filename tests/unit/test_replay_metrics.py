"""RoutingSession.metrics: counts against loops, blocks apart from each other, the alignment alarm."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from moe_layer import RoutingSession, RoutingTrace, TraceError
from tests.unit.replay_models import (
    LAYERS,
    D,
    E,
    K,
    T,
    batch,
    make_model,
    make_trace,
    random_ids,
    record,
)

# ---- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_against_loops() -> None:
    model = make_model()
    live = record(model, batch())
    other = make_trace(seed=8)
    session = RoutingSession(model)
    with session.compare(other):
        y = model(batch())
    assert torch.equal(y, model(batch())), "compare changes nothing"
    m = session.metrics()
    a, b = live.wide_ids().tolist(), other.wide_ids().tolist()
    pairs = [(set(a[t][i]), set(b[t][i])) for t in range(T) for i in range(2)]
    assert m.rows_compared == len(pairs)
    assert m.mismatch == pytest.approx(sum(p != q for p, q in pairs) / len(pairs))
    assert m.overlap == pytest.approx(sum(len(p & q) for p, q in pairs) / len(pairs) / K)
    assert m.zero_overlap == pytest.approx(sum(not p & q for p, q in pairs) / len(pairs))
    assert m.token_mismatch == pytest.approx(
        sum(any(set(a[t][i]) != set(b[t][i]) for i in range(2)) for t in range(T)) / T
    )
    assert m.mismatch_by_layer[LAYERS[0]] == pytest.approx(sum(p != q for p, q in pairs[::2]) / T)
    assert m.margin > 0 and m.margin_mismatched > 0 and m.rows_replayed == 0
    assert session.metrics().rows_compared == 0, "reading starts a new interval"


def test_replay_counts_and_measures() -> None:
    ids = random_ids(seed=6)
    ids[0, :, 1] = -1
    ids[1] = -1
    trace = RoutingTrace.from_ids(ids, num_experts=E, layers=LAYERS)
    model = make_model()
    session = RoutingSession(model)
    with session.replay(trace, measure=True):
        model(batch())
    m = session.metrics()
    assert (m.rows_replayed, m.slots_replayed, m.slots_filled) == (2 * (T - 1), 2 * (K * T - 3), 6)
    assert m.rows_compared == 2 * T and 0 < m.mismatch < 1
    assert m.scalars()["replay/slots_filled"] == 6.0


def test_blocks_that_raise_count_nothing() -> None:
    """What one block saw of a token never mixes with another block's: after an error, and in parts of other sizes."""
    model, x = make_model(), batch().flatten(0, 1)
    session, trace = RoutingSession(model), make_trace(seed=8)
    with session.compare(trace):
        model(x)
    expected = session.metrics()
    for block in (session.compare(trace), session.replay(trace, measure=True)):
        with pytest.raises(ZeroDivisionError), block:
            model.blocks[0](x)
            raise ZeroDivisionError
    assert session.metrics().scalars() == dict.fromkeys(expected.scalars(), 0.0)
    with session.compare(trace):  # the first part ends where the failed blocks' only call did
        for rows in (x[:5], x[5:]):
            model(rows)
    assert session.metrics().scalars() == pytest.approx(expected.scalars())


def test_blocks_of_two_threads_count_apart() -> None:
    model, traces = make_model(), [make_trace(seed=8), record(make_model(), batch())]
    session, barrier = RoutingSession(model), threading.Barrier(2)
    expected = []
    for trace in traces:
        with session.compare(trace):
            model(batch())
        expected.append(session.metrics())

    def one(trace: RoutingTrace) -> None:
        with torch.no_grad(), session.compare(trace):
            x = model.blocks[0](batch())
            barrier.wait()  # both have seen the same tokens in the first layer
            model.blocks[1](x)

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(one, traces))
    m = session.metrics()
    assert m.rows_compared == sum(e.rows_compared for e in expected)
    assert m.token_mismatch == pytest.approx(sum(e.token_mismatch for e in expected) / 2)


def test_counters_of_a_capture_are_complete_when_it_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    """A graph may be captured inside the block: what only the block's end adds would be missing in every launch."""
    from moe_layer.replay import metrics

    model = make_model()
    session = RoutingSession(model)
    with session.replay(make_trace(seed=8), measure=True):
        model(batch())
    expected = session.metrics()
    monkeypatch.setattr(metrics, "is_capturing", lambda tensor: True)
    with session.replay(make_trace(seed=8), measure=True):
        model(batch())
        assert session.metrics() == expected
    assert session.metrics().rows_replayed == 0


def test_alarm_for_a_trace_shifted_by_one_token() -> None:
    """Aligned: silent. Shifted by one row: it fires, as does the token check when ids are at hand."""
    model = make_model(seed=5, experts=8)
    x = torch.randn(1, 400, D)
    trace = record(model, x)
    session = RoutingSession(model)
    with session.compare(trace):
        model(x)
    session.metrics().check_alignment()
    index = torch.arange(400) - 1
    with session.compare(trace.plan(index, layers=session.layers)):
        model(x)
    with pytest.raises(TraceError, match="the trace is shifted"):
        session.metrics().check_alignment()
    with session.replay(trace.plan(index, layers=session.layers), measure=True):
        model(x)
    assert session.metrics().zero_overlap > 0.2
    with session.replay(trace.plan(index, layers=session.layers)):
        model(x)
    with pytest.raises(TraceError, match="798 router calls were replayed and none was compared"):
        session.metrics().check_alignment()
