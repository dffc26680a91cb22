"""FSDP2 beside expert parallelism: everything but the routed experts is sharded over all data ranks (dp x ep)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard

from moe_layer.errors import ConfigError
from moe_layer.parallel import compat
from moe_layer.parallel.shard import expert_parameters, moe_layers


def shard_rest(model: nn.Module, mesh: DeviceMesh, *, modules: Iterable[nn.Module] = (), **options: Any) -> None:
    """Apply `fully_shard` to `modules`, then to `model`, leaving the routed experts to `parallelize`.

    Call it after `parallelize(model, mesh)` and before the optimizer is made. FSDP averages the dense gradients in
    backward; `sync_gradients` then does the experts' and `clip_grad_norm` counts every shard once. A packed shared
    expert lies beside the routed ones and stays whole on every rank.

    Args:
        model: parallelized over `mesh`.
        mesh: the mesh given to `parallelize`; its dimensions become one.
        modules: parts that are gathered and freed by themselves, for example the decoder's blocks.
        options: passed to `fully_shard` (`mp_policy`, `reshard_after_forward`, ...).

    Raises:
        ConfigError: the model was not parallelized.
    """
    layers = moe_layers(model)
    if not layers or any(layer.router.context is None for layer in layers):
        raise ConfigError("model is not parallelized, so FSDP would shard its experts; call parallelize(model, mesh)")
    ignored = {parameter for _, parameter in expert_parameters(model)}
    for layer in layers:
        shared = layer.config.shared_expert
        if shared is not None and shared.mode == "packed":
            ignored.update(layer.shared_expert.parameters())  # type: ignore[attr-defined]
    whole = compat.flat_mesh(mesh)
    for module in (*modules, model):
        fully_shard(module, mesh=whole, ignored_params=ignored, **options)
