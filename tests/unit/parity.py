"""Comparison of two modules with the same weights: output and every gradient, under a random upstream gradient."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from torch import Tensor

TOLERANCE = 1e-6


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest error relative to the largest entry; an all-zero expectation must be met exactly."""
    scale = expected.detach().abs().max().item() if expected.numel() else 0.0
    error = (found.detach().to(expected.dtype) - expected.detach()).abs().max().item() if expected.numel() else 0.0
    return error if scale == 0 else error / scale


def gradients(
    call: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, parameters: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """y, dx and the gradient of each parameter."""
    x = x.clone().requires_grad_()
    for parameter in parameters.values():
        parameter.grad = None
    y = call(x)
    y.backward(dy)
    assert x.grad is not None
    result = {"y": y.detach(), "dx": x.grad}
    for name, parameter in parameters.items():
        assert parameter.grad is not None, f"{name} has no gradient"
        result[name] = parameter.grad.clone()
    return result


def assert_close(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, tolerance: float = TOLERANCE) -> None:
    """Every tensor within `tolerance`, relative to the largest entry of the expected one."""
    assert set(found) == set(expected)
    errors = {name: relative(found[name], expected[name]) for name in expected}
    bad = {name: error for name, error in errors.items() if not error <= tolerance}
    assert not bad, f"relative errors above {tolerance}: {bad}"
    assert all(tensor.abs().max() > 0 for tensor in expected.values()), "a comparison of zeros proves nothing"
