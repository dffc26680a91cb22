#!/usr/bin/env python3
"""Dispatch and combine over several ranks, apart and inside the layer, beside the un-deduplicated NCCL path.

    python scripts/bench/dispatch.py --out docs/benchmarks/dispatch_h200x2.jsonl     # starts its own two ranks
    python scripts/bench/dispatch.py --device cpu --tiny                             # gloo, to see that it runs

Everything is interleaved in one run; times are medians over the samples of the slowest rank. `us` is device time with
the host ahead (no launch costs, but a call that reads from the device pays for its gaps), `host_us` until the call
returns, `GBps` counts deduplicated bytes that leave a rank. `ratio` is the peer's time over ours.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import dispatch_layer  # noqa: E402
import dispatch_routed  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from dispatch_peers import UndedupedDispatcher, dispatch_config  # noqa: E402
from dispatch_timing import Meter, Samples  # noqa: E402
from ranks import start_ranks  # noqa: E402

from moe_layer.dispatch import make_dispatcher  # noqa: E402
from moe_layer.dispatch.formats import format_for  # noqa: E402
from moe_layer.errors import ConfigError  # noqa: E402
from moe_layer.observe.exchange_model import LINK_GBPS, table  # noqa: E402
from moe_layer.parallel import ParallelContext  # noqa: E402
from moe_layer.parallel.compat import default_store, prefixed  # noqa: E402
from moe_layer.types import Routing  # noqa: E402

SHAPES = {  # T of a rank, D, E, K
    "T4096-D7168-E256-K8": (4096, 7168, 256, 8),
    "T4096-D2048-E128-K8": (4096, 2048, 128, 8),
    "T512-D7168-E256-K8": (512, 7168, 256, 8),
    "T512-D2048-E128-K8": (512, 2048, 128, 8),
    "tiny": (64, 256, 8, 2),
}
CASES = {  # what a dispatch delivers
    "expert_major+probs": {"rows": "expert_major"},
    "compact+probs": {"rows": "compact"},
    "fp8 compact": {"rows": "compact", "dispatch_format": "fp8_1x128"},
}
PEER = "permute + NCCL all_to_all_single (splits known) + permute"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--backends",
        default="all_to_all,nvlink,nvlink:static",
        help="comma-separated; `:static` for static capacity, `:static:dense` or `:static:slots` for dispatch.push as "
        "well; those that this version lacks are skipped",
    )
    parser.add_argument("--shapes", nargs="*", choices=sorted(SHAPES), help="for dispatch and combine apart")
    parser.add_argument("--layer-shapes", nargs="*", choices=sorted(dispatch_layer.SHAPES))
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="NCCL, or gloo on this machine")
    parser.add_argument("--tiny", action="store_true", help="one tiny shape each")
    parser.add_argument("--graph", action="store_true", help="capture the layer steps of `:static` backends as well")
    parser.add_argument("--routed", action="store_true", help="also the router and each dispatch behind it (not NCCL)")
    parser.add_argument("--runs", type=int, default=25, help="samples of each case")
    parser.add_argument("--limit", type=float, default=150.0, help="seconds after which every rank is ended")
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines here")
    parser.add_argument("--model", action="store_true", help="measure nothing: bytes and time of R = 2, 4, 8 by counts")
    parser.add_argument("--link-gbps", type=float, default=LINK_GBPS, help="of --model; default: measured on H200s")
    arguments = parser.parse_args()
    if arguments.model:
        return arguments
    if arguments.tiny:
        arguments.shapes, arguments.layer_shapes = ["tiny"], ["tiny"]
    for name, known in (("shapes", SHAPES), ("layer_shapes", dispatch_layer.SHAPES)):
        if getattr(arguments, name) is None:
            setattr(arguments, name, [shape for shape in known if shape != "tiny"])
    if arguments.device == "cuda" and torch.cuda.device_count() < arguments.ranks:
        parser.error(
            f"--ranks is {arguments.ranks} and this machine has {torch.cuda.device_count()} CUDA GPUs; "
            "lower --ranks or pass --device cpu --tiny"
        )
    return arguments


def random_routing(shape: tuple[int, ...], device: torch.device, rank: int) -> Routing:
    """K distinct experts a token, uniformly."""
    tokens, _, experts, top_k = shape
    generator = torch.Generator(device).manual_seed(7 + rank)
    ids = torch.rand(tokens, experts, device=device, generator=generator).topk(top_k).indices
    weights = torch.rand(tokens, top_k, device=device, generator=generator)
    return Routing.from_ids(ids, weights / weights.sum(1, keepdim=True), num_experts=experts)


class Variant:
    """One dispatcher as a pair of calls; every sample dispatches, then combines what arrived."""

    def __init__(self, dispatcher: Any, x: torch.Tensor, routing: Routing, **extra: Any) -> None:
        self.dispatcher, self.x, self.routing, self.extra = dispatcher, x, routing, extra
        self.received = self.dispatch()
        self.rows = torch.randn(self.received.probs_N.shape[0], x.shape[1], device=x.device).to(x.dtype)

    def dispatch(self) -> Any:
        self.received = self.dispatcher.dispatch(self.x, self.routing, **self.extra)
        return self.received

    def combine(self) -> torch.Tensor:
        return self.dispatcher.combine(self.rows, self.received)


def make_variants(
    shape: tuple[int, ...], context: ParallelContext, *, backends: list[str], say: Callable[[str], None]
) -> tuple[dict[str, Variant], dict[str, float]]:
    """Name -> variant, and the deduplicated bytes that leave this rank in each one's dispatch."""
    tokens, hidden, experts, top_k = shape
    device = context.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(tokens, hidden, device=device).to(dtype)
    routing = random_routing(shape, device, context.ep_rank)
    peer = UndedupedDispatcher(context.ep_group, num_experts=experts, top_k=top_k)
    variants = {"nccl": Variant(peer, x, routing, splits=peer.splits(routing))}
    sent_bytes: dict[str, float] = {}
    for backend in backends:
        for case, options in CASES.items():
            try:
                config = dispatch_config(backend, tokens=tokens, **options)
                dispatcher = make_dispatcher(config, num_experts=experts, top_k=top_k, context=context)
            except ConfigError as error:
                say(f"  {backend} {case}: skipped, {str(error).splitlines()[0]}")
                continue
            name = f"{backend} {case}"
            variants[name] = Variant(dispatcher, x, routing)
            remote = variants[name].received.plan.send_counts_R.tolist()
            remote[context.ep_rank] = 0
            per_row = format_for(config, None, hidden=hidden, dtype=dtype).msg_bytes
            sent_bytes[f"{name} dispatch"] = sum(remote) * per_row
            sent_bytes[f"{name} combine"] = sum(remote) * hidden * dtype.itemsize
    return variants, sent_bytes


@torch.no_grad()
def measure_dispatch(
    name: str, context: ParallelContext, meter: Meter, *, backends: list[str], runs: int, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of one shape: dispatch and combine of every variant. Collective."""
    variants, sent_bytes = make_variants(SHAPES[name], context, backends=backends, say=say)
    cases = {f"{variant} {half}": Samples() for variant in variants for half in ("dispatch", "combine")}
    for run in range(runs + 3):
        for ahead in (True, False):
            for key, variant in variants.items():
                for half in ("dispatch", "combine"):
                    into = cases[f"{key} {half}"] if run >= 3 else Samples()
                    meter.sample(getattr(variant, half), into, ahead=ahead)
    times = meter.medians(cases)
    rows = []
    for case, (device_ms, host_ms) in times.items():
        half = case.rsplit(" ", 1)[1]
        peer_ms = times[f"nccl {half}"][0]
        row = {"kind": half, "shape": name, "case": case, "us": round(device_ms * 1e3, 1)}
        row |= {"host_us": round(host_ms * 1e3, 1), "peer": PEER, "peer_us": round(peer_ms * 1e3, 1)}
        if case in sent_bytes:
            row |= {"ratio": round(peer_ms / device_ms, 3), "bytes": int(sent_bytes[case])}
            row["GBps"] = round(sent_bytes[case] / device_ms * 1e-6, 1)
        rows.append(row)
    return rows


def about(device: torch.device, ranks: int) -> dict[str, Any]:
    """Where a row was measured."""
    git = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, cwd=ROOT)
    found: dict[str, Any] = {"ranks": ranks, "torch": torch.__version__, "git": git.stdout.strip() or None}
    if device.type == "cuda":
        nccl = ".".join(map(str, torch.cuda.nccl.version()))
        found |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "nccl": nccl}
    return found | {"command": "python " + " ".join(sys.argv)}


def work(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """One rank."""
    began = time.monotonic()
    device = torch.device("cuda", rank) if arguments.device == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo",
        init_method=rendezvous,
        rank=rank,
        world_size=arguments.ranks,
        timeout=timedelta(seconds=arguments.limit),
    )
    header = about(device, arguments.ranks)
    backends = arguments.backends.split(",")

    def say(text: str) -> None:
        if rank == 0:
            print(text, flush=True)

    def write(rows: list[dict[str, Any]]) -> None:
        for row in rows if rank == 0 else []:
            print("  " + show(row), flush=True)
            if arguments.out is not None:
                arguments.out.parent.mkdir(parents=True, exist_ok=True)
                with arguments.out.open("a") as file:
                    file.write(json.dumps({**header, **row}) + "\n")

    say(json.dumps(header))
    store = prefixed(default_store(), "bench")
    context = ParallelContext(dist.group.WORLD, ep_rank=rank, ep_size=arguments.ranks, device=device, store=store)
    meter = Meter(device, dist.group.WORLD)
    for name in arguments.shapes:
        say(f"{name} ({time.monotonic() - began:.0f} s)")
        write(measure_dispatch(name, context, meter, backends=backends, runs=arguments.runs, say=say))
        if arguments.routed:
            options = {"backends": backends, "cases": CASES, "runs": arguments.runs}
            write(dispatch_routed.measure(name, SHAPES[name], context, meter, **options))  # type: ignore[arg-type]
    for name in arguments.layer_shapes:
        say(f"layer {name} ({time.monotonic() - began:.0f} s)")
        options = {"backends": backends, "runs": arguments.runs, "graph": arguments.graph}
        write(dispatch_layer.measure(name, meter=meter, say=say, **options))  # type: ignore[arg-type]
    say(f"done after {time.monotonic() - began:.0f} s")
    dist.destroy_process_group()


def show(row: dict[str, Any]) -> str:
    if row["kind"] == "layer":
        return (
            f"{row['case']:28s} {row['ms']:9.3f} ms  host {row['host_ms']:8.3f}  NCCL path {row['peer_ms']:9.3f} "
            f"({row['ratio']:.2f}x)  copies {row['copies_ms']:9.3f}  exposed {row['exposed'] * 100:.1f}%"
        )
    if row["kind"] == "routed":
        return f"behind the router: {row['case']:40s} {row['us']:9.1f} us  visible {row['visible_us']:8.1f}"
    tail = f"  {row['ratio']:.2f}x  {row['GBps']:6.1f} GB/s" if "ratio" in row else ""
    return f"{row['case']:40s} {row['us']:9.1f} us  host {row['host_us']:8.1f}{tail}"


def main() -> int:
    arguments = parse_arguments()
    if arguments.model:
        print(table(link_gbps=arguments.link_gbps))
        return 0
    return start_ranks(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
