"""fan_out: one order of addition, and a last term that its GEMM adds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.ops.fan_out import LateProduct, fan_out


class Linear(torch.autograd.Function):
    """x @ w.T whose gradient of x is left in `late`, as the gate does."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, late: LateProduct) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.late = late
        return x @ weight.t()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.late.put(grads[0], ctx.saved_tensors[0])
        return None, None, None


@pytest.mark.parametrize("others", [0, 1, 2])
def test_late_product_is_added_to_the_other_gradients(others: int) -> None:
    x, weight = torch.randn(5, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 4, dtype=torch.float64)
    upstream = torch.randn(5, 3, dtype=torch.float64)
    late = LateProduct()
    *plain, last = fan_out(x, others + 1, late)
    terms = [(part * (i + 2)).sum() for i, part in enumerate(plain)]
    for _ in range(2):
        x.grad = None
        torch.autograd.backward(
            [*terms, Linear.apply(last, weight, late)],
            [*(torch.ones((), dtype=torch.float64) for _ in terms), upstream],
            retain_graph=True,
        )
        torch.testing.assert_close(x.grad, upstream @ weight + sum(range(2, others + 2)))


def test_nothing_late_is_a_plain_sum() -> None:
    x = torch.randn(3, 2, requires_grad=True)
    first, second = fan_out(x, 2, LateProduct())
    (first * 2 + second * 3).sum().backward()
    assert torch.equal(x.grad, torch.full((3, 2), 5.0))
