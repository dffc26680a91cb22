"""Literal fp64 loops for the expert MLP, importing nothing of the package; gradients by autograd over the loops."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def oracle_activation(gate: Tensor, up: Tensor, activation: str, limit: float, alpha: float) -> Tensor:
    """Elementary functions only, element by element."""
    if activation == "swiglu":
        return gate / (1 + torch.exp(-gate)) * up
    if activation == "geglu":
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * gate * gate * gate)
        return 0.5 * gate * (1 + torch.tanh(inner)) * up
    assert activation == "swiglu_clamped"
    g = torch.where(gate > limit, torch.full_like(gate, limit), gate)
    u = torch.where(up > limit, torch.full_like(up, limit), up)
    u = torch.where(u < -limit, torch.full_like(u, -limit), u)
    return g / (1 + torch.exp(-alpha * g)) * (u + 1)


def oracle_glu(h: Tensor, probs: Tensor | None, activation: str, limit: float, alpha: float) -> Tensor:
    """[N, 2F] -> [N, F], one row at a time."""
    width = h.shape[1] // 2
    rows = []
    for n in range(h.shape[0]):
        row = oracle_activation(h[n, :width], h[n, width:], activation, limit, alpha)
        rows.append(row if probs is None else probs[n] * row)
    return torch.stack(rows) if rows else h.new_zeros(0, width)


def oracle_experts(
    rows: list[tuple[int, int, int]],
    x: Tensor,
    weights: Tensor,
    parameters: dict[str, Tensor],
    *,
    activation: str,
    limit: float = 7.0,
    alpha: float = 1.702,
    apply_probs: bool = True,
) -> Tensor:
    """One output row for each (local expert, token, slot), multiplied by weights[token, slot] if `apply_probs`."""
    outputs = []
    for expert, token, slot in rows:
        h = parameters["gate_up_proj"][expert] @ x[token]
        if "gate_up_proj_bias" in parameters:
            h = h + parameters["gate_up_proj_bias"][expert]
        width = h.shape[0] // 2
        y = parameters["down_proj"][expert] @ oracle_activation(h[:width], h[width:], activation, limit, alpha)
        if "down_proj_bias" in parameters:
            y = y + parameters["down_proj_bias"][expert]
        outputs.append(weights[token, slot] * y if apply_probs else y)
    return torch.stack(outputs) if outputs else x.new_zeros(0, x.shape[1])


def oracle_shared(x: Tensor, gate: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """Shared SwiGLU expert, one token at a time."""
    rows = [down @ oracle_activation(gate @ row, up @ row, "swiglu", 0.0, 0.0) for row in x]
    return torch.stack(rows) if rows else x.new_zeros(0, down.shape[0])
