"""What configuration and replay say to `route_topk`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.config.model import MoEConfig
from moe_layer.errors import RoutingError
from moe_layer.ops.uniform import uniform_ids
from moe_layer.types import RoutingDecision


def routing_options(
    config: MoEConfig, replay: RoutingDecision | None, *, attaches: bool, finishes: bool, like: Tensor
) -> dict[str, Any]:
    """Keyword arguments of `route_topk` and `gate_topk`.

    Args:
        replay: decision with ids `[T, K]`, or None.
        attaches: losses are attached to this pass.
        finishes: they are of one rank's batch, which the op itself can finish.
        like: `[T, ...]`, for the number of tokens and the device of `force_uniform`.

    Raises:
        RoutingError: replay under a capacity factor, recorded weights asked for but not given, or ids in a dtype too
            narrow for the experts.
    """
    cfg, loss_cfg, policy = config.router, config.losses, config.replay
    mode, renormalize, aux_counts = policy.weights, cfg.renormalize, loss_cfg.counts
    if replay is not None:
        renormalize = {"router": renormalize, "always": True, "never": False}[policy.renormalize]
        aux_counts = {"losses": aux_counts, "off": "none"}.get(policy.aux_map, policy.aux_map)
    if not attaches or loss_cfg.aux == "none":
        aux_counts = "none"
    want_z = attaches and loss_cfg.z_coeff > 0.0
    finishes = finishes and (aux_counts != "none" or want_z)
    if replay is not None and cfg.capacity_factor is not None and not policy.allow_capacity:
        raise RoutingError(
            f"replay with router.capacity_factor {cfg.capacity_factor} would drop replayed slots; set it to "
            "null for "
            "training on recorded routing, or set replay.allow_capacity: true"
        )
    if replay is not None and replay.weights is None and mode != "live":
        raise RoutingError(
            f"replay.weights is {mode}, which needs recorded weights; "
            "pass RoutingDecision(ids, weights=...) or set replay.weights: live"
        )
    if replay is not None and torch.iinfo(replay.ids.dtype).max < cfg.num_experts - 1:
        raise RoutingError(
            f"replay ids are {replay.ids.dtype}, which cannot name all {cfg.num_experts} experts: larger ids have "
            "wrapped around where they were made; record them in a wider dtype"
        )
    if replay is None and cfg.force_uniform:
        ids_TK = uniform_ids(like.shape[0], cfg.top_k, cfg.num_experts, device=like.device)
        replay, mode = RoutingDecision(ids=ids_TK), "live"
    return {
        "top_k": cfg.top_k,
        "score_function": cfg.score_function,
        "softmax_order": cfg.softmax_order,
        "renormalize": renormalize,
        "scaling_factor": cfg.scaling_factor,
        "num_groups": cfg.num_groups or 0,
        "group_topk": cfg.group_topk or 0,
        "group_rule": cfg.group_rule,
        "replay_ids": None if replay is None else replay.ids,
        "replay_weights": None if replay is None or mode == "live" else replay.weights,
        "weights_mode": "live" if replay is None else mode,
        "aux_counts": aux_counts,
        "want_z": want_z,
        "loss_coeffs": (loss_cfg.aux_coeff, loss_cfg.z_coeff) if finishes else None,
    }
