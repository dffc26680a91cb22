#!/usr/bin/env python3
"""Forward + backward of the layer (router included, one GPU, bf16), variants interleaved in one run.

    python scripts/bench/layer_gpu.py --out docs/benchmarks/layer_h200.jsonl

One JSON line a shape: medians of ours eager and in a CUDA graph, of the same layer over torch's grouped GEMM, the run's
own sum of the six GEMMs and "six GEMMs + two combines at copy speed", host microseconds, launches, saved bytes, peak
memory.
"""

from __future__ import annotations

import argparse
import json
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
from torch import Tensor  # noqa: E402

from moe_layer.config import ExpertsConfig, LossesConfig, MoEConfig, RouterConfig  # noqa: E402
from moe_layer.experts import quack  # noqa: E402
from moe_layer.experts.spec import ExpertsSpec, Layout, RowGradient, Weights, WeightTargets  # noqa: E402
from moe_layer.layer import MoELayer  # noqa: E402
from moe_layer.ops import _ext  # noqa: E402

SHAPES = {  # T, D, F, E, K
    "qwen3-30b-16k": (16384, 2048, 768, 128, 8),
    "qwen3-30b-4k": (4096, 2048, 768, 128, 8),
    "olmoe-16k": (16384, 2048, 1024, 64, 8),
    "30b-n256-32k": (32768, 4096, 256, 256, 16),
    "deepseek-v3-ep8-share": (16384, 7168, 2048, 32, 8),
    "qwen3-next-16k": (16384, 2048, 512, 512, 10),
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), default=list(SHAPES))
    parser.add_argument("--runs", type=int, default=15, help="interleaved runs; the median counts")
    parser.add_argument("--losses", action="store_true", help="with load-balancing and z loss")
    parser.add_argument("--profile", action="store_true", help="print the kernels of one step")
    parser.add_argument("--out", type=Path, default=None)
    return parser.parse_args()


def milliseconds(function: Callable[[], Any]) -> float:
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end)


def make_layer(shape: tuple[int, ...], backend: str, *, losses: bool) -> MoELayer:
    _, hidden, width, experts, top_k = shape
    config = MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        experts=ExpertsConfig(intermediate_size=width, backend=backend),
        losses=LossesConfig(aux="batch", aux_coeff=1e-3, z_coeff=1e-3) if losses else LossesConfig(),
    )
    torch.manual_seed(0)
    return MoELayer(config, device="cuda", dtype=torch.bfloat16)


def make_step(layer: MoELayer, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    def step() -> None:
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        layer(x).backward(upstream)

    return step


def in_graph(step: Callable[[], None]) -> Callable[[], None]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


def six_gemms(layer: MoELayer, x: Tensor, upstream: Tensor) -> Callable[[], None]:
    """The expert MLP alone, on the layer's own routing."""
    with torch.no_grad():
        routing = layer.router(x)
        received = layer.dispatcher.dispatch(x, routing)
    experts = layer.experts
    layout = Layout(
        x=x.detach(),
        index=received.index_N,
        probs=received.probs_N,
        offsets=received.offsets_L1,
        counts=received.counts_L,
        row_CK=received.row_CK,
        ids_CK=received.ids_CK,
    )
    weights = Weights(experts.gate_up_proj.detach(), experts.down_proj.detach(), None, None)
    spec = ExpertsSpec("quack", "swiglu", 7.0, 1.702, True, torch.bfloat16, layer.config.router.num_experts)
    targets = WeightTargets(
        torch.empty_like(weights.gate_up), torch.empty_like(weights.down), None, None, accumulate=(False,) * 4
    )

    def run() -> None:
        _, h = quack.forward(layout, weights, spec)
        quack.backward(RowGradient(upstream, layout.index), h, layout, weights, spec, targets, need_x=True)

    return run


def saved_bytes(layer: MoELayer, x: Tensor) -> int:
    """Bytes that autograd keeps between forward and backward, parameters left out, each storage once."""
    kept: dict[int, int] = {}
    parameters = {p.untyped_storage().data_ptr() for p in layer.parameters()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = layer(x)
    del y
    return sum(kept.values())


def count_launches(step: Callable[[], None], *, show: bool) -> tuple[int, float]:
    """Kernels of one step, and the GPU microseconds of those that are no GEMM of QuACK's."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [e for e in found.key_averages() if e.device_time_total > 0]
    if show:
        for e in sorted(events, key=lambda e: -e.device_time_total)[:30]:
            print(f"    {e.device_time_total:9.1f} us {e.count:3d} x {e.key[:100]}")
    rest = sum(e.device_time_total for e in events if "quack" not in e.key)
    return sum(e.count for e in events), rest


def copy_bandwidth() -> float:
    """Bytes per second, read plus written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 2**30 / (min(milliseconds(lambda: target.copy_(source)) for _ in range(10)) * 1e-3)


def measure(name: str, arguments: argparse.Namespace, bandwidth: float) -> dict[str, Any]:
    shape = SHAPES[name]
    tokens, hidden, _, experts, top_k = shape
    began = time.perf_counter()
    ours = make_layer(shape, "quack", losses=arguments.losses)
    x = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16).requires_grad_()
    upstream = torch.randn(tokens, hidden, device="cuda", dtype=torch.bfloat16)
    step = make_step(ours, x, upstream)
    step()
    torch.cuda.synchronize()
    first_step = time.perf_counter() - began
    variants = {"eager": step, "graph": in_graph(step), "gemms": six_gemms(ours, x, upstream)}
    variants["grouped_mm"] = make_step(make_layer(shape, "grouped_mm", losses=arguments.losses), x, upstream)
    times: dict[str, list[float]] = {variant: [] for variant in variants}
    for run in range(arguments.runs + 3):
        for variant, function in variants.items():
            value = milliseconds(function)
            if run >= 3:
                times[variant].append(value)
    began = time.perf_counter()
    step()
    host = time.perf_counter() - began
    torch.cuda.synchronize()
    launches, glue = count_launches(step, show=arguments.profile)
    kept = saved_bytes(ours, x)
    width = shape[2]
    allowed = 2 * tokens * hidden + 4 * tokens * top_k * width + tokens * experts * 4 + 32 * tokens * top_k
    median = {variant: statistics.median(values) for variant, values in times.items()}
    combines = 2 * (tokens * top_k + tokens) * hidden * 2 / bandwidth * 1e3
    return {
        "shape": name,
        "T_D_F_E_K": shape,
        "losses": arguments.losses,
        "ms": {variant: round(value, 4) for variant, value in median.items()},
        "spread_ms": {variant: [round(min(v), 4), round(max(v), 4)] for variant, v in times.items()},
        "six_gemms_plus_combines_ms": round(median["gemms"] + combines, 4),
        "not_quack_us": round(glue, 1),
        "launches": launches,
        "host_us": round(host * 1e6, 1),
        "saved_bytes": kept,
        "saved_bytes_allowed": allowed,
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "first_step_s": round(first_step, 2),
    }


def main() -> None:
    arguments = parse_arguments()
    bandwidth = copy_bandwidth()
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    about = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "git": git.stdout.strip() or None,
        "library": _ext.status().sentence(),
        "copy_GBps": round(bandwidth * 1e-9),
        "command": "python " + " ".join(sys.argv),
    }
    print(json.dumps(about), flush=True)
    for name in arguments.shapes:
        torch.cuda.reset_peak_memory_stats()
        row = {**about, **measure(name, arguments, bandwidth)}
        shown = ("shape", "ms", "six_gemms_plus_combines_ms", "not_quack_us", "launches", "host_us", "first_step_s")
        print(
            {key: row[key] for key in shown},
            f"saved/allowed {row['saved_bytes'] / row['saved_bytes_allowed']:.3f}",
            flush=True,
        )
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps(row) + "\n")
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
