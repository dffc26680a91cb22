"""RoutingTrace: every kind of damage is a TraceError."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_layer import RoutingTrace, TraceError
from moe_layer.replay.checks import _repeated
from moe_layer.replay.spec import id_dtype
from tests.unit.replay_models import LAYERS, E, T, make_trace, random_ids

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
