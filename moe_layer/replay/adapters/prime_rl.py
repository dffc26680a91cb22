"""prime-rl: `routed_experts` of a sample on the wire.

Source: PrimeIntellect-ai/prime-rl, trainer transport: `{"data": base64, "shape": [S, L, K], "start": n, "dtype":
"uint8" or
"uint16"}`, C order. The dtype there follows from the largest id of the sample, so two samples of one model may differ
in
it; ours follows from the number of experts. Rows that were never recorded are zeros: `recorded_rows` marks them
missing.
Total Router Recall (#3509) adds fp32 weights of the same shape.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.adapters.rows import LayerAxis, as_position, check_record, decode, trace_of_rows
from moe_layer.replay.trace import RoutingTrace


def from_prime_rl(
    routed_experts: Mapping[str, Any],
    *,
    num_experts: int,
    axis: LayerAxis,
    num_tokens: int | None = None,
    recorded_rows: int | None = None,
    weights: Tensor | np.ndarray | None = None,
    token_ids: Tensor | None = None,
) -> RoutingTrace:
    """A trace of one sample.

    Args:
        recorded_rows: rows from this one on are padding. weights: floating, same shape.

    Raises:
        TraceError: keys that are missing, data that does not decode, rows or layers that do not fit.
    """
    check_record(routed_experts, "prime-rl")
    missing = [key for key in ("data", "shape", "dtype") if key not in routed_experts]
    if missing:
        raise TraceError(f"prime-rl routed_experts lacks {missing}; it has {sorted(routed_experts)}")
    dtype = str(routed_experts["dtype"])
    if dtype not in ("uint8", "uint16"):
        raise TraceError(f"prime-rl sends uint8 or uint16, got {dtype}")
    ids = decode(routed_experts["data"], dtype, routed_experts["shape"], "prime-rl")
    if recorded_rows is not None:
        if recorded_rows < 0:
            raise TraceError(f"recorded_rows is {recorded_rows}, must be the rows before the padding, from 0")
        ids = ids.clone()
        ids[recorded_rows:] = -1
    return trace_of_rows(
        ids,
        num_experts=num_experts,
        axis=axis,
        num_tokens=num_tokens,
        source="prime-rl",
        weights=None if weights is None else torch.as_tensor(weights).float(),
        token_ids=token_ids,
        first_position=as_position(routed_experts.get("start", 0), "prime-rl"),
    )
