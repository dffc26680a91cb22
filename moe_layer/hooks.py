"""`check()` and `update_bias()` around an optimizer's steps, for training loops that are not yours."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from moe_layer.errors import ConfigError


class StepHooks:
    """What `step_hooks` installed; `remove()` takes it off again."""

    def __init__(self, *handles: Any) -> None:
        self._handles = handles

    def remove(self) -> None:
        """Leave the optimizer as it was."""
        for handle in self._handles:
            handle.remove()


def step_hooks(model: nn.Module, optimizer: torch.optim.Optimizer, *, check: bool = True) -> StepHooks:
    """Let every step of `optimizer` call each layer's `check()` before and its `update_bias()` after.

    For transformers' Trainer, Lightning and other loops without a place for them. A step that a gradient scaler skips
    calls neither.

    Args:
        model: holds MoELayers, or blocks that `replace_moe_blocks` made.
        optimizer: torch's, or a wrapper that holds one as `.optimizer`.
        check: False leaves `check()` out, which synchronises on CUDA; call it yourself now and then.

    Raises:
        ConfigError: no such layer in the model.
    """
    layers: list[Any] = [m for m in model.modules() if hasattr(m, "dispatcher") and hasattr(m, "update_bias")]
    if not layers:
        raise ConfigError(f"{type(model).__name__} contains no MoELayer; give the model that holds them")

    def before(*_: Any) -> None:
        for layer in layers:
            layer.check()

    def after(*_: Any) -> None:
        for layer in layers:
            layer.update_bias()

    inner = getattr(optimizer, "optimizer", optimizer)  # accelerate's and Lightning's wrappers keep no hooks themselves
    handles = [inner.register_step_post_hook(after)]
    if check:
        handles.append(inner.register_step_pre_hook(before))
    return StepHooks(*handles)
