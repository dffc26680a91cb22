"""The computation behind both doors: casts, autocast off, choice of the backend, the compact row gradient."""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType

import torch
from torch import Tensor

import moe_layer.ops.experts as op
from moe_layer.experts import grouped_mm, quack, reference
from moe_layer.experts.parts import Parts
from moe_layer.experts.spec import ExpertsSpec, Layout, RowGradient, Weights, WeightTargets
from moe_layer.ops.cast import cast, dense, no_autocast
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.stash import pack_fp8, unpack_fp8
from moe_layer.ops.tree_reduce import reduction_blocks, tree_reduce
from moe_layer.types import GradientLink

BACKENDS: dict[str, ModuleType] = {"reference": reference, "grouped_mm": grouped_mm, "quack": quack}


def _cast(weights: Weights, dtype: torch.dtype) -> Weights:
    gate_up_bias, down_bias = (None if bias is None else dense(bias, dtype) for bias in weights[2:])
    return Weights(dense(weights.gate_up, dtype), dense(weights.down, dtype), gate_up_bias, down_bias)


def run_forward(layout: Layout, weights: Weights, spec: ExpertsSpec) -> tuple[Tensor, Tensor]:
    """rows [N, D] in x's dtype and what backward wants of H (see the backend; packed under `keep_h: fp8`)."""
    with no_autocast(layout.x.device.type):
        rows_ND, h = BACKENDS[spec.backend].forward(layout, _cast(weights, spec.compute_dtype), spec)
        return cast(rows_ND, layout.x.dtype), pack_fp8(h) if spec.keep_h == "fp8" else h


def row_gradient(d_rows_ND: Tensor, link: GradientLink | None) -> RowGradient:
    """d(rows) as the backends take it: the source rows of a link where nothing else flowed in."""
    if link is None:
        return RowGradient(d_rows_ND, None)
    found, d_y_TD = link.take(d_rows_ND)
    if d_y_TD is not None:
        return RowGradient(found + gather_rows(d_y_TD, link.index_N), None)
    return RowGradient(found, None if found is d_rows_ND else link.index_N)


def run_backward(
    d_out: RowGradient,
    h: Tensor,
    layout: Layout,
    weights: Weights,
    spec: ExpertsSpec,
    needs: Sequence[bool],
    *,
    main_grads: Sequence[Tensor | None] = (None, None, None, None),
    parts: Parts | None = None,
) -> tuple[Tensor | None, ...]:
    """Gradients of x, probs and the four weights, None where `needs` is False or where they went to a main_grad.

    The weights' gradients of one of several `parts` are None until the last one returns the sum.
    """

    def make() -> WeightTargets:
        return _targets(weights, needs[2:], main_grads)

    with no_autocast(layout.x.device.type):
        targets, last = (make(), True) if parts is None else parts.targets(make)
        if spec.keep_h == "fp8":
            h = unpack_fp8(h, weights.gate_up.shape[1], spec.compute_dtype)
        d_x, d_probs = BACKENDS[spec.backend].backward(
            RowGradient(dense(d_out.rows, spec.compute_dtype), d_out.index),
            h,
            layout,
            _cast(weights, spec.compute_dtype),
            spec,
            targets,
            need_x=needs[0],
        )
        if torch.is_anomaly_enabled() and not torch.compiler.is_compiling():
            d_x, d_probs = (None if values is None else _defined(values, layout) for values in (d_x, d_probs))
        if d_x is not None:
            d_x = to_source_rows(d_x, layout, spec)
        d_weights = tuple(
            target if last and main_grad is None else None
            for target, main_grad in zip(targets[:4], main_grads, strict=True)
        )
        return (d_x, d_probs if needs[1] else None, *d_weights)


def _defined(values_N: Tensor, layout: Layout) -> Tensor:
    """Zeros in the pads and the tail, where `torch.autograd.detect_anomaly` would take undefined values for ours."""
    row_N = torch.arange(values_N.shape[0], device=values_N.device)
    expert_N = torch.searchsorted(layout.offsets[1:], row_N, right=True).clamp(max=layout.counts.shape[0] - 1)
    there_N = row_N - layout.offsets[expert_N] < layout.counts[expert_N]
    return torch.where(there_N.view(-1, *[1] * (values_N.ndim - 1)), values_N, 0)


def _targets(weights: Weights, needs: Sequence[bool], main_grads: Sequence[Tensor | None]) -> WeightTargets:
    targets: list[Tensor | None] = []
    for weight, need, main_grad in zip(weights, needs, main_grads, strict=True):
        if weight is None or not need:
            targets.append(None)
        elif main_grad is not None:
            targets.append(main_grad)
        else:
            targets.append(torch.empty(weight.shape, dtype=weight.dtype, device=weight.device))
    accumulate = tuple(main_grad is not None for main_grad in main_grads)
    return WeightTargets(*targets, accumulate=accumulate)


def to_source_rows(d_x_ND: Tensor, layout: Layout, spec: ExpertsSpec) -> Tensor:
    """d(gathered rows) -> d(x): compact rows sum their slots by the tree that dispatch uses in expert-major mode."""
    if layout.index is None:
        return cast(d_x_ND, layout.x.dtype)
    d_x_CD = tree_reduce(
        d_x_ND,
        layout.row_CK,
        ids_MK=layout.ids_CK,
        num_experts=spec.num_experts,
        blocks=reduction_blocks(spec.num_experts),
        like_rows=d_x_ND.dtype == layout.x.dtype,
    )
    return cast(d_x_CD, layout.x.dtype)


def _split(arguments: tuple) -> tuple[Layout, Weights, ExpertsSpec, tuple]:
    weights_end = op.NUM_LAYOUT + op.NUM_WEIGHTS
    spec_end = weights_end + len(ExpertsSpec.__dataclass_fields__)
    return (
        Layout(*arguments[: op.NUM_LAYOUT]),
        Weights(*arguments[op.NUM_LAYOUT : weights_end]),
        ExpertsSpec(*arguments[weights_end:spec_end]),
        arguments[spec_end:],
    )


@torch.library.impl("moe_layer::experts_fwd", "default")
def _experts_fwd(*arguments: object) -> tuple[Tensor, Tensor]:
    layout, weights, spec, _ = _split(arguments)
    return run_forward(layout, weights, spec)


@torch.library.impl("moe_layer::experts_bwd", "default")
def _experts_bwd(d_rows_ND: Tensor, h: Tensor, *arguments: object) -> tuple[Tensor, ...]:
    layout, weights, spec, (needs,) = _split(arguments)
    found = run_backward(RowGradient(d_rows_ND, None), h, layout, weights, spec, needs)
    return tuple(layout.x.new_empty(0) if gradient is None else gradient for gradient in found)
