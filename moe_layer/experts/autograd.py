"""The eager door: one autograd.Function, cheaper than a custom op, and the only door that knows main_grad."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_layer.experts.compute import row_gradient, run_backward, run_forward
from moe_layer.experts.parts import Parts
from moe_layer.experts.spec import ExpertsSpec, Layout, Weights
from moe_layer.ops._call import refuse_second_derivative
from moe_layer.types import GradientLink

NAMES = ("experts.gate_up_proj", "experts.down_proj", "experts.gate_up_proj_bias", "experts.down_proj_bias")


def main_grad_of(parameter: Tensor | None, name: str) -> Tensor | None:
    """The parameter's `main_grad`, checked, or None when it has none or wants no gradient.

    Raises:
        ValueError: the parameter is sharded, or main_grad has another shape, dtype or device.
        RuntimeError: torch.compile traces a full graph (where breaks are allowed, the module then runs eagerly).
    """
    main_grad = getattr(parameter, "main_grad", None)
    if parameter is None or main_grad is None or not parameter.requires_grad:
        return None
    if hasattr(parameter, "to_local") or not parameter.is_leaf:
        raise ValueError(
            f"{name} has a main_grad but is sharded (DTensor or FSDP), where gradients must go through "
            "autograd; delete its main_grad attribute or keep the parameter unsharded"
        )
    if torch.compiler.is_compiling():
        raise RuntimeError(
            f"{name} has a main_grad, which torch.compile cannot update in backward; "
            "delete the attribute or run this layer in eager mode (torch.compiler.disable)"
        )
    if main_grad.dtype != torch.float32 or main_grad.shape != parameter.shape or main_grad.device != parameter.device:
        raise ValueError(
            f"{name}.main_grad is {main_grad.dtype} {tuple(main_grad.shape)} on {main_grad.device}, must be "
            f"float32 {tuple(parameter.shape)} on {parameter.device}; allocate it as "
            "torch.zeros_like(parameter, dtype=torch.float32)"
        )
    return main_grad


class ExpertsFunction(torch.autograd.Function):
    """rows [N, D] of a layout; its x and probs and the fields of Weights once more, for autograd.

    `parameters` are the weights' owners (for main_grad).
    """

    @staticmethod
    def forward(
        ctx: Any,
        spec: ExpertsSpec,
        parameters: tuple[nn.Parameter | None, ...],
        link: GradientLink | None,
        parts: Parts | None,
        layout: Layout,
        x: Tensor,
        probs: Tensor | None,
        *weights: Any,
    ) -> Tensor:
        layout = layout._replace(x=x, probs=probs)
        rows_ND, h = run_forward(layout, Weights(*weights), spec)
        ctx.spec, ctx.parameters, ctx.link, ctx.parts = spec, parameters, link, parts
        ctx.save_for_backward(*layout, *weights, h)
        return rows_ND

    @staticmethod
    def backward(ctx: Any, d_rows_ND: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        *tensors, h = ctx.saved_tensors
        split = len(Layout._fields)
        main_grads = [main_grad_of(p, name) for p, name in zip(ctx.parameters, NAMES, strict=True)]
        found = run_backward(
            row_gradient(d_rows_ND, ctx.link),
            h,
            Layout(*tensors[:split]),
            Weights(*tensors[split:]),
            ctx.spec,
            ctx.needs_input_grad[_NOT_DIFFERENTIABLE:],
            main_grads=main_grads,
            parts=ctx.parts,
        )
        for parameter, main_grad in zip(ctx.parameters, main_grads, strict=True):
            if main_grad is not None:
                parameter.grad_added_to_main_grad = True
        return (*(None,) * _NOT_DIFFERENTIABLE, *found)


_NOT_DIFFERENTIABLE = 5  # the first arguments of ExpertsFunction


def experts_mlp(
    layout: Layout,
    weights: Weights,
    spec: ExpertsSpec,
    *,
    parameters: tuple[nn.Parameter | None, ...],
    link: GradientLink | None = None,
    parts: Parts | None = None,
) -> Tensor:
    """rows [N, D]: through `ExpertsFunction` in eager mode, through the op pair under torch.compile."""
    for parameter, name in zip(parameters, NAMES, strict=True):
        main_grad_of(parameter, name)
    if torch.compiler.is_compiling():
        return torch.ops.moe_layer.experts_fwd(*layout, *weights, *spec.as_arguments())[0]
    rows_ND = ExpertsFunction.apply(spec, parameters, link, parts, layout, layout.x, layout.probs, *weights)
    if link is not None:
        link.accept(rows_ND)
    return rows_ND
