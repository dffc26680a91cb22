"""One x, several consumers, one fixed order of gradient addition.

Autograd adds the gradients of a tensor in the order in which its consumers happen to finish. Behind this op the order
is that of the outputs (routed, shared, gate), so dx has the same bits every run and at every expert-parallel size.

The last term may be a matrix product (the gate's d(logits) @ weight): left in a `LateProduct`, it is added by the GEMM
that computes it, which saves writing and reading [T, D] once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.ops._call import refuse_second_derivative


class LateProduct:
    """Carries a @ b from a consumer's backward to the fan-out's, in place of that consumer's gradient (None then).

    One object belongs to one forward pass.
    """

    def __init__(self) -> None:
        self._factors: tuple[Tensor, Tensor] | None = None

    def put(self, a_TE: Tensor, b_ED: Tensor) -> None:
        """Called by the consumer's backward, which then returns None for x."""
        self._factors = (a_TE, b_ED)

    def add_to(self, total_TD: Tensor | None) -> Tensor | None:
        """total + a @ b, rounded once; writes into `total_TD`."""
        factors, self._factors = self._factors, None
        if factors is None:
            return total_TD
        return torch.mm(*factors) if total_TD is None else total_TD.addmm_(*factors)


class _FanOut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, count: int, late: LateProduct | None) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.late = late
        return tuple(x.view_as(x) for _ in range(count))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        refuse_second_derivative()
        total: Tensor | None = None
        for grad in grads:
            if grad is not None:
                total = grad if total is None else total + grad
        if ctx.late is not None:
            # In place: the first term is a sum that the experts or the dispatcher wrote for this node alone.
            total = ctx.late.add_to(total)
        return total, None, None


def fan_out(x: Tensor, count: int, late: LateProduct | None = None) -> tuple[Tensor, ...]:
    """`count` views of x whose gradients are added first to last, and `late`'s product after them."""
    return _FanOut.apply(x, count, late)
