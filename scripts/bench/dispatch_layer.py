"""The layer's forward + backward over several ranks, for `scripts/bench/dispatch.py`: one set of experts, several
dispatchers, and the same step with local copies in place of messages ("exposed communication" is the difference)."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import torch
from dispatch_peers import CopyDispatcher, UndedupedDispatcher, dispatch_config
from dispatch_timing import Meter, Samples
from graphs import in_graph
from torch.distributed.device_mesh import init_device_mesh

from moe_layer import MoELayer, parallelize
from moe_layer.config import DispatchConfig, ExpertsConfig, MoEConfig, RouterConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import ConfigError
from moe_layer.experts.parameters import local_part
from moe_layer.parallel import ParallelContext

SHAPES = {  # T of a rank, D, F, E, K
    "qwen3-30b-16k": (16384, 2048, 768, 128, 8),
    "qwen3-30b-4k": (4096, 2048, 768, 128, 8),
    "deepseek-v3-4k": (4096, 7168, 2048, 256, 8),
    "tiny": (64, 32, 16, 8, 2),
}
ROWS = ("expert_major", "compact")


def make_layer(shape: tuple[int, ...], device: torch.device, ranks: int) -> tuple[MoELayer, ParallelContext]:
    """A layer whose experts are split over the ranks; values are drawn where they will live."""
    _, hidden, width, experts, top_k = shape
    config = MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        experts=ExpertsConfig(intermediate_size=width),
        dispatch=DispatchConfig(backend="all_to_all", deadline_s=20.0),
    )
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    layer = MoELayer(config, device="meta", dtype=dtype)
    context = parallelize(layer, init_device_mesh(device.type, (ranks,), mesh_dim_names=("ep",)))
    torch.manual_seed(0)
    layer.to_empty(device=device)
    layer.reset_parameters()
    return layer, context


def make_dispatchers(
    layer: MoELayer, context: ParallelContext, x: torch.Tensor, *, backends: list[str], say: Callable[[str], None]
) -> dict[str, Any]:
    """Name -> dispatcher: each backend in each layout, its copy, and the un-deduplicated path."""
    router = layer.config.router
    options: dict[str, Any] = {"num_experts": router.num_experts, "top_k": router.top_k}
    found: dict[str, Any] = {"nccl": UndedupedDispatcher(context.ep_group, **options)}
    for rows in ROWS:
        with torch.no_grad():
            config = DispatchConfig(backend="all_to_all", rows=rows, deadline_s=20.0)
            template = make_dispatcher(config, context=context, **options).dispatch(x.detach(), layer.router(x))
        found[f"copies {rows}"] = CopyDispatcher(template)
        for backend in backends:
            try:
                config = dispatch_config(backend, tokens=x.shape[0], rows=rows)
                found[f"{backend} {rows}"] = make_dispatcher(config, context=context, **options)
            except ConfigError as error:
                say(f"  {backend} {rows}: skipped, {str(error).splitlines()[0]}")
    return found


def make_step(layer: MoELayer, dispatcher: Any, x: torch.Tensor, upstream: torch.Tensor) -> Callable[[], None]:
    parameters = list(layer.parameters())

    def step() -> None:
        layer.dispatcher = dispatcher
        for parameter in parameters:
            parameter.grad = None
        x.grad = None
        layer(x).backward(upstream)

    return step


def check_same(layer: MoELayer, dispatchers: dict[str, Any], x: torch.Tensor, upstream: torch.Tensor) -> None:
    """Every way of moving rows must give the outputs and gradients of the NCCL path.

    Raises:
        AssertionError: the relative error of y, dx or an expert's dW is above 2%, the rounding of bf16 sums.
    """
    want: list[torch.Tensor] = []
    for case, dispatcher in dispatchers.items():
        if case.startswith("copies"):
            continue
        make_step(layer, dispatcher, x, upstream)()
        with torch.no_grad():
            found = [layer(x), x.grad, local_part(layer.experts.down_proj.grad)]
        for name, got, reference in zip(("y", "dx", "dW"), found, want or found, strict=True):
            error = float((got.float() - reference.float()).norm() / reference.float().norm())
            assert error < 0.02, f"{case}: {name} differs from the NCCL path by {error:.3g}"
        want = want or [tensor.clone() for tensor in found]


def measure(
    name: str, *, backends: list[str], runs: int, graph: bool, meter: Meter, say: Callable[[str], None]
) -> list[dict[str, Any]]:
    """Rows of one shape: every backend and layout beside the NCCL path and its own copy. Collective."""
    shape, device = SHAPES[name], meter.device
    ranks = torch.distributed.get_world_size()
    layer, context = make_layer(shape, device, ranks)
    generator = torch.Generator(device).manual_seed(1 + torch.distributed.get_rank())
    x, upstream = (
        torch.randn(shape[0], shape[1], device=device, generator=generator).to(layer.router.weight.dtype)
        for _ in range(2)
    )
    x.requires_grad_()
    dispatchers = make_dispatchers(layer, context, x, backends=backends, say=say)
    check_same(layer, dispatchers, x, upstream)
    steps = {case: make_step(layer, dispatcher, x, upstream) for case, dispatcher in dispatchers.items()}
    for _ in range(3):
        for step in steps.values():
            step()
    if graph and device.type == "cuda":
        captured = [case for case in steps if case.startswith("copies") or ":static" in case]
        steps |= {f"{case} graph": in_graph(steps[case]) for case in captured}
    cases = {case: Samples() for case in steps}
    for _ in range(runs):
        for case, step in steps.items():
            meter.step(step, cases[case])
    times = meter.medians(cases)
    peak = torch.cuda.max_memory_allocated() if device.type == "cuda" else 0
    context.close()
    del layer, dispatchers, steps
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return [_row(name, case, times, peak) for case in times if case != "nccl" and not case.startswith("copies")]


def _row(shape: str, case: str, times: dict[str, tuple[float, float]], peak: int) -> dict[str, Any]:
    step_ms, host_ms = times[case]
    copies_ms = times["copies " + case.split(" ", 1)[1]][0]
    return {
        "kind": "layer",
        "shape": shape,
        "T_D_F_E_K": SHAPES[shape],
        "case": case,
        "ms": round(step_ms, 4),
        "host_ms": round(host_ms, 4),
        "peer": "permute + NCCL all_to_all_single + permute, same experts",
        "peer_ms": round(times["nccl"][0], 4),
        "ratio": round(times["nccl"][0] / step_ms, 3),
        "copies_ms": round(copies_ms, 4),
        "exposed": round((step_ms - copies_ms) / step_ms, 4),
        "peak_bytes": peak,
    }
