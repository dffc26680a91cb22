"""Four gloo worker processes for the whole test run: `pool.run(fn, *args)` calls a module-level function on every rank.

Starting costs seconds (each process imports torch), a call costs milliseconds. Functions see an initialised default
process group.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).resolve().parents[2]


class Pool:
    """`size` processes, started together on the first `run`."""

    def __init__(self, size: int) -> None:
        self.size = size
        self._processes: list[subprocess.Popen[bytes]] = []
        self._connections: list[Connection] = []

    def run(self, fn: Callable[..., Any], *args: Any, timeout_s: float = 90.0) -> list[Any]:
        """Results in rank order.

        Raises:
            AssertionError: a rank raised (all tracebacks are shown) or did not answer; the pool starts afresh next
                time.
        """
        if not self._processes:
            self._start()
        call = pickle.dumps((fn.__module__, fn.__qualname__, args))
        for connection in self._connections:
            connection.send_bytes(call)
        answers = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(timeout_s):
                self.close()
                raise AssertionError(f"worker {rank} did not finish {fn.__qualname__} in {timeout_s} s")
            answers.append(pickle.loads(connection.recv_bytes()))
        failed = [f"rank {rank}:\n{text}" for rank, (text, _) in enumerate(answers) if text is not None]
        if failed:
            self.close()
            raise AssertionError("\n".join(failed))
        return [value for _, value in answers]

    def _start(self) -> None:
        with Listener(("127.0.0.1", 0)) as listener:
            with socket.socket() as probe:
                probe.bind(("127.0.0.1", 0))
                port = probe.getsockname()[1]
            env = os.environ | {
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "WORLD_SIZE": str(self.size),
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": str(_ROOT),
            }
            command = [sys.executable, "-m", "tests.distributed.pool", str(listener.address[1])]
            key = listener._authkey  # type: ignore[attr-defined]
            assert key is None
            self._processes = [
                subprocess.Popen(command, env=env | {"RANK": str(rank)}, cwd=_ROOT) for rank in range(self.size)
            ]
            accepted = [listener.accept() for _ in range(self.size)]
            self._connections = sorted(accepted, key=lambda connection: connection.recv())
            for rank, connection in enumerate(self._connections):
                connection.send(rank)

    def close(self) -> None:
        for connection in self._connections:
            connection.close()
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes, self._connections = [], []


def _worker(port: int) -> None:
    import importlib

    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    rank = int(os.environ["RANK"])
    with Client(("127.0.0.1", port)) as connection:
        connection.send(rank)
        connection.recv()
        dist.init_process_group("gloo")
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


if __name__ == "__main__":
    _worker(int(sys.argv[1]))
