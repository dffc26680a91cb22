#!/usr/bin/env python3
"""Forward + backward of the whole layer on one GPU: TransformerEngine's expert GEMMs beside our own backends.

    python scripts/bench/experts_te.py --out docs/benchmarks/te_h200.jsonl

One layer, its weights in every variant: `auto` (QuACK where installed), `grouped_mm`, and `transformer_engine` under
each FP8 recipe. Eager steps, taken in turns, medians; host microseconds a step; launches and the sum of their times
(TE's GEMMs run on several streams); how far y is from the first variant's.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import layer_parts as parts  # noqa: E402
import torch  # noqa: E402
from layer_shapes import SHAPES  # noqa: E402

from moe_layer.config import ExpertsConfig, MoEConfig, RouterConfig  # noqa: E402
from moe_layer.layer import MoELayer  # noqa: E402

RECIPES = ("none", "delayed", "current", "blockwise")


def make_layer(shape: tuple[int, ...], backend: str, recipe: str) -> MoELayer:
    _, hidden, width, experts, top_k = shape
    config = MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        experts=ExpertsConfig(intermediate_size=width, backend=backend, fp8_recipe=recipe),  # type: ignore[arg-type]
    )
    torch.manual_seed(0)
    return MoELayer(config, device="cuda", dtype=torch.bfloat16)


def measure(name: str, runs: int, steps: int) -> dict[str, Any]:
    """One row: milliseconds, host microseconds and errors of every variant; a variant that fails says why."""
    shape = SHAPES[name]
    x, upstream = parts.make_inputs(shape)
    wanted = [("auto", "none"), ("grouped_mm", "none"), *(("transformer_engine", recipe) for recipe in RECIPES)]
    layers: dict[str, MoELayer] = {}
    failed: dict[str, str] = {}
    errors: dict[str, float] = {}
    reference = None
    for backend, recipe in wanted:
        key = backend if recipe == "none" else f"{backend} {recipe}"
        try:
            layer = make_layer(shape, backend, recipe)
            if layers:
                layer.load_state_dict(next(iter(layers.values())).state_dict())
            for _ in range(2):  # delayed scaling measures its first scales
                parts.make_step(layer, x, upstream)()
            y = layer(x).detach().float()
            torch.cuda.synchronize()
        except (RuntimeError, ValueError, AssertionError) as error:
            failed[key] = f"{type(error).__name__}: {str(error)[:200]}"
            continue
        reference = y if reference is None else reference
        errors[key] = round(float((y - reference).norm() / reference.norm()), 5)
        layers[key] = layer
    variants = {key: parts.make_step(layer, x, upstream) for key, layer in layers.items()}
    times: dict[str, list[float]] = {key: [] for key in variants}
    for run in range(runs + 2):
        for key, step in variants.items():
            value = parts.milliseconds(step, steps)
            if run >= 2:
                times[key].append(value)
    kernels = {key: parts.timeline(step) for key, step in variants.items()}
    return {
        "bench": "experts_te",
        "shape": name,
        "T_D_F_E_K": shape,
        "ms": {key: round(statistics.median(values), 4) for key, values in times.items()},
        "spread_ms": {key: [round(min(values), 4), round(max(values), 4)] for key, values in times.items()},
        "host_us": {key: round(parts.host_microseconds(step), 1) for key, step in variants.items()},
        "launches": {key: len(found) for key, found in kernels.items()},
        "sum_of_kernels_ms": {key: round(sum(us for _, us in found) / 1e3, 4) for key, found in kernels.items()},
        "relative_difference_of_y": errors,
        "failed": failed,
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformer_engine": importlib.metadata.version("transformer-engine"),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["qwen3-30b-4k", "qwen3-30b-16k"])
    parser.add_argument("--runs", type=int, default=7, help="interleaved runs; the median counts")
    parser.add_argument("--steps", type=int, default=3, help="steps in a row per sample")
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines here")
    arguments = parser.parse_args()
    for name in arguments.shapes:
        row = measure(name, arguments.runs, arguments.steps)
        print(json.dumps(row), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as stream:
                stream.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
