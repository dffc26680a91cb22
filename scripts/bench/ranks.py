"""Start the ranks of a benchmark on this machine, and end them when they take too long."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Callable

import torch.multiprocessing as mp


def start_ranks(work: Callable[[int, argparse.Namespace, str], None], arguments: argparse.Namespace) -> int:
    """Run `work(rank, arguments, rendezvous)` in `arguments.ranks` processes; 1 if `arguments.limit` seconds pass."""
    os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
    with tempfile.TemporaryDirectory() as folder:
        ranks = mp.start_processes(
            work, (arguments, f"file://{folder}/store"), nprocs=arguments.ranks, join=False, start_method="spawn"
        )
        until = time.monotonic() + arguments.limit
        while not ranks.join(timeout=1.0):
            if time.monotonic() > until:
                for process in ranks.processes:
                    process.kill()
                print(f"the ranks did not finish within --limit {arguments.limit:g} s and were ended", file=sys.stderr)
                return 1
    return 0
