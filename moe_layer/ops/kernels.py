"""The `kernels` key: which bodies the ops run on CUDA tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.errors import ConfigError
from moe_layer.ops import _ext

_reference_layers = False  # a layer of this process asked for the reference


def require_kernels(kernels: str) -> None:
    """Honour `kernels` once, when a layer, a dispatcher or an adapter is built.

    auto loads the compiled library when it is there; cuda insists on it; reference keeps it unloaded. A library
    registers its kernels for the whole process, so the choice is the process's.

    Raises:
        ConfigError: `cuda` without a loadable library, or `reference` after the library was loaded.
    """
    if kernels == "reference":
        global _reference_layers
        _refuse_loaded_kernels()
        _reference_layers = True
        return
    status = _ext.status()
    if kernels == "cuda" and not status.loaded:
        raise ConfigError(
            f"kernels: cuda is not possible, {status.reason}; build the library with {_ext.REBUILD}, "
            "or set kernels: auto"
        )


def note_first_cuda_use(kernels: str, x: Tensor) -> None:
    """Before the first op on CUDA: load the library if nobody has, warn once if it is absent. Free afterwards.

    Raises:
        RuntimeError: the library was built for other GPUs than this one.
        ConfigError: `reference`, but somebody has loaded the library since the layer was built.
    """
    if not x.is_cuda or torch.compiler.is_compiling():
        return
    if kernels == "reference":
        _refuse_loaded_kernels()
    else:
        _ext.warn_if_missing()


def load_kernels(x: Tensor) -> None:
    """Before an op on CUDA that may be the process's first, called without any layer: as `kernels: auto` does.

    Does nothing where a layer of this process asked for the reference, and is free afterwards.

    Raises:
        RuntimeError: the library was built for other GPUs than this one.
    """
    if x.is_cuda:
        _load()


@torch.compiler.assume_constant_result
def _load() -> None:
    if not _reference_layers:
        _ext.warn_if_missing()


@torch.compiler.assume_constant_result
def kernels_loaded() -> bool:
    """Whether the library is loaded, without loading it."""
    return bool(_ext.status.cache_info().currsize) and _ext.status().loaded


def _refuse_loaded_kernels() -> None:
    if kernels_loaded():
        raise ConfigError(
            "kernels: reference, but this process already loaded the CUDA library for another layer; "
            "set MOE_LAYER_CUDA=0 or build all layers with kernels: reference"
        )
