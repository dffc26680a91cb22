"""Distributed checkpoints of MegatronExperts, interchangeable with Megatron's own experts.

Megatron stores `experts.linear_fc1.weight` as one global tensor with a leading expert dimension, gate and up halves as
separate shards; a rank contributes its experts. Ours hold all local experts in one parameter, so each is a factory that
cuts them apart on save and stacks them on load. Ours has no `_extra_state`: Megatron's experts load such a checkpoint
with `--dist-ckpt-strictness log_unexpected`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from moe_layer.compat.megatron import MegatronExperts

_NAMES = {
    "gate_up_proj": "linear_fc1.weight",
    "down_proj": "linear_fc2.weight",
    "gate_up_proj_bias": "linear_fc1.bias",
    "down_proj_bias": "linear_fc2.bias",
}


def sharded_experts(module: MegatronExperts, prefix: str, sharded_offsets: tuple) -> dict[str, Any]:
    """State-dict name -> factory of its shards."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory

    factory: Any = ShardedTensorFactory  # its annotations ask for dicts, its documentation and callers use lists
    first, total = _position(module)
    replica = (0, 0, 0 if module.dp_group is None else module.dp_group.rank())
    found: dict[str, Any] = {}
    for name, parameter in module.named_parameters():
        key = f"{prefix}experts.{_NAMES[name]}"

        def build(
            key: str, data: Tensor, replica_id: Any, _range: Any, *, halves: int = 1 + ("gate_up" in name)
        ) -> list:
            return _shards(key, data, sharded_offsets, first=first, total=total, halves=halves, replica_id=replica_id)

        def merge(parts: list, *, halves: int = 1 + ("gate_up" in name)) -> Tensor:
            experts = [torch.cat(parts[i : i + halves]) for i in range(0, len(parts), halves)]
            return torch.stack(experts)

        found[prefix + name] = factory(key, parameter.data, build, merge, replica)
    return found


def _position(module: MegatronExperts) -> tuple[int, int]:
    """First global expert of this rank, and the global number of experts."""
    local = module.num_local_experts
    if module.ep_group is None:
        return 0, local
    return module.ep_group.rank() * local, module.ep_group.size() * local


def _shards(
    key: str, data: Tensor, sharded_offsets: tuple, *, first: int, total: int, halves: int, replica_id: Any
) -> list[Any]:
    from megatron.core.dist_checkpointing import ShardedTensor

    lead = len(sharded_offsets)
    shards = []
    for local, expert in enumerate(data):
        for half, part in enumerate(expert.chunk(halves)):
            shards.append(
                ShardedTensor.from_rank_offsets(
                    key,
                    part,
                    *sharded_offsets,
                    (lead, first + local, total),
                    (lead + 1, half, halves),
                    replica_id=replica_id,
                    prepend_axis_num=lead + 1,
                )
            )
    return shards
