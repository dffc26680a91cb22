"""Save, load and reshard one MoELayer: files hold all E experts, a rank reads the rows of its own.

The files do not know the number of ranks they were saved from; any EP size that divides E loads them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor

from moe_layer.checkpoint.layouts import block_shapes
from moe_layer.checkpoint.mapping import EXPERT_PREFIX, BlockMapping, Shape, check_manifest
from moe_layer.checkpoint.source import TensorSource
from moe_layer.checkpoint.storage import load_tensors, read_header, save_tensors
from moe_layer.config.model import (
    BalanceConfig,
    DispatchConfig,
    ExpertsConfig,
    LossesConfig,
    MoEConfig,
    ReplayConfig,
    RouterConfig,
    SharedExpertConfig,
)
from moe_layer.errors import CheckpointError

if TYPE_CHECKING:
    from moe_layer.layer import MoELayer


def expert_range(num_experts: int, ep_rank: int, ep_size: int) -> range:
    """The contiguous experts of one EP rank.

    Raises:
        CheckpointError: ep_size does not divide num_experts, or ep_rank is outside it.
    """
    if ep_size < 1 or num_experts % ep_size or not 0 <= ep_rank < ep_size:
        raise CheckpointError(
            f"rank {ep_rank} of {ep_size} cannot share {num_experts} experts; the expert-parallel size must divide them"
        )
    local = num_experts // ep_size
    return range(ep_rank * local, (ep_rank + 1) * local)


def save_block(path: str | Path, tensors: Mapping[str, Tensor], config: MoEConfig) -> None:
    """Write one complete block (all experts) with its config and checksums.

    Raises:
        CheckpointError: tensors do not fit the config.
    """
    check_manifest(block_shapes(config), {name: tuple(t.shape) for name, t in tensors.items()}, where="block to save")
    save_tensors(path, tensors, header={"config": asdict(config)})


def load_block(path: str | Path, *, ep_rank: int = 0, ep_size: int = 1) -> tuple[dict[str, Tensor], MoEConfig]:
    """Read one block, or one EP rank's share of it: only that rank's bytes of the expert tensors are read.

    Raises:
        CheckpointError: damaged, of another format version, or not the tensors its config needs.
    """
    config = config_from_dict(read_header(path).get("config"), where=str(path))
    experts = expert_range(config.router.num_experts, ep_rank, ep_size)
    tensors, _ = load_tensors(path, experts=None if ep_size == 1 else experts)
    found = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    check_manifest(_local_shapes(config, experts), found, where=str(path))
    return tensors, config


def save_layer(layer: MoELayer, path: str | Path) -> None:
    """Save a layer's parameters and expert bias. Under `parallelize`, every rank calls it and rank 0 writes."""
    tensors = {name: _full(tensor) for name, tensor in layer.state_dict().items()}
    if layer.router.context is None or dist.get_rank() == 0:
        save_block(path, tensors, layer.config)


def load_layer(layer: MoELayer, path: str | Path) -> None:
    """Load what `save_layer` or `moe-layer convert` wrote, at this layer's EP size.

    Raises:
        CheckpointError: damaged file, or shapes that are not this layer's.
    """
    rank, size = _ep_position(layer)
    tensors, _ = load_block(path, ep_rank=rank, ep_size=size)
    assign(layer, tensors)


def import_block(layer: MoELayer, mapping: BlockMapping, tensors: Mapping[str, Tensor] | TensorSource) -> None:
    """Load another program's block straight into a layer; reads only this rank's experts.

    Raises:
        CheckpointError: names or shapes on either side do not fit.
    """
    rank, size = _ep_position(layer)
    experts = expert_range(layer.config.router.num_experts, rank, size)
    assign(layer, mapping.to_ours(tensors, experts=None if size == 1 else experts))


def export_block(layer: MoELayer, mapping: BlockMapping) -> dict[str, Tensor]:
    """The layer's tensors under the other program's names, on the CPU. Collective under `parallelize`."""
    return mapping.from_ours({name: _full(tensor) for name, tensor in layer.state_dict().items()})


def assign(layer: MoELayer, tensors: Mapping[str, Tensor]) -> None:
    """Copy this rank's tensors into the layer, strictly: the same names, the same local shapes.

    Raises:
        CheckpointError: a tensor is missing, extra or misshapen; the layer is then unchanged.
    """
    own = {name: _local(tensor) for name, tensor in layer.state_dict().items()}
    shapes = {name: tuple(tensor.shape) for name, tensor in own.items()}
    check_manifest(shapes, {name: tuple(t.shape) for name, t in tensors.items()}, where="layer to load")
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.copy_(tensors[name])


def config_from_dict(values: Any, *, where: str) -> MoEConfig:
    """MoEConfig from the nested dict that `dataclasses.asdict` gave.

    Raises:
        CheckpointError: unknown or missing keys.
    """
    sections = {
        "router": RouterConfig,
        "experts": ExpertsConfig,
        "shared_expert": SharedExpertConfig,
        "losses": LossesConfig,
        "balance": BalanceConfig,
        "dispatch": DispatchConfig,
        "replay": ReplayConfig,
    }
    try:
        parts: dict[str, Any] = {
            key: sections[key](**value) if key in sections and value is not None else value
            for key, value in dict(values).items()
        }
        return MoEConfig(**parts)
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where}: the stored config does not fit this version of moe_layer: {error}") from error


def _local_shapes(config: MoEConfig, experts: range) -> dict[str, Shape]:
    return {
        name: (len(experts), *shape[1:]) if name.startswith(EXPERT_PREFIX) else shape
        for name, shape in block_shapes(config).items()
    }


def _ep_position(layer: MoELayer) -> tuple[int, int]:
    context = layer.router.context
    return (0, 1) if context is None else (context.ep_rank, context.ep_size)


def _local(tensor: Tensor) -> Tensor:
    """This rank's part of a DTensor, any other tensor as it is."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # type: ignore[operator]


def _full(tensor: Tensor) -> Tensor:
    """All of a DTensor (a collective), on the CPU."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor  # type: ignore[operator]
    return whole.detach().cpu()
