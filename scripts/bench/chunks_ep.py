#!/usr/bin/env python3
"""`dispatch.chunks` over several GPUs (`backend: nvlink`, static capacity, bf16): time, peak memory, the window.

    torchrun --nproc-per-node 2 scripts/bench/chunks_ep.py --out docs/benchmarks/chunks_h200.jsonl

One JSON line a shape and layout of rows: for each number of parts the median of forward + backward in a CUDA graph
(slowest rank), MiB above what was allocated before the step on rank 0, the window's size, and how far y, dx and the
experts' dW are from those of one part. `--device cpu --shapes tiny` tries the script over gloo.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from dispatch_layer import SHAPES, make_step  # noqa: E402
from dispatch_peers import dispatch_config  # noqa: E402
from dispatch_timing import Meter, Samples  # noqa: E402
from graphs import in_graph  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.distributed.device_mesh import init_device_mesh  # noqa: E402

from moe_layer import MoELayer, parallelize  # noqa: E402
from moe_layer.config import ExpertsConfig, MoEConfig, RouterConfig  # noqa: E402
from moe_layer.experts.parameters import local_part  # noqa: E402


def make_layer(shape: tuple[int, ...], device: torch.device, *, rows: str, chunks: int) -> tuple[MoELayer, Any]:
    tokens, hidden, width, experts, top_k = shape
    dispatch = dispatch_config("nvlink:static", tokens=tokens, rows=rows)
    config = MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        experts=ExpertsConfig(intermediate_size=width),
        dispatch=dataclasses.replace(dispatch, chunks=chunks),
    )
    layer = MoELayer(config, device="meta", dtype=torch.bfloat16 if device.type == "cuda" else torch.float32)
    context = parallelize(layer, init_device_mesh(device.type, (dist.get_world_size(),), mesh_dim_names=("ep",)))
    torch.manual_seed(0)
    layer.to_empty(device=device)
    layer.reset_parameters()
    return layer, context


def memory(layer: MoELayer, x: Tensor, upstream: Tensor) -> dict[str, int]:
    """MiB above what is allocated now: peak of the forward, what it keeps, peak of the step."""
    for tensor in (x, *layer.parameters()):
        tensor.grad = None
    if x.device.type == "cpu":
        return {}
    torch.cuda.synchronize()
    before, found = torch.cuda.memory_allocated(), {}
    torch.cuda.reset_peak_memory_stats()
    y = layer(x)
    found["forward_peak"], found["kept"] = torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    y.backward(upstream)
    found["peak"] = torch.cuda.max_memory_allocated()
    return {name: round((count - before) / 2**20) for name, count in found.items()}


def measure(name: str, rows: str, arguments: argparse.Namespace, meter: Meter) -> dict[str, Any]:
    """Every number of parts in turns. Collective."""
    shape, device = SHAPES[name], meter.device
    generator = torch.Generator(device).manual_seed(1 + dist.get_rank())
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x, upstream = (torch.randn(shape[:2], device=device, generator=generator).to(dtype) for _ in range(2))
    x.requires_grad_()
    steps, found, contexts = {}, {}, []
    want: list[Tensor] = []
    for chunks in arguments.chunks:
        layer, context = make_layer(shape, device, rows=rows, chunks=chunks)
        contexts.append(context)
        step = make_step(layer, layer.dispatcher, x, upstream)
        step()
        with torch.no_grad():
            got = [layer(x), x.grad.clone(), local_part(layer.experts.down_proj.grad).clone()]
        layer.check()
        want = want or got
        differs = {
            part: float((a.float() - b.float()).norm() / b.float().norm())
            for part, a, b in zip(("y", "dx", "dW"), got, want, strict=True)
        }
        window = layer.dispatcher.buffer_bytes(shape[1], dtype)  # type: ignore[attr-defined]
        found[str(chunks)] = {**memory(layer, x, upstream), "window": round(window / 2**20)}
        found[str(chunks)]["difference"] = {part: float(f"{value:.2g}") for part, value in differs.items()}
        steps[str(chunks)] = in_graph(step) if device.type == "cuda" else step
    cases = {case: Samples() for case in steps}
    for _ in range(arguments.runs):
        for case, step in steps.items():
            meter.step(step, cases[case])
    times = meter.medians(cases)
    for context in contexts:
        context.close()
    ms = {case: round(times[case][0], 4) for case in steps}
    about = {
        "shape": name,
        "T_D_F_E_K": shape,
        "ranks": dist.get_world_size(),
        "backend": "nvlink, static",
        "rows": rows,
    }
    return {**about, "ms": ms, "MiB": found}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=["qwen3-30b-16k"])
    parser.add_argument("--rows", nargs="*", choices=["expert_major", "compact"], default=["expert_major", "compact"])
    parser.add_argument("--chunks", nargs="*", type=int, default=[1, 2, 4])
    parser.add_argument("--runs", type=int, default=9, help="interleaved runs; the median counts")
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines here")
    arguments = parser.parse_args()
    dist.init_process_group("nccl" if arguments.device == "cuda" else "gloo")
    rank = dist.get_rank()
    device = torch.device("cuda", rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    about = {"date": time.strftime("%Y-%m-%d"), "torch": torch.__version__, "git": git.stdout.strip() or None}
    about |= {"gpu": torch.cuda.get_device_name()} if device.type == "cuda" else {}
    about["command"] = "torchrun " + " ".join(sys.argv)
    meter = Meter(device, dist.group.WORLD)
    for name in arguments.shapes:
        for rows in arguments.rows:
            row = measure(name, rows, arguments, meter)
            if rank == 0:
                print(json.dumps(row), flush=True)
                if arguments.out is not None:
                    with arguments.out.open("a") as file:
                        file.write(json.dumps({**about, **row}) + "\n")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
