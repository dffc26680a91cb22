"""Where this process stands among its ranks, and the few collectives the trainer itself needs."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from moe_layer.config.train import TrainConfig
from moe_layer.errors import ConfigError, DispatchTimeout, RankMismatch
from moe_layer.train.checkpoint import Layout


@dataclass(frozen=True)
class World:
    """This rank's place.

    Attributes:
        mesh: ("dp", "ep"), or None for a single process.
        copies: ranks that see the same data: ep under `dispatch.backend: replicated`, else 1.
    """

    rank: int
    layout: Layout
    device: torch.device
    mesh: DeviceMesh | None
    copies: int = 1

    @property
    def size(self) -> int:
        return self.layout.world

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def data_ranks(self) -> int:
        """Into how many parts a batch is cut."""
        return self.size // self.copies

    @property
    def data_rank(self) -> int:
        """Which part is this rank's."""
        return self.rank // self.copies

    def total(self, tensor: Tensor) -> Tensor:
        """Sum over the parts of the batch, in place."""
        if self.size > 1:
            with self._together():
                dist.all_reduce(tensor)
        return tensor.div_(self.copies) if self.copies > 1 else tensor

    def barrier(self) -> None:
        if self.size > 1:
            with self._together():
                dist.barrier()

    def agree(self, flag: int) -> int:
        """The largest `flag` of all ranks."""
        if self.size == 1:
            return flag
        tensor = torch.tensor([flag], device=self.device)
        with self._together():
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX)
        return int(tensor.item())

    def require_same(self, facts: Mapping[str, Any]) -> None:
        """Every rank raises what two of them disagree about, before it costs a hang or a silently different replica.

        Raises:
            RankMismatch: names each differing fact with every rank's value.
        """
        if self.size == 1:
            return
        every: list[dict[str, Any]] = [{}] * self.size
        with self._together():
            dist.all_gather_object(every, dict(facts))
        names = dict.fromkeys(name for record in every for name in record)
        differing = [name for name in names if any(record.get(name) != every[0].get(name) for record in every)]
        if differing:
            lines = "; ".join(
                f"{name}: " + ", ".join(f"{record.get(name)!r} on rank {rank}" for rank, record in enumerate(every))
                for name in differing
            )
            raise RankMismatch(f"ranks disagree about {lines}; start every rank with the same command and files")

    def broadcast(self, tensor: Tensor) -> Tensor:
        """Rank 0's tensor, in place."""
        if self.size > 1:
            with self._together():
                dist.broadcast(tensor, src=0)
        return tensor

    @contextmanager
    def _together(self) -> Iterator[None]:
        """A collective of the trainer: when a peer is gone, torch says which connection broke and not what to do."""
        try:
            yield
        except RuntimeError as error:
            reason = " ".join(str(error).split())[:160]
            raise DispatchTimeout(
                f"rank {self.rank} lost another rank while they exchanged results of a step ({reason}); see that "
                "rank's log, then restart the job with --resume auto"
            ) from error


def plan_layout(config: TrainConfig) -> Layout:
    """Check the parallel sizes against torchrun's WORLD_SIZE and the batch.

    Raises:
        ConfigError: sizes that do not fit together.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    ep, dp = config.parallel.ep, config.parallel.dp
    problems = []
    if world % ep:
        problems.append(
            f"parallel.ep ({ep}) must divide the number of ranks ({world}); start with torchrun --nproc-per-node {ep}, "
            f"or set parallel.ep={world}"
        )
    elif dp is not None and dp * ep != world:
        problems.append(
            f"parallel.dp ({dp}) times parallel.ep ({ep}) must be the number of ranks ({world}); leave dp out"
        )
    loop = config.train
    parts = max(1, world // _copies(config))
    if loop.global_batch % (loop.micro_batch * parts):
        share = max(1, loop.global_batch // parts)
        problems.append(
            f"train.global_batch ({loop.global_batch}) must be divisible by train.micro_batch ({loop.micro_batch}) "
            f"times the number of ranks with data of their own ({parts}); try train.micro_batch={share} "
            f"train.global_batch={share * parts}"
        )
    if problems:
        raise ConfigError(problems)
    return Layout(world=world, dp=world // ep, ep=ep)


def _copies(config: TrainConfig) -> int:
    return config.parallel.ep if config.moe.dispatch.backend == "replicated" else 1


def pick_device(name: str) -> torch.device:
    """`auto` is CUDA when there is one.

    Raises:
        ConfigError: cuda was asked for and is not there.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("train.device is cuda, but this torch sees no CUDA device; set train.device to auto or cpu")
    if name == "cuda":
        index = int(os.environ.get("LOCAL_RANK", "0"))
        if index >= torch.cuda.device_count():
            raise ConfigError(
                f"local rank {index} has no GPU of its own ({torch.cuda.device_count()} visible); "
                f"start with torchrun --nproc-per-node {torch.cuda.device_count()}"
            )
        return torch.device("cuda", index)
    return torch.device("cpu")


@contextmanager
def join(config: TrainConfig) -> Iterator[World]:
    """Join torchrun's process group if there is one; leave it at the end."""
    layout = plan_layout(config)
    device = pick_device(config.train.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    with _deterministic(device):
        if layout.world == 1:
            yield World(rank=0, layout=layout, device=device, mesh=None)
            return
        with _process_group(device):
            mesh = init_device_mesh(device.type, (layout.dp, layout.ep), mesh_dim_names=("dp", "ep"))
            yield World(rank=dist.get_rank(), layout=layout, device=device, mesh=mesh, copies=_copies(config))


@contextmanager
def _process_group(device: torch.device) -> Iterator[None]:
    dist.init_process_group("cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo")
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextmanager
def _deterministic(device: torch.device) -> Iterator[None]:
    """On CUDA: torch's deterministic kernels (attention's backward adds atomically otherwise, and resume is not
    bit-exact)."""
    if device.type != "cuda":
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS insists on it under this mode
    debug: Any = torch.utils.deterministic  # a module whose attribute is a property
    was, fills = torch.are_deterministic_algorithms_enabled(), debug.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    debug.fill_uninitialized_memory = False  # a debugging aid that costs a pass over every buffer
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(was)
        debug.fill_uninitialized_memory = fills
