#!/usr/bin/env python3
"""Train a configuration at EP = 1 and EP = 2 (gloo, same global batch) and compare the losses of every step.

    python scripts/compare_ep.py configs/train/tiny.yaml --steps 50 --dtype fp64

Exit code 1 when a loss differs by more than 1e-5 (relative). In fp32 the ranks sum dense gradients in another order; on
a large batch a near tie of the router then goes the other way sooner or later, and the runs part (they stay equally
good). fp64 has no such near ties, so a difference there is an error of the arithmetic.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from moe_layer.observe.metrics import read_metrics  # noqa: E402

LIMIT = 1e-5


def run(config: str, out: Path, ranks: int, overrides: list[str]) -> list[float]:
    """Losses of every step."""
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    command = [sys.executable, *launch, "-m", "moe_layer", "train", config, "--out", str(out), *overrides]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, text=True, capture_output=True, check=False)
    if done.returncode != 0:
        sys.exit(f"training at EP = {ranks} failed:\n{done.stdout[-1000:]}{done.stderr[-3000:]}")
    return [float(row["loss/train"]) for row in read_metrics(out) if row["kind"] == "train"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", default="configs/train/tiny.yaml")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--dtype", choices=["fp32", "fp64"], default="fp64")
    parser.add_argument("--batch", type=int, default=16, help="sequences in the global batch")
    arguments = parser.parse_args()
    same = [
        f"train.steps={arguments.steps}",
        f"train.dtype={arguments.dtype}",
        f"train.global_batch={arguments.batch}",
        "train.log_every=1",
        "train.val_every=0",
        "train.checkpoint_every=0",
    ]
    with tempfile.TemporaryDirectory() as folder:
        one, two = (
            run(
                arguments.config,
                Path(folder) / f"ep{ep}",
                ep,
                [*same, f"parallel.ep={ep}", f"train.micro_batch={arguments.batch // ep}"],
            )
            for ep in (1, 2)
        )
    if not len(one) == len(two) == arguments.steps:
        sys.exit(f"expected {arguments.steps} losses, got {len(one)} at EP = 1 and {len(two)} at EP = 2")
    apart = [abs(a - b) / abs(a) for a, b in zip(one, two, strict=True)]
    first = next((step for step, value in enumerate(apart, 1) if value > LIMIT), None)
    print(
        f"{arguments.config} {arguments.dtype}: {arguments.steps} losses from {one[0]:.4f} to {one[-1]:.4f}, "
        f"EP = 2 differs from EP = 1 by at most {max(apart):.1e} (limit {LIMIT:.0e})"
        + ("" if first is None else f", above it from step {first} on")
    )
    return 0 if first is None else 1


if __name__ == "__main__":
    sys.exit(main())
