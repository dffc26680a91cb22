"""Per-expert loop: any device and dtype, fp64 included. On CPU it is also the fastest backend.

Each expert's rows go through the same calls on the same matrix wherever the expert lives, so results do not depend on
the number of ranks (design section 3, bit promise). Only real rows are read: pads and rows past the last offset may
hold anything, and come back as zeros. On an accelerator each pass reads the counts once on the host.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from moe_layer.experts.spec import ExpertsSpec, Layout, RowGradient, Weights, WeightTargets
from moe_layer.ops.glu import glu_backward, glu_forward


def _groups(layout: Layout) -> Iterator[tuple[int, slice]]:
    """(expert, its real rows) for each expert that has rows."""
    bounds = torch.stack((layout.offsets[:-1], layout.counts)).tolist()
    for expert, (start, count) in enumerate(zip(*bounds, strict=True)):
        if count:
            yield expert, slice(start, start + count)


def _zero_gaps(out_ND: Tensor, groups: list[tuple[int, slice]]) -> None:
    """Zero the pads and the tail, so that nothing uninitialised leaves this file."""
    end = 0
    for _, rows in groups:
        out_ND[end : rows.start].zero_()
        end = rows.stop
    out_ND[end:].zero_()


def _gather(layout: Layout, rows: slice, dtype: torch.dtype) -> Tensor:
    x = layout.x[rows] if layout.index is None else layout.x.index_select(0, layout.index[rows])
    return x.to(dtype)


def _project_up(x_nD: Tensor, weights: Weights, expert: int, out: Tensor | None = None) -> Tensor:
    matrix = weights.gate_up[expert].t()
    if weights.gate_up_bias is None:
        return torch.mm(x_nD, matrix, out=out)
    return torch.addmm(weights.gate_up_bias[expert], x_nD, matrix, out=out)


def _add_down_bias(y_nD: Tensor, bias_D: Tensor, probs_n: Tensor | None) -> None:
    if probs_n is None:
        y_nD.add_(bias_D)
    else:
        y_nD.add_(torch.outer(probs_n, bias_D.to(probs_n.dtype)).to(y_nD.dtype))


def _accumulate(target: Tensor, a: Tensor, b: Tensor, add: bool) -> None:
    """target (+)= a.T @ b, in one GEMM where the dtypes allow it."""
    if not add and target.dtype == a.dtype:
        torch.mm(a.t(), b, out=target)
    elif not add:
        target.copy_(torch.mm(a.t(), b))
    elif target.dtype == a.dtype:
        target.addmm_(a.t(), b)
    else:
        target.add_(torch.mm(a.t(), b))


def _accumulate_rows(target: Tensor, rows: Tensor, add: bool) -> None:
    total = rows.sum(0, dtype=torch.float64 if rows.dtype == torch.float64 else torch.float32)
    target.add_(total) if add else target.copy_(total)


def _zero_idle(targets: WeightTargets, groups: list[tuple[int, slice]], num_local: int) -> None:
    """Experts without rows get a zero gradient."""
    busy = {expert for expert, _ in groups}
    for target, add in zip(targets[:4], targets.accumulate, strict=True):
        if target is None or add:
            continue
        for expert in range(num_local):
            if expert not in busy:
                target[expert].zero_()


def forward(layout: Layout, weights: Weights, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """rows [N, D] and H [N, 2F] ([0, 2F] unless `spec.save_h`), both in `spec.compute_dtype`."""
    dtype, num_rows = spec.compute_dtype, layout.num_rows
    width = weights.gate_up.shape[1]
    out_ND = layout.x.new_empty(num_rows, weights.down.shape[1], dtype=dtype)
    h_N2F = layout.x.new_empty(num_rows if spec.save_h else 0, width, dtype=dtype)
    groups = list(_groups(layout))
    for expert, rows in groups:
        x_nD = _gather(layout, rows, dtype)
        h_n2F = _project_up(x_nD, weights, expert, h_N2F[rows] if spec.save_h else None)
        probs_n = None if layout.probs is None else layout.probs[rows]
        a_nF = glu_forward(h_n2F, probs_n, activation=spec.activation, limit=spec.limit, alpha=spec.alpha)
        y_nD = torch.mm(a_nF, weights.down[expert].t(), out=out_ND[rows])
        if weights.down_bias is not None:
            _add_down_bias(y_nD, weights.down_bias[expert], probs_n)
    _zero_gaps(out_ND, groups)
    return out_ND, h_N2F


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
    """d(gathered x) [N, D] in the compute dtype (None unless `need_x`) and d(probs) [N]; fills `targets`."""
    dtype, num_rows = spec.compute_dtype, layout.num_rows
    add_gate_up, add_down, add_gate_up_bias, add_down_bias = targets.accumulate
    d_x_ND = layout.x.new_empty(num_rows, layout.x.shape[1], dtype=dtype) if need_x else None
    d_probs_N = None if layout.probs is None else torch.zeros_like(layout.probs)
    groups = list(_groups(layout))
    for expert, rows in groups:
        x_nD = _gather(layout, rows, dtype)
        d_y_nD = d_out.rows[rows] if d_out.index is None else d_out.rows.index_select(0, d_out.index[rows])
        h_n2F = h_N2F[rows] if spec.save_h else _project_up(x_nD, weights, expert)
        probs_n = None if layout.probs is None else layout.probs[rows]
        d_h_n2F, d_probs_n, a_nF = glu_backward(
            torch.mm(d_y_nD, weights.down[expert]),
            h_n2F,
            probs_n,
            activation=spec.activation,
            limit=spec.limit,
            alpha=spec.alpha,
        )
        if targets.down is not None:
            _accumulate(targets.down[expert], d_y_nD, a_nF, add_down)
        if targets.gate_up is not None:
            _accumulate(targets.gate_up[expert], d_h_n2F, x_nD, add_gate_up)
        if targets.gate_up_bias is not None:
            _accumulate_rows(targets.gate_up_bias[expert], d_h_n2F, add_gate_up_bias)
        if weights.down_bias is not None and probs_n is not None:
            wide_nD = d_y_nD.to(d_probs_n.dtype)
            d_probs_n.add_(wide_nD @ weights.down_bias[expert].to(wide_nD.dtype))
            d_y_nD = wide_nD * probs_n.unsqueeze(-1)
        if targets.down_bias is not None:
            _accumulate_rows(targets.down_bias[expert], d_y_nD, add_down_bias)
        if d_probs_N is not None:
            d_probs_N[rows] = d_probs_n
        if d_x_ND is not None:
            torch.mm(d_h_n2F, weights.gate_up[expert], out=d_x_ND[rows])
    if d_x_ND is not None:
        _zero_gaps(d_x_ND, groups)
    _zero_idle(targets, groups, weights.gate_up.shape[0])
    return d_x_ND, d_probs_N
