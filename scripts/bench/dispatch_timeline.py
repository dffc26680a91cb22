#!/usr/bin/env python3
"""Every kernel of one nvlink dispatch and one combine on two GPUs, and both against `sm_budget`.

    python scripts/bench/dispatch_timeline.py --out docs/benchmarks/dispatch_timeline_h200x2.jsonl

Static capacity, medians. `times` are the slower rank's, on the device with the host ahead and until the call returned
(`host`); `kernel` rows are rank 0's, where `start_us` counts from the first kernel of the profiled pair of calls.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
import torch.multiprocessing as mp  # noqa: E402
from dispatch import SHAPES, about, random_routing  # noqa: E402
from dispatch_timing import Meter, Samples  # noqa: E402

from moe_layer.config.model import DispatchConfig  # noqa: E402
from moe_layer.dispatch import make_dispatcher  # noqa: E402
from moe_layer.parallel import ParallelContext  # noqa: E402
from moe_layer.parallel.compat import default_store, prefixed  # noqa: E402
from moe_layer.types import Routing  # noqa: E402

CASES = [(form, rows) for form in ("input", "fp8_1x128") for rows in ("expert_major", "compact")]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="T4096-D7168-E256-K8")
    parser.add_argument("--budgets", type=int, nargs="*", default=[8, 32, 128], help="sm_budget beside the default")
    parser.add_argument("--push", choices=("slots", "dense"), default="slots")
    parser.add_argument("--runs", type=int, default=10)
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines here")
    arguments = parser.parse_args()
    if torch.cuda.device_count() < 2:
        parser.error(f"two CUDA GPUs are needed, this machine has {torch.cuda.device_count()}")
    return arguments


def both(
    meter: Meter,
    dispatcher: Any,
    x: torch.Tensor,
    routing: Routing,
    out: torch.Tensor,
    *,
    into: dict[str, Samples],
    ahead: bool,
) -> None:
    """One dispatch, then one combine."""
    received = meter.sample(lambda: dispatcher.dispatch(x, routing), into["dispatch"], ahead=ahead)
    meter.sample(lambda: dispatcher.combine(out, received), into["combine"], ahead=ahead)


def kernels(call: Any) -> list[dict[str, Any]]:
    """What the GPU ran during `call`, from the profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = [e for e in events if e.get("cat") in ("kernel", "gpu_memcpy", "gpu_memset")]
    events = [e for e in events if "nccl" not in e["name"] and "spin_kernel" not in e["name"]]
    return sorted(events, key=lambda e: e["ts"])


@torch.no_grad()
def measure(arguments: argparse.Namespace, context: ParallelContext, meter: Meter) -> Iterator[dict[str, Any]]:
    """The rows of all cases. Collective."""
    shape = SHAPES[arguments.shape]
    tokens, hidden, experts, top_k = shape
    x = torch.randn(tokens, hidden, device=context.device).to(torch.bfloat16)
    routing = random_routing(shape, context.device, context.ep_rank)
    for form, rows in CASES:
        for budget in (None, *(arguments.budgets if form == "input" else [])):
            config = DispatchConfig(
                backend="nvlink",
                capacity="static",
                static_factor=1.25,
                max_tokens_per_rank=tokens,
                rows=rows,  # type: ignore[arg-type]
                dispatch_format=form,  # type: ignore[arg-type]
                sm_budget=budget,
                push=arguments.push,
            )
            dispatcher = make_dispatcher(config, num_experts=experts, top_k=top_k, context=context)
            received = dispatcher.dispatch(x, routing)
            out = torch.randn(received.probs_N.shape[0], hidden, device=x.device).to(x.dtype)
            cases = {"dispatch": Samples(), "combine": Samples()}
            for run in range(2 * (arguments.runs + 3)):
                into = cases if run >= 6 else {name: Samples() for name in cases}
                both(meter, dispatcher, x, routing, out, into=into, ahead=run % 2 == 0)
            dispatcher.check()
            times = {}
            for name, (device_ms, host_ms) in meter.medians(cases).items():
                times |= {f"{name}_us": round(device_ms * 1e3, 1), f"{name}_host_us": round(host_ms * 1e3, 1)}
            what = {"dispatch_format": form, "rows": rows}
            yield {"what": "times", **what, "sm_budget": budget, **times}
            if budget is not None:
                continue
            call = partial(both, meter, dispatcher, x, routing, out, into=cases, ahead=True)
            kernels(call)  # the profiler's first use is slow
            events = kernels(call)
            for event in events:
                row = {"start_us": round(event["ts"] - events[0]["ts"], 1), "us": round(event["dur"], 1)}
                yield {"what": "kernel", **what, **row, "stream": event["args"].get("stream"), "name": event["name"]}


def work(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """One rank."""
    torch.cuda.set_device(rank)
    device = torch.device("cuda", rank)
    dist.init_process_group("nccl", init_method=rendezvous, rank=rank, world_size=2)
    store = prefixed(default_store(), "bench")
    context = ParallelContext(dist.group.WORLD, ep_rank=rank, ep_size=2, device=device, store=store)
    header = {"bench": "dispatch_timeline", "shape": arguments.shape, "push": arguments.push, **about(device, 2)}
    header["date"] = date.today().isoformat()
    for row in measure(arguments, context, Meter(device, dist.group.WORLD)):
        if rank != 0:
            continue
        name = row.get("name", "")[:70]
        print(" ".join(f"{value}" for key, value in row.items() if key != "name"), name, flush=True)
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            with arguments.out.open("a") as file:
                file.write(json.dumps({**header, **row}) + "\n")
    context.close()
    dist.destroy_process_group()


def main() -> int:
    arguments = parse_arguments()
    with tempfile.TemporaryDirectory() as folder:
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")
        mp.spawn(work, args=(arguments, f"file://{folder}/store"), nprocs=2)
    return 0


if __name__ == "__main__":
    sys.exit(main())
