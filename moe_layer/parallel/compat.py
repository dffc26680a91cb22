"""The one place that knows about torch.distributed's private names and how versions 2.11 to 2.13 differ."""

from __future__ import annotations

import copy
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def default_store() -> Any:
    """The rendezvous store of the default process group."""
    return dist.distributed_c10d._get_default_store()


def prefixed(store: Any, prefix: str) -> Any:
    return dist.PrefixStore(prefix, store)


def all_to_all(group: Any, out: Tensor, source: Tensor, *, out_rows: list[int], in_rows: list[int]) -> Any:
    """Start an uneven all-to-all over dim 0; returns the Work.

    The method of the group object is called, not `dist.all_to_all_single`, so that a group need not be registered: one
    process can then play several ranks.
    """
    return group.alltoall_base(out, source, out_rows, in_rows)


def all_gather(group: Any, out: Tensor, source: Tensor) -> Any:
    """Start an even all-gather along dim 0; returns the Work."""
    return group._allgather_base(out, source)


def abort(group: Any) -> None:
    """Abort a NCCL group, so that its stuck kernels end."""
    backend = group._get_backend(torch.device("cuda")) if hasattr(group, "_get_backend") else group
    backend.abort()


def new_group(ranks: list[int], *, backend: str | None, timeout_s: float) -> Any:
    """Create a subgroup (every rank of the world calls this, in the same order)."""
    return dist.new_group(ranks, backend=backend, timeout=timedelta(seconds=timeout_s))


def broadcast(tensor: Tensor, *, group: Any) -> None:
    """The group's first rank's values, in place."""
    dist.broadcast(tensor, group=group, group_src=0)


def all_reduce(tensor: Tensor, *, group: Any) -> None:
    """Sum over the group, in place."""
    dist.all_reduce(tensor, group=group)


def start_all_reduce(group: Any, tensor: Tensor) -> Any:
    """Start a sum over the group, in place; returns the Work (see `all_to_all` for why the method is called)."""
    return group.allreduce([tensor])


def set_local(parameter: Tensor, value: Tensor) -> None:
    """Give a parameter (its local part, when it is a DTensor) other memory; its identity stays."""
    if hasattr(parameter, "to_local"):
        parameter._local_tensor = value  # type: ignore[attr-defined]
    else:
        parameter.data = value


def local_part(parameter: Tensor) -> Tensor:
    """A DTensor parameter's local tensor, differentiable once: `to_local()` at a third of its host time.

    The gradient is given the parameter's own layout, where to_local() works it out again.
    """
    return parameter.to_local() if torch.compiler.is_compiling() else _LocalPart.apply(parameter)  # type: ignore[attr-defined]


class _LocalPart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, parameter: Any) -> Tensor:
        ctx.make, ctx.spec = type(parameter), parameter._spec
        return parameter._local_tensor.view_as(parameter._local_tensor)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return ctx.make(gradient.contiguous(), copy.copy(ctx.spec), requires_grad=False)


def flat_mesh(mesh: Any) -> Any:
    """The mesh with one dimension."""
    return mesh if mesh.ndim == 1 else mesh._flatten("_".join(mesh.mesh_dim_names))


def symmetric_memory(num_bytes: int, *, group: Any, device: torch.device) -> tuple[Tensor, list[int], Any]:
    """uint8 memory that every rank of the group can address, all ranks' addresses of it, and its handle (keep it)."""
    import torch.distributed._symmetric_memory as symm_mem

    memory = symm_mem.empty(num_bytes, dtype=torch.uint8, device=device)
    handle = symm_mem.rendezvous(memory, group)
    return memory, [int(pointer) for pointer in handle.buffer_ptrs], handle


def destroy_group(group: Any) -> None:
    """Destroy a subgroup; a default group that is gone already took it along."""
    if dist.is_initialized() and group is not None:
        dist.destroy_process_group(group)
