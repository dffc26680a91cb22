"""Which backend runs: an explicit choice is honoured or rejected, `auto` says when it must pick a slower one."""

from __future__ import annotations

import functools
import warnings

import torch

from moe_layer.experts import grouped_mm, quack, transformer_engine


@functools.cache
def _warn_once(message: str) -> None:
    warnings.warn(message, stacklevel=4)


@torch.compiler.assume_constant_result  # its arguments are constants of a compiled graph
def resolve(
    backend: str,
    device: torch.device,
    dtype: torch.dtype,
    *,
    hidden_size: int,
    width: int,
    activation: str = "swiglu",
    bias: bool = False,
    fp8_recipe: str = "none",
) -> str:
    """`reference`, `grouped_mm`, `quack` or, by name only, `transformer_engine` for operands of this device and dtype.

    `auto` takes the loop on CPU, where it is faster than torch's grouped GEMM (docs/benchmarks/cpu_layer.jsonl), QuACK
    on Hopper and grouped_mm on other GPUs. A step down on a GPU warns once, with the reason and the remedy.

    Raises:
        ValueError: the backend was asked for by name and cannot run this; names the fact and the remedy.
    """
    if backend == "reference" or (backend == "auto" and device.type == "cpu"):
        return "reference"
    if backend == "transformer_engine":
        obstacle = transformer_engine.obstacle(
            device, dtype, fp8_recipe=fp8_recipe, bias=bias, hidden_size=hidden_size, width=width
        )
        if obstacle is not None:
            raise ValueError(f"experts.backend is transformer_engine, but {obstacle}; or set experts.backend to auto")
        return backend
    no_quack = None
    if backend in ("auto", "quack"):
        no_quack = quack.obstacle(device, dtype, activation=activation, bias=bias, hidden_size=hidden_size, width=width)
        if no_quack is None:
            return "quack"
        if backend == "quack":
            raise ValueError(f"experts.backend is quack, but {no_quack}; or set experts.backend to auto")
    obstacle = grouped_mm.obstacle(device, dtype, hidden_size=hidden_size, width=width)
    if obstacle is None:
        if no_quack is not None and quack.is_hopper(device):
            _warn_once(f"experts.backend auto uses torch's grouped GEMM, slower than QuACK on this GPU: {no_quack}")
        return "grouped_mm"
    if backend == "grouped_mm":
        raise ValueError(f"experts.backend is grouped_mm, but {obstacle}; or set experts.backend to reference")
    _warn_once(f"experts.backend auto uses the per-expert loop, which synchronises with the host: {obstacle}")
    return "reference"
