#!/usr/bin/env python3
"""The shared expert beside the routed ones: `shared_expert.mode` packed against overlap, one GPU, bf16, interleaved.

    python scripts/bench/shared.py --out docs/benchmarks/shared_h200.jsonl

Forward + backward of a whole layer without graphs; medians in milliseconds, and the layer without a shared expert.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from moe_layer.config import DispatchConfig, ExpertsConfig, MoEConfig, RouterConfig, SharedExpertConfig  # noqa: E402
from moe_layer.layer import MoELayer  # noqa: E402

SHAPES = {  # T, D, F, E, K
    "deepseek-v3-ep8-share": (4096, 7168, 2048, 32, 8),
    "qwen3-30b-4k": (4096, 2048, 768, 128, 8),
    "tiny": (64, 32, 16, 8, 2),
}


def make_step(shape: tuple[int, ...], mode: str, rows: str, device: str) -> Callable[[], None]:
    tokens, hidden, width, experts, top_k = shape
    shared = None if mode == "none" else SharedExpertConfig(intermediate_size=width, mode=mode)
    config = MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        experts=ExpertsConfig(intermediate_size=width),
        shared_expert=shared,
        dispatch=DispatchConfig(rows=rows),
    )
    torch.manual_seed(0)
    layer = MoELayer(config, device=device, dtype=torch.bfloat16)
    x = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16).requires_grad_()
    upstream = torch.randn(tokens, hidden, device=device, dtype=torch.bfloat16)

    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        layer(x).backward(upstream)

    return step


def milliseconds(step: Callable[[], None]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    step()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=["deepseek-v3-ep8-share"])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines here")
    arguments = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    for name in arguments.shapes:
        variants = {
            f"{mode} {rows}": make_step(SHAPES[name], mode, rows, "cuda")
            for rows in ("compact", "expert_major")
            for mode in ("packed", "overlap", "none")
        }
        times: dict[str, list[float]] = {variant: [] for variant in variants}
        for run in range(arguments.runs + 3):
            for variant, step in variants.items():
                value = milliseconds(step)
                if run >= 3:
                    times[variant].append(value)
        row: dict[str, Any] = {"shape": name, "T_D_F_E_K": SHAPES[name], "gpu": torch.cuda.get_device_name()}
        row |= {"torch": torch.__version__, "git": git.stdout.strip() or None, "command": " ".join(sys.argv)}
        row["ms"] = {variant: round(statistics.median(values), 4) for variant, values in times.items()}
        print(name, row["ms"], flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
