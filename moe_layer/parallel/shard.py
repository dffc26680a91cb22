"""`parallelize`: shard the experts over the ep dimension of a mesh, bind every layer to the groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard

from moe_layer.config.model import MoEConfig
from moe_layer.dispatch.plan import check_divisible
from moe_layer.errors import ConfigError
from moe_layer.parallel import compat
from moe_layer.parallel.context import ParallelContext


class ParallelLayer(Protocol):
    """What `parallelize` needs of a layer; `MoELayer` is one. (This package lies below it and cannot import it.)"""

    config: MoEConfig
    experts: nn.Module
    router: Any
    dispatcher: Any

    def bind(self, context: ParallelContext | None, *, layer_index: int = 0) -> None:
        """Attach the groups and make the dispatcher."""
        ...


def parallelize(model: nn.Module, mesh: DeviceMesh) -> ParallelContext:
    """Split the experts of every MoELayer in `model` over `mesh["ep"]`; collective over the mesh.

    Build the whole model on every rank first (on a meta device when it is large): rank r keeps experts `[r*E/R,
    (r+1)*E/R)` as DTensors `Shard(0)`. Everything else is replicated; values come from the first rank. Create the
    optimizer afterwards.

    Args:
        model: holds at least one MoELayer, none of them bound to groups yet.
        mesh: dimensions named `ep` and, optionally, `dp`.

    Returns:
        The context shared by the layers; `close()` it before the default process group is destroyed.

    Raises:
        ConfigError: the mesh has no `ep`, the model no MoELayer, or the experts do not split.
        RankMismatch: the ranks' configurations differ.
    """
    names = getattr(mesh, "mesh_dim_names", None) or ()
    if "ep" not in names or not set(names) <= {"dp", "ep"}:
        raise ConfigError(
            f'mesh must have dimensions named "dp" and "ep", got {names}; use init_device_mesh(device, (dp, ep), '
            'mesh_dim_names=("dp", "ep"))'
        )
    layers = moe_layers(model)
    if not layers:
        raise ConfigError("model contains no MoELayer; there is nothing to parallelize")
    if any(layer.router.context is not None for layer in layers):
        raise ConfigError("model is parallelized already; build a new one to change the mesh")
    for layer in layers:
        check_divisible(layer.config.router.num_experts, mesh["ep"].size())
    context = _make_context(mesh, deadline_s=max(layer.config.dispatch.deadline_s for layer in layers))
    for index, layer in enumerate(layers):
        if context.ep_size > 1:
            _shard_experts(layer.experts, mesh["ep"])
        layer.bind(context, layer_index=index)
    _take_first_ranks_values(model, context)
    return context


def moe_layers(model: nn.Module) -> list[ParallelLayer]:
    """Every MoELayer in the model, in registration order."""
    parts = ("bind", "config", "experts", "router", "dispatcher")
    return [module for module in model.modules() if all(hasattr(module, part) for part in parts)]  # type: ignore[misc]


def expert_parameters(model: nn.Module) -> Iterator[tuple[ParallelLayer, nn.Parameter]]:
    """The routed experts' parameters (not the shared expert's) with their layers."""
    for layer in moe_layers(model):
        for parameter in layer.experts.parameters():
            yield layer, parameter


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Every parameter, in order, in optimizer groups that torch's `foreach` and fused steps accept.

    They refuse a DTensor beside a plain tensor or one of another mesh, so after `parallelize` (and FSDP2) each mesh has
    a group of its own: `torch.optim.AdamW(parameter_groups(model), lr=...)`. One group on one rank.
    """
    groups: dict[DeviceMesh | None, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        mesh = parameter.device_mesh if isinstance(parameter, DTensor) else None
        groups.setdefault(mesh, []).append(parameter)
    return [{"params": parameters} for parameters in groups.values()]


def local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part, sharing storage; no autograd."""
    tensor = tensor.detach()
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _make_context(mesh: DeviceMesh, *, deadline_s: float) -> ParallelContext:
    """Own groups with the dispatch deadline: work that is stuck at exit ends with it, not after torch's half hour.

    NCCL's watchdog ends the process when its timeout comes first, before our error is there: it gets half a minute
    more, and the group is aborted at the deadline (`ParallelContext.fail`).
    """
    timeout_s = deadline_s + (30.0 if mesh.device_type == "cuda" else 1.0)
    has_dp = "dp" in (mesh.mesh_dim_names or ())
    grid = mesh.mesh if has_dp else mesh.mesh.unsqueeze(0)
    if has_dp and mesh.mesh_dim_names == ("ep", "dp"):
        grid = grid.T
    me = dist.get_rank()
    owned: list[Any] = []

    def group_of_mine(table: list[list[int]]) -> Any:
        found = None
        for ranks in table:
            group = compat.new_group(ranks, backend=None, timeout_s=timeout_s)
            if me in ranks:
                found = group
                owned.append(group)
        return found

    dp_size, ep_size = grid.shape
    ep_group = group_of_mine(grid.tolist())
    dp_group = group_of_mine(grid.T.tolist()) if dp_size > 1 else None
    data_group = group_of_mine([grid.flatten().tolist()]) if grid.numel() > 1 else None
    place = (grid == me).nonzero()[0].tolist()
    device = torch.device("cuda", torch.cuda.current_device()) if mesh.device_type == "cuda" else torch.device("cpu")
    return ParallelContext(
        ep_group,
        ep_rank=place[1],
        ep_size=ep_size,
        dp_group=dp_group,
        data_group=data_group,
        dp_size=dp_size,
        device=device,
        store=compat.prefixed(compat.default_store(), f"moe_layer/{grid[place[0]].tolist()}"),
        owned=tuple(owned),
    )


def _shard_experts(experts: nn.Module, ep_mesh: DeviceMesh) -> None:
    rank, size = ep_mesh.get_local_rank(), ep_mesh.size()
    for name, parameter in list(experts.named_parameters(recurse=False)):
        local = parameter.detach().chunk(size, dim=0)[rank].clone()
        sharded = DTensor.from_local(local, ep_mesh, [Shard(0)], run_check=False)
        experts.register_parameter(name, nn.Parameter(sharded, requires_grad=parameter.requires_grad))


@torch.no_grad()
def _take_first_ranks_values(model: nn.Module, context: ParallelContext) -> None:
    """Replicated values from the first data rank, an expert's from the first replica that holds it."""
    routed = {id(parameter) for _, parameter in expert_parameters(model)}
    for tensor in [*model.parameters(), *model.buffers()]:
        if tensor.is_meta:
            continue
        group = context.dp_group if id(tensor) in routed else context.data_group
        if group is not None:
            compat.broadcast(local_tensor(tensor), group=group)
