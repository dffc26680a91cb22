"""What makes a trace unusable: every finding is a TraceError that names the row, the value and the remedy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.spec import TraceSpec, unpack_bits

if TYPE_CHECKING:
    from moe_layer.replay.trace import RoutingTrace


def check_structure(trace: RoutingTrace) -> None:
    """Types, shapes, devices and boundaries; reads no row."""
    spec, n = trace.spec, trace.ids.shape[0] if trace.ids.ndim else 0
    layers = len(spec.layers)
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "ids": (spec.dtype, (n, layers, spec.top_k)),
        "valid": (torch.uint8, (n, layers, spec.validity_bytes)),
        "weights": (torch.float32, (n, layers, spec.top_k)),
        "token_check": (torch.int32, (n,)),
        "weights_version": (torch.int32, (n,)),
    }
    for name, (dtype, shape) in expected.items():
        tensor: Tensor | None = getattr(trace, name)
        if tensor is None:
            continue
        if tensor.device.type != "cpu":
            raise TraceError(
                f"{name} is on {tensor.device}, a trace lives on the CPU; call .cpu(), and plan(device=...)"
            )
        if tensor.dtype != dtype:
            raise TraceError(
                f"{name} is {tensor.dtype}, must be {dtype} (ids: uint8 up to 256 experts, int16 up to 32768, "
                f"else int32; this trace has {spec.num_experts}); build traces with RoutingTrace.from_ids"
            )
        if tuple(tensor.shape) != shape:
            raise TraceError(
                f"{name} has shape {tuple(tensor.shape)}, must be {shape} for {n} rows, {layers} layers and top_k "
                f"{spec.top_k}; rows, layers or top_k were lost"
            )
    _check_boundaries(trace.cu_seqlens, n)
    first = trace.first_position
    if isinstance(first, bool) or not isinstance(first, int) or first < 0:
        raise TraceError(f"first_position is {first!r}, must be 0 or the rows before this fragment")
    if not isinstance(trace.notes, Mapping):
        raise TraceError(f"notes must map text to text, got {type(trace.notes).__name__}; pass a dict")


def _check_boundaries(cu_seqlens: Tensor, rows: int) -> None:
    if cu_seqlens.dtype != torch.int64 or cu_seqlens.ndim != 1 or cu_seqlens.numel() < 2:
        raise TraceError(
            f"cu_seqlens must be int64 [S+1] with S >= 1, got {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}; "
            "pass the sequences' boundaries"
        )
    if int(cu_seqlens[0]) != 0 or int(cu_seqlens[-1]) != rows or bool((cu_seqlens.diff() < 0).any()):
        raise TraceError(
            f"cu_seqlens runs from {int(cu_seqlens[0])} to {int(cu_seqlens[-1])} and must rise from 0 to the trace's "
            f"{rows} rows; rows were lost or added"
        )


def check_columns(parts: Sequence[RoutingTrace]) -> None:
    """Traces that become one have the same columns, or the checks and facts of some rows would be lost in silence."""
    rows = [part for part in parts if part.num_tokens]  # a trace without rows has nothing to lose
    for name in ("weights", "token_check", "weights_version"):
        having = sum(getattr(part, name) is not None for part in rows)
        if 0 < having < len(rows):
            raise TraceError(
                f"{having} of the {len(rows)} traces have {name} and the others have none; record all of them alike, "
                f"or drop it: dataclasses.replace(trace, {name}=None)"
            )


def check_values(trace: RoutingTrace, *, complete: bool = False, chunk: int = 1 << 16) -> None:
    """Range, duplicates, weights and padding bits of every row, chunk by chunk so that a mapped file stays on disk."""
    for start in range(0, trace.ids.shape[0], chunk):
        rows = slice(start, start + chunk)
        weights = None if trace.weights is None else trace.weights[rows]
        _check_rows(trace.spec, trace.ids[rows], trace.valid[rows], weights, start, complete)


def _check_rows(spec: TraceSpec, ids: Tensor, bits: Tensor, weights: Tensor | None, start: int, complete: bool) -> None:
    used = spec.top_k % 8
    if used and bool((bits[..., -1] >> used).any()):
        raise TraceError(f"valid has bits set beyond top_k ({spec.top_k}); the bitmap is damaged or has another top_k")
    mask = unpack_bits(bits, spec.top_k)
    known = ids if bool(mask.all()) else torch.where(mask, ids, 0)
    if known.numel() and (int(known.min()) < 0 or int(known.max()) >= spec.num_experts):
        bad = (known < 0) | (known.to(torch.int64) >= spec.num_experts)
        at = _where(bad, spec, start)
        raise TraceError(
            f"{int(bad.sum())} ids lie outside [0, {spec.num_experts}), the first is {int(known[bad][0])} at {at}; "
            "mark missing slots in the validity bitmap and record logical, routed-only ids"
        )
    if complete and not bool(mask.all()):
        raise TraceError(
            f"{int((~mask).sum())} slots are missing (-1), the first at {_where(~mask, spec, start)}, and "
            "missing slots "
            "are forbidden here; record them, or allow missing slots"
        )
    repeated = _repeated(ids, mask)
    if bool(repeated.any()):
        at = _where(repeated.unsqueeze(-1), spec, start)
        raise TraceError(
            f"{int(repeated.sum())} rows name an expert twice, the first at {at}; zero-filled rows look like "
            "this: mark "
            "rows that were never recorded as missing"
        )
    if weights is not None and not bool((torch.isfinite(weights) | ~mask).all()):
        at = _where(~torch.isfinite(weights) & mask, spec, start)
        raise TraceError(f"recorded weights are NaN or infinite, the first at {at}; record again, or drop the weights")


def _repeated(ids_NLK: Tensor, mask_NLK: Tensor) -> Tensor:
    """bool `[N, L]`: rows with one expert in two slots. Slots are compared in pairs, in the narrow dtype: a sort of
    ids that may be missing takes ten times as long."""
    ids_KNL = ids_NLK.movedim(2, 0).contiguous()
    mask_KNL = None if bool(mask_NLK.all()) else mask_NLK.movedim(2, 0).contiguous()
    repeated_NL = torch.zeros(ids_NLK.shape[:2], dtype=torch.bool)
    for slot in range(1, len(ids_KNL)):
        same = ids_KNL[:slot] == ids_KNL[slot]
        if mask_KNL is not None:
            same &= mask_KNL[:slot] & mask_KNL[slot]
        repeated_NL |= same.any(0)
    return repeated_NL


def _where(hits: Tensor, spec: TraceSpec, start: int) -> str:
    row, layer = torch.nonzero(hits)[0][:2].tolist()
    return f"row {start + row}, layer {spec.layers[layer]!r}"
