"""`forced_expert_ids` as mojo_opset has it (mojo_opset#353), over our layer.

T tokens, K top-k, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moe_layer.errors import RoutingError
from moe_layer.layer import MoELayer
from moe_layer.replay.decision import as_decision
from moe_layer.types import RoutingDecision


class MojoMoE(nn.Module):
    """A MoELayer under mojo_opset's call.

    Args:
        layer: the layer; expert parallel when it is bound to a context.
        strict: raise ids that a device kernel could only count, after each forward (synchronises).
    """

    def __init__(self, layer: MoELayer, *, strict: bool = False) -> None:
        super().__init__()
        self.layer = layer
        self.strict = strict

    def forward(self, hidden_states: Tensor, forced_expert_ids: Tensor | None = None) -> Tensor:
        """y, shaped as `hidden_states [..., D]`.

        Args:
            forced_expert_ids: integers of any dtype, `(T, K)` or `[..., K]`, on any device: they move to the input's
                device
                before anything is exchanged. -1 slots are filled with the best live experts that the row does not
                have yet
                (mojo_opset fills them with the live slot, which may repeat an expert).

        The weights of forced experts come from the current logits, in fp32. They are renormalised if and only if
        `router.renormalize` says so (always under `softmax_order: post`) or `replay.renormalize` overrides it;
        mojo_opset always renormalises: `replay.renormalize: always`.

        With several ranks each rank forces its own tokens; the dispatcher exchanges ids like any others, whatever
        backend.

        Raises:
            RoutingError (a ValueError): another shape (both are named), ids that are no integers, or ids outside [-1,
            E) on
                the CPU. On a device they are counted, the slots are routed live, and `check()` or `strict` raises.
        """
        decision = self._decision(hidden_states, forced_expert_ids)
        y = self.layer(hidden_states, replay=decision)
        if self.strict:
            self.layer.check()
        assert isinstance(y, Tensor)
        return y

    def _decision(self, hidden_states: Tensor, forced_expert_ids: Tensor | None) -> RoutingDecision | None:
        if forced_expert_ids is None:
            return None
        cfg = self.layer.config.router
        decision = as_decision(forced_expert_ids, hidden_states.shape[:-1], cfg.top_k, device=hidden_states.device)
        check_range(forced_expert_ids, num_experts=cfg.num_experts)
        return decision


def check_range(forced_expert_ids: Tensor, *, num_experts: int) -> None:
    """For integer ids on the CPU, where looking at them costs nothing.

    Raises:
        RoutingError: ids outside [-1, E).
    """
    ids = forced_expert_ids
    if ids.device.type != "cpu" or not ids.numel() or torch.compiler.is_compiling():
        return
    ids = ids.to(torch.int64)  # torch compares no uint16
    low, high = int(ids.min()), int(ids.max())
    if low < -1 or high >= num_experts:
        raise RoutingError(
            f"forced_expert_ids run from {low} to {high} and must lie in [-1, {num_experts}); -1 is filled with "
            "a live expert"
        )
