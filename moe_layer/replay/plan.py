"""RoutingPlan: the rows of a trace that one micro-batch replays, on the device, layer by layer.

L layers, T tokens of the micro-batch, K top-k, B = ceil(K/8).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.spec import TraceSpec, integer_tensor, layer_names, token_checks, unpack_bits
from moe_layer.types import RoutingDecision

if TYPE_CHECKING:
    from moe_layer.replay.trace import RoutingTrace


@dataclass(frozen=True, eq=False)
class RoutingPlan:
    """Ids stay in their narrow dtype; one layer at a time is widened when its router asks.

    Attributes:
        spec: of these layers. ids: `[L, T, K]`. valid: uint8 `[L, T, B]`, None when every slot is recorded.
        weights: fp32 `[L, T, K]` or None.
    """

    spec: TraceSpec
    ids: Tensor
    valid: Tensor | None
    weights: Tensor | None

    @property
    def num_tokens(self) -> int:
        return self.ids.shape[1]

    @property
    def device(self) -> torch.device:
        return self.ids.device

    def decision(self, layer: int, start: int = 0, stop: int | None = None) -> RoutingDecision:
        """Rows `[start, stop)` of a layer for the router `[T, K]`; no host synchronisation.

        Ids are int32 with -1 for missing slots, or as stored when every slot is recorded (routers widen on load).
        """
        rows = slice(start, stop)
        ids_TK = self.ids[layer, rows]
        if self.valid is not None:
            recorded_TK = unpack_bits(self.valid[layer, rows], self.spec.top_k)
            ids_TK = torch.where(recorded_TK, ids_TK.to(torch.int32), -1)
        return RoutingDecision(ids_TK, weights=None if self.weights is None else self.weights[layer, rows])

    def to(self, device: torch.device | str) -> RoutingPlan:
        """The plan on another device; from the CPU to CUDA through pinned memory, without waiting."""
        target = torch.device(device)

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or tensor.device == target:
                return tensor
            if tensor.device.type == "cpu" and target.type == "cuda":
                tensor = tensor.pin_memory()
            return tensor.to(target, non_blocking=True)

        ids = move(self.ids)
        assert ids is not None
        return replace(self, ids=ids, valid=move(self.valid), weights=move(self.weights))


def make_plan(
    trace: RoutingTrace,
    token_index: Tensor | None,
    *,
    layers: Sequence[str] | Mapping[str, str] | None,
    device: torch.device | str,
    tokens: Tensor | None,
    allow_missing: bool,
) -> RoutingPlan:
    """See `RoutingTrace.plan`."""
    index_T, present_T = _check_index(trace, token_index)
    if tokens is not None:
        _check_tokens(trace, index_T, present_T, tokens)
    names = trace.spec.layers if layers is None else layer_names(layers)
    if not names:
        raise TraceError("layers is empty; name the layers that this stage replays, or do not replay")
    recorded = list(layers.values()) if isinstance(layers, Mapping) else names
    at = torch.tensor(trace.spec.positions(recorded))

    def take(tensor: Tensor) -> Tensor:
        # Of a trace without rows every token is a pad.
        rows = (
            tensor.index_select(0, index_T) if trace.num_tokens else tensor.new_zeros(len(index_T), *tensor.shape[1:])
        )
        return rows.index_select(1, at).transpose(0, 1).contiguous()

    bits = take(trace.valid) * present_T.to(torch.uint8).view(1, -1, 1)
    whole = unpack_bits(bits, trace.spec.top_k)
    if not allow_missing and not bool((whole | ~present_T.view(1, -1, 1)).all()):
        row = int((~whole.all(-1).all(0) & present_T).nonzero()[0])
        raise TraceError(
            f"token {row} of the micro-batch has missing slots and allow_missing is False; record it, or allow "
            "missing slots"
        )
    plan = RoutingPlan(
        spec=replace(trace.spec, layers=names),
        ids=take(trace.ids),
        valid=None if bool(whole.all()) else bits,
        weights=None if trace.weights is None else take(trace.weights),
    )
    return plan.to(device)


def _check_index(trace: RoutingTrace, token_index: Tensor | None) -> tuple[Tensor, Tensor]:
    """int64 `[T]` with pads at row 0, and bool `[T]`, False at pads."""
    if token_index is None:
        return torch.arange(trace.num_tokens), torch.ones(trace.num_tokens, dtype=torch.bool)
    index_T = integer_tensor(token_index, "token_index").detach().cpu().to(torch.int64).reshape(-1)
    if index_T.numel() and (int(index_T.min()) < -1 or int(index_T.max()) >= trace.num_tokens):
        raise TraceError(
            f"token_index runs from {int(index_T.min())} to {int(index_T.max())}, the trace has rows 0 to "
            f"{trace.num_tokens - 1} (-1 = pad); it was made for another batch"
        )
    present_T = index_T >= 0
    return index_T.clamp(min=0), present_T


def _check_tokens(trace: RoutingTrace, index_T: Tensor, present_T: Tensor, tokens: Tensor) -> None:
    if trace.token_check is None:
        raise TraceError(
            "tokens were given but the trace has no token checks; record it with token_ids, or omit tokens"
        )
    flat = integer_tensor(tokens, "tokens").detach().cpu().reshape(-1)
    if flat.numel() != index_T.numel():
        raise TraceError(
            f"tokens has {flat.numel()} entries and token_index {index_T.numel()}; they must have one shape"
        )
    at_T = present_T.nonzero().squeeze(1)  # pads are no rows, and a trace of pads alone may have none
    rows_T = index_T[at_T]
    wrong = token_checks(flat[at_T], trace.positions[rows_T]) != trace.token_check[rows_T]
    if bool(wrong.any()):
        at = int(at_T[wrong][0])
        raise TraceError(
            f"{int(wrong.sum())} of {len(at_T)} tokens are not the recorded ones, the first is token "
            f"{at} of the "
            f"micro-batch (id {int(flat[at])}, trace row {int(index_T[at])}); the batch is shifted, or from "
            "another rollout"
        )
