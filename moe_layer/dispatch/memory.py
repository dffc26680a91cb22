"""Memory of one rank that all ranks of a host can write: torch symmetric memory on GPUs, `/dev/shm` between processes
on a CPU, ordinary memory between threads."""

from __future__ import annotations

import itertools
import os
import zlib
from typing import Any

import torch
from torch import Tensor

from moe_layer.dispatch.wire import Link
from moe_layer.errors import CapacityError, RankMismatch
from moe_layer.parallel import compat

_names = itertools.count()


def share_memory(num_bytes: int, link: Link) -> tuple[Tensor, list[int], Any]:
    """Zeroed memory of this rank, every rank's address for it, and what must be kept alive."""
    device, pid = link.context.device, os.getpid()
    home = zlib.crc32(f"{os.uname().nodename} {_boot_id()}".encode())
    places = _gather(link, [pid, home])
    if len({place[1] for place in places}) > 1:
        raise RankMismatch(
            "dispatch.backend nvlink needs all ranks of the EP group on one host; use all_to_all across hosts"
        )
    if len({place[0] for place in places}) == 1:  # threads play the ranks
        memory = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
        _settle(device)
        return memory, [row[0] for row in _gather(link, [memory.data_ptr()])], None
    if device.type == "cuda":
        memory, pointers, handle = compat.symmetric_memory(num_bytes, group=link.group, device=device)
        memory.zero_()
        _settle(device)
        _gather(link, [0])  # nobody writes before everybody has zeroed
        return memory, pointers, handle
    path = "/dev/shm/moe_layer_{}_{}"
    number = next(_names)
    _reserve(path.format(pid, number), num_bytes)
    memory = torch.from_file(path.format(pid, number), shared=True, size=num_bytes, dtype=torch.uint8)
    memory.zero_()
    places = _gather(link, [pid, number])
    views = [
        memory
        if place == [pid, number]
        else torch.from_file(path.format(*place), shared=True, size=num_bytes, dtype=torch.uint8)
        for place in places
    ]
    _gather(link, [0])  # everybody has mapped everything: the names can go
    os.unlink(path.format(pid, number))
    return memory, [view.data_ptr() for view in views], views


def _reserve(path: str, num_bytes: int) -> None:
    """Make a file of that size now: a write to shared memory that is not there would end the process without a word."""
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
    try:
        os.posix_fallocate(file, 0, num_bytes)
    except OSError as error:
        os.unlink(path)
        raise CapacityError(
            f"the dispatch window of {num_bytes} bytes does not fit into /dev/shm ({error.strerror}); lower "
            "dispatch.max_tokens_per_rank, or give the container more shared memory"
        ) from error
    finally:
        os.close(file)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _boot_id() -> str:
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return file.read().strip()
    except OSError:
        return ""


def _gather(link: Link, values: list[int]) -> list[list[int]]:
    mine = torch.tensor(values, dtype=torch.int64, device=link.context.device)
    every = mine.new_empty(link.size * len(values))
    at = link.at("bind")
    link.wait(link.start(lambda: compat.all_gather(link.group, every, mine), at), at, read=True)
    return every.view(link.size, len(values)).tolist()
