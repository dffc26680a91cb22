"""Checksummed safetensors files: a format version, a config, and a sha256 of every tensor in the metadata.

safetensors itself loads a file with flipped payload bits without complaint. Tensors whose names begin with `experts.`
carry one digest per expert, so that a rank which reads only its own experts still verifies what it read.
Files are written beside their target and renamed: an interrupted save leaves the previous file whole.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from moe_layer.checkpoint.mapping import EXPERT_PREFIX
from moe_layer.errors import CheckpointError

FORMAT = "moe_layer.block"
VERSION = 1


def save_tensors(path: str | Path, tensors: Mapping[str, Tensor], *, header: Mapping[str, Any]) -> None:
    """Write tensors and a JSON header, with digests of both, atomically.

    Args:
        path: the `.safetensors` file. tensors: any dtypes; written as contiguous CPU tensors.
        header: JSON-serialisable values kept with the file (the config).
    """
    path = Path(path)
    stored = _by_value(tensors)
    digests = {name: _digests(name, tensor) for name, tensor in stored.items()}
    text = json.dumps({"header": dict(header), "sha256": digests}, sort_keys=True)
    metadata = {
        "format": FORMAT,
        "version": str(VERSION),
        "content": text,
        "content_sha256": hashlib.sha256(text.encode()).hexdigest(),
    }
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        save_file(stored, partial, metadata=metadata)
        with partial.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _by_value(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Contiguous CPU tensors that share no storage, which safetensors insists on."""
    stored: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        value = tensor.detach().cpu().contiguous()
        storage = value.untyped_storage().data_ptr()
        stored[name] = value.clone() if storage in seen else value
        seen.add(storage)
    return stored


def load_tensors(path: str | Path, *, experts: range | None = None) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read and verify a file written by `save_tensors`.

    Args:
        experts: read only these rows of the `experts.*` tensors.

    Returns:
        tensors on the CPU, and the header.

    Raises:
        CheckpointError: not such a file, another version, truncated, altered, or without all its tensors.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            content = _content(path, file.metadata())
            digests = content["sha256"]
            names = set(file.keys())
            if names != set(digests):
                raise CheckpointError(
                    f"{path} holds {len(names)} tensors and was saved with {len(digests)}; differing: "
                    f"{', '.join(sorted(names ^ set(digests))[:4])}; restore the file from a copy"
                )
            tensors = {name: _read(file, name, experts) for name in sorted(names)}
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}; restore it from a copy") from error
    for name, tensor in tensors.items():
        _verify(path, name, tensor, digests[name], experts)
    return tensors, content["header"]


def read_header(path: str | Path) -> dict[str, Any]:
    """The header of a file written by `save_tensors`, without its tensors.

    Raises:
        CheckpointError: not such a file, another version, or the header was altered.
    """
    path = Path(path)
    try:
        with safe_open(path, framework="pt") as file:
            return _content(path, file.metadata())["header"]
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(f"{path} is not a whole safetensors file: {error}; restore it from a copy") from error


def _content(path: Path, metadata: Mapping[str, str] | None) -> dict[str, Any]:
    found = dict(metadata or {})
    if found.get("format") != FORMAT:
        raise CheckpointError(
            f"{path} was not written by moe_layer (format {found.get('format')!r}); convert it with moe-layer convert"
        )
    if found.get("version") != str(VERSION):
        raise CheckpointError(
            f"{path} has format version {found.get('version')!r}, this moe_layer reads {VERSION}; install a newer one"
        )
    text = found.get("content", "")
    if hashlib.sha256(text.encode()).hexdigest() != found.get("content_sha256"):
        raise CheckpointError(f"{path}: the header does not match its sha256; restore the file from a copy")
    return json.loads(text)


def _read(file: Any, name: str, experts: range | None) -> Tensor:
    if experts is None or not name.startswith(EXPERT_PREFIX):
        return file.get_tensor(name)
    return file.get_slice(name)[experts.start : experts.stop]


def _verify(path: Path, name: str, tensor: Tensor, digests: str | list[str], experts: range | None) -> None:
    if experts is not None and isinstance(digests, list):
        digests = digests[experts.start : experts.stop]
    found = _digests(name, tensor)
    if found == digests:
        return
    where = name
    if isinstance(found, list) and len(found) == len(digests):
        first = 0 if experts is None else experts.start
        bad = [first + i for i, (a, b) in enumerate(zip(found, digests, strict=True)) if a != b]
        where = f"{name}, experts {bad[:8]}"
    raise CheckpointError(f"{path}: {where} does not match its sha256 (the data changed); restore the file from a copy")


def _digests(name: str, tensor: Tensor) -> str | list[str]:
    if name.startswith(EXPERT_PREFIX):
        return [_digest(part) for part in tensor]
    return _digest(tensor)


def _digest(tensor: Tensor) -> str:
    """sha256 over dtype, shape and bytes."""
    digest = hashlib.sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode())
    if tensor.numel():
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
