"""Traces on disk: safetensors (memory-mapped) or npz, with a format version and a SHA-256 over facts and rows."""

from __future__ import annotations

import hashlib
import json
import os
import uuid
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.spec import TraceSpec

if TYPE_CHECKING:
    from moe_layer.replay.trace import RoutingTrace

FORMAT = "moe-routing-trace"
VERSION = 1
REQUIRED = ("ids", "valid", "cu_seqlens")
OPTIONAL = ("weights", "token_check", "weights_version")


def save_trace(trace: RoutingTrace, path: Path) -> None:
    """Write beside the target, then rename: a crash leaves no half file under the name.

    Raises:
        TraceError: a name that ends neither in .safetensors nor in .npz.
    """
    _check_suffix(path)
    tensors = {name: tensor for name in REQUIRED + OPTIONAL if (tensor := getattr(trace, name)) is not None}
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    facts = _facts(trace)
    header = {"format": FORMAT, "version": str(VERSION), "facts": facts, "sha256": _digest(facts, tensors)}
    partial = path.with_name(f".{path.name}.{uuid.uuid4().hex[:12]}.partial")  # of this call: others may write it too
    try:
        with open(partial, "wb") as file:
            if path.suffix == ".npz":
                arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
                np.savez(file, **arrays, header=np.frombuffer(json.dumps(header).encode(), dtype=np.uint8))
            else:
                from safetensors.torch import save

                file.write(save(tensors, metadata=header))
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def open_trace(path: Path, *, verify: bool) -> RoutingTrace:
    """See `RoutingTrace.open`."""
    from moe_layer.replay.trace import RoutingTrace

    _check_suffix(path)
    if not path.is_file():
        raise TraceError(f"there is no trace at {path}; check the path")
    header, tensors = _read_npz(path) if path.suffix == ".npz" else _read_safetensors(path)
    _check_header(path, header)
    missing = [name for name in REQUIRED if name not in tensors]
    unknown = sorted(set(tensors) - {*REQUIRED, *OPTIONAL})
    if missing or unknown:
        raise TraceError(
            f"{path} lacks the tensors {missing} and has the unknown ones {unknown}; it is not a whole trace"
        )
    if verify and _digest(header["facts"], tensors) != header["sha256"]:
        raise TraceError(
            f"{path} does not have the checksum it was written with; it is damaged, copy or record it again"
        )
    spec, first, notes = _read_facts(path, header["facts"])
    trace = RoutingTrace(spec=spec, first_position=first, notes=notes, **tensors)
    if verify:
        trace.validate()
    return trace


def _check_suffix(path: Path) -> None:
    if path.suffix not in (".safetensors", ".npz"):
        raise TraceError(f"{path} must end in .safetensors or .npz; choose one of these formats")


def _facts(trace: RoutingTrace) -> str:
    spec = trace.spec
    facts = {
        "num_experts": spec.num_experts,
        "top_k": spec.top_k,
        "layers": list(spec.layers),
        "first_position": trace.first_position,
        "notes": dict(trace.notes),
    }
    try:
        return json.dumps(facts, sort_keys=True)
    except TypeError as error:
        raise TraceError(f"notes must map text to text ({error}); convert the values") from error


def _read_facts(path: Path, text: str) -> tuple[TraceSpec, int, dict[str, str]]:
    """What `_facts` wrote; the checksum says nothing about a writer that is not ours."""
    try:
        facts = json.loads(text)
        numbers = [facts[name] for name in ("num_experts", "top_k", "first_position")]
        layers, notes = facts["layers"], facts["notes"]
    except (KeyError, TypeError, json.JSONDecodeError) as error:
        raise TraceError(f"{path} has an unreadable description ({error}); it is damaged, record it again") from error
    whole = all(isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**31 for n in numbers)
    if not whole or not isinstance(layers, list) or not isinstance(notes, dict):
        raise TraceError(
            f"{path} has an unreadable description (num_experts, top_k, first_position {numbers}, layers "
            f"{str(layers)[:40]}, notes {str(notes)[:40]}); it is damaged, record it again"
        )
    return TraceSpec(numbers[0], numbers[1], tuple(layers)), numbers[2], notes


def _digest(facts: str, tensors: dict[str, Tensor]) -> str:
    sha = hashlib.sha256(facts.encode())
    for name in sorted(tensors):
        tensor = tensors[name]
        sha.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
        sha.update(np.ascontiguousarray(tensor.numpy()))  # torch's view as bytes fails for no and for one element
    return sha.hexdigest()


def _read_safetensors(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            header = dict(file.metadata() or {})
            return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    except SafetensorError as error:
        raise TraceError(f"{path} is truncated or no safetensors file ({error}); copy or record it again") from error


def _read_npz(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        header = json.loads(arrays.pop("header").tobytes())
        return header, {name: torch.from_numpy(array) for name, array in arrays.items()}
    except (OSError, ValueError, KeyError, TypeError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
        # RuntimeError: zipfile takes a changed header for encryption, or for a method of compression it lacks
        raise TraceError(f"{path} is truncated or no npz trace ({error}); copy or record it again") from error


def _check_header(path: Path, header: object) -> None:
    found = header if isinstance(header, dict) else {}
    texts = all(isinstance(found.get(name), str) for name in ("format", "facts", "sha256"))
    if not texts or found["format"] != FORMAT:
        raise TraceError(f"{path} is not a routing trace (format {found.get('format')!r}); pass a file written by save")
    version = found.get("version")
    if version != str(VERSION):
        raise TraceError(
            f"{path} has trace format version {version}, this package reads {VERSION}; "
            "upgrade moe_layer, or save the trace with a matching version"
        )
