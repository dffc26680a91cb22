"""Quantised expert MLPs for rollout and evaluation: forward only, on any device, the numbers of an inference engine.

| format | weights | activations (both GEMMs' inputs) |
|---|---|---|
| int8 | symmetric, one scale per output channel | symmetric, one scale per token |
| fp8_1x128 | e4m3, one scale per 128 inputs of an output channel | e4m3, one scale per token and 128 features |

Precision: scales fp32 (largest magnitude / 127 or / 448), round to nearest even; products and sums fp32. int8
products are
exact, and so are their sums up to 1040 inputs; fp8 is emulated by dequantising, which hardware does after every block
of
128. The activation and the routing probability stay fp32. Quantised weights are kept until a value of a parameter
changes, which is found by reading them: writing to `.data`, as weight syncs of rollout engines do, counts no version.

n rows of an expert, N rows, D hidden, F width, L local experts, B blocks of 128.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_layer.experts.spec import Layout, Weights
from moe_layer.ops.glu import glu_forward

FORMATS = ("int8", "fp8_1x128")
BLOCK = 128
INT8_MAX = 127.0
FP8_MAX = 448.0
_BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def dequantized(x: Tensor, weight_format: str) -> Tensor:
    """fp32 values that `x` `[..., C]` has after a trip through the format, scales along the last dimension."""
    x = x.detach().float()
    if weight_format == "int8":
        scale = _scale(x, INT8_MAX)
        return (x / scale).round().clamp(-INT8_MAX, INT8_MAX) * scale
    width = x.shape[-1]
    blocks = torch.nn.functional.pad(x, (0, -width % BLOCK)).unflatten(-1, (-1, BLOCK))
    scale = _scale(blocks, FP8_MAX)
    rounded = (blocks / scale).clamp(-FP8_MAX, FP8_MAX).to(torch.float8_e4m3fn).float() * scale
    return rounded.flatten(-2)[..., :width]


def _scale(x: Tensor, largest: float) -> Tensor:
    """fp32 `[..., 1]`; 1 where everything is zero. Divided by a tensor: CUDA multiplies by a number's reciprocal."""
    if not x.shape[-1]:
        return x.new_ones(*x.shape[:-1], 1)
    peak = x.abs().amax(dim=-1, keepdim=True) / x.new_full((), largest)
    return torch.where(peak > 0, peak, 1.0)


def _fingerprint(weight: Tensor) -> int:
    """A sum over the bits of a contiguous weight `[..., C]` that knows its rows; reads one number on the host."""
    bits = weight.detach().view(_BITS[weight.element_size()])
    rows_N = bits.sum(dim=-1, dtype=torch.int64).flatten()
    return int((rows_N * torch.arange(1, rows_N.numel() + 1, device=weight.device)).sum())


@dataclass
class QuantizedWeights:
    """Dequantised weights of one module, made again when its parameters were written to."""

    key: tuple[Any, ...] = ()
    weights: Weights | None = None

    def of(self, weights: Weights, weight_format: str) -> Weights:
        """The weights after quantisation, fp32."""
        tensors = (weights.gate_up, weights.down)
        key = (weight_format, *((_fingerprint(t), t.dtype, t.device, tuple(t.shape)) for t in tensors))
        if self.weights is None or self.key != key:
            with torch.no_grad():
                gate_up, down = (dequantized(t, weight_format) for t in tensors)
            self.key, self.weights = key, Weights(gate_up, down, None, None)
        return Weights(self.weights.gate_up, self.weights.down, weights.gate_up_bias, weights.down_bias)

    def __deepcopy__(self, memo: dict[int, Any]) -> QuantizedWeights:
        return QuantizedWeights()

    def __reduce__(self) -> tuple[Any, ...]:
        return QuantizedWeights, ()


class ForwardOnly(torch.autograd.Function):
    """The quantised MLP; x and probs are inputs so that a backward through it is noticed."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, probs: Tensor | None, run: Any, weight_format: str) -> Tensor:
        ctx.weight_format = weight_format
        return run()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise RuntimeError(
            f"experts.weight_format {ctx.weight_format} has no backward: quantised experts serve rollout and "
            "evaluation; "
            "train a copy of the layer with experts.weight_format input"
        )


def forward(
    layout: Layout,
    weights: Weights,
    *,
    weight_format: str,
    activation: str,
    limit: float,
    alpha: float,
    cache: QuantizedWeights,
) -> Tensor:
    """rows [N, D] in x's dtype, pads and tail zero; reads the row counts on the host."""

    def run() -> Tensor:
        return _mlp(layout, cache.of(weights, weight_format), weight_format, activation, limit, alpha)

    return ForwardOnly.apply(layout.x, layout.probs, run, weight_format)


def _mlp(layout: Layout, weights: Weights, weight_format: str, activation: str, limit: float, alpha: float) -> Tensor:
    """Row by row except for the GEMMs, so that pads and the tail, which may hold anything, disturb nobody."""
    bounds = torch.stack((layout.offsets[:-1], layout.counts)).tolist()
    groups = [(expert, slice(start, start + n)) for expert, (start, n) in enumerate(zip(*bounds, strict=True)) if n]
    probs_N = None if layout.probs is None else layout.probs.float()
    x_CD = dequantized(layout.x, weight_format)  # once a token where rows are gathered
    h_N2F = x_CD.new_empty(layout.num_rows, weights.gate_up.shape[1])
    for expert, rows in groups:
        x_nD = x_CD[rows] if layout.index is None else x_CD.index_select(0, layout.index[rows])
        torch.mm(x_nD, weights.gate_up[expert].t(), out=h_N2F[rows])
        if weights.gate_up_bias is not None:
            h_N2F[rows] += weights.gate_up_bias[expert].float()
    a_NF = dequantized(glu_forward(h_N2F, probs_N, activation=activation, limit=limit, alpha=alpha), weight_format)
    out_ND = layout.x.new_zeros(layout.num_rows, weights.down.shape[1])
    for expert, rows in groups:
        y_nD = a_NF[rows] @ weights.down[expert].t()
        if weights.down_bias is not None:
            bias_D = weights.down_bias[expert].float()
            y_nD = y_nD + (bias_D if probs_N is None else probs_N[rows].unsqueeze(1) * bias_D)
        out_ND[rows] = y_nD.to(out_ND.dtype)
    return out_ND
