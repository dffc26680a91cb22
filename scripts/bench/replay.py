"""Cost of recording and replaying: `python scripts/bench/replay.py [--device cuda] [preset overrides ...]`, JSON lines.

One layer forward and backward with a session that does nothing, records, replays and compares, interleaved; the router
alone live and replayed; the file's bytes per token against the format's arithmetic.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch

from moe_layer import MoELayer, RoutingSession, RoutingTrace, load_config

CPU_SIZE = ["hidden_size=256", "router.num_experts=32", "router.top_k=4", "experts.intermediate_size=128"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--preset", default="qwen3-30b-a3b")
    parser.add_argument("--tokens", type=int, default=0, help="default 2048 on CPU, 16384 on CUDA")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    on_gpu = args.device.startswith("cuda")
    config = load_config(args.preset, [*([] if on_gpu else CPU_SIZE), *args.overrides])
    tokens = args.tokens or (16384 if on_gpu else 2048)
    dtype = torch.bfloat16 if on_gpu else torch.float32
    layer = MoELayer(config, device=args.device, dtype=dtype)
    x = torch.randn(tokens, config.hidden_size, device=args.device, dtype=dtype, requires_grad=True)
    session = RoutingSession(layer)
    with torch.no_grad(), session.record() as recording:
        layer(x)
    trace = recording.trace()
    plan = trace.plan(layers=session.layers, device=session.device)
    cases = _cases(layer, x, session, plan)
    times = _interleaved(cases, args.repeats, on_gpu)
    facts = {
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "torch": torch.__version__,
        "tokens": tokens,
        "experts": config.router.num_experts,
        "top_k": config.router.top_k,
        "ms": times,
        "record_overhead": times["step, record"] / times["step"] - 1,
        "replay_overhead_of_router": times["router, replay"] / times["router"] - 1,
        **_bytes(trace),
    }
    sys.stdout.write(json.dumps(facts) + "\n")
    return 0


def _cases(layer: MoELayer, x: torch.Tensor, session: RoutingSession, plan: object) -> dict[str, Callable[[], None]]:
    def step() -> None:
        layer(x).square().sum().backward()

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
        layer.router(x)

    def router_replay() -> None:
        with session.replay(plan):
            layer.router(x)

    return {
        "step": step,
        "step, record": recorded,
        "step, replay": replayed,
        "step, compare": compared,
        "router": router,
        "router, replay": router_replay,
    }


def _interleaved(cases: dict[str, Callable[[], None]], repeats: int, on_gpu: bool) -> dict[str, float]:
    """Median milliseconds of each case, taken in turns."""
    found: dict[str, list[float]] = {name: [] for name in cases}
    for repeat in range(repeats + 3):
        for name, case in cases.items():
            if on_gpu:
                torch.cuda.synchronize()
            start = time.perf_counter()
            case()
            if on_gpu:
                torch.cuda.synchronize()
            if repeat >= 3:
                found[name].append(1e3 * (time.perf_counter() - start))
    return {name: round(median(values), 4) for name, values in found.items()}


def _bytes(trace: RoutingTrace) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "a.safetensors"
        trace.save(path)
        on_disk = path.stat().st_size / trace.num_tokens
    memory = (trace.ids.nbytes + trace.valid.nbytes) / trace.num_tokens
    return {"bytes_per_token": trace.spec.bytes_per_token, "memory_per_token": memory, "file_per_token": on_disk}


if __name__ == "__main__":
    sys.exit(main())
