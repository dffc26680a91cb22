"""Hopper expert GEMMs through QuACK (quack-kernels 0.6.5, extra `hopper`): the only file that knows that library.

Six launches a step, none of them autotuned, none of them synchronising with the host:

    F1  h, a    = x[index] @ gate_up^T, silu(g) * u * p      gathered A, SwiGLU and probability in the epilogue
    F2  rows    = a @ down^T
    B1  dh, a   = dy[index] @ down, dSwiGLU                  gathered A; recomputes a and reduces d(p) in the epilogue
    B2  d_down  = dy[index]^T @ a                            gathered A
    B3  dx rows = dh @ gate_up
    B4  d_gate_up = dh^T @ x[index]                          gathered x

H is private to this file: its columns alternate gate and up (what the paired epilogues read), although the weights keep
gate rows first: `concat_layout` reads them so without a copy. Tiles come from `tiles.py`.

Letters: N rows, D hidden, F expert width, L local experts.
"""

from __future__ import annotations

import functools
import importlib.util
from typing import Any

import torch
from torch import Tensor

from moe_layer.experts.spec import ExpertsSpec, Layout, RowGradient, Weights, WeightTargets
from moe_layer.experts.tiles import Tile, choose_tiles

INSTALL = "pip install 'moe-layer[hopper]'"


@functools.cache
def _missing() -> str | None:
    for module in ("quack", "cutlass"):
        if importlib.util.find_spec(module) is None:
            return f"the package that provides {module} is not installed; {INSTALL}"
    return None


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


@functools.cache
def _config(tile: Tile) -> Any:
    from quack.gemm_config import GemmConfig

    return GemmConfig(
        tile_m=tile.m,
        tile_n=tile.n,
        cluster_m=tile.cluster_m,
        cluster_n=tile.cluster_n,
        pingpong=tile.pingpong,
        is_dynamic_persistent=False,
        device_capacity=9,
    )


@functools.cache
def _gated(with_probs: bool) -> Any:
    """Epilogue of F1: the pre-activation pairs, and silu(g) * u (* p)."""
    from quack.activation import swiglu
    from quack.epilogue import gemm_epilogue, pack, unpack
    from quack.epilogue.ops import ColVecLoad

    if not with_probs:

        @gemm_epilogue(outputs=("activated",), mode="acc_pair")
        def gated(acc):  # type: ignore[no-untyped-def]
            g, u = unpack(acc)
            return {"D": pack(g, u), "activated": swiglu(g, u)}

        return gated

    @gemm_epilogue(outputs=("activated",), ops={"probs": ColVecLoad("probs")}, mode="acc_pair")
    def gated_probs(acc, probs):  # type: ignore[no-untyped-def]
        g, u = unpack(acc)
        return {"D": pack(g, u), "activated": swiglu(g, u) * probs}

    return gated_probs


@functools.cache
def _dgated(with_probs: bool) -> Any:
    """Epilogue of B1: d(pre-activation) pairs, the activation again, and per row <activation, d(activation)>."""
    from quack.epilogue.library import dgated_mod

    return dgated_mod("swiglu", has_scale=with_probs, has_reduce=with_probs)


def _matmul(
    a: Tensor,
    b: Tensor,
    out: Tensor,
    *,
    tile: Tile,
    rows: Tensor | None = None,
    depth: Tensor | None = None,
    index: Tensor | None = None,
    concat: tuple[str, ...] | None = None,
    accumulate: bool = False,
) -> None:
    """out = a @ b, grouped over a's rows (`rows`: boundaries) or over the contraction (`depth`)."""
    from quack.gemm_interface import _gemm_execute

    _gemm_execute(
        a,
        b,
        out,
        None,
        bias=None,
        alpha=1.0,
        beta=1.0,
        cu_seqlens_m=rows,
        cu_seqlens_k=depth,
        A_idx=index,
        batch_idx_permute=None,
        add_to_output=accumulate,
        dynamic_scheduler=False,
        config=_config(tile),
        rounding_mode=0,
        sr_seed=0,
        concat_layout=concat,
        SFA=None,
        SFB=None,
        split_k=1,
        split_k_mode=0,
    )


def _project_up(layout: Layout, weights: Weights, x: Tensor, *, tile: Tile) -> tuple[Tensor, Tensor]:
    """H [N, 2F] (alternating columns) and the activation [N, F]."""
    num_rows, width = layout.num_rows, weights.down.shape[2]
    h_N2F = x.new_empty(num_rows, 2 * width)
    a_NF = x.new_empty(num_rows, width)
    operands = {} if layout.probs is None else {"probs": layout.probs}
    _gated(layout.probs is not None)(
        x,
        weights.gate_up.mT,
        out={"D": h_N2F, "activated": a_NF},
        config=_config(tile),
        tuned=False,
        cu_seqlens_m=layout.offsets,
        A_idx=layout.index,
        concat_layout=("B",),
        **operands,
    )
    return h_N2F, a_NF


def forward(layout: Layout, weights: Weights, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """rows [N, D] and H (its layout is this file's own; [0, 2F] unless `spec.save_h`)."""
    num_rows, (hidden, width) = layout.num_rows, weights.down.shape[1:]
    x = layout.x.to(spec.compute_dtype)
    if num_rows == 0:
        return x.new_empty(0, hidden), x.new_empty(0, 2 * width)
    tiles = choose_tiles(rows_per_expert=num_rows / weights.down.shape[0], hidden=hidden, width=width)
    h_N2F, a_NF = _project_up(layout, weights, x, tile=tiles.up)
    out_ND = x.new_empty(num_rows, hidden)
    _matmul(a_NF, weights.down.mT, out_ND, tile=tiles.down, rows=layout.offsets)
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
    x = layout.x.to(spec.compute_dtype)
    if not spec.save_h:
        h_N2F, _ = _project_up(layout, weights, x, tile=tiles.up)
    d_h_N2F = torch.empty_like(h_N2F)
    a_NF = h_N2F.new_empty(num_rows, width)
    operands = {} if layout.probs is None else {"mColVecBroadcast": layout.probs}
    found = _dgated(layout.probs is not None)(
        d_out.rows,
        weights.down,
        h_N2F,
        out={"D": d_h_N2F, "mAuxOut": a_NF},
        config=_config(tiles.d_activation),
        tuned=False,
        cu_seqlens_m=layout.offsets,
        A_idx=d_out.index,
        **operands,
    )
    add_gate_up, add_down = targets.accumulate[:2]
    ends = layout.offsets
    if targets.down is not None:
        _matmul(
            d_out.rows.mT,
            a_NF,
            targets.down,
            tile=tiles.d_down,
            depth=ends,
            index=d_out.index,
            accumulate=add_down,
        )
    if targets.gate_up is not None:
        _matmul(
            x.mT,
            d_h_N2F,
            targets.gate_up.mT,
            tile=tiles.d_gate_up,
            depth=ends,
            index=layout.index,
            concat=("out",),
            accumulate=add_gate_up,
        )
    d_x_ND = None
    if need_x:
        d_x_ND = x.new_empty(num_rows, hidden)
        _matmul(d_h_N2F, weights.gate_up, d_x_ND, tile=tiles.d_x, rows=ends, concat=("B",))
    return d_x_ND, found.get("mColVecReduce")


def _empty_backward(
    layout: Layout, targets: WeightTargets, hidden: int, *, need_x: bool
) -> tuple[Tensor | None, Tensor | None]:
    for target, add in zip(targets[:4], targets.accumulate, strict=True):
        if target is not None and not add:
            target.zero_()
    d_x = layout.x.new_empty(0, hidden) if need_x else None
    return d_x, None if layout.probs is None else torch.zeros_like(layout.probs)
