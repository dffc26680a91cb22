"""transformers: record the routers of an unchanged model, also while it generates with a KV cache.

Source: transformers 5.x routers named `*TopKRouter` return `(logits, weights, indices [T, K])`, for example
`Qwen3MoeTopKRouter.forward` in models/qwen3_moe/modeling_qwen3_moe.py. `generate()` runs every token but the last
sampled
one, so a sequence of S tokens has S-1 rows (measured with 5.23). Rows come in the order of the calls; with left padding
see `moe_layer.replay.index_map.generation_index`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from moe_layer.errors import TraceError
from moe_layer.replay.recording import Recording
from moe_layer.replay.spec import TraceSpec
from moe_layer.replay.tap import Routed, is_recomputing


@contextmanager
def record_transformers(model: nn.Module, *, exclude: Sequence[str] = (), weights: bool = False) -> Iterator[Recording]:
    """Record every router call of the block; call `trace()` on the result afterwards.

    Args:
        model: a transformers model with its own blocks (for replaced blocks use `RoutingSession.record`).
        exclude: patterns of module paths, such as MTP layers. weights: keep the gate weights.

    Raises:
        TraceError: no such routers, routers of different sizes, or outputs that are not the documented ones.
    """
    routers: dict[str, Any] = {
        path.rpartition(".")[0]: module
        for path, module in model.named_modules()
        if type(module).__name__.endswith("TopKRouter") and not hasattr(module, "routing_tap")
    }
    routers = {name: m for name, m in routers.items() if not any(fnmatchcase(name, p) for p in exclude)}
    sizes = {(int(m.num_experts), int(m.top_k)) for m in routers.values()}
    if len(sizes) != 1:
        raise TraceError(
            f"{type(model).__name__} has {len(routers)} TopKRouters with (num_experts, top_k) {sorted(sizes)}; "
            "need some, of "
            "one size; use RoutingSession for replaced blocks"
        )
    ((experts, top_k),) = sizes
    recording = Recording(TraceSpec(experts, top_k, tuple(routers)), weights=weights)
    handles = [
        module.register_forward_hook(_hook(recording, index, name))
        for index, (name, module) in enumerate(routers.items())
    ]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()
    recording.finish()


def _hook(recording: Recording, index: int, name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, arguments: Any, output: Any) -> None:
        if is_recomputing():
            return
        if not isinstance(output, tuple) or len(output) < 3 or not _is_ids(output[2], recording.spec.top_k):
            raise TraceError(
                f"router {name!r} ({type(module).__name__}) did not return (logits, weights, indices [T, "
                f"{recording.spec.top_k}]); "
                "this version of transformers has another layout"
            )
        logits, gate, ids = output[:3]
        ids_TK = ids.detach().reshape(-1, ids.shape[-1]).to(torch.int32)
        gate_TK = gate.detach().reshape(gate.shape[0], -1)
        events = ids_TK.new_zeros(8)
        recording.add(index, Routed(ids_TK, gate_TK, logits, None, events, lambda: ids_TK))

    return hook


def _is_ids(value: Any, top_k: int) -> bool:
    return isinstance(value, Tensor) and not value.is_floating_point() and value.shape[-1] == top_k
