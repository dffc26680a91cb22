#!/usr/bin/env python3
"""SonicMoE in a process of its own: `layer_gpu.py --peer sonic` drives it, because its wheels need an older QuACK.

    PYTHONPATH=SITE python peer_sonic.py --tune qwen3-30b-16k qwen3-30b-4k --cache DIR [--seconds 420]
    PYTHONPATH=SITE python peer_sonic.py --serve --cache DIR     (one JSON request a line on stdin)

SITE: where scripts `wheels.sh sonic` + `install_wheels.sh sonic` put sonic-moe 0.1.2.post1, quack-kernels 0.3.11 and
cutlass-dsl 4.4.2. Its autotuner keeps timings and compiled kernels under QUACK_CACHE_DIR, keyed by exact shapes (not by
GPU), and Triton its own under TRITON_CACHE_DIR: both are put below --cache, which can be carried to another machine of
the same GPU. A first call per shape without that cache compiles and times some 80 kernels (minutes).

The call is `moe_TC_softmax_topk_layer`, the functional form of its MoE module: router GEMM, softmax over the chosen
logits (equal to our renormalised softmax), gate and up rows of w1 alternating. Letters: T D F E K as in layer_shapes.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from layer_shapes import SHAPES


def use_cache(folder: Path) -> None:
    """Point both autotuners at `folder`; must happen before sonicmoe is imported."""
    os.environ["QUACK_CACHE_DIR"] = str(folder)
    os.environ["TRITON_CACHE_DIR"] = str(folder / "triton")
    os.environ["TRITON_CACHE_AUTOTUNING"] = "1"


class Sonic:
    """One shape loaded at a time: inputs, parameters, an eager step and its CUDA graph."""

    def __init__(self) -> None:
        import sonicmoe
        import torch

        self.torch, self.sonic, self.version = torch, sonicmoe, sonicmoe.__version__
        self.graph: Any = None

    def load(self, shape: list[int], tensors: str | None = None, zipf: bool = False) -> dict[str, Any]:
        """Make the layer, run three steps (the first one tunes), capture one.

        Args:
            shape: T D F E K. tensors: file with x, upstream, router, gate_up (gate rows first) and down, else random.
            zipf: skew the router as `layer_parts.skew` does.
        """
        torch = self.torch
        self.free()
        tokens, hidden, width, experts, self.top_k = shape
        torch.manual_seed(0)
        kind: dict[str, Any] = {"device": "cuda", "dtype": torch.bfloat16}
        if tensors is None:
            x, upstream = torch.randn(2, tokens, hidden, **kind).unbind()
            router = torch.randn(experts, hidden, **kind) * 0.02
            gate_up = torch.randn(experts, 2 * width, hidden, **kind) * 0.02
            down = torch.randn(experts, hidden, width, **kind) * 0.02
        else:
            found = torch.load(tensors, weights_only=True)
            x, upstream, router = (found[name].cuda() for name in ("x", "upstream", "router"))
            gate_up, down = found["gate_up"].cuda(), found["down"].cuda()
            gate_up = gate_up.view(experts, 2, width, hidden).transpose(1, 2).reshape(experts, 2 * width, hidden)
        if zipf:
            x[:, 0] = 1.0
            router[:, 0] = -torch.log(torch.randperm(experts, device="cuda") + 1.0)
        self.upstream = upstream
        self.leaves = [t.detach().clone().requires_grad_() for t in (x, router, gate_up, down)]
        del x, router, gate_up, down
        began = time.perf_counter()
        for _ in range(3):
            self.step()
        torch.cuda.synchronize()
        answer: dict[str, Any] = {"first_s": round(time.perf_counter() - began, 2), "version": self.version}
        try:
            self.graph = self._capture()
            self.graph.replay()
            torch.cuda.synchronize()
        except Exception as error:
            self.graph = None
            answer["graph_error"] = f"{type(error).__name__}: {error}"[:300]
        return answer

    def step(self) -> Any:
        for leaf in self.leaves:
            leaf.grad = None
        x, router, gate_up, down = self.leaves
        y, _, _ = self.sonic.moe_TC_softmax_topk_layer(
            x,
            router,
            gate_up.permute(1, 2, 0),
            None,
            down.permute(1, 2, 0),
            None,
            self.top_k,
            self.torch.cuda.current_stream().cuda_stream,
            self.sonic.functional.ActivationType.SWIGLU,
        )
        y.backward(self.upstream)
        return y

    def _capture(self) -> Any:
        torch = self.torch
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self.step()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.step()
        return graph

    def time(self, what: str, n: int) -> dict[str, float]:
        """Milliseconds a step, of n steps in a row; `what` is eager or graph."""
        run = self.step if what == "eager" else self.graph.replay
        start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
        self.torch.cuda.synchronize()
        start.record()
        for _ in range(n):
            run()
        end.record()
        end.synchronize()
        return {"ms": start.elapsed_time(end) / n}

    def results(self, path: str) -> dict[str, str]:
        """Write y and the gradients of x, router, gate_up (gate rows first again) and down."""
        torch = self.torch
        y = self.step()
        names = ("dx", "drouter", "dgate_up", "ddown")
        grads = {name: leaf.grad for name, leaf in zip(names, self.leaves, strict=True)}
        experts, rows, hidden = grads["dgate_up"].shape
        grads["dgate_up"] = (
            grads["dgate_up"].view(experts, rows // 2, 2, hidden).transpose(1, 2).reshape(experts, rows, hidden)
        )
        torch.save({"y": y.detach().cpu(), **{name: grad.cpu() for name, grad in grads.items()}}, path)
        return {"path": path}

    def launches(self) -> dict[str, int]:
        """Kernels, copies and fills of one eager step."""
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as found:
            self.step()
            self.torch.cuda.synchronize()
        return {"launches": sum(e.count for e in found.key_averages() if e.device_time_total > 0)}

    def free(self) -> dict[str, bool]:
        self.graph, self.leaves, self.upstream = None, [], None
        self.torch.cuda.empty_cache()
        return {"freed": True}


def serve() -> None:
    """Answer requests {"do": method, ...its arguments} until stdin closes. Only answers go to stdout."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the libraries print goes to stderr
    peer = None
    for line in sys.stdin:
        try:
            request = json.loads(line)
            peer = Sonic() if peer is None else peer
            answer = getattr(peer, request.pop("do"))(**request)
        except Exception as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"[:500]}
        print(json.dumps(answer), file=out, flush=True)


def tune(names: list[str], seconds: int) -> None:
    """Run each shape once, so that the cache holds its kernels and timings; stops after `seconds`."""
    signal.alarm(seconds)
    began = time.perf_counter()
    peer = Sonic()
    print(json.dumps({"import_s": round(time.perf_counter() - began, 1), "version": peer.version}), flush=True)
    for name in names:
        print(json.dumps({"shape": name, **peer.load(list(SHAPES[name]))}), flush=True)
    peer.free()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--serve", action="store_true")
    parser.add_argument("--tune", nargs="+", choices=list(SHAPES), default=None)
    parser.add_argument("--cache", type=Path, required=True)
    parser.add_argument("--seconds", type=int, default=420, help="limit of --tune")
    arguments = parser.parse_args()
    use_cache(arguments.cache.resolve())
    if arguments.tune:
        tune(arguments.tune, arguments.seconds)
    if arguments.serve:
        serve()


if __name__ == "__main__":
    main()
