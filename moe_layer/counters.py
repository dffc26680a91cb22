"""Buffers that keep their dtype and have a value wherever a module gets its memory.

`expert_bias` and sums stay fp32 whatever `.to()` says. Counters and the loss scale are in no checkpoint: where a model
gets its memory after its construction (`to_empty`, transformers' from_pretrained, `load_state_dict(assign=True)`),
nobody else would give them a value.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

_FP32 = ("expert_bias", "loss_scale", "log_sums")


def start_of(buffer: str) -> float:
    """A new buffer's value."""
    return 1.0 if buffer == "loss_scale" else 0.0


class CountingModule(nn.Module):
    """The base of `Router`, which registers the buffers and `weight`."""

    weight: Tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CountingModule:
        self._catch_up()
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if name in _FP32 and new.dtype != old.dtype:
                setattr(self, name, old.to(new.device))
            if old.is_meta and not new.is_meta:
                self._start(name)
        return self

    def __setattr__(self, name: str, value: Any) -> None:
        before = self.__dict__.get("_buffers", {}).get(name)
        super().__setattr__(name, value)
        if before is not None and before.is_meta:
            self._start(name)

    def _load_from_state_dict(self, *arguments: Any, **options: Any) -> None:
        super()._load_from_state_dict(*arguments, **options)
        for name, buffer in list(self.named_buffers(recurse=False)):
            if name in _FP32 and buffer.dtype in (torch.bfloat16, torch.float16):  # assigned as a program cast it
                setattr(self, name, buffer.float())
        self._catch_up()

    def _catch_up(self) -> None:
        """Memory for counters where the weight has got some without them (accelerate's loaders)."""
        if self.weight.is_meta:
            return
        for name in self._non_persistent_buffers_set:
            buffer = getattr(self, name)
            if buffer.is_meta:
                setattr(self, name, torch.empty_like(buffer, device=self.weight.device))

    def _start(self, name: str) -> None:
        """Saved buffers have the value that was just loaded, or wait for it."""
        if name in self._non_persistent_buffers_set:
            getattr(self, name).fill_(start_of(name))
