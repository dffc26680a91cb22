"""Where a conversion reads tensors from: a dict in memory, or safetensors files that are read piece by piece."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, cast, runtime_checkable

from safetensors import SafetensorError, safe_open
from torch import Tensor

from moe_layer.errors import CheckpointError

INDEX_NAME = "model.safetensors.index.json"


@runtime_checkable
class TensorSource(Protocol):
    """Named tensors whose shapes are known without reading them."""

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        """Name -> shape of everything in the source."""
        ...

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        """The tensor, or rows [start, stop) of its first dimension."""
        ...


@dataclass(frozen=True)
class DictSource:
    """Tensors in memory."""

    tensors: Mapping[str, Tensor]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        tensor = self.tensors[name].detach()
        return tensor if rows is None else tensor[rows[0] : rows[1]]


@dataclass(frozen=True)
class FileSource:
    """Tensors of one or more safetensors files; `read` touches only the bytes it returns.

    Attributes:
        files: tensor name in the file -> file.
        prefix: only names that begin with it; it is cut off.
        table: name without prefix -> shape.
    """

    files: Mapping[str, Path]
    prefix: str
    table: Mapping[str, tuple[int, ...]]

    def shapes(self) -> Mapping[str, tuple[int, ...]]:
        return self.table

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        full = self.prefix + name
        path = self.files[full]
        try:
            with safe_open(path, framework="pt") as file:
                if rows is None:
                    return file.get_tensor(full)
                return file.get_slice(full)[rows[0] : rows[1]]
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{path}: cannot read {full}: {error}; copy the file again") from error

    def select(self, prefix: str) -> FileSource:
        """The tensors whose names begin with `prefix`, which is cut off."""
        kept = {full: path for full, path in self.files.items() if full.startswith(prefix)}
        by_file: dict[Path, list[str]] = {}
        for full, path in kept.items():
            by_file.setdefault(path, []).append(full)
        table: dict[str, tuple[int, ...]] = {}
        for path, names in by_file.items():
            shapes = _file_shapes(path, names)
            table.update({full.removeprefix(prefix): shape for full, shape in shapes.items()})
        return FileSource(kept, prefix, table)


def as_source(tensors: Mapping[str, Tensor] | TensorSource) -> TensorSource:
    """A dict of tensors as a source; a source as it is."""
    if isinstance(tensors, Mapping):
        return DictSource(cast("Mapping[str, Tensor]", tensors))
    return tensors


def open_files(path: str | Path) -> FileSource:
    """Every tensor of a safetensors file, or of a directory of them (with or without a Hugging Face index).

    Raises:
        CheckpointError: nothing to read, a file of the index is absent, a header is damaged, or a name occurs twice.
    """
    path = Path(path)
    if path.is_file():
        paths = [path]
    elif path.is_dir():
        paths = sorted(path.glob("*.safetensors"))
    else:
        raise CheckpointError(f"{path} does not exist; give a safetensors file or a directory of them")
    if not paths:
        raise CheckpointError(f"{path} holds no *.safetensors file; pickled checkpoints (.bin, .pt) are not read")
    files: dict[str, Path] = {}
    for file in paths:
        for name in _file_names(file):
            if name in files:
                raise CheckpointError(f"tensor {name} is both in {files[name]} and in {file}; remove one of them")
            files[name] = file
    _check_index(path, files)
    return FileSource(files, "", {})


def _check_index(path: Path, files: Mapping[str, Path]) -> None:
    """Every tensor promised by the directory's index is in the file it names."""
    index = path / INDEX_NAME
    if not index.is_file():
        return
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        absent = [name for name, file in weight_map.items() if name not in files or files[name].name != file]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{index} is not a readable index ({error}); copy it again") from error
    if absent:
        raise CheckpointError(
            f"{index} lists {len(weight_map)} tensors and {len(absent)} of them are not in their files, the first is "
            f"{absent[0]} in {weight_map[absent[0]]}; the download is not complete"
        )


def _file_names(path: Path) -> list[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return list(file.keys())
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}; copy it again") from error


def _file_shapes(path: Path, names: list[str]) -> dict[str, tuple[int, ...]]:
    try:
        with safe_open(path, framework="pt") as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in names}
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file: {error}; copy it again") from error
