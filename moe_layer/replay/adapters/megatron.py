"""Megatron-Core: the list per layer of `RouterReplay`, and the inference engine's `moe_topk_indices`.

Sources: megatron/core/transformer/moe/router_replay.py (`get_recorded_data`, `set_replay_data`: one int64 [T, K]
tensor per
router in the order the routers were built; T is one rank's share of the micro-batch), and
megatron/core/inference/inference_request.py (`moe_topk_indices` [total_tokens-1, num_moe_layers, top_k], int16 up to
32768
experts, else int32).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.adapters.rows import LayerAxis, as_tensor, trace_of_rows
from moe_layer.replay.plan import RoutingPlan
from moe_layer.replay.trace import RoutingTrace


def from_megatron(
    recorded: Sequence[Tensor], *, num_experts: int, layers: Sequence[str], token_ids: Tensor | None = None
) -> RoutingTrace:
    """A trace from `RouterReplay.get_recorded_data()`.

    Args:
        recorded: integer `[T, K]` per router, in the order of `layers`.

    Raises:
        TraceError: another number of layers (routers built twice, or dense layers counted), or layers that did not run.
    """
    if len(recorded) != len(layers):
        raise TraceError(
            f"megatron recorded {len(recorded)} routers and {len(layers)} layers are named; the global list "
            "holds every router "
            "ever built, MTP included: clear it before the model is built"
        )
    absent = [name for name, ids in zip(layers, recorded, strict=True) if ids is None]
    shapes = {tuple(ids.shape) for ids in recorded if ids is not None}
    if absent or len(shapes) != 1:
        raise TraceError(
            f"megatron recorded shapes {sorted(shapes)} and nothing for {absent}; record one forward pass of all"
        )
    ids = torch.stack([as_tensor(ids, "megatron") for ids in recorded], dim=1)
    return RoutingTrace.from_ids(
        ids, num_experts=num_experts, layers=layers, token_ids=token_ids, notes={"engine": "megatron"}
    )


def to_megatron(plan: RoutingPlan) -> list[Tensor]:
    """What `RouterReplay.set_replay_data` takes: int64 `[T, K]` per layer, on the plan's device.

    Raises:
        TraceError: missing slots, which Megatron cannot express.
    """
    if plan.valid is not None:
        raise TraceError(
            "Megatron's RouterReplay has no missing slots; drop pads from the plan, or replay with RoutingSession"
        )
    return [plan.decision(layer).ids.to(torch.int64) for layer in range(len(plan.spec.layers))]


def from_megatron_inference(
    moe_topk_indices: object, *, num_experts: int, axis: LayerAxis, num_tokens: int | None = None
) -> RoutingTrace:
    """A trace from one request of Megatron's inference engine: `[total_tokens-1, L, K]`."""
    ids = as_tensor(moe_topk_indices, "megatron inference")
    return trace_of_rows(ids, num_experts=num_experts, axis=axis, num_tokens=num_tokens, source="megatron inference")
