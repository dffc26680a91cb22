"""One x, several consumers, one fixed order of gradient addition.

Autograd adds the gradients of a tensor in the order in which its consumers happen to finish. Behind this op the order
is that of the outputs (routed, shared, gate), so dx has the same bits every run and at every expert-parallel size.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None]:
        total: Tensor | None = None
        for grad in grads:
            if grad is not None:
                total = grad if total is None else total + grad
        return total, None


def fan_out(x: Tensor, count: int) -> tuple[Tensor, ...]:
    """`count` views of x whose gradients are added first to last."""
    return _FanOut.apply(x, count)
