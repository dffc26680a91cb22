"""Training checkpoints: torch.distributed.checkpoint in safetensors files, a checksummed manifest, an atomic rename.

    <run>/checkpoints/step_00000100/
        shard-0000R-....safetensors   what rank R saved: model.*, optimizer.* (shards of DTensors reshard on load)
        local/0000R.safetensors       what only rank R needs at the same layout: counters, random-number state
        manifest.json                 format version, step, layout, SHA-256 of each file and of itself

Files are written into a hidden folder, flushed, and renamed when complete, so a killed run leaves the previous
checkpoint whole. Nothing is pickled; DCP's own pickled metadata is avoided by its safetensors storage.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter

from moe_layer.errors import CheckpointError

FORMAT = "moe_layer.train"
VERSION = 1
_STEP = re.compile(r"step_(\d{8,})")


@dataclass(frozen=True)
class Layout:
    """Ranks that wrote a checkpoint; `local/` files are loaded only into the same layout."""

    world: int = 1
    dp: int = 1
    ep: int = 1


@dataclass(frozen=True)
class Manifest:
    """`manifest.json` without its own checksum."""

    step: int
    layout: Layout
    data: str
    """Fingerprint of the training text."""
    files: Mapping[str, str]
    """Path below the checkpoint -> SHA-256."""


def save(
    folder: Path,
    shared: Mapping[str, Tensor],
    *,
    local: Mapping[str, Tensor],
    step: int,
    layout: Layout,
    data: str,
    keep: int,
) -> Path:
    """Write `folder/step_<step>` from all ranks together; returns its path.

    Args:
        shared: the same keys on every rank; DTensors are saved in shards, plain tensors once.
        local: this rank's own tensors. keep: checkpoints to keep, this one included.

    Raises:
        OSError: the disk refuses; nothing that existed is touched.
    """
    final = folder / f"step_{step:08d}"
    work = folder / f".writing-step_{step:08d}"
    try:
        _write(work, shared, local=local, manifest=Manifest(step=step, layout=layout, data=data, files={}))
    except (OSError, SafetensorError, dcp.api.CheckpointException) as error:
        shutil.rmtree(work, ignore_errors=True)  # a full disk needs the space
        raise OSError(f"{final} was not saved: {_reason(error)}; make room, then continue with --resume") from error
    if _rank(layout) == 0:
        if final.exists():  # the same step again after a resume: the new one takes its place
            _remove(final)
        os.rename(work, final)
        _flush(folder)
        others = [path for path in checkpoints(folder) if path != final]
        for old in others[: max(0, len(others) - (keep - 1))]:
            _remove(old)
    _barrier(layout)
    return final


def _write(work: Path, shared: Mapping[str, Tensor], *, local: Mapping[str, Tensor], manifest: Manifest) -> None:
    """The files of a checkpoint; rank 0 adds the manifest of what all ranks wrote."""
    layout, rank = manifest.layout, _rank(manifest.layout)
    if rank == 0:
        work.parent.mkdir(parents=True, exist_ok=True)
        for stale in work.parent.glob(".writing-*"):
            shutil.rmtree(stale)
        (work / "local").mkdir(parents=True)
    _barrier(layout)
    state = {name: _at_least_1d(tensor) for name, tensor in shared.items()}
    with _quiet():
        writer = HuggingFaceStorageWriter(str(work), save_distributed=True)
        dcp.save(state, storage_writer=writer, no_dist=layout.world == 1)
    save_file({k: v.detach().cpu().contiguous() for k, v in local.items()}, _local_file(work, rank))
    _barrier(layout)
    if rank == 0:
        found = sorted(path for path in work.rglob("*") if path.is_file())
        files = {path.relative_to(work).as_posix(): _digest(path, flush=True) for path in found}
        _write_manifest(work, replace(manifest, files=files))


def checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints under `folder`, oldest first."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if _STEP.fullmatch(path.name))


def find(where: Path) -> Path:
    """The checkpoint meant by a run directory, its `checkpoints` folder or a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    if (where / "manifest.json").is_file() or _STEP.fullmatch(where.name):
        if where.is_dir():
            return where
        raise CheckpointError(f"no checkpoint at {where}; there are: {_names(checkpoints(where.parent))}")
    for folder in (where / "checkpoints", where):
        if found := checkpoints(folder):
            return found[-1]
    raise CheckpointError(
        f"no checkpoint in {where} (looked for checkpoints/step_*/manifest.json); give a run directory"
    )


def read_manifest(path: Path) -> Manifest:
    """Read and check `manifest.json`.

    Raises:
        CheckpointError: missing, damaged, or of a format version this program does not know.
    """
    try:
        raw = json.loads((path / "manifest.json").read_bytes())
        checksum = raw.pop("sha256")
        intact = checksum == _json_digest(raw)
    except FileNotFoundError:
        raise CheckpointError(
            f"{path} has no manifest.json, so it is no complete checkpoint; {_others(path)}"
        ) from None
    except (ValueError, KeyError, AttributeError, TypeError):
        intact, raw = False, {}
    if not intact:
        raise CheckpointError(f"{path}/manifest.json does not match its own checksum: it is damaged; {_others(path)}")
    if raw["format"] != FORMAT or raw["version"] != VERSION:
        raise CheckpointError(
            f"{path} has format {raw['format']} version {raw['version']}, this program reads {FORMAT} version "
            f"{VERSION}; load it with the version of moe_layer that wrote it"
        )
    return Manifest(step=raw["step"], layout=Layout(**raw["layout"]), data=raw["data"], files=raw["files"])


def load(path: Path, shared: Mapping[str, Tensor], *, layout: Layout) -> tuple[Manifest, dict[str, Tensor] | None]:
    """Check every file of a checkpoint, then load it into `shared` in place, resharding DTensors.

    Returns:
        The manifest, and this rank's own tensors, or None if the checkpoint was written by another layout.

    Raises:
        CheckpointError: truncated, bit-flipped, missing, surplus or misshapen contents; names them.
    """
    manifest = read_manifest(path)
    _verify(path, manifest, layout)
    reader = HuggingFaceStorageReader(str(path))
    state = {name: _at_least_1d(tensor) for name, tensor in shared.items()}
    try:
        _check_names(path, state)
        with _quiet():
            dcp.load(state, storage_reader=reader, no_dist=layout.world == 1)
        local = None
        if manifest.layout == layout:
            local = load_file(_local_file(path, _rank(layout)))
    except (SafetensorError, OSError, dcp.api.CheckpointException) as error:
        raise CheckpointError(f"{path} does not load: {_reason(error)}; {_others(path)}") from error
    return manifest, local


def _verify(path: Path, manifest: Manifest, layout: Layout) -> None:
    """Compare checksums, the files shared out over the ranks; every rank raises the same error."""
    rank = _rank(layout)
    problems = []
    for name in sorted(manifest.files)[rank :: layout.world]:
        file = path / name
        if not file.is_file():
            problems.append(f"{name} is missing")
        elif _digest(file) != manifest.files[name]:
            problems.append(f"{name} ({file.stat().st_size} bytes) does not match its checksum")
    if layout.world > 1:
        gathered: list[list[str]] = [[] for _ in range(layout.world)]
        dist.all_gather_object(gathered, problems)
        problems = [problem for found in gathered for problem in found]
    if problems:
        raise CheckpointError(f"checkpoint {path} is damaged: {'; '.join(problems)}; {_others(path)}")


def _check_names(path: Path, state: Mapping[str, Tensor]) -> None:
    saved: dict[str, Any] = {}
    for name, entry in HuggingFaceStorageReader(str(path)).read_metadata().state_dict_metadata.items():
        saved[name] = tuple(getattr(entry, "size", ()))  # bytes entries, which we never write, have none
    wanted = {name: tuple(tensor.shape) for name, tensor in state.items()}
    problems = [f"{n} is missing" for n in wanted if n not in saved] + [
        f"{n} is surplus" for n in saved if n not in wanted
    ]
    problems += [
        f"{n} is {saved[n]}, the model has {wanted[n]}" for n in wanted if n in saved and saved[n] != wanted[n]
    ]
    if problems:
        more = f" and {len(problems) - 4} more" if len(problems) > 4 else ""
        raise CheckpointError(
            f"checkpoint {path} does not fit this configuration: {'; '.join(problems[:4])}{more}; "
            "use the resolved.yaml of the run that wrote it"
        )


def _write_manifest(work: Path, manifest: Manifest) -> None:
    body = {"format": FORMAT, "version": VERSION, **asdict(manifest)}
    body["sha256"] = _json_digest(body)
    path = work / "manifest.json"
    path.write_text(json.dumps(body, indent=1))
    _flush(path)
    _flush(work)


def _json_digest(body: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()


def _digest(path: Path, *, flush: bool = False) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while chunk := file.read(1 << 22):
            digest.update(chunk)
    if flush:
        _flush(path)
    return digest.hexdigest()


def _flush(path: Path) -> None:
    """fsync: a rename that survives a power cut while its contents do not would look like a whole checkpoint."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _remove(path: Path) -> None:
    """Delete a checkpoint so that no moment shows it half there."""
    doomed = path.with_name(f".writing-removed-{path.name}")
    os.rename(path, doomed)
    shutil.rmtree(doomed)


def _local_file(path: Path, rank: int) -> Path:
    return path / "local" / f"{rank:05d}.safetensors"


def _at_least_1d(tensor: Tensor) -> Tensor:
    return tensor.reshape(1) if tensor.ndim == 0 else tensor


def _others(path: Path) -> str:
    rest = [other for other in checkpoints(path.parent) if other != path]
    return f"resume from another one: {_names(rest)}" if rest else "there is no other one beside it; start the run anew"


def _names(paths: list[Path]) -> str:
    return ", ".join(str(path) for path in paths) or "none"


@contextmanager
def _quiet() -> Iterator[None]:
    """Without DCP's warning that a single process saves in a single process."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled", category=UserWarning)
        yield


def _reason(error: BaseException) -> str:
    """One line; DCP wraps what went wrong on each rank together with its traceback."""
    if isinstance(error, dcp.api.CheckpointException):
        return "; ".join(dict.fromkeys(str(cause) for cause, _ in error.failures.values()))
    return str(error)


def _rank(layout: Layout) -> int:
    return dist.get_rank() if layout.world > 1 else 0


def _barrier(layout: Layout) -> None:
    if layout.world > 1:
        dist.barrier()
