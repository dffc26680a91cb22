#!/usr/bin/env python3
"""Forward + backward of the layer (router included, one GPU, bf16), variants and peers interleaved in one run.

    python scripts/bench/layer_gpu.py --out docs/benchmarks/layer_h200.jsonl
    python scripts/bench/layer_gpu.py --peer sonic --peer-path SITE --peer-cache DIR --shapes qwen3-30b-16k qwen3-30b-4k
    python scripts/bench/layer_gpu.py --first-step --shapes qwen3-30b-4k
    python scripts/bench/layer_gpu.py --main-grad --shapes qwen3-30b-16k qwen3-30b-4k

One JSON line a shape: medians of ours eager and in a CUDA graph, of the same layer over torch's grouped GEMM, of the
peer (a process of its own, `peer_sonic.py`), the run's own sum of the six GEMMs and "six GEMMs + two combines at copy
speed", each kernel beside its roofline, host microseconds, launches, saved bytes, peak memory.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import layer_parts as parts  # noqa: E402
import torch  # noqa: E402
from graphs import in_graph  # noqa: E402
from layer_peer import Peer, PeerError, agreement, peer_columns  # noqa: E402
from layer_shapes import GOALS, SHAPES  # noqa: E402
from peer_scatter import is_installed, scatter_step  # noqa: E402

from moe_layer.ops import _ext  # noqa: E402


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--runs", type=int, default=11, help="interleaved runs; the median counts")
    parser.add_argument("--steps", type=int, default=3, help="steps in a row per sample")
    parser.add_argument("--losses", action="store_true", help="with load-balancing and z loss")
    parser.add_argument("--zipf", action="store_true", help="expert loads that fall like 1 / rank")
    parser.add_argument("--no-grouped-mm", action="store_true", help="leave out the same layer over torch's GEMM")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step")
    parser.add_argument("--host-profile", action="store_true", help="print where the host's time goes")
    parser.add_argument("--main-grad", action="store_true", help="only: what fp32 accumulation costs in backward")
    parser.add_argument("--first-step", action="store_true", help="only: seconds to the first step, cold and warm")
    parser.add_argument("--peer", choices=["sonic"], default=None)
    parser.add_argument("--peer-path", default="", help="PYTHONPATH of the peer's wheels")
    parser.add_argument("--peer-cache", type=Path, default=Path("peer_cache"), help="folder of the peer's autotuner")
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def measure(name: str, arguments: argparse.Namespace, rates: dict[str, float], peer: Peer | None) -> dict[str, Any]:
    shape = SHAPES[name]
    tokens, hidden, width, experts, top_k = shape
    began = time.perf_counter()
    ours = parts.make_layer(shape, "quack", losses=arguments.losses)
    x, upstream = parts.make_inputs(shape)
    step = parts.make_step(ours, x, upstream)
    step()
    torch.cuda.synchronize()
    first_step = time.perf_counter() - began
    imbalance = parts.skew(ours, x) if arguments.zipf else None
    found = peer_row(peer, ours, x, upstream, shape, arguments)
    variants = {"eager": step, "graph": in_graph(step), "gemms": parts.six_gemms(ours, x, upstream)}
    if not arguments.no_grouped_mm:
        twin = parts.make_layer(shape, "grouped_mm", losses=arguments.losses)
        twin.load_state_dict(ours.state_dict())
        variants["grouped_mm"] = parts.make_step(twin, x, upstream)
    scatter: dict[str, Any] = {"scattermoe": "not installed"}
    if is_installed():
        variants["scattermoe"], error = scatter_step(ours, x, upstream)
        scatter = {"scattermoe": {"median_error_of_y": round(error, 5)}}
    times = interleave(variants, arguments, peer, found)
    steps = parts.timeline(step)
    if arguments.profile:
        for kernel, us in steps:
            print(f"    {us:9.1f} us  {kernel[:110]}")
    if arguments.host_profile:
        print(parts.host_profile(step))
    allowed = 2 * tokens * hidden + 4 * tokens * top_k * width + tokens * experts * 4 + 32 * tokens * top_k
    median = {variant: statistics.median(values) for variant, values in times.items() if values}
    combines = 2 * (tokens * top_k + tokens) * hidden * 2 / rates["bandwidth"] * 1e3
    return {
        "shape": name,
        "T_D_F_E_K": shape,
        "losses": arguments.losses,
        **({} if imbalance is None else {"routing": "zipf", "max_load_over_mean": round(imbalance, 2)}),
        "ms": {variant: round(value, 4) for variant, value in median.items()},
        "spread_ms": {variant: [round(min(v), 4), round(max(v), 4)] for variant, v in times.items() if v},
        "six_gemms_plus_combines_ms": round(median["gemms"] + combines, 4),
        **({} if peer is None else {"peer": found, **peer_columns(times, "sonic", GOALS[name])}),
        **scatter,
        "kernels_us": parts.parts_of(steps),
        "roofline_us": parts.rooflines(shape, **rates),
        "launches": len(steps),
        "launches_around_gemms": sum(not parts.is_gemm(kernel) for kernel, _ in steps),
        "host_us": round(parts.host_microseconds(step), 1),
        "saved_bytes": parts.saved_bytes(ours, x),
        "saved_bytes_allowed": allowed,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "first_step_s": round(first_step, 2),
    }


def peer_row(peer: Peer | None, ours: Any, x: Any, upstream: Any, shape: tuple, arguments: argparse.Namespace) -> dict:
    """Load the peer with this shape: with our tensors and a comparison where they are small, else random ones."""
    if peer is None:
        return {}
    try:
        small = 3 * shape[3] * shape[1] * shape[2] < 1e9
        if small:
            row = agreement(peer, ours, x, upstream, shape)
        else:
            row = peer.ask("load", seconds=560, shape=list(shape), zipf=arguments.zipf)
        return {**row, **peer.ask("launches", seconds=60)}
    except PeerError as error:
        print(f"    {error}", flush=True)
        return {"failed": str(error)}


def interleave(
    variants: dict[str, parts.Step], arguments: argparse.Namespace, peer: Peer | None, found: dict[str, Any]
) -> dict[str, list[float]]:
    """Milliseconds of each variant and of the peer's eager step and graph, taken in turns."""
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    kinds = [] if peer is None or "failed" in found else ["eager"] if "graph_error" in found else ["eager", "graph"]
    times.update({f"sonic_{kind}": [] for kind in kinds})
    for run in range(arguments.runs + 2):
        for variant, function in variants.items():
            value = parts.milliseconds(function, arguments.steps)
            if run >= 2:
                times[variant].append(value)
        for kind in kinds:
            assert peer is not None
            value = peer.ask("time", seconds=60, what=kind, n=arguments.steps)["ms"]
            if run >= 2:
                times[f"sonic_{kind}"].append(value)
    return times


def measure_main_grad(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Adding weight gradients to fp32 main_grads inside the GEMMs, against bf16 gradients and a separate addition."""
    shape = SHAPES[name]
    layer = parts.make_layer(shape, "quack")
    x, upstream = parts.make_inputs(shape)
    plain = parts.make_step(layer, x, upstream)
    matrices = (layer.experts.gate_up_proj, layer.experts.down_proj)
    totals = [torch.zeros(p.shape, device="cuda") for p in matrices]

    def separate() -> None:
        plain()
        for total, parameter in zip(totals, matrices, strict=True):
            total.add_(parameter.grad)

    runs = {"bf16": in_graph(plain), "separate_add": in_graph(separate)}
    for parameter, total in zip(matrices, totals, strict=True):
        parameter.main_grad = total
    plain()
    runs["main_grad"] = in_graph(plain)
    times: dict[str, list[float]] = {variant: [] for variant in runs}
    for _ in range(arguments.runs):
        for variant, function in runs.items():
            times[variant].append(parts.milliseconds(function, arguments.steps))
    median = {variant: statistics.median(values) for variant, values in times.items()}
    add = median["separate_add"] - median["bf16"]
    hidden = (median["separate_add"] - median["main_grad"]) / add
    return {
        "shape": name,
        "what": "main_grad",
        "ms": {variant: round(value, 4) for variant, value in median.items()},
        "separate_add_ms": round(add, 4),
        "hidden": round(hidden, 3),
        "goal_hidden": 0.7,
    }


ONE_STEP = """
import sys, time
began = time.perf_counter()
import torch
import layer_parts as parts
from layer_shapes import SHAPES
imported = time.perf_counter()
shape = SHAPES[sys.argv[1]]
layer = parts.make_layer(shape, "quack")
x, upstream = parts.make_inputs(shape)
torch.cuda.synchronize()
made = time.perf_counter()
parts.make_step(layer, x, upstream)()
torch.cuda.synchronize()
print(*(round(t - began, 2) for t in (imported, made, time.perf_counter())))
"""


def measure_first_step(name: str) -> dict[str, Any]:
    """Seconds to the end of the first forward + backward in a fresh process: QuACK's cache on disk empty, then full.

    The step alone, and with importing torch and making the layer.
    """
    row: dict[str, Any] = {"shape": name, "what": "first_step", "goal_cold_s": 20, "goal_warm_s": 5}
    with tempfile.TemporaryDirectory() as cache:
        folders = f"{ROOT}{os.pathsep}{ROOT / 'scripts/bench'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"
        environment = {**os.environ, "QUACK_CACHE_DIR": cache, "PYTHONPATH": folders}
        for kind in ("cold", "warm"):
            command = [sys.executable, "-c", ONE_STEP, name]
            done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
            if done.returncode != 0:
                return {**row, "failed": done.stderr[-500:]}
            imported, made, stepped = map(float, done.stdout.split()[-3:])
            row[kind] = {"step_s": round(stepped - made, 2), "import_s": imported, "process_s": stepped}
    return row


def main() -> None:
    arguments = parse_arguments()
    rates = {"bandwidth": parts.copy_bandwidth(), "rate": parts.gemm_rate()}
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "git": git.stdout.strip() or None,
        "library": _ext.status().sentence(),
        "copy_GBps": round(rates["bandwidth"] * 1e-9),
        "cublas_TFLOPs": round(rates["rate"] * 1e-12),
        "command": "python " + " ".join(sys.argv),
    }
    print(json.dumps(about), flush=True)
    peer = None
    if arguments.peer is not None:
        log = Path(f"{arguments.out or 'layer'}.peer.log")
        peer = Peer(site=arguments.peer_path, cache=arguments.peer_cache, log=log)
    for name in arguments.shapes:
        torch.cuda.reset_peak_memory_stats()
        if arguments.first_step:
            row = {**about, **measure_first_step(name)}
        elif arguments.main_grad:
            row = {**about, **measure_main_grad(name, arguments)}
        else:
            row = {**about, **measure(name, arguments, rates, peer)}
        print(json.dumps({key: value for key, value in row.items() if key not in about}), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        torch.cuda.empty_cache()
    if peer is not None:
        peer.close()


if __name__ == "__main__":
    main()
