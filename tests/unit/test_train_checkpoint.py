"""Checkpoints: bitwise round trip, every damage found, and a save that dies leaves the previous one whole."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_layer.errors import CheckpointError
from moe_layer.train import checkpoint
from moe_layer.train.checkpoint import Layout


def _state(seed: int = 0) -> dict[str, Tensor]:
    make = torch.Generator().manual_seed(seed)
    return {
        "model.w": torch.randn(64, 33, generator=make),
        "model.half": torch.randn(7, generator=make).bfloat16(),
        "model.count": torch.randint(0, 2**40, (5,), generator=make),
        "optimizer.exp_avg.w": torch.randn(64, 33, generator=make),
        "model.scalar": torch.tensor(1.5 + seed),
    }


def _save(folder: Path, step: int, *, keep: int = 2, own_bytes: int = 3) -> Path:
    local = {"rng": (torch.arange(step, step + own_bytes) % 256).to(torch.uint8)}
    return checkpoint.save(folder, _state(step), local=local, step=step, layout=Layout(), data="d", keep=keep)


def _load(path: Path) -> tuple[checkpoint.Manifest, dict[str, Tensor], dict[str, Tensor] | None]:
    state = {name: torch.zeros_like(tensor) for name, tensor in _state().items()}
    manifest, local = checkpoint.load(path, state, layout=Layout())
    return manifest, state, local


def test_round_trip_is_bitwise_and_nothing_is_pickled(tmp_path: Path) -> None:
    path = _save(tmp_path, 12)
    manifest, state, local = _load(path)
    assert manifest.step == 12 and manifest.data == "d"
    for name, tensor in _state(12).items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert local is not None and local["rng"].tolist() == [12, 13, 14]
    assert {file.suffix for file in path.rglob("*") if file.is_file()} == {".safetensors", ".json"}


def test_keep_and_find(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        _save(tmp_path / "checkpoints", step)
    names = [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")]
    assert names == ["step_00000002", "step_00000003"]
    newest = tmp_path / "checkpoints" / names[-1]
    assert checkpoint.find(tmp_path) == checkpoint.find(tmp_path / "checkpoints") == checkpoint.find(newest) == newest
    with pytest.raises(CheckpointError, match=r"no checkpoint at .*step_00000009; there are: .*step_00000002"):
        checkpoint.find(tmp_path / "checkpoints" / "step_00000009")
    with pytest.raises(CheckpointError, match="give a run directory"):
        checkpoint.find(tmp_path / "nothing")


def test_the_newest_save_survives_older_futures(tmp_path: Path) -> None:
    for step in (100, 200, 150):
        path = _save(tmp_path, step, keep=1)
        assert checkpoint.checkpoints(tmp_path) == [path]


@pytest.mark.parametrize("fraction", [0.0, 0.3, 0.9, 1.0])
@pytest.mark.parametrize("which", ["shard", "local", "manifest"])
def test_truncation_and_bit_flips_are_found_and_name_the_file(tmp_path: Path, which: str, fraction: float) -> None:
    _save(tmp_path, 1)
    path = _save(tmp_path, 2)
    file = next(f for f in sorted(path.rglob("*")) if f.is_file() and which in f.relative_to(path).as_posix())
    good = file.read_bytes()
    at = min(len(good) - 1, int(fraction * len(good)))
    flipped = bytearray(good)
    flipped[at] ^= 0x10
    for damaged in (good[:at], bytes(flipped)):
        file.write_bytes(damaged)
        with pytest.raises(CheckpointError, match=rf"{file.name}.*; resume from another one: .*step_00000001"):
            _load(path)
    file.write_bytes(good)
    _load(path)


def test_missing_file_and_foreign_version(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    shard = next(path.glob("shard-*"))
    shard.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"shard-.* is missing; there is no other one beside it"):
        _load(path)
    raw = json.loads((path / "manifest.json").read_text())
    raw.pop("sha256")
    raw["version"] = 99
    raw["sha256"] = checkpoint._json_digest(raw)
    (path / "manifest.json").write_text(json.dumps(raw))
    with pytest.raises(CheckpointError, match="version 99, this program reads"):
        _load(path)


def test_another_model_is_refused_with_names_and_shapes(tmp_path: Path) -> None:
    path = _save(tmp_path, 1)
    state = _state()
    state["model.w"] = torch.zeros(64, 32)
    state["model.new"] = state.pop("model.half")
    with pytest.raises(CheckpointError) as error:
        checkpoint.load(path, state, layout=Layout())
    for part in ("model.new is missing", "model.half is surplus", "model.w is (64, 33), the model has (64, 32)"):
        assert part in str(error.value)


def test_a_save_that_fails_leaves_the_previous_one_and_is_cleaned_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = _save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_manifest", _raise_disk_full)
        with pytest.raises(OSError, match="No space left"):
            _save(tmp_path, 2)
    assert checkpoint.checkpoints(tmp_path) == [first]
    assert torch.equal(_load(first)[1]["model.w"], _state(1)["model.w"])
    assert not list(tmp_path.glob(".writing-*"))
    _save(tmp_path, 3)


@pytest.mark.parametrize(("limit", "own_bytes"), [(100, 3), (30_000, 60_000)], ids=["shard", "local"])
def test_a_disk_that_refuses_is_one_sentence(tmp_path: Path, limit: int, own_bytes: int) -> None:
    """DCP wraps the error in a BaseException with a traceback inside, safetensors in its own."""
    first = _save(tmp_path, 1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"step_00000002 was not saved: .*File too large.*; make room") as caught:
            _save(tmp_path, 2, own_bytes=own_bytes)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert "\n" not in str(caught.value)
    assert checkpoint.checkpoints(tmp_path) == [first] and not list(tmp_path.glob(".writing-*"))


def _raise_disk_full(*_: object) -> None:
    raise OSError(28, "No space left on device")
