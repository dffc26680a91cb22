"""RoutingTrace: formats, writing and mapping, cutting and joining, plans, index maps."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from moe_layer import RoutingTrace, TraceError
from moe_layer.replay import index_map
from moe_layer.replay.spec import TraceSpec, id_dtype, pack_bits, unpack_bits
from tests.unit.replay_models import LAYERS, E, K, T, make_trace, random_ids
from tests.unit.test_replay_trace_damage import IDS, _build


def same(a: RoutingTrace, b: RoutingTrace) -> bool:
    names = ("ids", "valid", "cu_seqlens", "weights", "token_check", "weights_version")
    equal = all(
        (x is None and y is None) or (x is not None and y is not None and x.dtype == y.dtype and torch.equal(x, y))
        for x, y in ((getattr(a, n), getattr(b, n)) for n in names)
    )
    return equal and a.spec == b.spec and a.first_position == b.first_position and dict(a.notes) == dict(b.notes)


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("experts", [8, 255, 256, 257, 32768, 32769])
def test_round_trip_of_every_dtype(tmp_path: Path, suffix: str, experts: int) -> None:
    """256 experts use every code of a byte, and -1 still survives."""
    ids = random_ids(20, experts=experts, top_k=3)
    ids[0, 0] = torch.tensor([experts - 1, 0, -1])
    trace = RoutingTrace.from_ids(ids, num_experts=experts, layers=LAYERS, cu_seqlens=[0, 5, 20], notes={"engine": "x"})
    assert trace.ids.dtype == id_dtype(experts)
    trace.save(tmp_path / f"a.{suffix}")
    again = RoutingTrace.open(tmp_path / f"a.{suffix}")
    assert same(trace, again)
    assert torch.equal(again.wide_ids(), ids.int())
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"a.{suffix}"], "no partial file stays"


def test_all_256_codes() -> None:
    ids = torch.arange(256).view(256, 1, 1)
    trace = RoutingTrace.from_ids(ids, num_experts=256, layers=["a"])
    complete = trace.plan().decision(0).ids
    assert complete.dtype == torch.uint8 and torch.equal(complete.long(), ids[:, 0])
    padded = trace.plan(torch.tensor([255, -1, 0])).decision(0).ids
    assert padded.dtype == torch.int32 and padded.flatten().tolist() == [255, -1, 0]


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
@pytest.mark.parametrize("rows", [0, 1, 2])
def test_short_traces(tmp_path: Path, rows: int, suffix: str) -> None:
    trace = make_trace(rows)
    trace.save(tmp_path / f"a.{suffix}")
    again = RoutingTrace.open(tmp_path / f"a.{suffix}")
    assert same(trace, again) and same(again.sequence(0), trace) and same(again.rows(0, rows), trace)


def test_optional_columns_and_bytes_per_token(tmp_path: Path) -> None:
    trace = make_trace(100)
    trace.save(tmp_path / "a.safetensors")
    assert same(RoutingTrace.open(tmp_path / "a.safetensors"), trace)
    assert trace.spec.bytes_per_token == 2 * (2 * 1 + 1)
    assert trace.ids.nbytes + trace.valid.nbytes == 100 * trace.spec.bytes_per_token
    qwen = TraceSpec(128, 8, tuple(f"l{i}" for i in range(48)))
    assert qwen.bytes_per_token == 48 * 9


def test_bitmap() -> None:
    mask = torch.rand(7, 3, 11) < 0.5
    assert torch.equal(unpack_bits(pack_bits(mask), 11), mask)
    assert pack_bits(torch.tensor([[True] + [False] * 8])).tolist() == [[1, 0]]


def test_a_trace_is_no_view_of_the_ids() -> None:
    ids = random_ids().to(torch.uint8)
    trace = _build(ids)
    expected = trace.wide_ids()
    ids.zero_()
    assert torch.equal(trace.wide_ids(), expected)
    assert torch.equal(trace.wide_ids(3, 7), expected[3:7])


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_two_writers_of_one_file(tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of one process: each writes its own file, the last one stays whole under the name."""
    path, first, second = tmp_path / f"a.{suffix}", make_trace(seed=1), make_trace(seed=2)
    real = os.fsync

    def fsync(file: int) -> None:
        monkeypatch.setattr(os, "fsync", real)
        second.save(path)
        real(file)

    monkeypatch.setattr(os, "fsync", fsync)
    first.save(path)
    assert same(RoutingTrace.open(path), first)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_flipping_any_bit_of_a_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    make_trace().save(path)
    data = path.read_bytes()
    for at in range(0, len(data), 7):
        broken = bytearray(data)
        broken[at] ^= 1 << (at % 8)
        path.write_bytes(bytes(broken))
        try:
            same_trace = same(RoutingTrace.open(path), make_trace())
        except TraceError:
            continue
        assert same_trace, f"bit {at % 8} of byte {at} changed the trace silently"


def test_open_is_mapped_and_lazy(tmp_path: Path) -> None:
    """Without `verify` a plan of ten rows must not read the other 200 MB."""
    path = tmp_path / "big.safetensors"
    n = 3_000_000
    spec = TraceSpec(256, 8, ("a", "b", "c", "d"))
    ids = torch.arange(8, dtype=torch.uint8).expand(n, 4, 8).contiguous()
    trace = RoutingTrace(spec, ids, torch.full((n, 4, 1), 255, dtype=torch.uint8), torch.tensor([0, n]))
    trace.save(path)
    del ids, trace
    before = _resident()
    plan = RoutingTrace.open(path, verify=False).plan(torch.arange(n - 10, n))
    assert _resident() - before < 30e6
    assert plan.decision(3).ids[0].tolist() == list(range(8))


def _resident() -> float:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


# ---- cutting, joining, plans ----------------------------------------------------------------------------------------


def test_splice_keeps_owned_rows() -> None:
    """Turn two repeats the first turn's rows with other ids (other kernels, newer weights): ours stay."""
    tokens = torch.arange(20)
    first = RoutingTrace.from_ids(
        random_ids(9, seed=1), num_experts=E, layers=LAYERS, token_ids=tokens[:9], weights_version=0
    )
    whole = RoutingTrace.from_ids(
        random_ids(20, seed=2), num_experts=E, layers=LAYERS, token_ids=tokens, weights_version=1
    )
    for other in (whole, whole.rows(9, 20), whole.rows(4, 20)):
        got = first.splice(other)
        assert got.num_tokens == 20 and got.lengths == [20]
        assert torch.equal(got.ids[:9], first.ids) and torch.equal(got.ids[9:], whole.ids[9:])
        assert got.weights_version is not None and got.weights_version.tolist() == [0] * 9 + [1] * 11
        got.plan(tokens=tokens)
    cut = first.splice(whole, 5)
    assert torch.equal(cut.ids[:5], first.ids[:5]) and torch.equal(cut.ids[5:], whole.ids[5:])


def test_splice_takes_what_no_turn_has_run_yet() -> None:
    """A turn of S tokens has S-1 rows, its last token is run by the next turn; a layer can be absent alone."""
    ids, tokens = random_ids(20, seed=1), torch.arange(20)
    ids[8], ids[3, 1], ids[5, 0, 1] = -1, -1, -1
    first = RoutingTrace.from_ids(
        ids[:9], num_experts=E, layers=LAYERS, token_ids=tokens[:9], weights_version=0, weights=torch.zeros(9, 2, K)
    )
    later = random_ids(20, seed=2)
    whole = RoutingTrace.from_ids(
        later, num_experts=E, layers=LAYERS, token_ids=tokens, weights_version=1, weights=torch.ones(20, 2, K)
    )
    expected = torch.cat((ids[:9], later[9:]))
    expected[8], expected[3, 1] = later[8], later[3, 1]  # slot (5, 0, 1) stays missing: its row is owned
    got = first.splice(whole)
    assert torch.equal(got.wide_ids(), expected.int())
    assert got.weights is not None and got.weights_version is not None
    assert got.weights_version.tolist() == [0] * 8 + [1] * 12
    assert got.weights.flatten(1).mean(1).tolist() == [0, 0, 0, 0.5, 0, 0, 0, 0] + [1] * 12
    got.plan(tokens=tokens)
    tail = first.splice(whole.rows(8, 20))
    assert torch.equal(tail.wide_ids()[8:], later[8:].int()) and bool((tail.wide_ids()[3, 1] == -1).all())
    assert same(first.splice(whole.rows(9, 20)).rows(0, 9), first.rows(0, 9)), "a fragment without them leaves gaps"
    assert same(whole.splice(whole), whole)


def test_concat_and_sequences() -> None:
    parts = [make_trace(n, seed=n) for n in (3, 0, 5)]
    whole = RoutingTrace.concat(parts)
    assert whole.lengths == [3, 0, 5]
    for index, part in enumerate(parts):
        assert same(whole.sequence(index), part)


def test_merge_of_context_parallel_shards() -> None:
    trace = make_trace(token_ids=None, weights_version=None)
    shards = []
    for rank in range(2):
        index = index_map.cp_zigzag_index([T], size=2, rank=rank)
        ids = torch.full((T, 2, K), -1)
        ids[index[index >= 0]] = trace.wide_ids()[index[index >= 0]].long()
        shards.append(RoutingTrace.from_ids(ids, num_experts=E, layers=LAYERS, weights=trace.weights))
    assert torch.equal(shards[0].merged(shards[1]).wide_ids(), trace.wide_ids())


def test_plan_follows_the_index() -> None:
    trace = make_trace()
    index = torch.tensor([[3, -1, 0], [11, 2, 2]])
    plan = trace.plan(index, layers=LAYERS[::-1])
    assert plan.num_tokens == 6 and plan.spec.layers == LAYERS[::-1]
    decision = plan.decision(0)
    expected = trace.wide_ids()[index.flatten().clamp(min=0), 1]
    expected[1] = -1
    assert decision.ids.dtype == torch.int32 and torch.equal(decision.ids, expected)
    assert torch.equal(plan.decision(1, 2, 4).ids, trace.wide_ids()[[0, 11], 0])
    assert decision.weights is not None and trace.weights is not None
    assert torch.equal(decision.weights[0], trace.weights[3, 1])
    assert trace.plan().valid is None, "a complete plan needs no bitmap"


def test_plan_of_a_stage_with_its_own_numbers() -> None:
    """The last stage calls the trace's second layer its first."""
    trace = make_trace()
    plan = trace.plan(layers={"stage.0.moe": LAYERS[1], "stage.1.moe": LAYERS[0]})
    assert plan.spec.layers == ("stage.0.moe", "stage.1.moe")
    for layer, recorded in enumerate((1, 0)):
        assert torch.equal(plan.decision(layer).ids.int(), trace.wide_ids()[:, recorded])
    with pytest.raises(TraceError, match=r"no layers \['b'\] .* a mapping from the session's names"):
        trace.plan(layers={"a": LAYERS[0], "c": "b"})


def test_tokens_are_compared_in_any_layout() -> None:
    tokens = torch.randint(0, 50, (T,), generator=torch.Generator().manual_seed(9))
    trace = make_trace(token_ids=tokens, cu_seqlens=[0, 5, T])
    index = index_map.left_pad_index([5, T - 5])
    batch = torch.where(index >= 0, tokens[index.clamp(min=0)], 0)
    trace.plan(index, tokens=batch)
    with pytest.raises(TraceError, match="shifted"):
        trace.plan(index, tokens=batch.roll(1, dims=1))
    with pytest.raises(TraceError, match="shifted"):
        trace.plan(torch.where(index > 0, index - 1, index), tokens=batch)


# ---- index maps -----------------------------------------------------------------------------------------------------


def test_tokens_of_a_rank_with_pads_only() -> None:
    """Pads have no tokens to compare, also where the trace has no rows at all."""
    for rows in (0, T):
        plan = make_trace(rows).plan(torch.full((2, 3), -1), tokens=torch.zeros(2, 3, dtype=torch.int64))
        assert plan.num_tokens == 6 and bool((plan.decision(0).ids == -1).all())


def test_traces_without_rows_join_any_others() -> None:
    bare = _build(IDS[:0])
    for whole in (RoutingTrace.concat([bare, make_trace()]), RoutingTrace.concat([make_trace(), bare])):
        assert whole.weights is not None and whole.token_check is not None and whole.weights_version is not None
    assert same(bare.splice(make_trace()), make_trace())


def test_packed_and_padded_maps() -> None:
    assert index_map.packed_index([3, 2], align=4).tolist() == [0, 1, 2, -1, 3, 4, -1, -1]
    assert index_map.packed_index([3, 2], total=7).tolist() == [0, 1, 2, 3, 4, -1, -1]
    assert index_map.left_pad_index([1, 3]).tolist() == [[-1, -1, 0], [1, 2, 3]]
    mask = torch.tensor([[1, 1, 0], [0, 1, 0]])
    assert index_map.mask_index(mask).tolist() == [[0, 1, -1], [-1, 2, -1]]
    with pytest.raises(TraceError, match="do not fit"):
        index_map.packed_index([3], total=2)
    with pytest.raises(TraceError, match="raise width"):
        index_map.left_pad_index([3], width=2)
    with pytest.raises(TraceError, match=r"rank 2 must lie in \[0, 2\)"):
        index_map.sp_index(torch.arange(4), size=2, rank=2)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[8], [5, 0, 9, 1], [16, 3]])
@pytest.mark.parametrize("make", [index_map.cp_zigzag_index, index_map.cp_contiguous_index])
def test_context_parallel_maps_cover_every_token_once(make, lengths: list[int], size: int) -> None:
    shards = [make(lengths, size=size, rank=rank) for rank in range(size)]
    assert len({len(shard) for shard in shards}) == 1, "equal shares"
    real = torch.cat(shards)
    assert real[real >= 0].sort().values.tolist() == list(range(sum(lengths)))


def test_zigzag_by_hand() -> None:
    assert index_map.cp_zigzag_index([8], size=2, rank=0).tolist() == [0, 1, 6, 7]
    assert index_map.cp_zigzag_index([8], size=2, rank=1).tolist() == [2, 3, 4, 5]
    assert index_map.cp_contiguous_index([8], size=2, rank=1).tolist() == [4, 5, 6, 7]
    both = [index_map.sp_index(index_map.cp_zigzag_index([8], size=2, rank=0), size=2, rank=r) for r in range(2)]
    assert [b.tolist() for b in both] == [[0, 1], [6, 7]]


def test_generation_map() -> None:
    mask = torch.tensor([[0, 1], [1, 1]])
    assert index_map.generation_index(mask, steps=2).tolist() == [[-1, 1, 4, 6], [2, 3, 5, 7]]


def test_npz_needs_nothing_of_ours(tmp_path: Path) -> None:
    make_trace().save(tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert file["ids"].shape == (T, 2, K)
        assert json.loads(file["header"].tobytes())["format"] == "moe-routing-trace"
