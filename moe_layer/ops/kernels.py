"""The `kernels` key: which bodies the ops run on CUDA tensors."""

from __future__ import annotations

from moe_layer.errors import ConfigError
from moe_layer.ops import _ext


def require_kernels(kernels: str) -> None:
    """Honour `kernels` once, when a layer is built.

    auto loads the compiled library when it is there; cuda insists on it; reference keeps it unloaded. A library registers its
    kernels for the whole process, so the choice is the process's.

    Raises:
        ConfigError: `cuda` without a loadable library, or `reference` after the library was loaded.
    """
    if kernels == "reference":
        if _ext.status.cache_info().currsize and _ext.status().loaded:
            raise ConfigError(
                "kernels: reference, but this process already loaded the CUDA library for another layer; "
                "set MOE_LAYER_CUDA=0 or build all layers with kernels: reference"
            )
        return
    status = _ext.status()
    if kernels == "cuda" and not status.loaded:
        raise ConfigError(f"kernels: cuda is not possible: {status.sentence()}, or set kernels: auto")
