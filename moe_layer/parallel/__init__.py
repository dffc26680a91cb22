"""Expert and data parallelism over a DeviceMesh."""

from __future__ import annotations

from moe_layer.parallel.context import ParallelContext
from moe_layer.parallel.gradients import clip_grad_norm, sync_gradients
from moe_layer.parallel.shard import parallelize, parameter_groups

__all__ = ["ParallelContext", "clip_grad_norm", "parallelize", "parameter_groups", "sync_gradients"]
