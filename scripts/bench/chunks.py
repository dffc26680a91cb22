#!/usr/bin/env python3
"""`dispatch.chunks`: time and memory of the layer in several parts of the tokens, one GPU, bf16, interleaved.

    python scripts/bench/chunks.py --out docs/benchmarks/chunks_h200.jsonl

One JSON line a shape. For each number of parts, with weight gradients in bf16 and with fp32 main_grads: medians of
forward + backward eager and in a CUDA graph; bytes above what was allocated before the step (weights, inputs and
main_grads were): the peak of the forward, what it keeps for backward, the peak of the whole step.
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
sys.path.insert(0, str(ROOT))

import layer_parts as parts  # noqa: E402
import torch  # noqa: E402
from graphs import in_graph  # noqa: E402
from layer_shapes import SHAPES  # noqa: E402

from moe_layer.layer import MoELayer  # noqa: E402


def memory(layer: MoELayer, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, int]:
    """Bytes above what is allocated now, in MiB."""
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()

    def above(count: int) -> int:
        return round((count - before) / 2**20)

    torch.cuda.reset_peak_memory_stats()
    y = layer(x)
    found = {"forward_peak": above(torch.cuda.max_memory_allocated()), "kept": above(torch.cuda.memory_allocated())}
    torch.cuda.reset_peak_memory_stats()
    y.backward(upstream)
    return {**found, "peak": above(torch.cuda.max_memory_allocated())}


def measure(name: str, arguments: argparse.Namespace, *, main_grad: bool) -> dict[str, Any]:
    shape = SHAPES[name]
    x, upstream = parts.make_inputs(shape)
    variants: dict[str, parts.Step] = {}
    bytes_of: dict[str, dict[str, int]] = {}
    for chunks in arguments.chunks:
        layer = parts.make_layer(shape, arguments.backend, chunks=chunks)
        if main_grad:
            for parameter in (layer.experts.gate_up_proj, layer.experts.down_proj):
                parameter.main_grad = torch.zeros(parameter.shape, device="cuda")
        step = parts.make_step(layer, x, upstream)
        step()
        bytes_of[str(chunks)] = memory(layer, x, upstream)
        variants |= {f"{chunks} eager": step, f"{chunks} graph": in_graph(step)}
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for run in range(arguments.runs + 2):
        for variant, function in variants.items():
            value = parts.milliseconds(function, arguments.steps)
            if run >= 2:
                times[variant].append(value)
    return {
        "shape": name,
        "T_D_F_E_K": shape,
        "backend": arguments.backend,
        "weight_gradients": "fp32 main_grad" if main_grad else "bf16",
        "ms": {variant: round(statistics.median(values), 4) for variant, values in times.items()},
        "spread_ms": {variant: [round(min(v), 4), round(max(v), 4)] for variant, v in times.items()},
        "MiB": bytes_of,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["qwen3-30b-16k", "30b-n256-32k"])
    parser.add_argument("--chunks", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--backend", choices=["quack", "grouped_mm"], default="quack")
    parser.add_argument("--gradients", nargs="*", choices=["bf16", "main_grad"], default=["bf16", "main_grad"])
    parser.add_argument("--runs", type=int, default=9, help="interleaved runs; the median counts")
    parser.add_argument("--steps", type=int, default=3, help="steps in a row per sample")
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines here")
    arguments = parser.parse_args()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "git": git.stdout.strip() or None,
        "command": "python " + " ".join(sys.argv),
    }
    for name in arguments.shapes:
        for gradients in arguments.gradients:
            row = measure(name, arguments, main_grad=gradients == "main_grad")
            print(json.dumps(row), flush=True)
            if arguments.out is not None:
                with arguments.out.open("a") as file:
                    file.write(json.dumps({**about, **row}) + "\n")
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
