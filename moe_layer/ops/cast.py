"""Casts that cost nothing where there is nothing to do: a `.to()` or `.contiguous()` that changes nothing still takes
the host 2 to 8 us, and a step of a small layer is bound by the host."""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor


def cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """`tensor.to(dtype)`, differentiable."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)


def dense(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Contiguous in `dtype`, differentiable."""
    tensor = cast(tensor, dtype)
    return tensor if tensor.is_contiguous() else tensor.contiguous()


def no_autocast(device_type: str) -> contextlib.AbstractContextManager:
    """Autocast off, which is a context only where it is on."""
    if torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return contextlib.nullcontext()
