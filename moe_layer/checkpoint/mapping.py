"""Renaming and reshaping of one MoE block's tensors, as data: a list of pieces that can be read in both directions.

A `BlockMapping` states the complete set of names and shapes on both sides and which region of one side each region of
the other fills. Conversion is bitwise (copies only, no arithmetic) and strict: every name and shape is checked before
the first byte moves, and every element on both sides belongs to exactly one piece.

Shape letters: E experts, L local experts, D hidden, F expert intermediate.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from moe_layer.checkpoint.source import TensorSource, as_source
from moe_layer.errors import CheckpointError

Shape = tuple[int, ...]
EXPERT_PREFIX = "experts."
_LISTED = 4


@dataclass(frozen=True)
class Region:
    """Part of a named tensor: all of it, one expert of it (dim 0), and/or a range of the rows that follow."""

    name: str
    expert: int | None = None
    rows: tuple[int, int] | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """The view of `tensor` that this region means."""
        view = tensor if self.expert is None else tensor[self.expert]
        return view if self.rows is None else view[self.rows[0] : self.rows[1]]


@dataclass(frozen=True)
class Piece:
    """A region of ours equals a region of theirs, up to a permutation of elements.

    `transposed`: the last two dimensions are swapped in theirs. `interleaved`: theirs alternates gate and up rows
    (g0, u0, g1, u1, ...) where ours has all gate rows first.
    """

    ours: Region
    theirs: Region
    transposed: bool = False
    interleaved: bool = False

    def import_into(self, ours: Tensor, theirs: Tensor) -> None:
        """Write their values, a tensor shaped like their region, into our region."""
        value = theirs.transpose(-1, -2) if self.transposed else theirs
        if not self.interleaved:
            ours.copy_(value)
            return
        dim = _row_dim(self.ours.name, ours)
        for half, target in enumerate(ours.chunk(2, dim)):
            target.copy_(_every_second(value, dim, half))

    def export_into(self, theirs: Tensor, ours: Tensor) -> None:
        """Write our values into their region: the inverse of `import_into`."""
        target = theirs.transpose(-1, -2) if self.transposed else theirs
        if not self.interleaved:
            target.copy_(ours)
            return
        dim = _row_dim(self.ours.name, ours)
        for half, value in enumerate(ours.chunk(2, dim)):
            _every_second(target, dim, half).copy_(value)


def _row_dim(name: str, tensor: Tensor) -> int:
    """Dimension of the 2F gate and up rows: last in a bias, last but one in a weight."""
    return tensor.ndim - 1 if name.endswith("bias") else tensor.ndim - 2


def _every_second(tensor: Tensor, dim: int, first: int) -> Tensor:
    return tensor[(slice(None),) * dim + (slice(first, None, 2),)]


@dataclass(frozen=True)
class BlockMapping:
    """Both manifests of one MoE block and the pieces between them.

    Attributes:
        label: what "theirs" is, for messages.
        ours, theirs: name -> shape, the complete set on each side.
        pieces: cover every element of both sides once.
    """

    label: str
    ours: Mapping[str, Shape]
    theirs: Mapping[str, Shape]
    pieces: tuple[Piece, ...]

    def __post_init__(self) -> None:
        for side, manifest in (("ours", self.ours), ("theirs", self.theirs)):
            covered = sum(_numel(getattr(piece, side), manifest) for piece in self.pieces)
            total = sum(math.prod(shape) for shape in manifest.values())
            assert covered == total, f"{self.label}: pieces cover {covered} of {total} elements of {side}"

    def to_ours(
        self, tensors: Mapping[str, Tensor] | TensorSource, *, experts: range | None = None
    ) -> dict[str, Tensor]:
        """Our state dict of the block, in the dtypes found.

        Args:
            tensors: their tensors, exactly those of `theirs`; a file-backed source is read piece by piece.
            experts: only these global experts (an EP rank's share); others are neither read nor allocated.

        Raises:
            CheckpointError: a tensor is missing, extra, misshapen, or differs in dtype from its siblings.
        """
        source = as_source(tensors)
        check_manifest(self.theirs, source.shapes(), where=self.label)
        result: dict[str, Tensor] = {}
        for piece in self.pieces:
            if experts is not None and piece.ours.expert is not None and piece.ours.expert not in experts:
                continue
            value = self._read(source, piece, experts)
            target = self._allocate(result, piece, value.dtype, experts)
            if target.dtype != value.dtype:
                raise CheckpointError(
                    f"{self.label}: {piece.theirs.name} is {value.dtype}, but other parts of our {piece.ours.name} are "
                    f"{target.dtype}; store all of them in one dtype"
                )
            piece.import_into(self._ours_view(target, piece, experts), value)
        return result

    def from_ours(self, tensors: Mapping[str, Tensor] | TensorSource) -> dict[str, Tensor]:
        """Their tensors from our complete block (all E experts); the inverse of `to_ours`, bit for bit.

        Raises:
            CheckpointError: a tensor is missing, extra or misshapen.
        """
        source = as_source(tensors)
        check_manifest(self.ours, source.shapes(), where="moe_layer block")
        result: dict[str, Tensor] = {}
        loaded: dict[str, Tensor] = {}
        for piece in self.pieces:
            if piece.ours.name not in loaded:
                loaded = {piece.ours.name: source.read(piece.ours.name)}
            value = piece.ours.of(loaded[piece.ours.name])
            if piece.theirs.name not in result:
                shape = self.theirs[piece.theirs.name]
                result[piece.theirs.name] = torch.empty(shape, dtype=value.dtype, device=value.device)
            piece.export_into(piece.theirs.of(result[piece.theirs.name]), value)
        return result

    def _read(self, source: TensorSource, piece: Piece, experts: range | None) -> Tensor:
        stacked = piece.ours.expert is None and piece.ours.name.startswith(EXPERT_PREFIX)
        if experts is not None and stacked:
            return source.read(piece.theirs.name, rows=(experts.start, experts.stop))
        if piece.theirs.expert is None and piece.theirs.rows is not None:
            return source.read(piece.theirs.name, rows=piece.theirs.rows)
        return piece.theirs.of(source.read(piece.theirs.name))

    def _allocate(self, result: dict[str, Tensor], piece: Piece, dtype: torch.dtype, experts: range | None) -> Tensor:
        name = piece.ours.name
        if name not in result:
            shape = self.ours[name]
            if experts is not None and name.startswith(EXPERT_PREFIX):
                shape = (len(experts), *shape[1:])
            result[name] = torch.empty(shape, dtype=dtype)
        return result[name]

    def _ours_view(self, target: Tensor, piece: Piece, experts: range | None) -> Tensor:
        region = piece.ours
        if experts is not None and region.expert is not None:
            region = Region(region.name, region.expert - experts.start, region.rows)
        return region.of(target)


def _numel(region: Region, manifest: Mapping[str, Shape]) -> int:
    shape = manifest[region.name][0 if region.expert is None else 1 :]
    if region.rows is not None:
        shape = (region.rows[1] - region.rows[0], *shape[1:])
    return math.prod(shape)


def check_manifest(expected: Mapping[str, Shape], found: Mapping[str, Shape], *, where: str) -> None:
    """Compare names, count and shapes.

    Raises:
        CheckpointError: one sentence with everything missing, extra and misshapen.
    """
    missing = [f"{name} {list(expected[name])}" for name in expected if name not in found]
    extra = [name for name in found if name not in expected]
    wrong = [
        f"{name} is {list(found[name])}, must be {list(shape)}"
        for name, shape in expected.items()
        if name in found and tuple(found[name]) != tuple(shape)
    ]
    problems = [
        f"{len(items)} {kind}: {_some(items)}"
        for kind, items in (("missing", missing), ("unexpected", extra), ("misshapen", wrong))
        if items
    ]
    if problems:
        raise CheckpointError(
            f"{where}: expected {len(expected)} tensors, found {len(found)}; {'; '.join(problems)}; "
            "check that the config matches the checkpoint"
        )


def _some(items: Iterable[str]) -> str:
    items = list(items)
    listed = ", ".join(items[:_LISTED])
    return listed if len(items) <= _LISTED else f"{listed} and {len(items) - _LISTED} more"
