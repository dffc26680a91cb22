"""RoutingSession.record: what is kept, of which layers, in which rows; sessions and models, names and copies."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from torch import Tensor

from moe_layer import RoutingError, RoutingSession, RoutingTrace, TraceError
from tests.unit.replay_models import (
    LAYERS,
    D,
    K,
    T,
    batch,
    make_model,
    make_trace,
    record,
)


def test_recording_refuses_layers_that_ran_differently() -> None:
    model = make_model()
    with (
        RoutingSession(model) as session,
        pytest.raises(TraceError, match="run the whole model inside record"),
        session.record(),
    ):
        model.blocks[0](batch())


def test_a_model_that_is_one_layer_and_wrapped_names() -> None:
    layer = make_model().blocks[0].moe
    with RoutingSession(layer) as session:
        assert session.layers == (".",)
        with session.record() as recording:
            layer(torch.randn(3, D))
        assert recording.trace().num_tokens == 3
    wrapped = torch.nn.Sequential()
    wrapped.add_module("module", make_model())
    with RoutingSession(wrapped) as session:
        assert session.layers == LAYERS


def test_copies_carry_no_session() -> None:
    model = make_model()
    session = RoutingSession(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(block.moe.router.routing_tap is None for block in twin.blocks)
        with session.replay(make_trace()):
            assert torch.equal(twin(batch()), make_model()(batch()))
            model(batch())


def test_one_session_at_a_time() -> None:
    model = make_model()
    session = RoutingSession(model)
    with pytest.raises(RoutingError, match="another session is attached"):
        RoutingSession(model)
    session.close()
    later = RoutingSession(model, exclude=["blocks.0.*"])
    try:
        RoutingSession(model)
    except RoutingError as error:  # it must not keep the layers that were free while the error is looked at
        assert "layer 'blocks.1.moe', 1 in all" in str(error)
        RoutingSession(model, exclude=["blocks.1.*"]).close()
    later.close()
    RoutingSession(model)  # dropped at once: it must not block the next one
    gc.collect()
    RoutingSession(model).close()


def test_blocks_of_tasks_that_take_turns() -> None:
    """What two tasks of one thread ran would land in both records: the first block to be closed says so."""
    session = RoutingSession(make_model())
    first, second = session.record(), session.record()
    first.__enter__()
    second.__enter__()
    with pytest.raises(RoutingError, match="was closed while one that was opened later is open"):
        first.__exit__(None, None, None)
    with pytest.raises(TraceError, match="no layer ran"):
        second.__exit__(None, None, None)
    with pytest.raises(TraceError, match="ended after 0 of"), session.replay(make_trace()):
        pass  # nothing had stayed open


def test_two_models_do_not_see_each_other() -> None:
    a, b = make_model(), make_model()
    with RoutingSession(a) as session, RoutingSession(b) as other, session.replay(make_trace(seed=3)):
        with other.record() as recording:
            y = b(batch())
        a(batch())
    assert torch.equal(y, make_model()(batch()))
    assert torch.equal(recording.trace().ids, record(make_model(), batch()).ids)


def test_padding_is_recorded_as_missing() -> None:
    layer = make_model().blocks[0].moe
    valid = torch.tensor([True, False, True, True])
    x = torch.randn(4, D)
    with RoutingSession(layer) as session:
        with session.record() as recording:
            layer(x, valid=valid)
        trace = recording.trace()
        assert (trace.wide_ids()[:, 0] >= 0).all(1).tolist() == valid.tolist()
        packed = recording.trace(torch.tensor([0, -1, 1, 2]), cu_seqlens=[0, 1, 3])
        assert packed.num_tokens == 3 and torch.equal(packed.ids, trace.ids[valid])
        with session.replay(trace):
            y = layer(x, valid=valid)
        assert torch.equal(y, layer(x, valid=valid))


def test_recording_and_replaying_in_chunks() -> None:
    """Prefill and decode steps: several calls of each layer in one block, one plan for all."""
    model = make_model()
    x = batch().flatten(0, 1)
    session = RoutingSession(model)
    with session.record() as recording:
        parts = [model(x[:7]), model(x[7:8]), model(x[8:])]
    trace = recording.trace()
    assert torch.equal(trace.ids, record(make_model(), x).ids)
    with session.replay(trace):
        again = [model(x[:7]), model(x[7:8]), model(x[8:])]
    assert torch.equal(torch.cat(parts), torch.cat(again))


def test_micro_batches_of_one_record_by_their_maps() -> None:
    """Tokens regrouped with pads: the joined maps bring every row to its place."""
    model, x = make_model(), batch().flatten(0, 1)
    maps = [torch.tensor([[7, 2, -1], [0, 11, 4]]), torch.tensor([5, 1, 3, 10]), torch.tensor([8, -1, 6, 9])]
    with RoutingSession(model) as session, session.record() as recording:
        for index in maps:
            model(x[index.clamp(min=0)])
    trace = recording.trace(torch.cat([index.flatten() for index in maps]), num_tokens=T)
    assert torch.equal(trace.wide_ids(), record(make_model(), x).wide_ids())


def test_static_recording_takes_each_launch_home() -> None:
    model = make_model()
    session = RoutingSession(model)
    with session.record(max_tokens=T + 4) as recording:
        model(batch())
        recording.commit(T)
        model(batch(1))
        recording.commit(T)
    trace = recording.trace()
    expected = RoutingTrace.concat([record(make_model(), batch(i)) for i in (0, 1)])
    assert torch.equal(trace.ids, expected.ids)
    with pytest.raises(TraceError, match="raise max_tokens"), session.record(max_tokens=3):
        model(batch())
    with pytest.raises(RoutingError, match="keeps no weights"), session.record(max_tokens=3, weights=True):
        pass


def test_pinned_memory_is_taken_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pieces of one dtype lie side by side, never overlap, and a large one gets a chunk of its own."""
    from moe_layer.replay import recording

    taken = []
    real = torch.empty

    def empty(size: int, *, dtype: torch.dtype, pin_memory: bool) -> Tensor:
        assert pin_memory
        taken.append(size * dtype.itemsize)
        return real(size, dtype=dtype)

    monkeypatch.setattr(recording.torch, "empty", empty)
    memory = recording.PinnedMemory()
    pieces = [memory.take(torch.Size((n % 7, 3)), torch.uint8).fill_(n % 251) for n in range(500)]
    pieces.append(memory.take(torch.Size((50_000, 4)), torch.float32).fill_(1.0))
    for n, piece in enumerate(pieces[:-1]):
        assert tuple(piece.shape) == (n % 7, 3) and bool((piece == n % 251).all())
    assert taken == [recording.FIRST_CHUNK, 800_000]


def test_records_of_other_streams_are_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Events go behind the copies on every stream that ran a router, once each, also while the block is open."""
    from moe_layer.replay import recording

    log: list[str] = []

    class Event:
        def record(self, stream: str) -> None:
            log.append(f"record {stream}")

        def synchronize(self) -> None:
            log.append("wait")

    monkeypatch.setattr(recording.torch.cuda, "Event", Event)
    model = make_model()
    with RoutingSession(model) as session, session.record() as recorded:
        model(batch())
        recorded._streams.update(("a",))
        recorded.trace()
        assert log == ["record a", "wait"]
        recorded._streams.update(("b",))
    assert log[2:] == ["record b"]
    recorded.trace()
    assert log[3:] == ["wait"]


def test_a_capture_takes_neither_calls_nor_commits(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_layer.replay import recording as module

    model = make_model()
    session = RoutingSession(model)
    with session.record(max_tokens=T) as recording:
        model(batch())
        monkeypatch.setattr(module, "is_capturing", lambda tensor: True)
        with pytest.raises(TraceError, match=r"cannot capture commit\(\); call it after each launch"):
            recording.commit(T)
    with pytest.raises(TraceError, match=r"cannot capture record\(\); use record\(max_tokens"), session.record():
        model(batch())


def test_static_recording_of_rows_that_nobody_wrote() -> None:
    """They would be expert 0: after too large a commit, or of a layer that did not run."""
    model, x = make_model(), batch().flatten(0, 1)
    with RoutingSession(model) as session, session.record(max_tokens=T) as recording:
        with pytest.raises(TraceError, match="nothing was taken home; call commit"):
            recording.trace()
        model.blocks[0](x)
        with pytest.raises(TraceError, match=r"commit\(3\), but layer 'blocks.1.moe' ran over at most 0 tokens"):
            recording.commit(3)
        model(x[:5])
        with pytest.raises(TraceError, match=r"commit\(6\), but layer 'blocks.1.moe' ran over at most 5 tokens"):
            recording.commit(6)
        recording.commit(4)
    assert torch.equal(recording.trace().ids, record(make_model(), x[:5]).ids[:4])


@pytest.mark.parametrize("static", [False, True])
def test_the_last_expert_of_a_byte_is_no_missing_slot(static: bool) -> None:
    """256 experts: 255 and -1 stay apart, with masks, with a map, and with neither."""
    layer = make_model(experts=256).blocks[0].moe
    x, valid = torch.randn(4, D), torch.tensor([True, False, True, True])
    ids = torch.tensor([[255, 0], [1, 2], [254, 255], [3, 255]])
    masked = torch.where(valid.unsqueeze(1), ids, -1)
    with RoutingSession(layer) as session:
        for mask, expected in ((None, ids), (valid, masked)):
            with session.record(max_tokens=4 if static else None) as recording:
                layer(x, valid=mask, replay=ids)
                if static:
                    recording.commit(4)
            assert torch.equal(recording.trace().wide_ids()[:, 0], expected.int())
            moved = recording.trace(torch.tensor([4, 2, -1, 0])).wide_ids()[:, 0]
            assert torch.equal(moved[[4, 2, 0]], expected[[0, 1, 3]].int()) and bool((moved[[1, 3]] == -1).all())


def test_static_recording_of_masks_that_come_and_go() -> None:
    """A row that was padding in one launch and a token in the next is recorded in the next."""
    layer = make_model().blocks[0].moe
    x, valid = torch.randn(4, D), torch.tensor([True, False, True, True])
    with RoutingSession(layer) as session, session.record(max_tokens=4) as recording:
        for mask in (None, valid, None):
            layer(x, valid=mask)
            recording.commit(4)
        with pytest.raises(TraceError, match=r"commit\(5\) of buffers for 4 tokens"):
            recording.commit(5)
    complete = (recording.trace().wide_ids()[:, 0] >= 0).all(1).view(3, 4)
    assert complete.tolist() == [[True] * 4, valid.tolist(), [True] * 4]
    assert recording.host_bytes == 3 * 4 * K + 2 * 4


@pytest.mark.parametrize("static", [False, True])
def test_rollout_under_inference_mode_then_training(static: bool) -> None:
    """Session, record and counters made in inference mode serve a training pass; one block may see both modes."""
    model, x = make_model(), batch()
    with torch.inference_mode():
        session = RoutingSession(model)
    with session.record(max_tokens=T if static else None) as recording:
        for mode in (True, False):
            with torch.inference_mode(mode):
                model(x)
                if static:
                    recording.commit(T)
    trace = recording.trace()
    assert torch.equal(trace.ids[:T], trace.ids[T:])
    with torch.inference_mode(), session.replay(trace.plan(torch.arange(T), layers=LAYERS), measure=True):
        expected = model(x)
    with session.replay(trace.plan(torch.arange(T), layers=LAYERS), measure=True):
        y = model(x)
    y.sum().backward()
    assert torch.equal(y, expected)
    assert (session.metrics().rows_replayed, session.metrics().rows_replayed) == (4 * T, 0)
