"""GPU time of the whole router after the gate GEMM, forward and backward, beside a peer.

Every variant is captured in a CUDA graph of several calls over different logits (together larger than the L2 unless
--warm) and the graphs are replayed in turn; the median time of a call is reported with the copy ceiling measured in the
same run. `replay cost` is the forward with forced ids, those of the same logits, over the live one (--replay adds ids
with missing slots, ids of which a tenth of the rows differ by one expert, and random ones), `record cost` the ids in an
int16 buffer too; `gate GEMM` is the product in front, with --hidden columns. A peer that does not import is replaced by
the eager and the compiled reference. Rows go to docs/benchmarks/router.jsonl (--output) with GPU, versions, git sha and
shape.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moe_layer.ops import _ext
from moe_layer.ops import batch_losses as losses_module
from moe_layer.ops import route_topk as module
from moe_layer.ops import route_topk_bwd as backward_module
from moe_layer.ops.route_topk import RouteTopk, route_topk

ROOT = Path(__file__).resolve().parents[2]
DEEPSEEK = {"score_function": "sigmoid", "num_groups": 8, "group_topk": 4, "scaling_factor": 2.5}


class Shape(NamedTuple):
    tokens: int
    experts: int
    top_k: int
    options: dict[str, Any]
    bias: bool = False


SHAPES = {
    "e8-k2": Shape(16384, 8, 2, {}),
    "e64-k8": Shape(16384, 64, 8, {}),
    "e128-k8": Shape(16384, 128, 8, {}),
    "e256-k8-grouped": Shape(16384, 256, 8, DEEPSEEK, True),
    "e384-k8": Shape(16384, 384, 8, {}),
    "e512-k10": Shape(16384, 512, 10, {}),
    "e256-k16": Shape(32768, 256, 16, {}),
    "e8-k2-t4096": Shape(4096, 8, 2, {}),
    "e128-k8-t4096": Shape(4096, 128, 8, {}),
    "e256-k8-grouped-t4096": Shape(4096, 256, 8, DEEPSEEK, True),
    "e512-k10-t4096": Shape(4096, 512, 10, {}),
}
LOSSES = {"aux_counts": "live", "want_z": True}
GOALS = {"e128-k8": 12.0, "e256-k8-grouped": 15.0, "e512-k10": 25.0}
BACKWARD_OPTIONS = ("score_function", "softmax_order", "renormalize", "scaling_factor", "weights_mode")
DEFAULTS = {
    "score_function": "softmax", "softmax_order": "post", "renormalize": True, "scaling_factor": 1.0, "num_groups": 0,
    "group_topk": 0, "group_rule": "sum_top2", "weights_mode": "live", "aux_counts": "none", "want_z": False,
    "want_probs": False, "want_scores": False, "map_format": "none",
    "want_losses": False, "aux_coeff": 1.0, "z_coeff": 1.0,
}  # fmt: skip


class Inputs(NamedTuple):
    logits: list[Tensor]
    bias: Tensor | None
    ids: list[Tensor]
    d_weights: Tensor
    d_score_sum: Tensor
    d_z: Tensor


def make_inputs(shape: Shape, dtype: torch.dtype, warm: bool) -> Inputs:
    size = shape.tokens * shape.experts * dtype.itemsize
    sets = 1 if warm else max(2, min(16, (160 << 20) // size))
    logits = [torch.randn(shape.tokens, shape.experts, device="cuda").to(dtype) for _ in range(sets)]
    bias = torch.randn(shape.experts, device="cuda") * 0.1 if shape.bias else None
    ids = [route_topk(x, bias, top_k=shape.top_k, **shape.options).ids for x in logits]
    d_weights = torch.randn(shape.tokens, shape.top_k, device="cuda")
    return Inputs(
        logits, bias, ids, d_weights, torch.randn(1, shape.experts, device="cuda"), torch.randn(1, device="cuda")
    )


def capture(call: Callable[[int], Any], calls: int) -> torch.cuda.CUDAGraph:
    """A graph of `calls` calls; the same calls run twice before, so that caches and lazily loaded kernels are warm."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(2):
            for index in range(calls):
                call(index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for index in range(calls):
            call(index)
    return graph


def sm_clock() -> int:
    """MHz of the SMs, from a kernel that spins for a number of cycles. The clock decides these times: report it."""
    cycles = 20_000_000
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    start.record()
    torch.cuda._sleep(cycles)
    end.record()
    end.synchronize()
    return round(cycles / start.elapsed_time(end) / 1e3)


def medians(graphs: dict[str, tuple[torch.cuda.CUDAGraph, int]], rounds: int) -> dict[str, float]:
    """Microseconds of one call of each variant, the variants interleaved.

    The host waits once a round and not after every graph: between graphs that the host waits for the device idles. The
    device sleeps first, so that a host that is busy with other work still runs ahead of it.
    """
    times: dict[str, list[float]] = {name: [] for name in graphs}
    for index in range(rounds + 3):
        marks = {}
        torch.cuda._sleep(4_000_000)
        for name, (graph, _) in graphs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            graph.replay()
            end.record()
            marks[name] = (start, end)
        torch.cuda.synchronize()
        for name, (start, end) in marks.items():
            if index >= 3:
                times[name].append(start.elapsed_time(end) * 1e3 / graphs[name][1])
    return {name: statistics.median(values) for name, values in times.items()}


def host_microseconds(call: Callable[[int], Any], calls: int = 200) -> float:
    torch.cuda.synchronize()
    start = time.perf_counter()
    for index in range(calls):
        call(index)
    spent = (time.perf_counter() - start) / calls * 1e6
    torch.cuda.synchronize()
    return spent


def warm_up(seconds: float = 1.0) -> None:
    """Matrix products until the clocks are up: an idle H200 stands at 345 MHz and would be measured there."""
    a = torch.randn(4096, 4096, device="cuda", dtype=torch.bfloat16)
    start = time.perf_counter()
    while time.perf_counter() - start < seconds:
        for _ in range(10):
            torch.mm(a, a)
        torch.cuda.synchronize()


def copy_ceiling() -> float:
    """GB/s of a kernel that reads 1 GiB and writes 1 GiB.

    Not `copy_`: in a graph it becomes a memory-copy node, which moved 2744 GB/s where this kernel moves 4250 (H200).
    """
    source = torch.empty(1 << 28, device="cuda").normal_()
    target = torch.empty_like(source)
    graph = capture(lambda _: torch.neg(source, out=target), 5)
    micro = medians({"copy": (graph, 5)}, 10)["copy"]
    return 2 * source.numel() * 4 / micro / 1e3


def gate(shape: Shape, hidden: int) -> Callable[[int], Any]:
    """The GEMM that produces bf16 logits; not part of the router's time."""
    x = torch.randn(shape.tokens, hidden, device="cuda", dtype=torch.bfloat16)
    weight = torch.randn(shape.experts, hidden, device="cuda", dtype=torch.bfloat16)
    return lambda _: torch.nn.functional.linear(x, weight)


def another_last(shape: Shape, inputs: Inputs, index: int, share: float) -> Tensor:
    """The live ids, but for a share of the rows the best expert that was not chosen in the last slot."""
    x, ids = inputs.logits[index], inputs.ids[index]
    more = route_topk(x, inputs.bias, top_k=shape.top_k + 1, **shape.options).ids
    other = torch.cat([ids[:, :-1], more[:, -1:]], dim=1)
    return torch.where(torch.rand(shape.tokens, 1, device="cuda") < share, other, ids)


def variants(shape: Shape, inputs: Inputs, replay: bool) -> dict[str, Callable[[int], Any]]:
    """Ours: forward with everything, its parts, recorded and replayed, and backward."""
    count = len(inputs.logits)
    buffer = torch.empty(shape.tokens, shape.top_k, dtype=torch.int16, device="cuda")
    holes = [ids.masked_fill(torch.rand_like(ids, dtype=torch.float32) < 0.01, -1) for ids in inputs.ids]
    others = torch.rand(shape.tokens, shape.experts, device="cuda").argsort(dim=1)[:, : shape.top_k].int()
    near = [another_last(shape, inputs, index, 0.1) for index in range(count)] if replay else []

    def forward(index: int, **more: Any) -> RouteTopk:
        return route_topk(inputs.logits[index % count], inputs.bias, top_k=shape.top_k, **shape.options, **more)

    grads = (inputs.d_weights, inputs.d_score_sum, inputs.d_z, None, None)
    options = {name: (DEFAULTS | shape.options)[name] for name in BACKWARD_OPTIONS}

    def backward(index: int, given: tuple[Tensor | None, ...] = grads) -> Tensor:
        at = index % count
        return torch.ops.moe_layer.route_topk_bwd(*given, inputs.logits[at], inputs.ids[at], None, None, **options)

    def whole(index: int, **more: Any) -> RouteTopk:
        """Weights, ids, counts and the finished losses: the router's part of a training step."""
        return forward(index, loss_coeffs=(1.0, 1.0), **(LOSSES | more))

    def replayed(index: int, ids: list[Tensor] = inputs.ids, **more: Any) -> RouteTopk:
        return whole(index, replay_ids=ids[index % count], **more)

    calls = {
        "forward": whole,
        "forward, sums only": lambda i: forward(i, **LOSSES),
        "forward, no losses": forward,
        "forward, effective": lambda i: forward(i, aux_counts="effective", want_z=True),
        "replayed": replayed,
        "recorded": lambda i: whole(i, id_buffer=buffer),
        "backward": backward,
        "backward, weights only": lambda i: backward(i, (inputs.d_weights, None, None, None, None)),
    }
    if replay:
        calls["replayed, 1% missing"] = lambda i: replayed(i, holes)
        calls["replayed, 10% of rows differ"] = lambda i: replayed(i, near)
        calls["replayed, random ids"] = lambda i: replayed(i, [others] * count)
        calls["replayed, effective"] = lambda i: replayed(i, aux_counts="effective")
    return calls


def peer_reference(shape: Shape, inputs: Inputs, compiled: bool) -> dict[str, Callable[[int], Any]]:
    given = DEFAULTS | shape.options | LOSSES | {"top_k": shape.top_k}
    forward_body, backward_body = module._op._init_fn, backward_module._op._init_fn
    options = {name: given[name] for name in BACKWARD_OPTIONS}
    count = len(inputs.logits)
    grads = (inputs.d_weights, inputs.d_score_sum, inputs.d_z, None, None)

    def forward(x: Tensor) -> Any:
        out = RouteTopk(*forward_body(x, inputs.bias, None, None, None, None, **given))
        sums = (out.counts, out.aux_counts, out.score_sum, out.z_sum)
        return out, losses_module._op._init_fn(*sums, top_k=shape.top_k, aux_coeff=1.0, z_coeff=1.0)

    def backward(x: Tensor, ids: Tensor) -> Any:
        return backward_body(*grads, x, ids, None, None, **options)

    if compiled:
        forward, backward = torch.compile(forward), torch.compile(backward)
    return {
        "forward": lambda i: forward(inputs.logits[i % count]),
        "backward": lambda i: backward(inputs.logits[i % count], inputs.ids[i % count]),
    }


def peer_te(shape: Shape, inputs: Inputs) -> dict[str, Callable[[int], Any]]:
    """TransformerEngine's three calls, dense indices; forward, and forward plus backward minus forward."""
    from transformer_engine.pytorch import router as te

    count, score = len(inputs.logits), shape.options.get("score_function", "softmax")
    leaves = [x.detach().requires_grad_() for x in inputs.logits]
    indices = torch.empty(shape.tokens, shape.top_k, dtype=torch.int32, device="cuda")
    groups = (shape.options.get("num_groups") or None, shape.options.get("group_topk") or None)
    scale = shape.options.get("scaling_factor")

    def forward(index: int) -> tuple[Tensor, Tensor]:
        x = leaves[index % count]
        probs, _ = te.fused_topk_with_score_function(
            x, shape.top_k, False, *groups, scale, score, inputs.bias, topk_indices=indices
        )
        routing_map, scores = te.fused_compute_score_for_moe_aux_loss(x, shape.top_k, score)
        counts = routing_map.sum(dim=0)
        return probs, te.fused_moe_aux_loss(scores, counts, shape.tokens, shape.experts, shape.top_k, 1e-2)

    d_probs = torch.randn(shape.tokens, shape.experts, device="cuda").to(inputs.logits[0].dtype)

    def both(index: int) -> None:
        probs, loss = forward(index)
        torch.autograd.grad([probs, loss], leaves[index % count], [d_probs, torch.ones_like(loss)])

    return {"forward": forward, "forward+backward": both}


def provenance() -> dict[str, Any]:
    def git(*words: str) -> str:
        return subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True).stdout.strip()

    return {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "cuda": torch.version.cuda,
        "git": git("rev-parse", "--short", "HEAD") or "unknown",
        "dirty": bool(git("status", "--porcelain", "--untracked-files=no")),
        "extension": _ext.status().info.get("sources", _ext.status().reason),
    }  # fmt: skip


def bench(name: str, dtype: torch.dtype, args: argparse.Namespace, ceiling: float) -> dict[str, Any]:
    shape = SHAPES[name]
    inputs = make_inputs(shape, dtype, args.warm)
    sets = len(inputs.logits)
    calls = {f"ours {key}": call for key, call in variants(shape, inputs, args.replay).items()}
    if dtype == torch.bfloat16:
        calls["gate GEMM"] = gate(shape, args.hidden)
    for peer in args.peers:
        found = peer_te(shape, inputs) if peer == "te" else peer_reference(shape, inputs, peer == "compile")
        calls |= {f"{peer} {key}": call for key, call in found.items()}
    host = host_microseconds(calls["ours forward"])
    per_graph = max(sets, 8)
    times = medians({key: (capture(call, per_graph), per_graph) for key, call in calls.items()}, args.rounds)
    if "te forward+backward" in times:
        times["te backward"] = times["te forward+backward"] - times["te forward"]
    forward = times["ours forward"]
    moved = shape.tokens * (shape.experts * dtype.itemsize + shape.top_k * 8)
    row = {
        "bench": "router",
        "shape": name,
        "dtype": str(dtype).removeprefix("torch."),
        **shape._asdict(),
        "bias": shape.bias,
    }
    row |= {"microseconds": {key: round(value, 2) for key, value in times.items()}, "host_microseconds": round(host, 1)}
    row |= {
        "replay_cost_percent": round(100 * (times["ours replayed"] / forward - 1), 1),
        "record_cost_percent": round(100 * (times["ours recorded"] / forward - 1), 1),
        "gb_per_s": round(moved / forward / 1e3),
        "copy_gb_per_s": round(ceiling),
        "sm_mhz": sm_clock(),
        "goal_forward": GOALS.get(name),
    }
    if "te" in args.peers:
        row["transformer_engine"] = importlib.metadata.version("transformer-engine")
        row["backward_over_te"] = round(times["ours backward"] / times["te backward"], 3)
    return row | {"warm_l2": args.warm} | provenance()


def peers(wanted: str) -> list[str]:
    """The peers to run: what was asked for, or the reference if TransformerEngine is not there."""
    if wanted != "te":
        return [] if wanted == "none" else [wanted]
    try:
        import transformer_engine.pytorch.router  # noqa: F401
    except ImportError as error:
        print(f"transformer_engine does not import ({error}); the eager and the compiled reference run instead")
        return ["reference", "compile"]
    return ["te"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peer", choices=("none", "te", "reference", "compile"), default="none")
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--dtypes", default="bfloat16,float32")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--replay", action="store_true", help="also replay with missing slots and without live counts")
    parser.add_argument("--hidden", type=int, default=2048, help="columns of the gate GEMM")
    parser.add_argument("--warm", action="store_true", help="one set of logits, which stays in the L2")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/router.jsonl")
    args = parser.parse_args()
    args.peers = peers(args.peer)
    print(_ext.status().sentence())
    warm_up()
    ceiling = copy_ceiling()
    print(f"{torch.cuda.get_device_name()}, copy ceiling {ceiling:.0f} GB/s, SM clock {sm_clock()} MHz")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    for name in args.shapes.split(","):
        for dtype in args.dtypes.split(","):
            try:
                row = bench(name, getattr(torch, dtype), args, ceiling)
            except RuntimeError as error:
                print(f"{name} {dtype}: {error}")
                continue
            with args.output.open("a") as stream:
                stream.write(json.dumps(row) + "\n")
            times = "  ".join(f"{key.removeprefix('ours ')} {value:.1f}" for key, value in row["microseconds"].items())
            goal = f" (goal {row['goal_forward']})" if row["goal_forward"] else ""
            print(
                f"{name:22s} {dtype:9s}{goal} us: {times}  host {row['host_microseconds']}  {row['gb_per_s']} GB/s"
                f"  replay {row['replay_cost_percent']:+}%  record {row['record_cost_percent']:+}%",
                flush=True,
            )


if __name__ == "__main__":
    main()
