"""What layer_gpu.py measures: steps, their parts, launches, host time, bytes, rooflines."""

from __future__ import annotations

import cProfile
import io
import pstats
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moe_layer.config import DispatchConfig, ExpertsConfig, LossesConfig, MoEConfig, RouterConfig
from moe_layer.experts import quack
from moe_layer.experts.spec import ExpertsSpec, Layout, RowGradient, Weights, WeightTargets
from moe_layer.layer import MoELayer

Step = Callable[[], Any]


def milliseconds(function: Step, n: int = 1) -> float:
    """Per call, of n calls in a row."""
    start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    start.record()
    for _ in range(n):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / n


def make_layer(
    shape: tuple[int, ...], backend: str, *, losses: bool = False, recompute: str = "none", chunks: int = 1
) -> MoELayer:
    _, hidden, width, experts, top_k = shape
    config = MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        experts=ExpertsConfig(intermediate_size=width, backend=backend, recompute=recompute),
        losses=LossesConfig(aux="batch", aux_coeff=1e-3, z_coeff=1e-3) if losses else LossesConfig(),
        dispatch=DispatchConfig(chunks=chunks),
    )
    torch.manual_seed(0)
    return MoELayer(config, device="cuda", dtype=torch.bfloat16)


def make_inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x (a leaf) and the upstream gradient."""
    torch.manual_seed(1)
    x, upstream = torch.randn(2, shape[0], shape[1], device="cuda", dtype=torch.bfloat16).unbind()
    return x.detach().clone().requires_grad_(), upstream.clone()


@torch.no_grad()
def skew(layer: MoELayer, x: Tensor) -> float:
    """Make expert loads fall like 1 / rank (Zipf): feature 0 is a constant that the router weighs by -log(rank).

    Returns:
        the largest load over the mean load.
    """
    experts = layer.config.router.num_experts
    x[:, 0] = 1.0
    layer.router.weight[:, 0] = -torch.log(torch.randperm(experts, device=x.device) + 1.0)
    counts = layer(x, return_routing=True)[1].counts_E.float()
    return float(counts.max() / counts.mean())


def make_step(layer: torch.nn.Module, x: Tensor, upstream: Tensor) -> Step:
    parameters = list(layer.parameters())

    def step() -> None:
        for parameter in parameters:
            parameter.grad = None
        x.grad = None
        layer(x).backward(upstream)

    return step


def six_gemms(layer: MoELayer, x: Tensor, upstream: Tensor) -> Step:
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
    spec = ExpertsSpec("quack", "swiglu", 7.0, 1.702, "input", torch.bfloat16, layer.config.router.num_experts)
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


def timeline(step: Step) -> list[tuple[str, float]]:
    """(name, microseconds) of one step's kernels, copies and fills, in the order of their start."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as found:
        step()
        torch.cuda.synchronize()
    events = [e for e in found.events() if e.device_type == DeviceType.CUDA and e.time_range.elapsed_us() > 0]
    events.sort(key=lambda e: e.time_range.start)
    return [(e.name, e.time_range.elapsed_us()) for e in events]


def parts_of(found: list[tuple[str, float]]) -> dict[str, float]:
    """Microseconds of the six GEMMs and the two combines, told apart by their order in a step, and of all the rest."""
    gemms = iter(("F1", "F2", "B1", "B2", "B4", "B3"))
    trees = iter(("combine", "combine_dx"))
    parts: dict[str, float] = {"rest": 0.0}
    for name, us in found:
        part = next(gemms, "rest") if is_gemm(name) else next(trees, "rest") if "tree_reduce" in name else "rest"
        parts[part] = round(parts.get(part, 0.0) + us, 1)
    return parts


def is_gemm(name: str) -> bool:
    """Whether a kernel is one of the six grouped GEMMs (QuACK's names)."""
    return "quack" in name or "GemmSm90" in name


def host_microseconds(step: Step, runs: int = 10) -> float:
    """Median time until one step, started on an idle device, has launched everything; the device is not waited for."""
    values = []
    for _ in range(runs):
        torch.cuda.synchronize()
        began = time.perf_counter()
        step()
        values.append((time.perf_counter() - began) * 1e6)
    torch.cuda.synchronize()
    return sorted(values)[len(values) // 2]


def host_profile(step: Step, runs: int = 50, lines: int = 35) -> str:
    """Where the host's time goes, backward on the calling thread."""
    torch.autograd.set_multithreading_enabled(False)
    profiler = cProfile.Profile()
    try:
        profiler.enable()
        for _ in range(runs):
            step()
        profiler.disable()
    finally:
        torch.autograd.set_multithreading_enabled(True)
        torch.cuda.synchronize()
    text = io.StringIO()
    pstats.Stats(profiler, stream=text).sort_stats("tottime").print_stats(lines)
    return text.getvalue()


def copy_bandwidth() -> float:
    """Bytes per second, read plus written."""
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * 2**30 / (min(milliseconds(lambda: target.copy_(source)) for _ in range(10)) * 1e-3)


def gemm_rate() -> float:
    """FLOP/s of cuBLAS at 8192^3 in bf16."""
    a = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)
    torch.mm(a, a)
    return 2 * 8192**3 / (min(milliseconds(lambda: torch.mm(a, a)) for _ in range(5)) * 1e-3)


def rooflines(shape: tuple[int, ...], *, bandwidth: float, rate: float) -> dict[str, float]:
    """Lower bounds in us of the parts of a step, from this run's copy and cuBLAS rates.

    GEMMs: max of FLOPs / rate and bytes / bandwidth, where every operand moves once and gathered rows come from x or
    d(y) once (L2 serves the K readings). Combines: T*K rows read, T rows written.
    """
    tokens, hidden, width, experts, top_k = shape
    rows, up, down = tokens * top_k, 2 * experts * 2 * width * hidden, 2 * experts * width * hidden
    wide, narrow, h, source = 2 * rows * hidden, 2 * rows * width, 4 * rows * width, 2 * tokens * hidden
    parts = {  # FLOPs, bytes
        "F1": (4 * rows * hidden * width, source + up + h + narrow),
        "F2": (2 * rows * hidden * width, narrow + down + wide),
        "B1": (2 * rows * hidden * width, source + down + 2 * h + narrow),
        "B2": (2 * rows * hidden * width, source + narrow + down),
        "B3": (4 * rows * hidden * width, h + up + wide),
        "B4": (4 * rows * hidden * width, source + h + up),
        "combine": (0, wide + source),
        "combine_dx": (0, wide + source),
    }
    return {name: round(max(flops / rate, moved / bandwidth) * 1e6, 1) for name, (flops, moved) in parts.items()}
