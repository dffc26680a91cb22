"""RoutingTrace: which experts every token used in every layer, as data that can be saved, cut, joined and replayed.

N rows (tokens, sequence after sequence), L layers, K top-k, E experts, S sequences, T tokens of a micro-batch.
Token-major, ids in a dtype that E alone decides, validity as one bit per slot: with 256 experts every code of a byte is
an expert, so no id can mean "missing" on disk. In decisions that reach a router, missing is -1.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.checks import check_columns, check_structure, check_values
from moe_layer.replay.plan import RoutingPlan, make_plan
from moe_layer.replay.spec import (
    WIDE_UNSIGNED,
    TraceSpec,
    integer_tensor,
    layer_names,
    pack_bits,
    token_checks,
    unpack_bits,
)


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Recorded routing of N tokens. Build it with `from_ids`, `open`, an adapter, or a session's `record`.

    Attributes:
        spec: E, K and the layers' module paths.
        ids: uint8, int16 or int32 (by E) `[N, L, K]`, in slot order. valid: uint8 `[N, L, ceil(K/8)]`, bit k of a row
            is slot k.
        cu_seqlens: int64 `[S+1]`, boundaries of the sequences.
        weights: fp32 `[N, L, K]`, the recording engine's gate weights, or None.
        token_check: int32 `[N]`, check of (token id, position), or None.
        weights_version: int32 `[N]`, which policy weights produced a row (partial rollouts), or None.
        first_position: position of each sequence's first row; other than 0 for a fragment that waits for `splice`.
        notes: free text, such as the engine's name.
    """

    spec: TraceSpec
    ids: Tensor
    valid: Tensor
    cu_seqlens: Tensor
    weights: Tensor | None = None
    token_check: Tensor | None = None
    weights_version: Tensor | None = None
    first_position: int = 0
    notes: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_structure(self)

    # ---- making -----------------------------------------------------------------------------------------------------

    @classmethod
    def from_ids(
        cls,
        ids: Tensor,
        *,
        num_experts: int,
        layers: Sequence[str],
        cu_seqlens: Tensor | Sequence[int] | None = None,
        weights: Tensor | None = None,
        token_ids: Tensor | None = None,
        weights_version: Tensor | int | None = None,
        first_position: int = 0,
        notes: Mapping[str, str] | None = None,
    ) -> RoutingTrace:
        """A checked trace from integer ids `[N, L, K]` of any signed or unsigned dtype, -1 = missing.

        Args:
            num_experts, layers: see `TraceSpec`. cu_seqlens: boundaries, default one sequence.
            weights: floating `[N, L, K]`. token_ids: integer `[N]`, kept as checks only.
            weights_version: one number or `[N]`. first_position: of a fragment. notes: free text.

        Raises:
            TraceError: ids below -1 or from E up, duplicates in a row, non-finite weights, shapes that do not fit.
        """
        if integer_tensor(ids, "ids").ndim != 3:
            raise TraceError(f"ids must be integers [rows, layers, top_k], got {ids.dtype} {tuple(ids.shape)}")
        spec = TraceSpec(num_experts, ids.shape[2], layer_names(layers))
        host = ids.detach().cpu()
        host = host.to(torch.int64) if host.dtype in WIDE_UNSIGNED else host
        low, high = (int(host.min()), int(host.max())) if host.numel() else (0, 0)
        if low < -1 or high >= num_experts:
            raise TraceError(
                f"ids run from {low} to {high} and must lie in [0, {num_experts}), or be "
                "-1 for a "
                "missing slot; record logical, routed-only ids"
            )
        n = ids.shape[0]
        bounds = torch.tensor([0, n]) if cu_seqlens is None else _integers(cu_seqlens, "cu_seqlens")
        version = None if weights_version is None else _versions(weights_version, n)
        if weights is not None and not (isinstance(weights, Tensor) and weights.is_floating_point()):
            raise TraceError(
                f"weights must be a floating tensor, got {getattr(weights, 'dtype', type(weights).__name__)}"
            )
        trace = cls(
            spec=spec,
            ids=torch.empty(host.shape, dtype=spec.dtype).copy_(host if low >= 0 else host.clamp(min=0)),
            valid=pack_bits(host >= 0),
            cu_seqlens=bounds,
            weights=None if weights is None else weights.detach().cpu().to(torch.float32).contiguous(),
            weights_version=version,
            first_position=first_position,
            notes=dict(notes) if isinstance(notes, Mapping) else notes or {},
        )
        check_values(trace)
        return trace if token_ids is None else trace.with_tokens(token_ids)

    def with_tokens(self, token_ids: Tensor) -> RoutingTrace:
        """The same trace that knows its tokens (as checks): integer `[N]`.

        Raises:
            TraceError: not one integer a row.
        """
        if tuple(integer_tensor(token_ids, "token_ids").shape) != (self.num_tokens,):
            raise TraceError(f"token_ids must be [{self.num_tokens}] like the rows, got {tuple(token_ids.shape)}")
        return replace(self, token_check=token_checks(token_ids, self.positions))

    @classmethod
    def open(cls, path: str | Path, *, verify: bool = True) -> RoutingTrace:
        """Open a saved trace, memory-mapped (`.safetensors`) or read (`.npz`).

        Args:
            verify: read the file once to compare its checksum and check every row.

        Raises:
            TraceError: truncated, damaged, another format or version, values that do not fit.
        """
        from moe_layer.replay.trace_io import open_trace

        return open_trace(Path(path), verify=verify)

    def save(self, path: str | Path) -> None:
        """Write `.safetensors` or `.npz` with format version and checksum; the file appears only when it is
        complete.
        """
        from moe_layer.replay.trace_io import save_trace

        save_trace(self, Path(path))

    # ---- reading ----------------------------------------------------------------------------------------------------

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[0]

    @property
    def lengths(self) -> list[int]:
        """Rows of each sequence."""
        return self.cu_seqlens.diff().tolist()

    @property
    def positions(self) -> Tensor:
        """int64 `[N]`, position of each row in its sequence."""
        starts = torch.repeat_interleave(self.cu_seqlens[:-1], self.cu_seqlens.diff())
        return torch.arange(self.num_tokens) - starts + self.first_position

    def wide_ids(self, start: int = 0, stop: int | None = None) -> Tensor:
        """int32 `[N, L, K]` with -1 for missing slots, of rows `[start, stop)`."""
        rows = slice(start, stop)
        return torch.where(unpack_bits(self.valid[rows], self.spec.top_k), self.ids[rows].to(torch.int32), -1)

    def validate(self, *, complete: bool = False) -> None:
        """Check every row; `complete` also forbids missing slots.

        Raises:
            TraceError: ids out of range, duplicates, non-finite weights, damaged bitmap.
        """
        check_values(self, complete=complete)

    def rows(self, start: int, stop: int) -> RoutingTrace:
        """Rows `[start, stop)` of a single-sequence trace as a fragment that knows its position.

        Raises:
            TraceError: several sequences, or rows outside the trace.
        """
        if len(self.cu_seqlens) != 2 or not 0 <= start <= stop <= self.num_tokens:
            raise TraceError(
                f"rows [{start}, {stop}) need one sequence with so many rows, this trace has "
                f"{len(self.cu_seqlens) - 1} "
                f"sequences and {self.num_tokens} rows; take a sequence first"
            )
        return self._cut(start, stop, self.first_position + start)

    def sequence(self, index: int) -> RoutingTrace:
        """One sequence.

        Raises:
            TraceError: no such sequence.
        """
        if not 0 <= index < len(self.cu_seqlens) - 1:
            raise TraceError(f"there is no sequence {index}, this trace has {len(self.cu_seqlens) - 1}")
        start, stop = self.cu_seqlens[index : index + 2].tolist()
        return self._cut(start, stop, self.first_position)

    def _cut(self, start: int, stop: int, first_position: int) -> RoutingTrace:
        cut = {name: getattr(self, name)[start:stop] for name in PER_ROW if getattr(self, name) is not None}
        return replace(self, **cut, cu_seqlens=torch.tensor([0, stop - start]), first_position=first_position)

    # ---- joining ----------------------------------------------------------------------------------------------------

    def splice(self, other: RoutingTrace, start: int | None = None) -> RoutingTrace:
        """Multi-turn and partial rollouts: keep this trace's rows below `start`, take the rest from `other`.

        Rows that are owned already are never replaced, because later turns recompute them with other weights or
        kernels. What this trace has no ids for is not owned: the last sampled token of a turn, which the engine first
        runs in the next turn's prefill, is taken from there.

        Args:
            other: a fragment of the same sequence, `other.first_position` rows into it; it may repeat owned rows.
            start: number of own rows to keep, default all of them.

        Raises:
            TraceError: another model, a gap, rows about other tokens, or columns (weights, token checks, weights
                versions) that only one of the two has.
        """
        start = self.num_tokens if start is None else start
        mine = self.rows(0, start)
        if other.spec != self.spec:
            raise TraceError(f"cannot splice a trace of {_describe(other.spec)} onto one of {_describe(self.spec)}")
        first = other.first_position - self.first_position
        if len(other.cu_seqlens) != 2 or not 0 <= first <= start or first + other.num_tokens < start:
            raise TraceError(
                f"the fragment covers positions [{first}, {first + other.num_tokens}) and must reach from at "
                f"most {start} "
                f"to at least {start}, in one sequence; a gap cannot be spliced"
            )
        check_columns([mine, other])
        self._check_overlap(other, first, min(self.num_tokens, first + other.num_tokens))
        return _join(
            [mine._filled(other.rows(0, start - first), first), other.rows(start - first, other.num_tokens)],
            one_sequence=True,
        )

    def _filled(self, other: RoutingTrace, first: int) -> RoutingTrace:
        """Layers of rows without any ids, from `other`, which are the rows from `first` on."""
        absent_NL1 = (self.valid[first:] == 0).all(2, keepdim=True)
        if not bool(absent_NL1.any()):
            return self
        absent = {"ids": absent_NL1, "valid": absent_NL1, "weights": absent_NL1}
        absent["weights_version"] = absent_NL1.all(1).squeeze(1)  # of rows that have nothing of this trace
        columns = {name: (getattr(self, name), getattr(other, name), mask) for name, mask in absent.items()}
        filled = {
            name: torch.cat((mine[:first], torch.where(mask, theirs, mine[first:])))
            for name, (mine, theirs, mask) in columns.items()
            if mine is not None
        }
        return replace(self, **filled)

    def _check_overlap(self, other: RoutingTrace, first: int, stop: int) -> None:
        if self.token_check is None or other.token_check is None or stop <= first:
            return
        differ = self.token_check[first:stop] != other.token_check[: stop - first]
        if bool(differ.any()):
            raise TraceError(
                f"the fragment is about other tokens from position {first + int(differ.nonzero()[0])} on; it "
                "belongs to "
                "another sequence, or is shifted"
            )

    @staticmethod
    def concat(traces: Sequence[RoutingTrace]) -> RoutingTrace:
        """Several traces of one model as one, sequence after sequence. Raises TraceError as `splice`."""
        if not traces:
            raise TraceError("concat needs at least one trace")
        for trace in traces[1:]:
            if trace.spec != traces[0].spec or trace.first_position != traces[0].first_position:
                raise TraceError(
                    f"cannot join a trace of {_describe(trace.spec)} from position {trace.first_position} on and one "
                    f"of {_describe(traces[0].spec)} from {traces[0].first_position} on; one model, and fragments are "
                    "spliced first"
                )
        return _join(list(traces), one_sequence=False)

    def merged(self, other: RoutingTrace) -> RoutingTrace:
        """Fill this trace's missing slots with `other`'s: the shards of a context-parallel recording.

        Raises:
            TraceError: other shapes, sequences, tokens or weights versions, slots that both have with different ids,
                rows that name an expert twice together, or weights in one of the two only.
        """
        if other.spec != self.spec or other.num_tokens != self.num_tokens:
            raise TraceError(
                f"cannot merge {other.num_tokens} rows of {_describe(other.spec)} into {self.num_tokens} rows of "
                f"{_describe(self.spec)}; merge shards of one forward pass"
            )
        check_columns([self, other])
        for name in ("cu_seqlens", "token_check", "weights_version", "first_position"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if not (torch.equal(mine, theirs) if isinstance(mine, Tensor) else mine == theirs):
                raise TraceError(f"the traces to be merged differ in {name}; merge shards of one forward pass")
        mine, theirs = unpack_bits(self.valid, self.spec.top_k), unpack_bits(other.valid, self.spec.top_k)
        if bool((mine & theirs & (self.ids != other.ids)).any()):
            raise TraceError(
                "both traces have ids for the same slots and they differ; merge shards of one forward pass"
            )
        weights = None
        if self.weights is not None and other.weights is not None:
            weights = torch.where(mine, self.weights, other.weights)
        ids = torch.where(mine, self.ids, other.ids)
        whole = replace(self, ids=ids, valid=self.valid | other.valid, weights=weights)
        check_values(whole)
        return whole

    # ---- replaying --------------------------------------------------------------------------------------------------

    def plan(
        self,
        token_index: Tensor | None = None,
        *,
        layers: Sequence[str] | Mapping[str, str] | None = None,
        device: torch.device | str = "cpu",
        tokens: Tensor | None = None,
        allow_missing: bool = True,
    ) -> RoutingPlan:
        """What one micro-batch on one rank replays: the only sharding primitive.

        Args:
            token_index: integer, any shape; row of the trace for each token of the micro-batch, -1 = pad or unknown.
                Default: all rows in order. See `moe_layer.replay.index_map`.
            layers: those of the session (a pipeline stage has some); where the trace has other names for them, a
                mapping from the session's to the trace's. device: of the model.
            tokens: the micro-batch's token ids, same shape as `token_index`; compared with the recorded ones.
            allow_missing: False refuses rows or slots without ids (pads excepted).

        Raises:
            TraceError: an index out of range, unknown layers, other tokens than recorded, missing slots where
                forbidden.
        """
        return make_plan(self, token_index, layers=layers, device=device, tokens=tokens, allow_missing=allow_missing)


def _integers(value: object, name: str) -> Tensor:
    """int64 on the CPU, from a tensor, an array or a list of integers."""
    try:
        return integer_tensor(torch.as_tensor(value), name).cpu().to(torch.int64)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(error, TraceError):
            raise
        raise TraceError(f"{name} must be integers, got {str(value)[:40]} ({error})") from error


def _versions(value: Tensor | int, rows: int) -> Tensor:
    """int32 `[rows]`."""
    versions = _integers(value, "weights_version")
    if versions.shape not in ((), (rows,)) or (versions.numel() and int(versions.abs().max()) >= 2**31):
        raise TraceError(
            f"weights_version must be one int32 or [{rows}] like the rows, got {tuple(versions.shape)} "
            f"{str(versions.tolist())[:40]}"
        )
    return versions.to(torch.int32).expand(rows).clone()


PER_ROW = ("ids", "valid", "weights", "token_check", "weights_version")


def _join(parts: list[RoutingTrace], *, one_sequence: bool) -> RoutingTrace:
    check_columns(parts)
    joined: dict[str, Any] = {}
    for name in PER_ROW:
        known = [tensor for part in parts if (tensor := getattr(part, name)) is not None]
        joined[name] = torch.cat(known) if known else None
    lengths = [part.cu_seqlens.diff() for part in parts]
    total = torch.cat(lengths).sum().reshape(1) if one_sequence else torch.cat(lengths)
    bounds = torch.cat((torch.zeros(1, dtype=torch.int64), total.cumsum(0)))
    return replace(parts[0], **joined, cu_seqlens=bounds)


def _describe(spec: TraceSpec) -> str:
    return f"{len(spec.layers)} layers (first {spec.layers[0]!r}), {spec.num_experts} experts, top_k {spec.top_k}"
