#!/usr/bin/env python3
"""Host microseconds of one eager forward + backward of the layer: by stage, by call, by Python function.

    python scripts/bench/host.py                      # one GPU: step, stages, what single calls cost
    python scripts/bench/host.py --ranks 2            # expert parallel over nvlink, dropless and static
    python scripts/bench/host.py --profile 45         # and cProfile's list, backward on the calling thread

The device is idle when a step begins and is not waited for, so a figure is the host's alone, except where the call
itself reads from the device (dropless dispatch over several ranks). Medians over `--runs`; the first rank reports.
`one_thread`: backward on the calling thread (torch.autograd.set_multithreading_enabled(False)).
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import pstats
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(os.environ.get("MOE_TREE", Path(__file__).resolve().parents[2]))
sys.path[:0] = [str(ROOT), str(Path(__file__).resolve().parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from dispatch_layer import SHAPES, make_layer, make_step  # noqa: E402
from dispatch_peers import dispatch_config  # noqa: E402
from ranks import start_ranks  # noqa: E402

import moe_layer  # noqa: E402
from moe_layer import MoELayer  # noqa: E402
from moe_layer.config import ExpertsConfig, LossesConfig, MoEConfig, RouterConfig  # noqa: E402
from moe_layer.dispatch import local, make_dispatcher, nvlink_call  # noqa: E402
from moe_layer.dispatch.arrange import GatherProbs  # noqa: E402
from moe_layer.experts.autograd import ExpertsFunction  # noqa: E402
from moe_layer.ops import attach_losses, fan_out, gate, route_topk  # noqa: E402

Step = Callable[[], Any]
FUNCTIONS = {
    "gate": gate._Fp32OutLinear,
    "route": route_topk._EagerDoor,
    "attach": attach_losses._EagerDoor,
    "probs": GatherProbs,
    "experts": ExpertsFunction,
    "fan_out": fan_out._FanOut,
    "sum": local._Sum,
    "dispatch send": nvlink_call.DispatchSend,
    "dispatch recv": nvlink_call.DispatchRecv,
    "combine send": nvlink_call.CombineSend,
    "combine recv": nvlink_call.CombineRecv,
}


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=sorted(SHAPES), default="qwen3-30b-4k")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--losses", action="store_true", help="with load-balancing and z loss (one rank)")
    parser.add_argument("--runs", type=int, default=40)
    parser.add_argument("--calls", action="store_true", help="what single calls cost (one rank)")
    parser.add_argument("--profile", type=int, default=0, help="lines of cProfile's list")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which every rank is ended")
    parser.add_argument("--label", default="", help="kept in the row")
    parser.add_argument("--out", type=Path, default=None, help="append JSON lines here")
    return parser.parse_args()


class Stages:
    """Wraps functions so that each adds its microseconds to a dictionary; a call inside a call counts in both."""

    def __init__(self) -> None:
        self.us: dict[str, float] = {}
        self._undo: list[tuple[Any, str, Any]] = []

    def watch(self, owner: Any, attribute: str, name: str) -> None:
        real = getattr(owner, attribute)

        def call(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            result = real(*args, **options)
            self.us[name] = self.us.get(name, 0.0) + (time.perf_counter() - began) * 1e6
            return result

        static = isinstance(owner, type)
        self._undo.append((owner, attribute, staticmethod(real) if static else real))
        setattr(owner, attribute, staticmethod(call) if static else call)

    def release(self) -> None:
        for owner, attribute, real in self._undo:
            setattr(owner, attribute, real)


def stages_of(layer: MoELayer, x: torch.Tensor, upstream: torch.Tensor, runs: int) -> dict[str, float]:
    """Median microseconds: the whole step without wrappers, then its two halves and the parts of each."""
    step = make_step(layer, layer.dispatcher, x, upstream)
    plain, found = [], []
    for _ in range(runs):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        plain.append((time.perf_counter() - began) * 1e6)
    watch = Stages()
    watch.watch(layer.router, "forward", "forward router")
    watch.watch(layer.dispatcher, "dispatch", "forward dispatch")
    watch.watch(layer.experts, "forward", "forward experts")
    watch.watch(layer.dispatcher, "combine", "forward combine")
    for name, function in FUNCTIONS.items():
        watch.watch(function, "backward", f"backward {name}")
    for _ in range(runs):
        for parameter in layer.parameters():
            parameter.grad = None
        x.grad = None
        torch.cuda.synchronize()
        watch.us = {}
        began = time.perf_counter()
        y = layer(x)
        middle = time.perf_counter()
        y.backward(upstream)
        end = time.perf_counter()
        found.append({"forward": (middle - began) * 1e6, "backward": (end - middle) * 1e6, **watch.us})
    watch.release()
    torch.cuda.synchronize()
    median = {"step": statistics.median(plain)}
    return {k: round(v, 1) for k, v in (median | {k: statistics.median(f[k] for f in found) for k in found[0]}).items()}


def step_ms(step: Step, runs: int, steps: int = 3) -> float:
    """Median of a step among `steps` in a row from an idle device."""
    values = []
    for _ in range(runs):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize()
        start.record()
        for _ in range(steps):
            step()
        end.record()
        end.synchronize()
        values.append(start.elapsed_time(end) / steps)
    return round(statistics.median(values), 4)


def profile(step: Step, lines: int, runs: int = 40) -> str:
    torch.autograd.set_multithreading_enabled(False)
    profiler = cProfile.Profile()
    profiler.enable()
    for _ in range(runs):
        step()
    profiler.disable()
    torch.autograd.set_multithreading_enabled(True)
    torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(lines)
    return text.getvalue()


def price(call: Step, n: int = 60) -> float:
    """Host microseconds of a call, the queue never full: the best of eight rounds."""
    best = float("inf")
    for _ in range(8):
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(n):
            call()
        best = min(best, (time.perf_counter() - began) / n * 1e6)
    torch.cuda.synchronize()
    return round(best, 2)


class _Identity(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return gradient


def prices(layer: MoELayer, x: torch.Tensor, upstream: torch.Tensor) -> dict[str, float]:
    """What single calls cost the host."""
    from moe_layer.ops.gather_rows import gather_rows
    from moe_layer.ops.tree_reduce import tree_reduce

    device = x.device
    with torch.no_grad():
        routing = layer.router(x)
        received = layer.dispatcher.dispatch(x, routing)
        rows = layer.experts(received)
        logits = layer.router.logits(x)
    small, event = torch.zeros(8, device=device), torch.cuda.Event()
    side, here = torch.cuda.Stream(), torch.cuda.current_stream()
    leaf = torch.zeros(8, device=device, requires_grad=True)
    column = routing.weights_TK.reshape(-1, 1)
    index, row_CK, ids_CK = received.index_N, received.row_CK, received.ids_CK

    def stream_context() -> None:
        with torch.cuda.stream(side):
            pass

    def set_streams() -> None:
        torch.cuda.set_stream(side)
        torch.cuda.set_stream(here)

    def tree() -> Any:
        experts = layer.config.router.num_experts
        return tree_reduce(rows, row_CK, ids_MK=ids_CK, num_experts=experts, blocks=8, like_rows=True)

    k = layer.config.router.top_k
    calls: dict[str, Step] = {
        "torch.empty": lambda: torch.empty(8, device=device),
        "new_empty": lambda: x.new_empty(8, 8),
        "new_empty 64 MB": lambda: x.new_empty(16384, 2048),
        "small.add_ (a launch)": lambda: small.add_(1.0),
        "mm gate": lambda: torch.mm(x.detach(), layer.router.weight.detach().t(), out_dtype=torch.float32),
        "current_stream": torch.cuda.current_stream,
        "with torch.cuda.stream": stream_context,
        "set_stream twice": set_streams,
        "event record + wait": lambda: (event.record(here), side.wait_event(event)),
        "new event record": lambda: torch.cuda.Event().record(here),
        "record_stream": lambda: small.record_stream(side),
        "torch.tensor 21 ints": lambda: torch.tensor(list(range(21)), dtype=torch.int64),
        "tolist of 10 (synchronises)": lambda: small.tolist(),
        "Function forward": lambda: _Identity.apply(leaf),
        "Function forward + backward": lambda: _Identity.apply(leaf).backward(small),
        "clone forward + backward": lambda: leaf.clone().backward(small),
        "route_topk op": lambda: route_topk.route_topk(logits.detach(), top_k=k),
        "router module, no grad": lambda: layer.router(x.detach()),
        "dispatch, no grad": lambda: layer.dispatcher.dispatch(x.detach(), routing),
        "gather_rows of a column": lambda: gather_rows(column.detach(), index),
        "tree_reduce": tree,
    }
    with torch.no_grad():
        quiet = {name: call for name, call in calls.items() if "backward" not in name and "forward" not in name}
        found = {name: price(call) for name, call in quiet.items()}
        found["experts forward"] = price(lambda: layer.experts(received), 12)
    found["layer forward, again and again"] = price(lambda: layer(x), 8)
    return found | {name: price(call) for name, call in calls.items() if name not in quiet}


def one_rank_layer(shape: tuple[int, ...], losses: bool) -> MoELayer:
    _, hidden, width, experts, top_k = shape
    config = MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        experts=ExpertsConfig(intermediate_size=width),
        losses=LossesConfig(aux="batch", aux_coeff=1e-3, z_coeff=1e-3) if losses else LossesConfig(),
    )
    torch.manual_seed(0)
    return MoELayer(config, device="cuda", dtype=torch.bfloat16)


def work(rank: int, arguments: argparse.Namespace, rendezvous: str) -> None:
    """One rank (or the only one)."""
    shape, device, ranks = SHAPES[arguments.shape], torch.device("cuda", rank), arguments.ranks
    torch.cuda.set_device(device)
    about = {"label": arguments.label, "ranks": ranks, "shape": arguments.shape, "gpu": torch.cuda.get_device_name()}
    about |= {"torch": torch.__version__, "tree": str(Path(moe_layer.__file__).parents[1])}
    if ranks == 1:
        layer, context = one_rank_layer(shape, arguments.losses), None
        backends = {"local": layer.dispatcher}
    else:
        dist.init_process_group("nccl", init_method=rendezvous, rank=rank, world_size=ranks)
        layer, context = make_layer(shape, device, ranks)
        options: dict[str, Any] = {"num_experts": shape[3], "top_k": shape[4], "context": context}
        backends = {
            name: make_dispatcher(dispatch_config(name, tokens=shape[0], rows="compact"), **options)
            for name in ("nvlink", "nvlink:static")
        }
    x, upstream = (torch.randn(shape[0], shape[1], device=device).bfloat16() for _ in range(2))
    x.requires_grad_()
    for name, dispatcher in backends.items():
        layer.dispatcher = dispatcher
        step = make_step(layer, dispatcher, x, upstream)
        for _ in range(5):
            step()
        row: dict[str, Any] = {**about, "backend": name}
        for threads, enabled in (("", True), ("_one_thread", False)):
            with torch.autograd.set_multithreading_enabled(enabled):
                row["ms" + threads] = step_ms(step, arguments.runs // 2)
                row["host_us" + threads] = stages_of(layer, x, upstream, arguments.runs)
        if arguments.calls and ranks == 1:
            row["call_us"] = prices(layer, x, upstream)
        report = profile(step, arguments.profile) if arguments.profile else ""
        if rank == 0:
            print(json.dumps(row), flush=True)
            print(report, end="")
            if arguments.out is not None:
                with arguments.out.open("a") as file:
                    file.write(json.dumps(row) + "\n")
    if context is not None:
        dist.barrier()
        context.close()
        dist.destroy_process_group()


def main() -> int:
    arguments = parse_arguments()
    if arguments.ranks == 1:
        work(0, arguments, "")
        return 0
    return start_ranks(work, arguments)


if __name__ == "__main__":
    sys.exit(main())
