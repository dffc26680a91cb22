"""One MoE layer for PyTorch. The public names are in `__all__`; docs/api.md describes them.

Names load on first use: reading a configuration does not import torch.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from moe_layer._version import __version__

if TYPE_CHECKING:
    from moe_layer.config import MoEConfig, load_config
    from moe_layer.errors import (
        CapacityError,
        CheckpointError,
        ConfigError,
        DispatchTimeout,
        RankMismatch,
        RoutingError,
        TraceError,
    )
    from moe_layer.hooks import step_hooks
    from moe_layer.layer import MoELayer
    from moe_layer.parallel import parallelize
    from moe_layer.replay.session import RoutingSession
    from moe_layer.replay.trace import RoutingTrace
    from moe_layer.types import Routing, RoutingDecision

_HOME = {
    "MoEConfig": "moe_layer.config",
    "load_config": "moe_layer.config",
    "MoELayer": "moe_layer.layer",
    "parallelize": "moe_layer.parallel",
    "step_hooks": "moe_layer.hooks",
    "Routing": "moe_layer.types",
    "RoutingDecision": "moe_layer.types",
    "RoutingSession": "moe_layer.replay.session",
    "RoutingTrace": "moe_layer.replay.trace",
    "CapacityError": "moe_layer.errors",
    "CheckpointError": "moe_layer.errors",
    "ConfigError": "moe_layer.errors",
    "DispatchTimeout": "moe_layer.errors",
    "RankMismatch": "moe_layer.errors",
    "RoutingError": "moe_layer.errors",
    "TraceError": "moe_layer.errors",
}

__all__ = [
    "CapacityError",
    "CheckpointError",
    "ConfigError",
    "DispatchTimeout",
    "MoEConfig",
    "MoELayer",
    "RankMismatch",
    "Routing",
    "RoutingDecision",
    "RoutingError",
    "RoutingSession",
    "RoutingTrace",
    "TraceError",
    "__version__",
    "load_config",
    "parallelize",
    "step_hooks",
]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'moe_layer' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)
