"""GPU time of the gate GEMM with the router behind it: fused (`gate_topk`) beside cuBLAS and `route_topk`.

Every variant is a CUDA graph of several calls over different x (together larger than the L2); the graphs are replayed
in turn. Rows go to docs/benchmarks/router.jsonl (--output).
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from router import DEEPSEEK, ROOT, capture, medians, provenance, sm_clock, warm_up
from torch import Tensor

from moe_layer.ops.gate import gate_logits
from moe_layer.ops.gate_topk import gate_topk
from moe_layer.ops.route_topk import RouteTopk, route_topk

LOSSES = {"aux_counts": "live", "want_z": True, "loss_coeffs": (0.01, 0.001)}


class Shape(NamedTuple):
    tokens: int
    hidden: int
    experts: int
    top_k: int
    options: dict[str, Any]
    bias: bool = False


SHAPES = {
    f"{name}-t{tokens}": Shape(tokens, *rest)
    for name, rest in {
        "e64-d2048": (2048, 64, 8, {}),
        "e128-d2048": (2048, 128, 8, {}),
        "e128-d4096": (4096, 128, 8, {}),
        "e128-d7168-grouped": (7168, 128, 8, DEEPSEEK, True),
    }.items()
    for tokens in (32768, 16384, 12288, 8192, 5120, 4096, 2048, 1024, 64)
}


def variants(shape: Shape, both: bool) -> dict[str, Callable[[int], Any]]:
    size = shape.tokens * shape.hidden * 2
    sets = max(2, min(8, (160 << 20) // size))
    xs = [torch.randn(shape.tokens, shape.hidden, device="cuda", dtype=torch.bfloat16) for _ in range(sets)]
    weight = (torch.randn(shape.experts, shape.hidden, device="cuda") * 2 / shape.hidden**0.5).bfloat16()
    bias = torch.randn(shape.experts, device="cuda") * 0.1 if shape.bias else None
    given = {"top_k": shape.top_k, **shape.options}
    if both:
        for leaf in (weight, *xs):
            leaf.requires_grad_()
    d_weights, d_losses = torch.randn(shape.tokens, shape.top_k, device="cuda"), torch.randn(2, device="cuda")

    def gemm(index: int) -> Tensor:
        return gate_logits(xs[index % sets], weight, None, gate_dtype="fp32_out")

    def unfused(index: int, **more: Any) -> RouteTopk:
        return route_topk(gemm(index), bias, **given, **more)

    def fused(index: int, **more: Any) -> RouteTopk:
        return gate_topk(xs[index % sets], weight, None, bias, **given, **more)[1]

    def backward(index: int, out: RouteTopk) -> tuple[Tensor, ...]:
        outputs, leaves = [out.weights, out.scaled_losses], [xs[index % sets], weight]
        return torch.autograd.grad(outputs, leaves, [d_weights, d_losses])

    if both:
        return {
            "apart, forward and backward": lambda i: backward(i, unfused(i, **LOSSES)),
            "fused, forward and backward": lambda i: backward(i, fused(i, **LOSSES)),
        }
    logits = [gemm(index) for index in range(sets)]
    return {
        "apart": unfused,
        "apart, losses": lambda i: unfused(i, **LOSSES),
        "gate GEMM": gemm,
        "router": lambda i: route_topk(logits[i % sets], bias, **given),
        "router, losses": lambda i: route_topk(logits[i % sets], bias, **given, **LOSSES),
        "fused": fused,
        "fused, losses": lambda i: fused(i, **LOSSES),
        "fused, losses and logits": lambda i: fused(i, **LOSSES, want_logits=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES))
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--backward", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/router.jsonl")
    args = parser.parse_args()
    warm_up()
    for name in args.shapes.split(","):
        calls = variants(SHAPES[name], args.backward)
        times = medians({key: (capture(call, 8), 8) for key, call in calls.items()}, args.rounds)
        row = {"bench": "gate", "shape": name, **SHAPES[name]._asdict(), "sm_mhz": sm_clock()}
        row |= {"microseconds": {key: round(value, 2) for key, value in times.items()}} | provenance()
        with args.output.open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{name}: " + "  ".join(f"{key} {value:.1f}" for key, value in times.items()), flush=True)
        del calls
        torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
