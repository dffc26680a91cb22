"""Gated activations of the expert MLP, times the routing probability, as one op and its backward.

Letters: N rows, F expert width. `h_N2F` holds the gate projection in columns [0, F) and the up projection in [F, 2F).

Precision notes: bf16 and fp16 inputs are widened to fp32, every step is fp32 and the result is rounded once; fp32 and
fp64 inputs are computed in their own dtype. Probabilities and their gradient are fp32 (fp64 with fp64 probabilities).

    swiglu           silu(g) * u
    swiglu_clamped   c * sigmoid(alpha * c) * (clamp(u, -limit, limit) + 1),  c = min(g, limit)      (gpt-oss)
    geglu            gelu_tanh(g) * u
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("swiglu", "swiglu_clamped", "geglu")


class GluGradients(NamedTuple):
    """d_h [N, 2F] in h's dtype; d_probs [N] in the dtype of probs ([0] without them); a [N, F]: the op's output."""

    d_h_N2F: Tensor
    d_probs_N: Tensor
    a_NF: Tensor


def _wide(dtype: torch.dtype) -> torch.dtype:
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _gate(g_NF: Tensor, activation: str, limit: float, alpha: float) -> Tensor:
    """A new tensor with the gate's factor."""
    if activation == "swiglu":
        return F.silu(g_NF)
    if activation == "geglu":
        return F.gelu(g_NF, approximate="tanh")
    c_NF = g_NF.clamp(max=limit)
    return torch.sigmoid(alpha * c_NF).mul_(c_NF)


def _gate_backward(d_NF: Tensor, g_NF: Tensor, activation: str, limit: float, alpha: float) -> Tensor:
    """d_NF times the derivative of `_gate`."""
    if activation == "swiglu":
        return torch.ops.aten.silu_backward(d_NF, g_NF)
    if activation == "geglu":
        return torch.ops.aten.gelu_backward(d_NF, g_NF, approximate="tanh")
    c_NF = g_NF.clamp(max=limit)
    s_NF = torch.sigmoid(alpha * c_NF)
    slope_NF = s_NF * (1 + alpha * c_NF * (1 - s_NF))
    return slope_NF.mul_(d_NF).masked_fill_(g_NF > limit, 0)


def glu_forward(h_N2F: Tensor, probs_N: Tensor | None, *, activation: str, limit: float, alpha: float) -> Tensor:
    """The op's body: activation(h) * probs as a new contiguous [N, F] in h's dtype."""
    g_NF, u_NF = h_N2F.to(_wide(h_N2F.dtype)).chunk(2, dim=-1)
    a_NF = _gate(g_NF, activation, limit, alpha)
    a_NF.mul_(u_NF.clamp(-limit, limit).add_(1) if activation == "swiglu_clamped" else u_NF)
    if probs_N is not None:
        a_NF.mul_(probs_N.to(a_NF.dtype).unsqueeze(-1))
    return a_NF.to(h_N2F.dtype)


def glu_backward(
    d_a_NF: Tensor, h_N2F: Tensor, probs_N: Tensor | None, *, activation: str, limit: float, alpha: float
) -> GluGradients:
    """The backward op's body: every output from one reading of `h`, so that no activation is kept from the forward.

    `a` is returned because the down projection's weight gradient needs it.
    """
    wide = _wide(h_N2F.dtype)
    g_NF, u_NF = h_N2F.to(wide).chunk(2, dim=-1)
    d_a_NF = d_a_NF.to(wide)
    d_h_N2F = torch.empty(h_N2F.shape, dtype=h_N2F.dtype, device=h_N2F.device)
    d_g_NF, d_u_NF = d_h_N2F.chunk(2, dim=-1)
    clamped = activation == "swiglu_clamped"
    up_NF = u_NF.clamp(-limit, limit).add_(1) if clamped else u_NF
    s_NF = _gate(g_NF, activation, limit, alpha)
    a_NF = s_NF * up_NF
    d_probs_N = h_N2F.new_empty(0, dtype=torch.float32)
    if probs_N is not None:
        p_N1 = probs_N.to(wide).unsqueeze(-1)
        d_probs_N = (d_a_NF * a_NF).sum(-1).to(probs_N.dtype)
        d_a_NF = d_a_NF * p_N1
        a_NF.mul_(p_N1)
    torch.mul(s_NF, d_a_NF, out=d_u_NF)
    if clamped:
        d_u_NF.masked_fill_(u_NF.abs() > limit, 0)
    d_g_NF.copy_(_gate_backward(d_a_NF * up_NF, g_NF, activation, limit, alpha))
    return GluGradients(d_h_N2F, d_probs_N, a_NF.to(h_N2F.dtype))


@torch.library.custom_op("moe_layer::glu", mutates_args=())
def _glu(h_N2F: Tensor, probs_N: Tensor | None, activation: str, limit: float, alpha: float) -> Tensor:
    return glu_forward(h_N2F, probs_N, activation=activation, limit=limit, alpha=alpha)


@_glu.register_fake
def _(h_N2F: Tensor, probs_N: Tensor | None, activation: str, limit: float, alpha: float) -> Tensor:
    return h_N2F.new_empty(h_N2F.shape[0], h_N2F.shape[1] // 2)


@torch.library.custom_op("moe_layer::glu_bwd", mutates_args=())
def _glu_bwd(
    d_a_NF: Tensor, h_N2F: Tensor, probs_N: Tensor | None, activation: str, limit: float, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    return tuple(glu_backward(d_a_NF, h_N2F, probs_N, activation=activation, limit=limit, alpha=alpha))


@_glu_bwd.register_fake
def _(
    d_a_NF: Tensor, h_N2F: Tensor, probs_N: Tensor | None, activation: str, limit: float, alpha: float
) -> tuple[Tensor, Tensor, Tensor]:
    d_probs_N = h_N2F.new_empty(0, dtype=torch.float32) if probs_N is None else torch.empty_like(probs_N)
    return h_N2F.new_empty(h_N2F.shape), d_probs_N, h_N2F.new_empty(h_N2F.shape[0], h_N2F.shape[1] // 2)


def _setup(ctx: Any, inputs: tuple, output: Tensor) -> None:
    h_N2F, probs_N, ctx.activation, ctx.limit, ctx.alpha = inputs
    ctx.save_for_backward(h_N2F, probs_N)


def _backward(ctx: Any, d_a_NF: Tensor) -> tuple:
    h_N2F, probs_N = ctx.saved_tensors
    d_h, d_probs, _ = torch.ops.moe_layer.glu_bwd(
        d_a_NF.contiguous(), h_N2F, probs_N, ctx.activation, ctx.limit, ctx.alpha
    )
    return d_h, None if probs_N is None else d_probs, None, None, None


_glu.register_autograd(_backward, setup_context=_setup)


def _check(h_N2F: Tensor, probs_N: Tensor | None, activation: str) -> None:
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; use one of {', '.join(ACTIVATIONS)}")
    if h_N2F.ndim != 2 or h_N2F.shape[1] % 2:
        raise ValueError(f"h must be [N, 2F] with gate columns first, got {tuple(h_N2F.shape)}")
    if not h_N2F.is_floating_point():
        raise TypeError(f"h must be a floating point tensor, got {h_N2F.dtype}")
    if probs_N is None:
        return
    if probs_N.shape != h_N2F.shape[:1]:
        raise ValueError(f"probs must be [{h_N2F.shape[0]}], one for each row of h, got {tuple(probs_N.shape)}")
    if probs_N.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"probs must be float32 (or float64), got {probs_N.dtype}; cast them with .float()")
    if probs_N.device != h_N2F.device:
        raise ValueError(f"probs is on {probs_N.device} and h on {h_N2F.device}; move them to one device")


def glu(
    h_N2F: Tensor,
    probs_N: Tensor | None = None,
    *,
    activation: str = "swiglu",
    limit: float = 7.0,
    alpha: float = 1.702,
) -> Tensor:
    """Gated activation of each row, times the row's probability.

    Args:
        h_N2F: floating point [N, 2F], gate columns first.
        probs_N: fp32 (or fp64) [N], or None for no factor.
        activation: one of `ACTIVATIONS`. limit, alpha: constants of `swiglu_clamped`.

    Returns:
        [N, F] in h's dtype, contiguous; differentiable in h and probs.

    Raises:
        ValueError, TypeError: an unknown activation, or shapes, dtypes or devices that do not fit.
    """
    _check(h_N2F, probs_N, activation)
    return torch.ops.moe_layer.glu(h_N2F, probs_N, activation, limit, alpha)


def glu_bwd(
    d_a_NF: Tensor,
    h_N2F: Tensor,
    probs_N: Tensor | None = None,
    *,
    activation: str = "swiglu",
    limit: float = 7.0,
    alpha: float = 1.702,
) -> GluGradients:
    """Gradients of `glu`, and its output again (see `GluGradients`). Arguments as for `glu`; `d_a_NF` is [N, F].

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(h_N2F, probs_N, activation)
    if d_a_NF.shape != (h_N2F.shape[0], h_N2F.shape[1] // 2):
        raise ValueError(f"d_a must be [N, F] for h {tuple(h_N2F.shape)}, got {tuple(d_a_NF.shape)}")
    return GluGradients(*torch.ops.moe_layer.glu_bwd(d_a_NF, h_N2F, probs_N, activation, limit, alpha))
