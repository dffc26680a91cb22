"""SGLang: `meta_info["routed_experts"]` of a request with `return_routed_experts=True`.

Sources: sgl-project/sglang#12162 (base64 of flat int32, logical [S-1, num_hidden_layers, top_k], prompt and output,
dense
layers zero); #24851 (`routed_experts_start_len`: only rows from there on); #31219 (open: `routed_experts_dtype` uint8
or
uint16 on the wire); #17434 (OpenAI endpoints: `sgl_ext.routed_experts`). With `skip_tokenizer_init` a tensor comes
instead.
Fused shared-expert columns are stripped by the engine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.adapters.rows import (
    LayerAxis,
    as_position,
    as_tensor,
    check_axis,
    check_record,
    decode,
    trace_of_rows,
)
from moe_layer.replay.trace import RoutingTrace


def from_sglang(
    meta_info: Mapping[str, Any],
    *,
    num_experts: int,
    top_k: int,
    axis: LayerAxis,
    num_tokens: int | None = None,
    start: int = 0,
    token_ids: Tensor | None = None,
    weights_version: int | None = None,
) -> RoutingTrace:
    """A trace of one response.

    Args:
        meta_info: the response's `meta_info`, or any mapping with `routed_experts`; a choice of the OpenAI endpoints is
            one with `sgl_ext`.
        num_tokens: S, prompt and output; None takes the rows as they are. start: the request's
            `routed_experts_start_len`.
        token_ids: of the S - start tokens (or of the rows without `num_tokens`).

    Raises:
        TraceError: data that does not decode, or other numbers of rows or layers; a server that ignored `start` is
            named.
    """
    start = as_position(start, "sglang")
    check_axis(axis)
    check_record(meta_info, "sglang")
    nested = meta_info.get("sgl_ext")
    meta_info = nested if isinstance(nested, Mapping) else meta_info
    data = meta_info.get("routed_experts")
    if data is None:
        raise TraceError(
            "meta_info has no routed_experts; start the server with --enable-return-routed-experts and ask for it"
        )
    if isinstance(data, str):
        dtype = str(meta_info.get("routed_experts_dtype", "int32"))
        ids = decode(data, dtype, _shape(data, dtype, axis, top_k, num_tokens, start), "sglang")
    else:
        ids = as_tensor(data, "sglang")
    return trace_of_rows(
        ids,
        num_experts=num_experts,
        axis=axis,
        num_tokens=num_tokens,
        source="sglang",
        token_ids=token_ids,
        weights_version=weights_version,
        first_position=start,
    )


def _shape(
    data: str, dtype: str, axis: LayerAxis, top_k: int, num_tokens: int | None, start: int
) -> tuple[int, int, int]:
    """The flat array names no shape: the layer axis that fits the expected number of rows."""
    sizes = {"int32": 4, "uint16": 2, "uint8": 1}
    if dtype not in sizes:
        raise TraceError(f"sglang sent routed_experts_dtype {dtype}, known are {', '.join(sizes)}")
    padding = data[-2:].count("=")
    ids = (len(data) * 3 // 4 - padding) // sizes[dtype]
    axes = [len(axis.layers)] if axis.decoder is None else [axis.decoder[0], len(axis.layers)]
    if num_tokens is not None:
        for layers in axes:
            if ids in ((num_tokens - start) * layers * top_k, (num_tokens - start - 1) * layers * top_k):
                return -1, layers, top_k
    return -1, axes[0], top_k
