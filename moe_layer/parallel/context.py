"""The process groups that one model's layers share, and where ranks report when something goes wrong."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch

from moe_layer.errors import DispatchTimeout
from moe_layer.parallel import compat


class ParallelContext:
    """Groups and fault reports. A resource: `close()` it; pickle and deepcopy leave it behind (they give None).

    Args:
        ep_group: the expert-parallel group, with gloo or NCCL behind it.
        ep_rank, ep_size: this rank's place in it.
        dp_group: ranks that hold the same experts; None when there is one.
        data_group: all ranks that see different data (dp x ep); None when there is one.
        dp_size: size of `dp_group`.
        device: where messages must live: the CPU for gloo, this rank's GPU for NCCL.
        store: key-value store reached by every rank of `ep_group`, for reports after a failure; None does without
            names.
        owned: groups that `close` destroys.

    Attributes:
        step: the optimiser step, carried in message headers; `advance_step` or the trainer moves it on.
        failure: None, or why the group is unusable.
    """

    def __init__(
        self,
        ep_group: Any,
        *,
        ep_rank: int,
        ep_size: int,
        dp_group: Any = None,
        data_group: Any = None,
        dp_size: int = 1,
        device: torch.device | str = "cpu",
        store: Any = None,
        owned: tuple[Any, ...] = (),
    ) -> None:
        self.ep_group = ep_group
        self.ep_rank = ep_rank
        self.ep_size = ep_size
        self.dp_group = dp_group
        self.data_group = data_group
        self.dp_size = dp_size
        self.device = torch.device(device)
        self.store = store
        self.step = 0
        self.failure: str | None = None
        self.window: Any = None  # of dispatch.backend nvlink, shared by the layers; see moe_layer/dispatch/window.py
        self.libraries: dict[Any, Any] = {}  # transports of dispatch.backend deep_ep and nccl_ep, shared by the layers
        self._owned = owned

    @property
    def data_size(self) -> int:
        """Ranks that see different data: dp * ep."""
        return self.dp_size * self.ep_size

    def advance_step(self) -> None:
        """Count one optimiser step (all ranks together), so that a rank that skips one is recognised."""
        self.step += 1

    def fail(self, position: str, reason: str, *, grace_s: float) -> DispatchTimeout:
        """Report this rank's position, see who else does within `grace_s`, and describe the failure.

        Every survivor calls this; the ranks that do not are the ones that died, hang or went elsewhere.
        """
        silent = self._silent_ranks(position, grace_s)
        if silent is None:
            names = "the rendezvous store did not answer either, so the rank that hosts it may be the one that failed"
        elif silent:
            names = f"ranks {silent} of {self.ep_size} did not report"
        else:
            names = "all ranks reported: the connection failed, or they wait for each other"
        self.failure = f"{position} on rank {self.ep_rank}: {names} ({reason})"
        if self.device.type == "cuda":
            compat.abort(self.ep_group)
        return DispatchTimeout(f"{self.failure}; restart the job from its last checkpoint without those ranks")

    def _silent_ranks(self, position: str, grace_s: float) -> list[int] | None:
        """Ranks without a report after `grace_s`; None when the store does not answer (a thread, because it may
        block)."""
        if self.store is None:
            return None
        found: list[list[int]] = []
        worker = threading.Thread(target=lambda: found.append(self._poll_store(position, grace_s)), daemon=True)
        worker.start()
        worker.join(grace_s + 1.0)
        return found[0] if found else None

    def _poll_store(self, position: str, grace_s: float) -> list[int]:
        until = time.monotonic() + grace_s
        self.store.set(f"failed/{self.ep_rank}", position)
        silent = [rank for rank in range(self.ep_size) if rank != self.ep_rank]
        while silent:
            silent = [rank for rank in silent if not self.store.check([f"failed/{rank}"])]
            if time.monotonic() > until:
                break
            time.sleep(0.02)
        return silent

    def close(self) -> None:
        """Destroy the groups made for this context. Every rank calls it; it is not a collective."""
        owned, self._owned = self._owned, ()
        if self.window is not None and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # peers may still be writing into it
        self.window = None
        for library in self.libraries.values():
            library.close()
        self.libraries.clear()
        self.failure = self.failure or "the context was closed"
        for group in owned:
            compat.destroy_group(group)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()
