"""Megatron-Core's `RouterReplay` over our layers, for RL drivers that call its statics (verl, SkyRL, NeMo-RL style).

    RouterReplay.attach(model)                                                   # instead of one instance per
    TopKRouter
    RouterReplay.set_replay_data(ids_per_layer)                                  # [T, K] per layer
    RouterReplay.set_global_router_replay_action(RouterReplayAction.REPLAY_FORWARD)

Semantics of megatron/core/transformer/moe/router_replay.py (tested against 0.16.1): the gate weights come from the
current
logits; RECORD keeps the last micro-batch's ids; every `set_target_indices` also queues its ids for REPLAY_BACKWARD,
which
takes them first in, first out. That order is right for 1F1B schedules with one recompute per layer and forward, and
wrong for
two forwards followed by one backward: `RoutingSession` has no such condition. Where Megatron fails silently we raise:
nothing to replay, another number of tokens or K, a recompute under REPLAY_FORWARD with several micro-batches queued, or
under no action with some.

Deviations: ids of -1 are routed live, and so are rows where `replay_mask` is False. verl adds that argument to
`set_target_indices` (volcengine/verl, verl/utils/megatron/router_replay_patch.py: R3 keeps the last row of a sequence
native, because no engine ran it) and calls the list of instances `router_instances`. The list is global because the
drivers' calls name no model; drivers that walk a model for Megatron's TopKRouter class find none of our routers, and
use the list, which is in module order.

T tokens, K top-k.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import Enum
from typing import ClassVar

import torch
from torch import Tensor, nn

from moe_layer.errors import RoutingError
from moe_layer.replay.session import find_routers
from moe_layer.replay.spec import WIDE_UNSIGNED
from moe_layer.replay.tap import NotCopied, Routed, is_recomputing
from moe_layer.types import RoutingDecision


class RouterReplayAction(Enum):
    """What the routers do."""

    RECORD = "record"
    REPLAY_FORWARD = "replay_forward"
    REPLAY_BACKWARD = "replay_backward"


class RouterReplay(NotCopied):
    """One MoE layer's record and targets; the statics act on all attached layers."""

    global_router_replay_instances: ClassVar[list[RouterReplay]] = []
    router_instances: ClassVar[list[RouterReplay]] = global_router_replay_instances  # verl's name of the same list

    def __init__(self, name: str = "", top_k: int = 0) -> None:
        self.name, self.top_k = name, top_k
        self.target_topk_idx: Tensor | None = None
        self.target_replay_mask: Tensor | None = None
        self.recorded_topk_idx: Tensor | None = None
        self.router_replay_action: RouterReplayAction | None = None
        self.replay_backward_list: list[Tensor] = []
        self.static_buffer: Tensor | None = None
        self.alive = True
        RouterReplay.global_router_replay_instances.append(self)

    # ---- statics ----------------------------------------------------------------------------------------------------

    @staticmethod
    def attach(model: nn.Module) -> list[RouterReplay]:
        """An instance for each of the model's MoE layers, in module order.

        Raises:
            RoutingError: no such layers, or a session is attached to them.
        """
        routers = find_routers(model)
        if not routers:
            raise RoutingError(f"{type(model).__name__} has no MoE layers of ours; replace its blocks first")
        if any(router.routing_tap is not None and router.routing_tap.alive for router in routers.values()):
            raise RoutingError("a session or RouterReplay is attached to this model; close or detach it first")
        made = []
        for name, router in routers.items():
            router.routing_tap = RouterReplay(name, router.config.router.top_k)
            made.append(router.routing_tap)
        return made

    @staticmethod
    def set_replay_data(all_layers_topk_indices: Sequence[Tensor]) -> None:
        """One integer `[T, K]` per attached layer.

        Raises:
            ValueError: another number of layers.
        """
        instances = RouterReplay.global_router_replay_instances
        if len(all_layers_topk_indices) != len(instances):
            raise ValueError(
                f"The number of replay tensors ({len(all_layers_topk_indices)}) does not match instances "
                f"({len(instances)}); "
                "clear_global_router_replay_instances() before the model is built again"
            )
        for instance, ids in zip(instances, all_layers_topk_indices, strict=True):
            instance.set_target_indices(ids)

    @staticmethod
    def get_recorded_data() -> list[Tensor | None]:
        """Recorded ids per layer, None where the layer did not run."""
        return [instance.get_recorded_indices() for instance in RouterReplay.global_router_replay_instances]

    @staticmethod
    def clear_global_indices() -> None:
        """Forget records and targets."""
        for instance in RouterReplay.global_router_replay_instances:
            instance.clear_indices()

    @staticmethod
    def set_global_router_replay_action(router_replay_action: RouterReplayAction) -> None:
        """The action of all layers."""
        for instance in RouterReplay.global_router_replay_instances:
            instance.set_router_replay_action(router_replay_action)

    @staticmethod
    def clear_global_router_replay_action() -> None:
        """All layers route live."""
        for instance in RouterReplay.global_router_replay_instances:
            instance.clear_router_replay_action()

    @staticmethod
    def clear_global_router_replay_instances() -> None:
        """Detach every layer."""
        for instance in RouterReplay.global_router_replay_instances:
            instance.alive = False
            instance.clear_router_replay_action()
        RouterReplay.global_router_replay_instances.clear()

    @staticmethod
    def set_global_static_buffers(buffer: Tensor) -> None:
        """RECORD copies ids into `[max_tokens, layers, K]` (int16, int32 or int64), which a CUDA graph can capture.

        Raises:
            ValueError: another number of layers.
        """
        instances = RouterReplay.global_router_replay_instances
        if buffer.ndim != 3 or buffer.shape[1] != len(instances):
            raise ValueError(f"the static buffer must be [max_tokens, {len(instances)}, K], got {tuple(buffer.shape)}")
        for index, instance in enumerate(instances):
            instance.static_buffer = buffer[:, index]

    @staticmethod
    def clear_global_static_buffers() -> None:
        """RECORD keeps references again."""
        for instance in RouterReplay.global_router_replay_instances:
            instance.static_buffer = None

    # ---- one layer --------------------------------------------------------------------------------------------------

    def set_target_indices(self, topk_indices: Tensor, replay_mask: Tensor | None = None) -> None:
        """Ids of the next forward, and of its recompute.

        Args:
            topk_indices: integer `[T, K]`. replay_mask: bool `[T]`, rows to replay; the others route live.

        Raises:
            ValueError: a mask that is not bool, or of another number of rows.
        """
        if topk_indices.dtype in WIDE_UNSIGNED:
            topk_indices = topk_indices.to(torch.int64)
        if replay_mask is not None:
            if replay_mask.dtype != torch.bool or tuple(replay_mask.shape) != tuple(topk_indices.shape[:1]):
                raise ValueError(
                    f"replay_mask must be bool [{topk_indices.shape[0]}] like the rows of the ids, got "
                    f"{replay_mask.dtype} {tuple(replay_mask.shape)}"
                )
            rows_T1 = replay_mask.to(topk_indices.device).unsqueeze(1)
            topk_indices = torch.where(rows_T1, topk_indices.to(torch.int64), -1)
        self.target_topk_idx, self.target_replay_mask = topk_indices, replay_mask
        self.replay_backward_list.append(topk_indices)

    def get_recorded_indices(self) -> Tensor | None:
        return self.recorded_topk_idx

    def record_indices(self, topk_indices: Tensor) -> None:
        """Keep ids, in the static buffer if there is one.

        Raises:
            RoutingError: more rows than the static buffer has.
        """
        if self.static_buffer is None:
            self.recorded_topk_idx = topk_indices.to(torch.int64)
            return
        rows = topk_indices.shape[0]
        if rows > self.static_buffer.shape[0]:
            raise RoutingError(
                f"the static buffer has {self.static_buffer.shape[0]} rows and {rows} tokens were routed"
            )
        self.static_buffer[:rows].copy_(topk_indices)
        self.recorded_topk_idx = self.static_buffer[:rows]

    def clear_indices(self) -> None:
        self.recorded_topk_idx = None
        self.target_topk_idx = None
        self.target_replay_mask = None
        self.replay_backward_list = []

    def set_router_replay_action(self, router_replay_action: RouterReplayAction) -> None:
        self.router_replay_action = router_replay_action

    def clear_router_replay_action(self) -> None:
        self.router_replay_action = None

    # ---- RoutingTap -------------------------------------------------------------------------------------------------

    def before(
        self, replay: RoutingDecision | None, *, num_tokens: int, device: torch.device
    ) -> RoutingDecision | None:
        action = self.router_replay_action
        if action is RouterReplayAction.REPLAY_FORWARD:
            ids = self._forward_ids()
        elif action is RouterReplayAction.REPLAY_BACKWARD:
            if not self.replay_backward_list:
                raise RoutingError(
                    f"layer {self.name!r}: nothing left to replay in the backward; one target per recompute"
                )
            ids = self.replay_backward_list.pop(0)
        else:
            if action is None and self.replay_backward_list and is_recomputing():
                raise RoutingError(
                    f"layer {self.name!r} recomputes without an action while {len(self.replay_backward_list)} "
                    "micro-batches are queued, so its gradient would belong to other experts than its forward; set "
                    "REPLAY_BACKWARD before the backward, or clear_global_indices() when nothing was replayed"
                )
            return replay
        if replay is not None:
            raise RoutingError(
                f"layer {self.name!r} got replay=... under {action.name}; use one of them, or clear the action"
            )
        if tuple(ids.shape) != (num_tokens, self.top_k) or ids.is_floating_point():
            raise RoutingError(
                f"layer {self.name!r}: replay ids must be integers [{num_tokens}, {self.top_k}], got {ids.dtype} "
                f"{tuple(ids.shape)}; set this rank's share of the micro-batch"
            )
        return RoutingDecision(ids.to(device))

    def _forward_ids(self) -> Tensor:
        if self.target_topk_idx is None:
            raise RoutingError(
                f"layer {self.name!r}: no target indices; call RouterReplay.set_replay_data before the forward"
            )
        if is_recomputing() and len(self.replay_backward_list) > 1:
            raise RoutingError(
                f"layer {self.name!r} recomputes under REPLAY_FORWARD with {len(self.replay_backward_list)} "
                "micro-batches queued; "
                "set REPLAY_BACKWARD before the backward, or use RoutingSession"
            )
        return self.target_topk_idx

    def after(self, routed: Routed) -> None:
        if self.router_replay_action is RouterReplayAction.RECORD and not is_recomputing():
            self.record_indices(routed.ids_TK.detach())
