"""Hopper expert GEMMs through QuACK (quack-kernels 0.6.5, extra `hopper`; `quack_plans.py` calls it).

Six launches a step, none of them autotuned, none of them synchronising with the host:

    F1  h, a    = x[index] @ gate_up^T, silu(g) * u * p      gathered A, SwiGLU and probability in the epilogue
    F2  rows    = a @ down^T
    B1  dh, a   = dy[index] @ down, dSwiGLU                  gathered A; recomputes a and reduces d(p) in the epilogue
    B2  d_down  = dy[index]^T @ a                            gathered A
    B3  dx rows = dh @ gate_up
    B4  d_gate_up = dh^T @ x[index]                          gathered x

H is private to this backend: its columns alternate gate and up (what the paired epilogues read), although the weights
keep gate rows first: `concat_layout` reads them so without a copy. Tiles come from `tiles.py`.

Letters: N rows, D hidden, F expert width, L local experts.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Collection

import torch
from torch import Tensor

from moe_layer.experts import quack_plans as plans
from moe_layer.experts.spec import ExpertsSpec, Layout, RowGradient, Weights, WeightTargets
from moe_layer.experts.tiles import choose_tiles, row_buckets
from moe_layer.ops.cast import dense

INSTALL = "pip install 'moe-layer[hopper]'"


@functools.cache
def _missing() -> str | None:
    for module in ("quack", "cutlass"):
        if importlib.util.find_spec(module) is None:
            return f"the package that provides {module} is not installed; {INSTALL}"
    return None


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether this is a GPU of compute capability 9.0."""
    return device.type == "cuda" and torch.cuda.is_available() and torch.cuda.get_device_capability(device)[0] == 9


def obstacle(
    device: torch.device, dtype: torch.dtype, *, activation: str, bias: bool, hidden_size: int, width: int
) -> str | None:
    """Why QuACK cannot run experts like these, with the remedy; None when it can."""
    if not is_hopper(device):
        return f"QuACK's pinned tiles are for Hopper GPUs and the experts are on {device}"
    if dtype != torch.bfloat16:
        return f"QuACK's tiles are for bfloat16, not {dtype}; use bfloat16 or autocast"
    if activation != "swiglu" or bias:
        return f"QuACK's epilogues here cover swiglu without biases, not {activation}{' with biases' if bias else ''}"
    if hidden_size % 8 or width % 8:
        return (
            f"QuACK needs rows of a multiple of 16 bytes, and hidden_size {hidden_size}, width {width} "
            "are not both multiples of 8; round them up"
        )
    return _missing()


def forward(layout: Layout, weights: Weights, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """rows [N, D] and H (its layout is this file's own; [0, 2F] unless `spec.save_h`)."""
    num_rows, (hidden, width) = layout.num_rows, weights.down.shape[1:]
    x = dense(layout.x, spec.compute_dtype)
    if num_rows == 0:
        return x.new_empty(0, hidden), x.new_empty(0, 2 * width)
    tiles = choose_tiles(rows_per_expert=num_rows / weights.down.shape[0], hidden=hidden, width=width)
    h_N2F, a_NF = plans.gate_up(
        x, weights.gate_up, layout.probs, offsets=layout.offsets, index=layout.index, tile=tiles.up
    )
    out_ND = x.new_empty(num_rows, hidden)
    plans.matmul("down", a_NF, weights.down, out_ND, tile=tiles.down, rows=layout.offsets)
    return out_ND, h_N2F if spec.save_h else h_N2F.new_empty(0, 2 * width)


def backward(
    d_out: RowGradient,
    h_N2F: Tensor,
    layout: Layout,
    weights: Weights,
    spec: ExpertsSpec,
    targets: WeightTargets,
    *,
    need_x: bool,
) -> tuple[Tensor | None, Tensor | None]:
    """d(gathered x) [N, D] (None unless `need_x`) and d(probs) [N]; fills `targets`."""
    num_rows, (hidden, width) = layout.num_rows, weights.down.shape[1:]
    if num_rows == 0:
        return _empty_backward(layout, targets, hidden, need_x=need_x)
    tiles = choose_tiles(rows_per_expert=num_rows / weights.down.shape[0], hidden=hidden, width=width)
    x = dense(layout.x, spec.compute_dtype)
    ends = layout.offsets
    if not spec.save_h:
        h_N2F, _ = plans.gate_up(x, weights.gate_up, layout.probs, offsets=ends, index=layout.index, tile=tiles.up)
    d_h_N2F, a_NF, d_probs_N = plans.d_activation(
        d_out.rows, weights.down, h_N2F, layout.probs, offsets=ends, index=d_out.index, tile=tiles.d_activation
    )
    add_gate_up, add_down = targets.accumulate[:2]
    if targets.down is not None:
        in_fp32 = add_down and targets.down.dtype == torch.float32
        plans.matmul(
            "d_down",
            d_out.rows.mT,
            a_NF.mT,
            targets.down,
            tile=tiles.add_down if in_fp32 else tiles.d_down,
            depth=ends,
            index=d_out.index,
            accumulate=add_down,
            by_load=tiles.add_by_load and in_fp32,
        )
    if targets.gate_up is not None:
        in_fp32 = add_gate_up and targets.gate_up.dtype == torch.float32
        plans.matmul(
            "d_gate_up",
            x.mT,
            d_h_N2F.mT,
            targets.gate_up.mT,
            tile=tiles.add_gate_up if in_fp32 else tiles.d_gate_up,
            depth=ends,
            index=layout.index,
            concat=("out",),
            accumulate=add_gate_up,
            by_load=tiles.add_by_load and in_fp32,
        )
    d_x_ND = None
    if need_x:
        d_x_ND = x.new_empty(num_rows, hidden)
        plans.matmul("d_x", d_h_N2F, weights.gate_up.mT, d_x_ND, tile=tiles.d_x, rows=ends, concat=("B",))
    return d_x_ND, d_probs_N


@torch.no_grad()
def warmup(weights: Weights, *, sums: Collection[torch.dtype] = ()) -> None:
    """Compile (or read from QuACK's cache) every kernel that experts of this width and hidden size may launch.

    Plans do not depend on the number of experts, so one expert of zeros stands for all; each number of rows that the
    table of tiles tells apart runs once.

    Args:
        weights: bf16 parameters on the GPU; only their shapes, dtype and device are used.
        sums: also weight gradients that are added to tensors of these dtypes (main_grads, `dispatch.chunks`).
    """
    hidden, width = weights.down.shape[1:]
    down = weights.down.new_zeros(1, hidden, width)
    fake = Weights(down.new_zeros(1, 2 * width, hidden), down, None, None)
    spec = ExpertsSpec("quack", "swiglu", 0.0, 0.0, "input", down.dtype, 1)
    seen = set()
    for num_rows in row_buckets(hidden=hidden, width=width):
        tiles = choose_tiles(rows_per_expert=num_rows, hidden=hidden, width=width)
        if tiles in seen:
            continue
        seen.add(tiles)
        layout = _fake_layout(down, num_rows)
        _, h_N2F = forward(layout, fake, spec)
        for dtype, add in ((down.dtype, False), *((dtype, True) for dtype in sums)):
            targets = WeightTargets(
                torch.zeros_like(fake.gate_up, dtype=dtype), torch.zeros_like(down, dtype=dtype), None, None, (add,) * 4
            )
            backward(RowGradient(layout.x, layout.index), h_N2F, layout, fake, spec, targets, need_x=True)


def _fake_layout(like: Tensor, num_rows: int) -> Layout:
    """All rows belong to one expert and come from one row of zeros."""
    bounds = torch.tensor([0, num_rows], dtype=torch.int32).to(like.device)
    index_N = torch.zeros(num_rows, dtype=torch.int32, device=like.device)
    return Layout(
        x=like.new_zeros(8, like.shape[1]),
        index=index_N,
        probs=torch.zeros(num_rows, device=like.device),
        offsets=bounds,
        counts=bounds[1:],
        row_CK=index_N[:0],
        ids_CK=index_N[:0],
    )


def _empty_backward(
    layout: Layout, targets: WeightTargets, hidden: int, *, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    for target, add in zip(targets[:4], targets.accumulate, strict=True):
        if target is not None and not add:
            target.zero_()
    d_x = layout.x.new_empty(0, hidden) if need_x else None
    return d_x, None if layout.probs is None else torch.zeros_like(layout.probs)
