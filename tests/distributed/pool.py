"""Four gloo worker processes for the whole test run: `pool.run(fn, *args)` calls a module-level function on every rank.

The workers are forked from a server that imported torch once (four imports took over a minute on two busy cores); a
call costs milliseconds. Functions see an initialised default process group.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import pickle
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

_PRELOAD = ["torch.distributed.tensor", "moe_layer.layer", "moe_layer.parallel"]


class Pool:
    """`size` processes, started together on the first `run`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[BaseProcess] = []
        self._connections: list[Connection] = []
        self._store: Any = None

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float = 90.0, lost: int | None = None) -> list[Any]:
        """Results in rank order. `lost`: the rank that `fn` kills or stops; its result is None, the pool starts afresh.

        Raises:
            AssertionError: a rank raised (with all tracebacks) or did not answer; the pool then starts afresh.
        """
        if not self._processes:
            self._start()
        call = pickle.dumps((fn.__module__, fn.__qualname__, args))
        for connection in self._connections:
            connection.send_bytes(call)
        answers = []
        for rank, connection in enumerate(self._connections):
            if rank == lost:
                answers.append((None, None))
                continue
            try:
                if not connection.poll(timeout_s):
                    raise AssertionError(f"worker {rank} did not finish {fn.__qualname__} in {timeout_s} s")
                answers.append(pickle.loads(connection.recv_bytes()))
            except (EOFError, AssertionError) as error:
                self.close()
                raise AssertionError(f"worker {rank} in {fn.__qualname__}: {error or 'the process ended'}") from error
        failed = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text is not None]
        if failed or lost is not None:
            self.close()
        if failed:
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def _start(self) -> None:
        import torch.distributed as dist

        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        # the store lives here, as with torchrun: it outlives a worker
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for rank in range(self.size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_worker, args=(rank, self.size, self._store.port, theirs), daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.join()
        self._processes, self._connections, self._store = [], [], None


def _worker(rank: int, size: int, port: int, connection: Connection) -> None:
    from datetime import timedelta

    import torch
    import torch.distributed as dist

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    while True:
        try:
            module, name, args = pickle.loads(connection.recv_bytes())
        except EOFError:
            return
        try:
            fn = importlib.import_module(module)
            for part in name.split("."):
                fn = getattr(fn, part)
            answer = (None, fn(*args))
        except Exception:
            answer = (traceback.format_exc(), None)
        connection.send_bytes(pickle.dumps(answer))
