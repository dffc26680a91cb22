"""vLLM: `--enable-return-routed-experts` (vllm-project/vllm#28284), three known generations.

| versions | where | layout |
|---|---|---|
| 0.14 to 0.20 | `CompletionOutput.routed_experts` | int32 [rows, num_hidden_layers, top_k], prompt and output |
| 0.21 | and `RequestOutput.prompt_routed_experts` | int16 [P, num_moe_layers, top_k] and [G, num_moe_layers, top_k] |
| 0.22 and later | the same two fields, or one | narrow dtype by the number of experts, layer axis of either kind |

The layer axis holds all decoder layers or the MoE layers only, depending on the version; `LayerAxis` tells them apart
by their number. Rows: S-1 for S tokens, or the tail of them when the rows of a known prefix were left out (#56402).
Draft (MTP) layers must not be on the axis (#48622).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.adapters.rows import LayerAxis, as_position, as_tensor, trace_of_rows
from moe_layer.replay.trace import RoutingTrace


def from_vllm(
    completion: Any,
    request: Any = None,
    *,
    num_experts: int,
    axis: LayerAxis,
    num_tokens: int | None = None,
    start: int = 0,
    token_ids: Tensor | None = None,
    weights_version: int | None = None,
) -> RoutingTrace:
    """A trace of one completion.

    Args:
        completion: a `CompletionOutput`, or anything with `routed_experts`, or the array itself.
        request: its `RequestOutput`, when it has `prompt_routed_experts` (0.21 and later).
        num_tokens: S, prompt and output. start: tokens whose rows were left out, so that a fragment comes back, to be
            spliced. token_ids: of the S - start tokens.

    Raises:
        TraceError: the field is absent, or rows or layers do not fit.
    """
    rows = as_tensor(getattr(completion, "routed_experts", completion), "vllm")
    prompt = getattr(request, "prompt_routed_experts", None)
    if prompt is not None:
        first = as_tensor(prompt, "vllm")
        if first.shape[1:] != rows.shape[1:]:
            raise TraceError(
                f"vllm prompt ids are {tuple(first.shape)} and output ids {tuple(rows.shape)}; one model, one axis"
            )
        rows = torch.cat((first, rows))
    return trace_of_rows(
        rows,
        num_experts=num_experts,
        axis=axis,
        num_tokens=num_tokens,
        source="vllm",
        token_ids=token_ids,
        weights_version=weights_version,
        first_position=as_position(start, "vllm"),
    )
