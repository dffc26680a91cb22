"""NeMo-RL: the codec `nrlre1:<dtype>:<S>x<L>x<K>:<base64>`.

Source: NVIDIA-NeMo/RL, router replay transport `inline`: int8 up to 128 experts, int16 up to 32768, else int32, so
that the
row sentinel -1 fits; a row is wholly recorded or wholly -1. MTP layers are excluded by default.
"""

from __future__ import annotations

import re

from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.adapters.rows import LayerAxis, decode, trace_of_rows
from moe_layer.replay.trace import RoutingTrace

_CODEC = re.compile(r"nrlre1:(int8|int16|int32):(\d+)x(\d+)x(\d+):([A-Za-z0-9+/=]*)")


def from_nemo_rl(
    encoded: str,
    *,
    num_experts: int,
    axis: LayerAxis,
    num_tokens: int | None = None,
    token_ids: Tensor | None = None,
) -> RoutingTrace:
    """A trace of one sample.

    Raises:
        TraceError: another codec, a dtype that does not follow from the number of experts, partly recorded rows.
    """
    match = _CODEC.fullmatch(encoded) if isinstance(encoded, str) else None
    if match is None:
        raise TraceError(f"not a NeMo-RL record: {str(encoded)[:40]!r}; expected nrlre1:<dtype>:<S>x<L>x<K>:<base64>")
    dtype, *shape = match.groups()[:4]
    expected = "int8" if num_experts <= 128 else "int16" if num_experts <= 32768 else "int32"
    if dtype != expected:
        raise TraceError(
            f"NeMo-RL uses {expected} for {num_experts} experts, the record has {dtype}; it is of another model"
        )
    ids = decode(match.group(5), dtype, [int(size) for size in shape], "nemo-rl")
    partial = (ids < 0).any(2) & (ids >= 0).any(2)
    if bool(partial.any()):
        row, layer = partial.nonzero()[0].tolist()
        raise TraceError(f"nemo-rl row {row} of layer {layer} is recorded in part; rows are whole or -1 there")
    return trace_of_rows(
        ids, num_experts=num_experts, axis=axis, num_tokens=num_tokens, source="nemo-rl", token_ids=token_ids
    )
