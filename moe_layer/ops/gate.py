"""Gate GEMM: logits_TE = x_TD @ weight.T (+ bias), with the dtype of each stage chosen by `gate_dtype`.

Precision notes
    fp32_out: operands in the input's dtype, fp32 accumulation and output. CUDA uses the GEMM's own fp32 output;
        elsewhere the operands are cast. The backward rounds dlogits to the operands' dtype, as a bf16 linear would.
    fp32: operands cast to fp32.
    input: a plain linear in the input's dtype.
    fp32 and fp64 inputs are computed as they are under all three.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from moe_layer.ops.cast import cast, no_autocast
from moe_layer.ops.fan_out import LateProduct


class _Fp32OutLinear(torch.autograd.Function):
    """x @ w.T from half-precision operands into fp32; both gradients are half-precision GEMMs."""

    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight: Tensor, late: LateProduct | None) -> Tensor:
        ctx.save_for_backward(x_TD, weight)
        ctx.late = late
        return torch.mm(x_TD, weight.t(), out_dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x_TD, weight = ctx.saved_tensors
        dlogits_TE = grads[0].to(x_TD.dtype)
        need_x, need_weight = ctx.needs_input_grad[:2]
        d_x_TD = None
        if need_x and ctx.late is not None and not torch.is_grad_enabled():
            ctx.late.put(dlogits_TE, weight)
        elif need_x:
            d_x_TD = dlogits_TE @ weight
        return d_x_TD, dlogits_TE.t() @ x_TD if need_weight else None, None


def gate_logits(
    x_TD: Tensor, weight: Tensor, bias: Tensor | None, *, gate_dtype: str, late: LateProduct | None = None
) -> Tensor:
    """Router logits.

    Args:
        x_TD: `[T, D]` floating. weight: `[E, D]`. bias: `[E]` or None.
        gate_dtype: `fp32_out | fp32 | input`.
        late: of the `fan_out` that made x_TD; under `fp32_out` on CUDA it takes d(x) in place of autograd.

    Returns:
        `[T, E]`: fp32 for half-precision inputs unless `input`, else x's dtype.
    """
    with no_autocast(x_TD.device.type):
        if gate_dtype == "input" or x_TD.dtype in (torch.float32, torch.float64):
            return F.linear(x_TD, cast(weight, x_TD.dtype), None if bias is None else cast(bias, x_TD.dtype))
        if gate_dtype == "fp32_out" and x_TD.is_cuda:
            logits_TE = _Fp32OutLinear.apply(x_TD, cast(weight, x_TD.dtype), late)
        else:
            logits_TE = F.linear(x_TD.float(), weight.float())
        return logits_TE if bias is None else logits_TE + bias.float()
