"""Router and dispatch together, for `scripts/bench/dispatch.py --routed`: what of a dispatch is visible behind the
router when its rows may start before (`dispatch.push`)."""

from __future__ import annotations

from typing import Any

import torch
from dispatch_peers import dispatch_config
from dispatch_timing import Meter, Samples

from moe_layer.config import ExpertsConfig, MoEConfig, RouterConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.parallel import ParallelContext
from moe_layer.router import Router


@torch.no_grad()
def measure(
    name: str,
    shape: tuple[int, ...],
    context: ParallelContext,
    meter: Meter,
    *,
    backends: list[str],
    cases: dict[str, dict[str, str]],
    runs: int,
) -> list[dict[str, Any]]:
    """Rows of one shape: the router alone, then with each dispatch behind it. Collective."""
    tokens, hidden, experts, top_k = shape
    dtype = torch.bfloat16 if context.device.type == "cuda" else torch.float32
    config = MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k),
        experts=ExpertsConfig(intermediate_size=hidden),
    )
    router = Router(config, device=context.device, dtype=dtype)
    torch.nn.init.normal_(router.weight, std=0.02)
    x = torch.randn(tokens, hidden, device=context.device).to(dtype)
    calls: dict[str, Any] = {"router": lambda: router(x)}

    def both(dispatcher: Any) -> None:
        begun = dispatcher.dispatch_begin(x)
        dispatcher.dispatch(x, router(x), begun=begun)

    for backend in backends:
        for case, options in cases.items():
            settings = dispatch_config(backend, tokens=tokens, **options)
            dispatcher = make_dispatcher(settings, num_experts=experts, top_k=top_k, context=context)
            calls[f"{backend} {case}"] = lambda dispatcher=dispatcher: both(dispatcher)
    samples = {case: Samples() for case in calls}
    for run in range(runs + 3):
        for ahead in (True, False):
            for case, call in calls.items():
                meter.sample(call, samples[case] if run >= 3 else Samples(), ahead=ahead)
    times = meter.medians(samples)
    alone = times["router"][0]
    return [
        {
            "kind": "routed",
            "shape": name,
            "case": case,
            "us": round(device_ms * 1e3, 1),
            "host_us": round(host_ms * 1e3, 1),
            "router_us": round(alone * 1e3, 1),
            "visible_us": round((device_ms - alone) * 1e3, 1),
        }
        for case, (device_ms, host_ms) in times.items()
    ]
