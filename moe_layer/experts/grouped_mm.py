"""torch's grouped GEMM (torch.nn.functional.grouped_mm): no host synchronisation on CUDA with bf16.

The GEMMs read every row inside the offsets: pads must be zero rows and the upstream gradient at pads must be zero
(dispatchers and the combine's backward write them so). Rows past the last offset are never read by the GEMMs, whose
outputs are uninitialised there; the activation passes over them row by row and nothing sums over them.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.experts.spec import ExpertsSpec, Layout, RowGradient, Weights, WeightTargets
from moe_layer.ops.glu import glu, glu_bwd

_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def obstacle(device: torch.device, dtype: torch.dtype, *, hidden_size: int, width: int) -> str | None:
    """Why grouped_mm cannot run operands like these, with the remedy; None when it can."""
    if not hasattr(torch.nn.functional, "grouped_mm") and not hasattr(torch, "_grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm; install torch >= 2.11"
    if dtype not in _DTYPES:
        return f"grouped_mm has no {dtype} kernel; use bfloat16"
    if device.type == "cuda":
        if dtype != torch.bfloat16:
            return f"on CUDA grouped_mm is fast in bfloat16 only, not {dtype}; use bfloat16 or autocast"
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            return f"grouped_mm needs compute capability 8.0 and this GPU has {capability}; use a newer one"
    multiple = 16 // dtype.itemsize
    if hidden_size % multiple or width % multiple:
        return (
            f"grouped_mm needs rows of a multiple of 16 bytes, and hidden_size {hidden_size}, width {width} "
            f"are not both multiples of {multiple} ({dtype}); round them up"
        )
    return None


def _grouped_mm(a: Tensor, b: Tensor, ends_L: Tensor) -> Tensor:
    function = getattr(torch.nn.functional, "grouped_mm", None) or torch._grouped_mm
    return function(a, b, offs=ends_L)


def _row_experts(layout: Layout, num_rows: int) -> Tensor:
    """Local expert of each row, int64 [N]; rows past the end get the last expert and are ignored."""
    positions = torch.arange(num_rows, device=layout.offsets.device, dtype=layout.offsets.dtype)
    return torch.bucketize(positions, layout.offsets[1:-1], right=True)


def _gather(layout: Layout, dtype: torch.dtype) -> Tensor:
    x = layout.x if layout.index is None else layout.x.index_select(0, layout.index)
    return x.to(dtype)


def _project_up(x_ND: Tensor, layout: Layout, weights: Weights, ends_L: Tensor) -> Tensor:
    h_N2F = _grouped_mm(x_ND, weights.gate_up.transpose(1, 2), ends_L)
    if weights.gate_up_bias is not None:
        h_N2F.add_(weights.gate_up_bias[_row_experts(layout, x_ND.shape[0])])
    return h_N2F


def forward(layout: Layout, weights: Weights, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """rows [N, D] and H [N, 2F] ([0, 2F] unless `spec.save_h`), both in `spec.compute_dtype`."""
    if layout.num_rows == 0:
        empty = layout.x.new_empty(0, weights.down.shape[1], dtype=spec.compute_dtype)
        return empty, empty.new_empty(0, weights.gate_up.shape[1])
    ends_L = layout.offsets[1:]
    h_N2F = _project_up(_gather(layout, spec.compute_dtype), layout, weights, ends_L)
    a_NF = glu(h_N2F, layout.probs, activation=spec.activation, limit=spec.limit, alpha=spec.alpha)
    out_ND = _grouped_mm(a_NF, weights.down.transpose(1, 2), ends_L)
    if weights.down_bias is not None:
        bias_ND = weights.down_bias[_row_experts(layout, layout.num_rows)]
        if layout.probs is not None:
            bias_ND = (bias_ND.to(layout.probs.dtype) * layout.probs.unsqueeze(-1)).to(out_ND.dtype)
        out_ND.add_(bias_ND)
    return out_ND, h_N2F if spec.save_h else h_N2F.new_empty(0, h_N2F.shape[1])


def _store(target: Tensor | None, value: Tensor, add: bool) -> None:
    if target is not None:
        target.add_(value) if add else target.copy_(value)


def _sum_rows(rows_NX: Tensor, ends_L: Tensor) -> Tensor:
    """Sum of each expert's rows, [L, X]: a grouped GEMM with ones, so that no atomics decide an order."""
    ones = rows_NX.new_ones(rows_NX.shape[0], 16 // rows_NX.dtype.itemsize)
    return _grouped_mm(rows_NX.t(), ones, ends_L)[..., 0]


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
    add_gate_up, add_down, add_gate_up_bias, add_down_bias = targets.accumulate
    d_out_ND = d_out.rows if d_out.index is None else d_out.rows.index_select(0, d_out.index)
    if layout.num_rows == 0:
        for target, add in zip(targets[:4], targets.accumulate, strict=True):
            if target is not None and not add:
                target.zero_()
        empty = d_out_ND.new_empty(0, layout.x.shape[1]) if need_x else None
        return empty, None if layout.probs is None else torch.zeros_like(layout.probs)
    ends_L = layout.offsets[1:]
    x_ND = _gather(layout, spec.compute_dtype)
    if not spec.save_h:
        h_N2F = _project_up(x_ND, layout, weights, ends_L)
    d_h_N2F, d_probs_N, a_NF = glu_bwd(
        _grouped_mm(d_out_ND, weights.down, ends_L),
        h_N2F,
        layout.probs,
        activation=spec.activation,
        limit=spec.limit,
        alpha=spec.alpha,
    )
    if targets.down is not None:
        _store(targets.down, _grouped_mm(d_out_ND.t(), a_NF, ends_L), add_down)
    if targets.gate_up is not None:
        _store(targets.gate_up, _grouped_mm(d_h_N2F.t(), x_ND, ends_L), add_gate_up)
    if targets.gate_up_bias is not None:
        _store(targets.gate_up_bias, _sum_rows(d_h_N2F, ends_L), add_gate_up_bias)
    if weights.down_bias is not None and layout.probs is not None:
        wide_ND = d_out_ND.to(layout.probs.dtype)
        d_probs_N = d_probs_N + (wide_ND * weights.down_bias[_row_experts(layout, layout.num_rows)]).sum(-1)
        d_out_ND = (wide_ND * layout.probs.unsqueeze(-1)).to(d_out_ND.dtype)
    if targets.down_bias is not None:
        _store(targets.down_bias, _sum_rows(d_out_ND, ends_L), add_down_bias)
    d_x_ND = _grouped_mm(d_h_N2F, weights.gate_up, ends_L) if need_x else None
    return d_x_ND, None if layout.probs is None else d_probs_N
