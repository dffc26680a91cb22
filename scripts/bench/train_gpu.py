#!/usr/bin/env python3
"""Train h200_1gpu.yaml on one GPU with the fast path, then its first steps with `backend: reference`, and compare.

    python scripts/bench/train_gpu.py --out runs/h200_1gpu [--steps 300] [--global-batch 16]

Prints and writes to OUT/result.json: MFU and tokens/s (median of the last 100 steps), the largest difference of the
first 50 training losses (goal: at most 0.02), and the seconds each run took. Both runs have the same data, seed and
schedule: the learning rate rises over the compared steps, however many follow. More key=value overrides may follow,
for both runs.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]


def train(out: Path, overrides: list[str], *, seconds: int) -> tuple[list[dict[str, Any]], float]:
    """Records of a run's metrics.jsonl and how long it took.

    Raises:
        SystemExit: it failed or took longer than `seconds`.
    """
    command = [
        sys.executable,
        "-m",
        "moe_layer",
        "train",
        "configs/train/h200_1gpu.yaml",
        "--out",
        str(out),
        *overrides,
    ]
    began = time.perf_counter()
    out.parent.mkdir(parents=True, exist_ok=True)
    log = Path(f"{out}.log")
    try:
        with log.open("w") as file:
            done = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, timeout=seconds)
    except subprocess.TimeoutExpired:
        raise SystemExit(f"{' '.join(command)} took more than {seconds} s; see {log}") from None
    if done.returncode != 0:
        print("\n".join(log.read_text().splitlines()[-15:]), flush=True)
        raise SystemExit(f"{' '.join(command)} ended with {done.returncode}; see {log}")
    took = time.perf_counter() - began
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], took


def losses(records: list[dict[str, Any]], count: int) -> list[float]:
    """Training losses of the first `count` steps."""
    found = {record["step"]: record["loss/train"] for record in records if "loss/train" in record}
    return [found[step] for step in sorted(found)][:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/h200_1gpu"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--global-batch", type=int, default=16, help="sequences of 2048 bytes a step")
    parser.add_argument("--compare", type=int, default=50, help="steps of the reference run; 0: leave it out")
    parser.add_argument("--seconds", type=int, default=200, help="limit of each run")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_args()
    micro = min(16, arguments.global_batch)
    common = [f"train.global_batch={arguments.global_batch}", f"train.micro_batch={micro}", "train.log_every=1"]
    common += ["train.val_every=0", "train.checkpoint_every=0", "data.max_bytes=32000000"]
    common += [f"optimizer.warmup_steps={arguments.compare or 50}", *arguments.overrides]
    out = arguments.out.resolve()
    fast, took = train(out / "fast", [f"train.steps={arguments.steps}", *common], seconds=arguments.seconds)
    tail = [record for record in fast if record.get("perf/mfu") is not None][-100:]
    result: dict[str, Any] = {
        "steps": arguments.steps,
        "tokens_per_step": arguments.global_batch * 2048,
        "seconds": round(took, 1),
        "tokens_per_s": round(statistics.median(record["perf/tokens_per_s"] for record in tail)) if tail else None,
        "mfu": round(statistics.median(record["perf/mfu"] for record in tail), 4) if tail else None,
        "first_loss": round(losses(fast, 1)[0], 4),
        "last_loss": round(statistics.mean(losses(fast, arguments.steps)[-10:]), 4),
    }
    print(json.dumps(result), flush=True)
    if arguments.compare:
        overrides = [f"train.steps={arguments.compare}", "moe.experts.backend=reference", *common]
        slow, took = train(out / "reference", overrides, seconds=arguments.seconds)
        pairs = list(zip(losses(fast, arguments.compare), losses(slow, arguments.compare), strict=False))
        worst = max(abs(a - b) for a, b in pairs)
        result.update(
            compared_steps=len(pairs), largest_loss_difference=round(worst, 5), reference_seconds=round(took, 1)
        )
        result["within_0.02"] = worst <= 0.02
    print(json.dumps(result))
    (out / "result.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
