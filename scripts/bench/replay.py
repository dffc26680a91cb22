#!/usr/bin/env python3
"""Cost of recording and replaying, variants interleaved in one run, eager and (on a GPU) in CUDA graphs.

    python scripts/bench/replay.py --device cuda --output docs/benchmarks/replay.jsonl      [preset overrides ...]

A JSON line per number of tokens and mode: medians of a step (forward and backward of `--layers` layers) alone,
recording, replaying and comparing, a block a step; of one router alone (gate GEMM, selection, losses), live and
replayed; host bytes a token and layer against the format's arithmetic. Goals on an H200: recording at most 5% of the
step, replay at most 10% of the router. An eager figure is wall time of a few calls in a row, so that the host may run
ahead as it does in training; a graph's is GPU time, with the copy of the recorded ids to the host. The commands' exit
code is 0 whatever the figures say.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from graphs import in_graph  # noqa: E402
from torch import nn  # noqa: E402

from moe_layer import MoELayer, RoutingSession, RoutingTrace, load_config  # noqa: E402
from moe_layer.experts.backend import resolve  # noqa: E402
from moe_layer.ops import _ext  # noqa: E402

CPU_SIZE = ["hidden_size=256", "router.num_experts=32", "router.top_k=4", "experts.intermediate_size=128"]
IN_A_ROW = 5
"""Calls between two readings of the clock; in a graph, calls of the router it holds."""
Cases = dict[str, Callable[[], None]]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, nargs="*", help="default 4096 16384 on CUDA, 2048 on CPU")
    parser.add_argument("--layers", type=int, default=1, help="of the step, one after the other")
    parser.add_argument("--runs", type=int, default=20, help="interleaved runs; the median counts")
    parser.add_argument("--output", type=Path, help="append the rows to this file")
    parser.add_argument("--sha", default="", help="of the sources, where there is no git")
    parser.add_argument("overrides", nargs="*", help="such as hidden_size=1024")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    for tokens in args.tokens or ([4096, 16384] if on_gpu else [2048]):
        for row in measure(args, tokens, on_gpu):
            sys.stdout.write(json.dumps(row) + "\n")
            sys.stdout.flush()
            if args.output is not None:
                with args.output.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    return 0


def measure(args: argparse.Namespace, tokens: int, on_gpu: bool) -> list[dict[str, Any]]:
    """A row for eager mode and, on a GPU, one for graphs."""
    config = load_config(args.preset, [*([] if on_gpu else CPU_SIZE), *args.overrides])
    dtype = torch.bfloat16 if on_gpu else torch.float32
    torch.manual_seed(0)
    model, single = (
        nn.Sequential(*(MoELayer(config, device=args.device, dtype=dtype) for _ in range(count)))
        for count in (args.layers, 1)
    )
    x = torch.randn(tokens, config.hidden_size, device=args.device, dtype=dtype, requires_grad=True)
    parts = [Bench(part, x) for part in (model, single)]
    session, trace, recording = parts[0].session, parts[0].trace, parts[0].recording
    width = config.experts.intermediate_size
    about = {
        "bench": "replay",
        "layers": args.layers,
        "T_D_F_E_K": (tokens, config.hidden_size, width, config.router.num_experts, config.router.top_k),
        "dtype": str(dtype).removeprefix("torch."),
        "experts": resolve(config.experts.backend, session.device, dtype, hidden_size=config.hidden_size, width=width),
        "gpu": torch.cuda.get_device_name() if on_gpu else "none",
        "torch": torch.__version__,
        "extension": _ext.status().sentence(),
        "git": args.sha or _git("rev-parse", "--short", "HEAD"),
        "host_bytes_per_token": recording.host_bytes / tokens / args.layers,
        **_bytes(trace),
    }
    cases = eager_cases(*parts)
    rows = [about | summary("eager", interleaved(cases, args.runs, in_a_row(on_gpu)))]
    if on_gpu:
        graphs, calls = graph_cases(*parts)
        rows.append(about | summary("graph", interleaved(graphs, args.runs, gpu_time, calls)))
    return rows


class Bench:
    """A model with its session and what it recorded of x."""

    def __init__(self, model: nn.Sequential, x: torch.Tensor) -> None:
        self.model, self.x, self.session = model, x, RoutingSession(model)
        with torch.no_grad(), self.session.record() as self.recording:
            model(x)
        self.trace = self.recording.trace()
        self.plan = self.trace.plan(layers=self.session.layers, device=self.session.device)


def eager_cases(whole: Bench, single: Bench) -> Cases:
    x, session, plan = whole.x, whole.session, whole.plan
    upstream = torch.randn_like(x)

    def step() -> None:
        whole.model.zero_grad(set_to_none=True)
        x.grad = None
        whole.model(x).backward(upstream)

    def recorded() -> None:
        with session.record():
            step()

    def replayed() -> None:
        with session.replay(plan):
            step()

    def compared() -> None:
        with session.compare(plan):
            step()

    def router() -> None:
        single.model[0].router(x)

    def router_replayed() -> None:
        with single.session.replay(single.plan):
            single.model[0].router(x)

    return {
        "step": step,
        "step, record": recorded,
        "step, replay": replayed,
        "step, compare": compared,
        "router": router,
        "router, replay": router_replayed,
    }


def graph_cases(whole: Bench, single: Bench) -> tuple[Cases, dict[str, int]]:
    """Launches, and how many calls of the router each holds."""
    eager = eager_cases(whole, single)
    tokens = whole.x.shape[0]
    with whole.session.record(max_tokens=tokens) as recording:
        record = in_graph(eager["step"])

    def recorded() -> None:
        record()
        recording.commit(tokens)

    cases: Cases = {"step": in_graph(eager["step"]), "step, record": recorded}
    for name in ("step, replay", "step, compare"):
        cases[name] = in_graph(eager[name])
    for name in ("router", "router, replay"):
        cases[name] = in_graph(_repeated(eager[name]))
    return cases, {"router": IN_A_ROW, "router, replay": IN_A_ROW}


def _repeated(case: Callable[[], None]) -> Callable[[], None]:
    def several() -> None:
        for _ in range(IN_A_ROW):
            case()

    return several


def in_a_row(on_gpu: bool) -> Callable[[Callable[[], None]], float]:
    """Clock of a case: milliseconds of wall time a call."""

    def clock(case: Callable[[], None]) -> float:
        start = time.perf_counter()
        for _ in range(IN_A_ROW):
            case()
        if on_gpu:
            torch.cuda.synchronize()
        return 1e3 * (time.perf_counter() - start) / IN_A_ROW

    return clock


def gpu_time(case: Callable[[], None]) -> float:
    """Clock of a launch: milliseconds of GPU time."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    case()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def interleaved(
    cases: Cases, runs: int, clock: Callable[[Callable[[], None]], float], calls: dict[str, int] | None = None
) -> dict[str, list[float]]:
    """Milliseconds a call of each case, in turns (there and back: the clock follows the load) after two rounds that do
    not count."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for run in range(runs + 2):
        for name, case in list(cases.items()) if run % 2 else reversed(cases.items()):
            value = clock(case) / (calls or {}).get(name, 1)
            if run >= 2:
                found[name].append(value)
    return found


def summary(mode: str, times: dict[str, list[float]]) -> dict[str, Any]:
    middle = {name: median(values) for name, values in times.items()}
    return {
        "mode": mode,
        "runs": len(times["step"]),
        "ms": {name: round(value, 4) for name, value in middle.items()},
        "spread_ms": {name: [round(min(values), 4), round(max(values), 4)] for name, values in times.items()},
        "record_of_step": round(middle["step, record"] / middle["step"] - 1, 4),
        "replay_of_step": round(middle["step, replay"] / middle["step"] - 1, 4),
        "replay_of_router": round(middle["router, replay"] / middle["router"] - 1, 4),
    }


def _bytes(trace: RoutingTrace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        trace.save(path)
        on_disk = path.stat().st_size / trace.num_tokens
    memory = (trace.ids.nbytes + trace.valid.nbytes) / trace.num_tokens
    return {
        "format_bytes_per_token": trace.spec.bytes_per_token,
        "trace_bytes_per_token": memory,
        "file_bytes_per_token": round(on_disk, 2),
    }


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, cwd=ROOT)
    except OSError:
        return None
    return done.stdout.strip() or None


if __name__ == "__main__":
    sys.exit(main())
