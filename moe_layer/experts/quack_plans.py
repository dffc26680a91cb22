"""QuACK's compiled GEMMs, launched without its interface layer: the only file that calls quack-kernels 0.6.5.

A plan of QuACK's holds a compiled kernel and nothing that depends on sizes, so one plan for each kind of GEMM, tile and
device serves every number of rows. The first call of a kind goes through QuACK's own checks and compiles (or reads its
cache on disk); the next ones cost a dictionary lookup and the launch.

Letters: N rows, D hidden, F expert width, L local experts.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from moe_layer.experts.tiles import Tile


@contextlib.contextmanager
def compile_later() -> Iterator[None]:
    """Inside, `torch.compile` of a function does its work at the first call of the result.

    QuACK wraps a dozen quantisers when it is imported, of which nothing here is called; the first wrapping loads
    inductor, a third of the import's time. Meant for that import alone; modules are compiled as ever.
    """
    compile_now = torch.compile

    def compile_function(model: Any = None, **options: Any) -> Any:
        if model is None:
            return functools.partial(compile_function, **options)
        if not inspect.isfunction(model):
            return compile_now(model, **options)
        compiled = functools.cache(lambda: compile_now(model, **options))

        @functools.wraps(model)
        def call(*args: Any, **kwargs: Any) -> Any:
            return compiled()(*args, **kwargs)

        return call

    torch.compile = compile_function  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compile_now


@functools.cache
def _import_quack() -> None:
    with compile_later():
        importlib.import_module("quack.gemm_interface")


@functools.cache
def _config(tile: Tile) -> Any:
    _import_quack()
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
    _import_quack()
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
    _import_quack()
    from quack.epilogue.library import dgated_mod

    return dgated_mod("swiglu", has_scale=with_probs, has_reduce=with_probs)


@functools.cache
def _plans(device: torch.device) -> dict[tuple, Any]:
    """Plans of this process on one device."""
    return {}


def _bind_context(device: torch.device) -> None:
    """QuACK asks the driver about the GPU while it makes a plan; a thread of autograd has a driver context only after
    its first launch."""
    torch.zeros(1, device=device)


@functools.cache
def _entry_points() -> tuple[Any, Any, Any]:
    _import_quack()
    from quack.gemm import run_gemm_plan
    from quack.gemm_interface import _gemm_execute
    from quack.gemm_runtime.host import run_gemm_epi_plan

    return run_gemm_epi_plan, run_gemm_plan, _gemm_execute


def _launch_epilogue(
    mod: Any,
    key: tuple,
    a: Tensor,
    b: Tensor,
    d: Tensor,
    c: Tensor | None,
    *,
    tile: Tile,
    operands: dict[str, Tensor],
    offsets: Tensor,
    index: Tensor | None,
    b_kn: bool,
    concat: tuple[str, ...] | None,
) -> None:
    plans = _plans(a.device)
    plan = plans.get(key)
    if plan is not None:
        _entry_points()[0](plan, a, b, d, c, operands, cu_seqlens_m=offsets, A_idx=index)
        return
    _bind_context(a.device)
    config = _config(tile)
    plans[key] = mod.gemm(
        a,
        b,
        d,
        c,
        epi_args=operands,
        tile_M=config.tile_m,
        tile_N=config.tile_n,
        tile_K=config.tile_k,
        cluster_M=config.cluster_m,
        cluster_N=config.cluster_n,
        pingpong=config.pingpong,
        is_dynamic_persistent=False,
        max_swizzle_size=config.max_swizzle_size,
        cu_seqlens_m=offsets,
        A_idx=index,
        b_kn=b_kn,
        concat_layout=concat,
    )


def gate_up(
    x: Tensor, weight_L2FD: Tensor, probs_N: Tensor | None, *, offsets: Tensor, index: Tensor | None, tile: Tile
) -> tuple[Tensor, Tensor]:
    """F1: H [N, 2F] with alternating gate and up columns, and silu(g) * u * p [N, F]."""
    num_rows = x.shape[0] if index is None else index.shape[0]
    columns = weight_L2FD.shape[1]
    h_N2F, a_NF = x.new_empty(num_rows, columns), x.new_empty(num_rows, columns // 2)
    operands = {"activated": a_NF}
    if probs_N is not None:
        operands["probs"] = probs_N
    _launch_epilogue(
        _gated(probs_N is not None),
        ("gate_up", tile, probs_N is None, index is None),
        x,
        weight_L2FD,
        h_N2F,
        None,
        tile=tile,
        operands=operands,
        offsets=offsets,
        index=index,
        b_kn=False,
        concat=("B",),
    )
    return h_N2F, a_NF


def d_activation(
    d_rows: Tensor,
    down_LDF: Tensor,
    h_N2F: Tensor,
    probs_N: Tensor | None,
    *,
    offsets: Tensor,
    index: Tensor | None,
    tile: Tile,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """B1: d(H) [N, 2F], the activation times p again [N, F], and d(p) [N] (None without probabilities)."""
    num_rows, width = h_N2F.shape[0], down_LDF.shape[2]
    d_h_N2F, a_NF = torch.empty_like(h_N2F), h_N2F.new_empty(num_rows, width)
    operands, partial = {"mAuxOut": a_NF}, None
    if probs_N is not None:
        partial = h_N2F.new_empty(num_rows, -(-width // tile.n), dtype=torch.float32)
        operands.update(mColVecBroadcast=probs_N, mColVecReduce=partial)
    _launch_epilogue(
        _dgated(probs_N is not None),
        ("d_activation", tile, probs_N is None, index is None),
        d_rows,
        down_LDF,
        d_h_N2F,
        h_N2F,
        tile=tile,
        operands=operands,
        offsets=offsets,
        index=index,
        b_kn=True,
        concat=None,
    )
    return d_h_N2F, a_NF, None if partial is None else partial.sum(dim=-1)


def matmul(
    kind: str,
    a: Tensor,
    b_NK: Tensor,
    out: Tensor,
    *,
    tile: Tile,
    rows: Tensor | None = None,
    depth: Tensor | None = None,
    index: Tensor | None = None,
    concat: tuple[str, ...] | None = None,
    accumulate: bool = False,
    by_load: bool = False,
) -> None:
    """out (+)= a @ b^T, grouped over a's rows (`rows`: boundaries) or over the contraction (`depth`).

    Args:
        kind: name of the call site; all its calls have the same layouts.
        a: `[N, K]`, or `[M, N]` column-major with `depth`. b_NK: `[L, columns, K]`, or `[columns, N]` with `depth`.
        out: `[N, columns]`, or `[L, M, columns]` with `depth`; fp32 where it is accumulated into a main_grad.
        concat: `("B",)` or `("out",)`: that operand holds gate rows first where a kernel wants pairs.
        accumulate: add to `out`, by reductions in memory, or with `by_load` by reading it in the epilogue.
    """
    _, run_plan, execute = _entry_points()
    plans, key = _plans(a.device), (kind, tile, index is None, accumulate, by_load, out.dtype)
    plan, added = plans.get(key), out if accumulate and by_load else None
    if plan is not None:
        run_plan(plan, a, b_NK, out, added, cu_seqlens_m=rows, cu_seqlens_k=depth, A_idx=index)
        return
    _bind_context(a.device)
    plans[key] = execute(
        a,
        b_NK.mT,
        out,
        added,
        bias=None,
        alpha=1.0,
        beta=1.0,
        cu_seqlens_m=rows,
        cu_seqlens_k=depth,
        A_idx=index,
        batch_idx_permute=None,
        add_to_output=accumulate and not by_load,
        dynamic_scheduler=False,
        config=_config(tile),
        rounding_mode=0,
        sr_seed=0,
        concat_layout=concat if concat is None or added is None else (*concat, "C"),
        SFA=None,
        SFB=None,
        split_k=1,
        split_k_mode=0,
    )
