#!/usr/bin/env python3
"""Forward + backward of the whole MoE block on CPU, interleaved with transformers' block on the same weights.

    python scripts/bench/layer.py --peer transformers

Prints medians, the run's own sum of the six GEMMs (nothing can be faster), and the ratio to the faster peer; appends a
JSON line to docs/benchmarks/cpu_layer.jsonl; exits with 1 when the ratio is above the goal of 1.05.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from moe_layer.config.model import DispatchConfig, ExpertsConfig, MoEConfig, RouterConfig  # noqa: E402
from moe_layer.layer import MoELayer  # noqa: E402

GOAL = 1.05


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", choices=["transformers", "none"], default="transformers")
    for name, value in (("tokens", 2048), ("hidden", 256), ("width", 128), ("experts", 16), ("top-k", 4)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--rows", choices=["expert_major", "compact"], default="expert_major")
    parser.add_argument("--backend", choices=["auto", "reference", "grouped_mm"], default="auto")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--runs", type=int, default=20, help="interleaved runs; the median counts")
    parser.add_argument("--out", type=Path, default=ROOT / "docs/benchmarks/cpu_layer.jsonl")
    parser.add_argument("--wait", type=float, default=60, metavar="S", help="wait so long for an idle machine")
    parser.add_argument("--no-write", action="store_true", help="print only")
    return parser.parse_args()


def our_layer(arguments: argparse.Namespace) -> MoELayer:
    config = MoEConfig(
        hidden_size=arguments.hidden,
        router=RouterConfig(num_experts=arguments.experts, top_k=arguments.top_k),
        experts=ExpertsConfig(intermediate_size=arguments.width, backend=arguments.backend),
        dispatch=DispatchConfig(rows=arguments.rows),
    )
    return MoELayer(config, dtype=getattr(torch, arguments.dtype))


def peer_block(arguments: argparse.Namespace, implementation: str, ours: MoELayer) -> nn.Module:
    """transformers' Qwen3-MoE block with our weights."""
    from transformers import Qwen3MoeConfig
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeSparseMoeBlock

    config = Qwen3MoeConfig(
        hidden_size=arguments.hidden,
        moe_intermediate_size=arguments.width,
        num_experts=arguments.experts,
        num_experts_per_tok=arguments.top_k,
        norm_topk_prob=True,
    )
    config._experts_implementation = implementation
    block = Qwen3MoeSparseMoeBlock(config).to(getattr(torch, arguments.dtype))
    with torch.no_grad():
        block.gate.weight.copy_(ours.router.weight)
        block.experts.gate_up_proj.copy_(ours.experts.gate_up_proj)
        block.experts.down_proj.copy_(ours.experts.down_proj)
    return block


def step(module: nn.Module, x_TD: Tensor, d_y_TD: Tensor) -> tuple[float, float, Tensor, Tensor]:
    """Seconds of the forward and the backward, y and dx; gradients are dropped outside the timed part."""
    module.zero_grad(set_to_none=True)
    x = x_TD.detach().requires_grad_()
    start = time.perf_counter()
    y = module(x[None])[0]
    middle = time.perf_counter()
    y.backward(d_y_TD)
    return middle - start, time.perf_counter() - middle, y.detach(), x.grad


def gemm_seconds(arguments: argparse.Namespace, runs: int) -> float:
    """The six expert GEMMs alone, rows split evenly: a floor for every implementation that calls this GEMM library."""
    D, F, E = arguments.hidden, arguments.width, arguments.experts
    rows = arguments.tokens * arguments.top_k // E
    dtype = getattr(torch, arguments.dtype)
    x, h, a = (torch.randn(E, rows, size, dtype=dtype) for size in (D, 2 * F, F))
    up, down = torch.randn(E, 2 * F, D, dtype=dtype), torch.randn(E, D, F, dtype=dtype)

    def once() -> float:
        start = time.perf_counter()
        for e in range(E):
            torch.mm(x[e], up[e].t()), torch.mm(a[e], down[e].t())
            torch.mm(x[e], down[e]), torch.mm(x[e].t(), a[e])
            torch.mm(h[e], up[e]), torch.mm(h[e].t(), x[e])
        return time.perf_counter() - start

    return statistics.median(once() for _ in range(runs))


def interleave(modules: dict[str, Callable], runs: int) -> dict[str, list[tuple[float, float]]]:
    """One step of each in turn, after three rounds of warm-up; the order rotates: none always follows another."""
    names = list(modules)
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for run in range(-3, runs):
        for i in range(len(names)):
            name = names[(run + i) % len(names)]
            forward, backward, *_ = modules[name]()
            if run >= 0:
                times[name].append((forward, backward))
    return times


def check_agreement(results: dict[str, Tensor], reference: str, dtype: str) -> None:
    """Speed of a wrong answer is worth nothing."""
    tolerance = 1e-4 if dtype == "float32" else 5e-2
    for name, value in results.items():
        error = (value - results[reference]).norm() / results[reference].norm()
        if not error <= tolerance:
            raise SystemExit(f"{name} and {reference} differ by {float(error):.2e} relative, above {tolerance}")


def busy_fraction(seconds: float = 1.0) -> float:
    """Share of all cores in use while this process sleeps (0 where /proc/stat is missing)."""

    def ticks() -> tuple[int, int]:
        values = [int(v) for v in Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:9]]
        return sum(values), values[3] + values[4]

    if not Path("/proc/stat").exists():
        return 0.0
    (total, idle), _, (later, later_idle) = ticks(), time.sleep(seconds), ticks()
    return 1 - (later_idle - idle) / max(1, later - total)


def wait_for_idle(seconds: float) -> float:
    """Two threads beside a busy neighbour measure the neighbour: wait, then say how busy the machine still is."""
    deadline = time.monotonic() + seconds
    while (busy := busy_fraction()) > 0.1 and time.monotonic() < deadline:
        pass
    if busy > 0.1:
        print(f"warning: other processes use {busy:.0%} of the cores; run again on an idle machine", file=sys.stderr)
    return round(busy, 3)


def environment() -> dict[str, Any]:
    def git(*command: str) -> str:
        return subprocess.run(["git", *command], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    try:
        from transformers import __version__ as transformers_version
    except ImportError:
        transformers_version = None
    return {
        "machine": f"{cpu}, {torch.get_num_threads()} threads, {platform.system()} {platform.machine()}",
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers_version,
        },
        "git_sha": git("rev-parse", "--short=12", "HEAD"),
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def summarise(times: dict[str, list[tuple[float, float]]]) -> dict[str, dict[str, float]]:
    def milliseconds(values: list[float]) -> float:
        return round(statistics.median(values) * 1e3, 3)

    return {
        name: {
            "forward_ms": milliseconds([f for f, _ in pairs]),
            "backward_ms": milliseconds([b for _, b in pairs]),
            "total_ms": milliseconds([f + b for f, b in pairs]),
            "fastest_ms": round(min(f + b for f, b in pairs) * 1e3, 3),
        }
        for name, pairs in times.items()
    }


def main() -> int:
    arguments = parse_arguments()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    record = environment()
    ours = our_layer(arguments)
    modules: dict[str, nn.Module] = {"ours": ours}
    if arguments.peer == "transformers":
        for implementation in ("eager", "grouped_mm"):
            modules[f"transformers_{implementation}"] = peer_block(arguments, implementation, ours)
    dtype = getattr(torch, arguments.dtype)
    x_TD, d_y_TD = (torch.randn(arguments.tokens, arguments.hidden).to(dtype) for _ in range(2))
    outputs = {name: step(module, x_TD, d_y_TD)[2:] for name, module in modules.items()}
    for i in range(2):
        check_agreement({name: pair[i] for name, pair in outputs.items()}, "ours", arguments.dtype)

    record["busy_before"] = wait_for_idle(arguments.wait)
    steps = {name: lambda m=module: step(m, x_TD, d_y_TD) for name, module in modules.items()}
    table = summarise(interleave(steps, arguments.runs))
    shape = {"T": arguments.tokens, "D": arguments.hidden, "F": arguments.width, "E": arguments.experts}
    record |= {"shape": shape | {"K": arguments.top_k}, "dtype": arguments.dtype, "rows": arguments.rows}
    record |= {"backend": arguments.backend, "runs": arguments.runs, "times": table}
    record["busy_after"] = round(busy_fraction(), 3)
    record["six_gemms_ms"] = round(gemm_seconds(arguments, arguments.runs) * 1e3, 3)
    for name, row in table.items():
        print(f"{name:24s}" + "".join(f"{key[:-3]:>10s} {value:8.2f} ms" for key, value in row.items()))
    print(f"{'six GEMMs alone':24s}{'total':>10s} {record['six_gemms_ms']:8.2f} ms")
    peers = [row["total_ms"] for name, row in table.items() if name != "ours"]
    if peers:
        record["ratio_to_faster_peer"] = round(table["ours"]["total_ms"] / min(peers), 4)
        print(f"ours / faster peer: {record['ratio_to_faster_peer']:.3f} (goal: at most {GOAL})")
    if not arguments.no_write:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        with arguments.out.open("a") as file:
            file.write(json.dumps(record) + "\n")
    return int(record.get("ratio_to_faster_peer", 0.0) > GOAL)


if __name__ == "__main__":
    sys.exit(main())
