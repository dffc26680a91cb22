"""RoutingTrace: formats, cutting and joining, plans, index maps; every kind of damage is a TraceError."""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_layer import RoutingTrace, TraceError
from moe_layer.replay import index_map
from moe_layer.replay.checks import _repeated
from moe_layer.replay.spec import TraceSpec, id_dtype, pack_bits, unpack_bits
from tests.unit.replay_models import LAYERS, E, K, T, make_trace, random_ids


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


# ---- damage ---------------------------------------------------------------------------------------------------------


def _tampered(path: Path, change: Callable[[dict, dict], None]) -> RoutingTrace:
    """A saved file whose tensors and metadata were changed, then opened."""
    from safetensors import safe_open

    make_trace().save(path)
    with safe_open(str(path), framework="pt") as file:
        header = dict(file.metadata())
    tensors = {name: tensor.clone() for name, tensor in load_file(path).items()}
    change(tensors, header)
    save_file(tensors, path, metadata=header)
    return RoutingTrace.open(path)


def _forge(path: Path, change: Callable[[dict, dict], None]) -> RoutingTrace:
    """The same with a checksum that fits: damage done by a broken writer, not by the disk."""
    from moe_layer.replay.trace_io import _digest

    def forge(tensors: dict, header: dict) -> None:
        change(tensors, header)
        header["sha256"] = _digest(header["facts"], tensors)

    return _tampered(path, forge)


def _facts(header: dict, **changes: object) -> None:
    header["facts"] = json.dumps(json.loads(header["facts"]) | changes)


def _cut(path: Path, keep: float) -> RoutingTrace:
    make_trace().save(path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    return RoutingTrace.open(path)


def _write(path: Path, data: bytes) -> RoutingTrace:
    path.write_bytes(data)
    return RoutingTrace.open(path)


def _build(ids: torch.Tensor, **settings: object) -> RoutingTrace:
    return RoutingTrace.from_ids(ids, **({"num_experts": E, "layers": LAYERS} | settings))  # type: ignore[arg-type]


def _with(name: str, value: torch.Tensor) -> RoutingTrace:
    return replace(make_trace(), **{name: value})


IDS = random_ids()
NAN = torch.full(IDS.shape, float("nan"))


def _zero_row() -> torch.Tensor:
    ids = IDS.clone()
    ids[3] = 0
    return ids


def _missing() -> RoutingTrace:
    ids = IDS.clone()
    ids[3, 1] = -1
    return _build(ids)


def _shard(**settings: object) -> RoutingTrace:
    return make_trace(**({"token_ids": None} | settings))


def _slot(slot: int) -> torch.Tensor:
    """Expert 5 in one slot of every row, the other one missing."""
    return torch.full(IDS.shape, -1).index_fill(2, torch.tensor(slot), 5)


def _npz(path: Path, header: object, **tensors: np.ndarray) -> RoutingTrace:
    """A foreign npz file."""
    arrays = {"ids": np.zeros((1, 1, 1), np.uint8), "valid": np.ones((1, 1, 1), np.uint8)}
    arrays |= {"cu_seqlens": np.array([0, 1]), **tensors}
    text = np.frombuffer(json.dumps(header).encode(), dtype=np.uint8)
    np.savez(path.with_suffix(".npz"), header=text, **arrays)  # type: ignore[arg-type]
    return RoutingTrace.open(path.with_suffix(".npz"))


def _encrypted(path: Path) -> RoutingTrace:
    """One bit in a zip directory says so."""
    make_trace().save(path.with_suffix(".npz"))
    data = bytearray(path.with_suffix(".npz").read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.with_suffix(".npz").write_bytes(bytes(data))
    return RoutingTrace.open(path.with_suffix(".npz"))


HEADER = {"format": "moe-routing-trace", "version": "1", "facts": "{}", "sha256": ""}

DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "id too large": (lambda p: _build(IDS + 1), r"must lie in \[0, 8\)"),
    "id below -1": (lambda p: _build(IDS - 3), "or be -1 for a missing slot"),
    "id too large in a file": (
        lambda p: _forge(p, lambda t, h: t["ids"].fill_(200)),
        "200 at row 0, layer 'blocks.0.moe'",
    ),
    "-1 where forbidden": (lambda p: _missing().validate(complete=True), "2 slots are missing .* row 3"),
    "-1 where forbidden in a plan": (lambda p: _missing().plan(allow_missing=False), "token 3 of the micro-batch"),
    "duplicates": (lambda p: _build(_zero_row()), "2 rows name an expert twice, the first at row 3"),
    "rows lost": (
        lambda p: _forge(p, lambda t, h: t.update(ids=t["ids"][1:].clone())),
        "rows, layers or top_k were lost|cu_seqlens|valid has shape",
    ),
    "boundaries": (lambda p: _forge(p, lambda t, h: t["cu_seqlens"].fill_(2)), "must rise from 0"),
    "boundaries fall": (lambda p: make_trace(cu_seqlens=[0, 9, 3, T]), "must rise from 0"),
    "K lost": (lambda p: _forge(p, lambda t, h: t.update(ids=t["ids"][..., :1].clone())), "must be"),
    "K of the description": (lambda p: _forge(p, lambda t, h: _facts(h, top_k=3)), "top_k 3"),
    "E of the description": (
        lambda p: _forge(p, lambda t, h: _facts(h, num_experts=500)),
        "ids is torch.uint8, must be torch.int16",
    ),
    "E too small": (lambda p: _forge(p, lambda t, h: _facts(h, num_experts=4)), r"outside \[0, 4\)"),
    "dtype of ids": (lambda p: _with("ids", IDS), "ids is torch.int64, must be torch.uint8"),
    "floating ids": (lambda p: _build(IDS.float()), "must be integers"),
    "device": (lambda p: _with("ids", make_trace().ids.to("meta")), "ids is on meta, a trace lives on the CPU"),
    "layer lost": (lambda p: _forge(p, lambda t, h: _facts(h, layers=["a"])), "1 layers"),
    "layer twice": (lambda p: _build(IDS, layers=["a", "a"]), r"\['a'\] occur more than once"),
    "layer without a name": (lambda p: _build(IDS, layers=["a", ""]), "module paths"),
    "unknown layer": (lambda p: make_trace().plan(layers=["blocks.7.moe"]), r"no layers \['blocks.7.moe'\]"),
    "checksum": (lambda p: _tampered(p, lambda t, h: t["ids"].add_(1)), "does not have the checksum"),
    "checksum of the description": (
        lambda p: _tampered(p, lambda t, h: _facts(h, notes={"a": "b"})),
        "does not have the checksum",
    ),
    "truncated": (lambda p: _cut(p, 0.9), "truncated"),
    "truncated header": (lambda p: _cut(p, 0.01), "truncated"),
    "truncated npz": (lambda p: _cut(p.with_suffix(".npz"), 0.7), "truncated"),
    "encrypted npz": (_encrypted, "truncated or no npz trace .*encrypted"),
    "header of a list": (lambda p: _npz(p, [1]), r"is not a routing trace \(format None\)"),
    "header of other types": (lambda p: _npz(p, HEADER | {"facts": 5}), "is not a routing trace"),
    "tensor of text": (lambda p: _npz(p, HEADER, ids=np.array(["a"])), "truncated or no npz trace"),
    "empty file": (lambda p: _write(p, b""), "truncated"),
    "another file": (lambda p: _write(p, b"PK\x03\x04 no trace" * 9), "no safetensors file"),
    "another safetensors": (lambda p: _tampered(p, lambda t, h: h.clear()), "is not a routing trace"),
    "another version": (
        lambda p: _forge(p, lambda t, h: h.update(version="2")),
        "format version 2, this package reads 1",
    ),
    "no such file": (lambda p: RoutingTrace.open(p), "there is no trace"),
    "another suffix": (lambda p: make_trace().save(p.with_suffix(".pt")), "must end in .safetensors or .npz"),
    "tensor lost": (lambda p: _forge(p, lambda t, h: t.pop("valid")), r"lacks the tensors \['valid'\]"),
    "unknown tensor": (lambda p: _forge(p, lambda t, h: t.update(x=torch.zeros(1))), r"unknown ones \['x'\]"),
    "bits beyond K": (lambda p: _forge(p, lambda t, h: t["valid"].fill_(255)), "bits set beyond top_k"),
    "description lost": (lambda p: _forge(p, lambda t, h: h.update(facts="{}")), "unreadable description"),
    "description of other types": (lambda p: _forge(p, lambda t, h: _facts(h, top_k="x")), "unreadable description"),
    "description too large": (
        lambda p: _forge(p, lambda t, h: _facts(h, num_experts=10**30)),
        "unreadable description",
    ),
    "notes of other types": (lambda p: _forge(p, lambda t, h: _facts(h, notes=[1])), "unreadable description"),
    "negative position": (lambda p: make_trace(first_position=-1), "first_position is -1"),
    "NaN weights": (lambda p: _build(IDS, weights=NAN), "NaN or infinite"),
    "weights of another shape": (lambda p: _build(IDS, weights=NAN[1:]), "weights has shape"),
    "wrong tokens": (
        lambda p: make_trace().plan(tokens=torch.zeros(T, dtype=torch.int64)),
        "are not the recorded ones",
    ),
    "tokens of another length": (lambda p: make_trace().plan(tokens=torch.zeros(3, dtype=torch.int64)), "one shape"),
    "no token checks": (lambda p: make_trace(token_ids=None).plan(tokens=torch.zeros(T).long()), "has no token checks"),
    "index out of range": (lambda p: make_trace().plan(torch.tensor([0, T])), f"has rows 0 to {T - 1}"),
    "index below -1": (lambda p: make_trace().plan(torch.tensor([-2])), "-1 = pad"),
    "index of floats": (lambda p: make_trace().plan(torch.tensor([0.5])), "must be integers"),
    "gap in a splice": (lambda p: make_trace().splice(make_trace(first_position=T + 1)), "a gap cannot be spliced"),
    "splice of another model": (lambda p: make_trace().splice(_build(IDS, layers=["a", "b"])), "cannot splice"),
    "splice of other tokens": (
        lambda p: make_trace().splice(make_trace(T + 2, seed=5)),
        "other tokens from position 0",
    ),
    "merge of differing shards": (lambda p: _shard().merged(_shard(seed=4)), "ids for the same slots and they differ"),
    "merge of other tokens": (lambda p: make_trace().merged(make_trace(seed=4)), "differ in token_check"),
    "merge of other sequences": (lambda p: make_trace().merged(make_trace(cu_seqlens=[0, 3, T])), "in cu_seqlens"),
    "merge of other versions": (lambda p: make_trace().merged(make_trace(weights_version=4)), "in weights_version"),
    "merge of another fragment": (lambda p: _shard().merged(_shard(first_position=2)), "in first_position"),
    "merge of shards with one expert": (
        lambda p: _build(_slot(0)).merged(_build(_slot(1))),
        f"{2 * T} rows name an expert twice",
    ),
    "merge that loses weights": (lambda p: _shard().merged(_shard(weights=None)), "1 of the 2 traces have weights"),
    "splice that loses token checks": (
        lambda p: make_trace(5).splice(make_trace(token_ids=None)),
        r"1 of the 2 traces have token_check .*replace\(trace, token_check=None\)",
    ),
    "concat that loses versions": (
        lambda p: RoutingTrace.concat([make_trace(), make_trace(weights_version=None), make_trace()]),
        "2 of the 3 traces have weights_version",
    ),
    "concat of fragments": (
        lambda p: RoutingTrace.concat([make_trace(), make_trace(first_position=2)]),
        "from position 2 on and one of .* from 0 on",
    ),
    "position of a float": (lambda p: make_trace(first_position=1.5), "first_position is 1.5"),
    "position of a tensor": (lambda p: make_trace(first_position=torch.tensor(3)), "first_position is tensor"),
    "notes of a string": (lambda p: make_trace(notes="sglang"), "notes must map text to text, got str"),
}


@pytest.mark.parametrize("case", DAMAGE)
def test_damage_is_refused(case: str, tmp_path: Path) -> None:
    act, text = DAMAGE[case]
    with pytest.raises(TraceError, match=text):
        act(tmp_path / "a.safetensors")


@pytest.mark.parametrize("experts", [9, 300, 40_000])
@pytest.mark.parametrize("top_k", [1, 2, 9])
def test_repeated_experts_against_sets(top_k: int, experts: int) -> None:
    """In every storage dtype; a missing slot is no expert, whatever number it holds."""
    g = torch.Generator().manual_seed(top_k)
    ids = torch.randint(0, experts, (300, 2, top_k), generator=g)
    ids[:200, :, ::2] = ids[:200, :, :1].clone()
    mask = torch.rand(ids.shape, generator=g) < torch.rand(300, 1, 1, generator=g)
    found = _repeated(ids.to(id_dtype(experts)), mask)
    for row, layer in itertools.product(range(300), range(2)):
        known = ids[row, layer][mask[row, layer]].tolist()
        assert bool(found[row, layer]) == (len(set(known)) < len(known))


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
