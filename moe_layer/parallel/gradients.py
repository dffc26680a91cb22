"""Gradients over a mesh: the loss is the mean over all ranks' tokens, so dense and expert gradients both divide by
dp*ep."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_layer.errors import ConfigError
from moe_layer.parallel import compat
from moe_layer.parallel.context import ParallelContext
from moe_layer.parallel.shard import ParallelLayer, expert_parameters, local_tensor, moe_layers

_BUCKET = 1 << 25  # elements of one all-reduce


def context_of(model: nn.Module) -> ParallelContext | None:
    """The context that `parallelize` bound, None for one rank."""
    return next((layer.router.context for layer in moe_layers(model)), None)


@torch.no_grad()
def sync_gradients(model: nn.Module) -> None:
    """Average gradients after the last backward of a step; collective over the mesh. A missing gradient counts as
    zeros.

    Dense parameters: mean over dp*ep ranks. Experts: their owner already has the sum over its EP group; the sum over dp
    is divided by dp*ep too (by dp under `backend: replicated`, where an EP group sees one batch). Parameters that FSDP
    shards (`moe_layer.parallel.fsdp.shard_rest`) were averaged by it in backward. Also moves `context.step` on.

    Raises:
        ConfigError: FSDP shards parameters over other ranks than the mesh of `parallelize`, or experts that
            `parallelize` has sharded.
    """
    context = context_of(model)
    if context is None:
        return
    routed: set[int] = set()
    whole: list[Tensor] = []
    replicated: list[Tensor] = []
    for layer, parameter in _own_experts(model, context):
        if parameter.requires_grad and id(parameter) not in routed:
            target = replicated if layer.config.dispatch.backend == "replicated" else whole
            target.append(_gradient(parameter))
        routed.add(id(parameter))
    dense = [
        _gradient(p)
        for p in model.parameters()
        if p.requires_grad and id(p) not in routed and not _averaged(p, context)
    ]
    _reduce(dense, group=context.data_group, divisor=context.data_size, context=context)
    _reduce(whole, group=context.dp_group, divisor=context.data_size, context=context)
    _reduce(replicated, group=context.dp_group, divisor=context.dp_size, context=context)
    context.advance_step()


@torch.no_grad()
def clip_grad_norm(model: nn.Module, max_norm: float) -> Tensor:
    """Scale all gradients so that their global 2-norm is at most `max_norm`; every expert counts once.

    Call after `sync_gradients`. The sum of squares of sharded experts is added over the EP group, that of parameters
    under FSDP over its mesh, so that all ranks clip alike.

    Returns:
        The norm before clipping, 0-d fp32.

    Raises:
        ConfigError: `max_norm` is not positive, or FSDP shards experts that `parallelize` has sharded.
    """
    if not max_norm > 0:
        raise ConfigError(f"max_norm must be positive, got {max_norm}; use inf to measure only")
    context = context_of(model)
    routed = {id(parameter) for _, parameter in _own_experts(model, context)}
    parameters = [p for p in model.parameters() if p.requires_grad and _has_gradient(p)]
    dense = [_gradient(p) for p in parameters if id(p) not in routed and not isinstance(p, DTensor)]
    sharded = [p for p in parameters if id(p) not in routed and isinstance(p, DTensor)]
    experts = [_gradient(p) for p in parameters if id(p) in routed]
    device = next((g.device for g in (*dense, *experts)), torch.device("cpu"))
    expert_square = _sum_of_squares(experts, device)
    if context is not None and context.ep_size > 1:
        _all_reduce(expert_square, group=context.ep_group, context=context)
    norm = (_sum_of_squares(dense, device) + expert_square + _sharded_square(sharded, device)).sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp_max(1.0)
    for gradient in (*dense, *experts, *map(_gradient, sharded)):
        gradient.mul_(factor.to(gradient.dtype))
    return norm.float()


def _own_experts(model: nn.Module, context: ParallelContext | None) -> Iterator[tuple[ParallelLayer, nn.Parameter]]:
    """Experts' parameters without those that FSDP shards (where `parallelize` does not): it treats them as dense.

    Raises:
        ConfigError: both shard them.
    """
    for layer, parameter in expert_parameters(model):
        if not isinstance(parameter, DTensor):
            yield layer, parameter
        elif context is not None and context.ep_size > 1:
            if parameter.device_mesh.ndim > 1:
                raise ConfigError(
                    f"experts are sharded by FSDP too, over {parameter.device_mesh}; leave them to parallelize: "
                    "moe_layer.parallel.fsdp.shard_rest shards everything else"
                )
            yield layer, parameter


def _has_gradient(parameter: nn.Parameter) -> bool:
    return parameter.grad is not None or getattr(parameter, "main_grad", None) is not None


def _gradient(parameter: nn.Parameter) -> Tensor:
    """The local gradient, `main_grad` where a parameter has one; zeros are attached when there is none."""
    main_grad = getattr(parameter, "main_grad", None)
    if main_grad is not None:
        return local_tensor(main_grad)
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return local_tensor(parameter.grad)


def _sum_of_squares(gradients: Iterable[Tensor], device: torch.device) -> Tensor:
    total = torch.zeros((), dtype=torch.float64 if device.type == "cpu" else torch.float32, device=device)
    for gradient in gradients:
        total += torch.linalg.vector_norm(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32)).square()
    return total


def _averaged(parameter: nn.Parameter, context: ParallelContext) -> bool:
    """Whether FSDP shards this dense parameter, and so averages its gradient."""
    if not isinstance(parameter, DTensor):
        return False
    ranks = parameter.device_mesh.size()
    if ranks != context.data_size:
        raise ConfigError(
            f"FSDP shards parameters over {ranks} ranks and parallelize uses {context.data_size}; give fully_shard the "
            "flattened mesh of parallelize, as moe_layer.parallel.fsdp.shard_rest does"
        )
    return True


def _sharded_square(parameters: Iterable[nn.Parameter], device: torch.device) -> Tensor:
    """Sum of squares of FSDP's gradients: added up over the mesh dimensions that shard them."""
    total = _sum_of_squares((), device)
    by_place: dict[Any, list[Any]] = {}
    for parameter in parameters:
        by_place.setdefault((parameter.device_mesh, parameter.placements), []).append(parameter)  # type: ignore[attr-defined]
    for (mesh, placements), same in by_place.items():
        square = _sum_of_squares(map(_gradient, same), device)
        for dimension, placement in enumerate(placements):
            if placement.is_shard():
                compat.all_reduce(square, group=mesh.get_group(dimension))
        total += square
    return total


def _all_reduce(flat: Tensor, *, group: object, context: ParallelContext) -> None:
    """A peer that died or hangs shows here too when it got through its layers."""
    try:
        compat.all_reduce(flat, group=group)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise context.fail(f"step {context.step}, phase gradients", reason, grace_s=1.25) from error


def _reduce(gradients: list[Tensor], *, group: object, divisor: int, context: ParallelContext) -> None:
    """Sum over the group in flat buckets of one dtype, then divide."""
    by_dtype: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        by_dtype.setdefault(gradient.dtype, []).append(gradient)
    for same in by_dtype.values():
        for bucket in _buckets(same):
            flat = torch.cat([gradient.flatten() for gradient in bucket])
            if group is not None:
                _all_reduce(flat, group=group, context=context)
            flat /= divisor
            for gradient, piece in zip(bucket, flat.split([g.numel() for g in bucket]), strict=True):
                gradient.copy_(piece.view_as(gradient))


def _buckets(gradients: list[Tensor]) -> list[list[Tensor]]:
    buckets: list[list[Tensor]] = []
    size = _BUCKET
    for gradient in gradients:
        if size + gradient.numel() > _BUCKET:
            buckets.append([])
            size = 0
        buckets[-1].append(gradient)
        size += gradient.numel()
    return buckets
