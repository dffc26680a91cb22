"""What all adapters share: which entries of a foreign layer axis are MoE layers, and S-1 rows for S tokens.

R recorded rows, S tokens of the sequence, A entries of the foreign layer axis, L MoE layers, K top-k.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.spec import layer_names
from moe_layer.replay.trace import RoutingTrace


@dataclass(frozen=True)
class LayerAxis:
    """How a foreign layer axis maps to module paths.

    Attributes:
        layers: module path of each MoE layer, in order.
        decoder: number of decoder layers and the indices that are MoE, for engines that keep all layers on the axis;
            None when only MoE layers are there. With it, an axis of either length is recognised by its length.
    """

    layers: tuple[str, ...]
    decoder: tuple[int, tuple[int, ...]] | None = None

    def __post_init__(self) -> None:
        if self.decoder is None:
            return
        count, indices = self.decoder
        if len(indices) != len(self.layers) or not all(0 <= index < count for index in indices):
            raise TraceError(
                f"decoder {self.decoder} must give each of the {len(self.layers)} layers its index below {count}"
            )

    @classmethod
    def of(cls, layers: Sequence[str], *, num_decoder_layers: int | None = None) -> LayerAxis:
        """From module paths with one number in them (`model.layers.3.mlp`): the number is the decoder index.

        Raises:
            TraceError: no layers, or decoder indices that repeat or pass `num_decoder_layers`.
        """
        layers = layer_names(layers)
        if not layers:
            raise TraceError("layers is empty; name the model's MoE layers")
        if num_decoder_layers is None:
            return cls(layers)
        numbers = tuple(_layer_number(name) for name in layers)
        if len(set(numbers)) != len(numbers) or max(numbers) >= num_decoder_layers:
            raise TraceError(
                f"decoder indices {list(numbers)} must differ and lie below {num_decoder_layers}; pass "
                "LayerAxis(layers, "
                "decoder=(count, indices))"
            )
        return cls(layers, (num_decoder_layers, numbers))

    def select(self, rows_RAK: Tensor) -> Tensor:
        """`[R, L, K]` of ids or weights.

        Raises:
            TraceError: an axis of another length.
        """
        axis = rows_RAK.shape[1]
        if axis == len(self.layers):
            return rows_RAK
        if self.decoder is not None and axis == self.decoder[0]:
            return rows_RAK[:, list(self.decoder[1])]
        known = f" or {self.decoder[0]} (all decoder layers)" if self.decoder else ""
        raise TraceError(
            f"the record has {axis} layers, expected {len(self.layers)} (MoE layers){known}; name the model's MoE "
            "layers, and leave draft and MTP layers out"
        )

    def pick(self, ids_RAK: Tensor) -> Tensor:
        """`[R, L, K]`, dense layers left out.

        Raises:
            TraceError: an axis of another length, or MoE layers that are all zero in every row (a pipeline stage that
                the
                engine did not gather).
        """
        picked = self.select(ids_RAK)
        if picked.shape[0] and picked.shape[2] > 1:
            empty = (picked == 0).all(2).all(0)
            if bool(empty.any()):
                name = self.layers[int(empty.nonzero()[0])]
                raise TraceError(f"layer {name!r} is zero in every row: the engine did not gather its pipeline stages")
        return picked


def check_axis(axis: object) -> None:
    """Raise TraceError unless the adapter was given a LayerAxis."""
    if not isinstance(axis, LayerAxis):
        raise TraceError(f"axis must be a LayerAxis, got {type(axis).__name__}; use LayerAxis.of(layers)")


def check_record(record: object, source: str) -> None:
    """Raise TraceError unless there is a mapping: samples of engines that did not record have None."""
    if not isinstance(record, Mapping):
        raise TraceError(f"{source} record must be a mapping, got {type(record).__name__}; it was not recorded")


def _layer_number(name: str) -> int:
    numbers = [int(part) for part in name.split(".") if part.isdigit()]
    if len(numbers) != 1:
        raise TraceError(f"{name!r} does not have exactly one number; pass LayerAxis(layers, decoder=(count, indices))")
    return numbers[0]


def trace_of_rows(
    ids_RAK: Tensor,
    *,
    num_experts: int,
    axis: LayerAxis,
    num_tokens: int | None,
    source: str,
    token_ids: Tensor | None = None,
    weights: Tensor | None = None,
    weights_version: int | None = None,
    first_position: int = 0,
) -> RoutingTrace:
    """A one-sequence trace from recorded rows.

    Args:
        num_tokens: S. Engines record S or S-1 rows, because the last sampled token is never run; a missing row is
            added.
        first_position: position of the first row (multi-turn requests return a tail).

    Raises:
        TraceError: neither S nor S-1 rows, both numbers are named; ids that are no trace.
    """
    check_axis(axis)
    if ids_RAK.ndim != 3:
        raise TraceError(f"{source} ids must be [rows, layers, top_k], got {tuple(ids_RAK.shape)}")
    if weights is not None and weights.shape != ids_RAK.shape:
        raise TraceError(f"{source} weights have shape {tuple(weights.shape)} and its ids {tuple(ids_RAK.shape)}")
    ids = axis.pick(ids_RAK.to(torch.int64))
    weights = None if weights is None else axis.select(weights)
    if num_tokens is not None:
        ids, weights = _pad_last(ids, weights, num_tokens - first_position, source)
    return RoutingTrace.from_ids(
        ids,
        num_experts=num_experts,
        layers=axis.layers,
        weights=weights,
        token_ids=token_ids,
        weights_version=weights_version,
        first_position=first_position,
        notes={"engine": source},
    )


def _pad_last(ids: Tensor, weights: Tensor | None, expected: int, source: str) -> tuple[Tensor, Tensor | None]:
    rows = ids.shape[0]
    if rows == expected:
        return ids, weights
    if rows != expected - 1:
        raise TraceError(
            f"{source} returned {rows} rows for {expected} tokens, must be {expected} or {expected - 1} (the "
            "last sampled "
            "token is never run); the request was truncated, resumed twice, or start was ignored (to train on fewer "
            "tokens, read all of them and take trace.rows(0, n))"
        )
    ids = torch.cat((ids, ids.new_full((1, *ids.shape[1:]), -1)))
    return ids, None if weights is None else torch.cat((weights, weights.new_zeros(1, *weights.shape[1:])))


def decode(data: str, dtype: str, shape: Sequence[int], source: str) -> Tensor:
    """Base64 of a C-ordered little-endian array; -1 in one of `shape` is computed.

    Raises:
        TraceError: no base64, a dtype that holds no ids, or a length that does not fit the shape.
    """
    try:
        kind = np.dtype(dtype).newbyteorder("<")
        if kind.kind not in "iu":
            raise TypeError(f"{dtype} is not an integer")
        array = np.frombuffer(base64.b64decode(data, validate=True), dtype=kind)
        array = array.reshape([int(size) for size in shape])
    except (binascii.Error, TypeError, ValueError) as error:
        raise TraceError(
            f"{source} data does not decode as {dtype} {list(shape)}: {error}; it is truncated, or another "
            "dtype was sent"
        ) from error
    return torch.from_numpy(array.astype(np.int64))


def as_tensor(value: object, source: str) -> Tensor:
    """int64 on the CPU from an integer tensor, a NumPy array or nested lists.

    Raises:
        TraceError: something else, numbers that are no integers (they would be truncated), or rows of unequal lengths.
    """
    if value is None or isinstance(value, (str, bytes, Mapping)):
        raise TraceError(f"{source} ids must be a tensor, an array or lists, got {type(value).__name__}")
    if isinstance(value, Tensor):
        if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
            raise TraceError(f"{source} ids must be integers, got {value.dtype}")
        return value.detach().cpu().to(torch.int64)
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise TraceError(f"{source} ids are lists of unequal lengths ({error}); rows were lost") from error
    if array.dtype.kind not in "iu" and array.size:
        raise TraceError(f"{source} ids must be integers, got {array.dtype}")
    return torch.from_numpy(array.astype(np.int64))


def as_position(value: object, source: str) -> int:
    """A position in a sequence.

    Raises:
        TraceError: no integer, or a negative one.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise TraceError(f"{source} start must be an integer from 0, got {value!r}")
    return value
