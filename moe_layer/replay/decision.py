"""Turn what a caller passes as `replay=` into a checked RoutingDecision of shape [T, K]."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.errors import RoutingError
from moe_layer.replay.spec import WIDE_UNSIGNED
from moe_layer.types import RoutingDecision


def as_decision(
    replay: RoutingDecision | Tensor | None, tokens: torch.Size, top_k: int, *, device: torch.device
) -> RoutingDecision | None:
    """Check and flatten a replay argument; ids move to `device`.

    Args:
        replay: decision, or integer ids `[..., K]` or `[T, K]`.
        tokens: the leading shape of the layer's input. top_k: K.

    Raises:
        RoutingError: wrong shape (names both), non-integer ids, non-floating weights, or a mask of another shape.
    """
    if replay is None:
        return None
    decision = replay if isinstance(replay, RoutingDecision) else RoutingDecision(ids=replay)
    if not isinstance(decision.ids, Tensor):
        if decision is replay:
            raise RoutingError(f"RoutingDecision's ids must be an integer tensor, got {type(decision.ids).__name__}")
        raise RoutingError(
            f"replay must be a RoutingDecision or an integer tensor, got {type(replay).__name__}; "
            "of a Routing, pass RoutingDecision(routing.ids_TK)"
        )
    num_tokens = tokens.numel()
    allowed = ((*tokens, top_k), (num_tokens, top_k))
    ids = decision.ids
    if tuple(ids.shape) not in allowed:
        raise RoutingError(f"replay ids must be {allowed[0]} or {allowed[1]}, got {tuple(ids.shape)}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise RoutingError(f"replay ids must be integers, got {ids.dtype}")
    if ids.dtype in WIDE_UNSIGNED:
        ids = ids.to(torch.int64)
    weights, valid = decision.weights, decision.valid
    if weights is not None:
        floating = isinstance(weights, Tensor) and weights.is_floating_point()
        if not floating or tuple(weights.shape) not in allowed:
            raise RoutingError(
                f"replay weights must be floating {allowed[0]} or {allowed[1]}, got {_described(weights)}"
            )
        weights = weights.to(device, torch.float32).reshape(num_tokens, top_k)
    ids = ids.to(device).reshape(num_tokens, top_k)
    if valid is not None:
        masks = isinstance(valid, Tensor) and valid.dtype == torch.bool
        if not masks or tuple(valid.shape) not in (tuple(tokens), (num_tokens,)):
            raise RoutingError(f"replay valid must be bool {tuple(tokens)}, got {_described(valid)}")
        ids = _mask(ids, valid.to(device).reshape(num_tokens))
    return RoutingDecision(ids=ids, weights=weights)


def _described(value: object) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else type(value).__name__


def _mask(ids_TK: Tensor, valid_T: Tensor) -> Tensor:
    if not ids_TK.dtype.is_signed:
        ids_TK = ids_TK.to(torch.int32)
    return torch.where(valid_T.unsqueeze(-1), ids_TK, -1)
