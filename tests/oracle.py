"""The whole layer as literal fp64 loops. Imports nothing of moe_layer: what it computes is what the documents say.

Gradients come from autograd through the loops. The parts have oracles of their own in oracle_router.py,
oracle_dispatch.py and oracle_experts.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor


@dataclass
class LayerOptions:
    """Options of the oracle layer, named as in the configuration."""

    top_k: int
    score_function: str = "softmax"
    softmax_order: str = "post"
    renormalize: bool = True
    scaling_factor: float = 1.0
    activation: str = "swiglu"
    clamp_limit: float = 7.0
    clamp_alpha: float = 1.702
    aux_coeff: float = 0.0
    z_coeff: float = 0.0
    forced: list[list[int]] | None = None
    valid: list[bool] | None = None
    extra: dict = field(default_factory=dict)


def choose(key: list[float], k: int) -> list[int]:
    """Indices of the k highest keys; equal keys by lower index."""
    return sorted(range(len(key)), key=lambda e: (-key[e], e))[:k]


def token_weights(logits_E: Tensor, chosen: list[int], options: LayerOptions) -> list[Tensor]:
    """Routing weights of the chosen experts of one token."""
    if options.score_function == "softmax" and options.softmax_order == "post":
        total = sum(torch.exp(logits_E[e] - logits_E.max()) for e in chosen)
        weights = [torch.exp(logits_E[e] - logits_E.max()) / total for e in chosen]
    else:
        if options.score_function == "softmax":
            total = sum(torch.exp(v - logits_E.max()) for v in logits_E)
            scores = [torch.exp(v - logits_E.max()) / total for v in logits_E]
        elif options.score_function == "sigmoid":
            scores = [1.0 / (1.0 + torch.exp(-v)) for v in logits_E]
        else:
            scores = [torch.sqrt(torch.log1p(torch.exp(v))) for v in logits_E]
        weights = [scores[e] for e in chosen]
        if options.renormalize and (options.score_function == "softmax" or len(chosen) > 1):
            tiny = 0.0 if options.score_function == "softmax" else 1e-20
            total = sum(weights) + tiny
            weights = [w / total for w in weights]
    return [w * options.scaling_factor for w in weights]


def activate(gate: Tensor, up: Tensor, options: LayerOptions) -> Tensor:
    if options.activation == "swiglu":
        return gate / (1.0 + torch.exp(-gate)) * up
    if options.activation == "geglu":
        inner = math.sqrt(2.0 / math.pi) * (gate + 0.044715 * gate**3)
        return 0.5 * gate * (1.0 + torch.tanh(inner)) * up
    gate = torch.minimum(gate, torch.tensor(options.clamp_limit, dtype=gate.dtype))
    up = torch.clamp(up, -options.clamp_limit, options.clamp_limit)
    return gate / (1.0 + torch.exp(-options.clamp_alpha * gate)) * (up + 1.0)


def layer(x_TD: Tensor, params: dict[str, Tensor], options: LayerOptions) -> tuple[Tensor, Tensor, list[list[int]]]:
    """y [T, D], the sum of the coefficient-weighted losses, and the chosen experts of each token."""
    num_experts = params["router.weight"].shape[0]
    rows, ids = [], []
    score_sum = [torch.zeros((), dtype=x_TD.dtype)] * num_experts
    counts = [0] * num_experts
    z_total, valid_tokens = torch.zeros((), dtype=x_TD.dtype), 0
    for t in range(x_TD.shape[0]):
        if options.valid is not None and not options.valid[t]:
            ids.append([])
            rows.append(shared(x_TD[t], params, torch.zeros_like(x_TD[t])))
            continue
        valid_tokens += 1
        logits_E = params["router.weight"] @ x_TD[t]
        if "router.bias" in params:
            logits_E = logits_E + params["router.bias"]
        live = choose(logits_E.tolist(), options.top_k)
        chosen = live if options.forced is None else options.forced[t]
        ids.append(chosen)
        y_D = torch.zeros_like(x_TD[t])
        for weight, e in zip(token_weights(logits_E, chosen, options), chosen, strict=True):
            y_D = y_D + weight * expert(x_TD[t], params, e, options)
        rows.append(shared(x_TD[t], params, y_D))
        for e in live:
            counts[e] += 1
        scores = normalised_scores(logits_E, options)
        score_sum = [total + s for total, s in zip(score_sum, scores, strict=True)]
        z_total = z_total + torch.logsumexp(logits_E, 0) ** 2
    loss = torch.zeros((), dtype=x_TD.dtype)
    if valid_tokens:
        slots = options.top_k * valid_tokens
        shares = sum(counts[e] / slots * score_sum[e] / valid_tokens for e in range(num_experts))
        loss = options.aux_coeff * num_experts * shares + options.z_coeff * z_total / valid_tokens
    y_TD = torch.stack(rows) if rows else x_TD * 0.0
    return y_TD, loss, ids


def normalised_scores(logits_E: Tensor, options: LayerOptions) -> list[Tensor]:
    """Scores of one token over all experts, summing to one."""
    if options.score_function == "softmax":
        return list(torch.softmax(logits_E, 0))
    if options.score_function == "sigmoid":
        scores = [1.0 / (1.0 + torch.exp(-v)) for v in logits_E]
    else:
        scores = [torch.sqrt(torch.log1p(torch.exp(v))) for v in logits_E]
    total = sum(scores) + 1e-20
    return [s / total for s in scores]


def expert(x_D: Tensor, params: dict[str, Tensor], e: int, options: LayerOptions) -> Tensor:
    """One expert on one token: gate rows first, then up rows."""
    hidden_2F = params["experts.gate_up_proj"][e] @ x_D
    if "experts.gate_up_proj_bias" in params:
        hidden_2F = hidden_2F + params["experts.gate_up_proj_bias"][e]
    width = hidden_2F.shape[0] // 2
    y_D = params["experts.down_proj"][e] @ activate(hidden_2F[:width], hidden_2F[width:], options)
    if "experts.down_proj_bias" in params:
        y_D = y_D + params["experts.down_proj_bias"][e]
    return y_D


def shared(x_D: Tensor, params: dict[str, Tensor], y_D: Tensor) -> Tensor:
    """y plus the shared expert, times its sigmoid gate where there is one."""
    if "shared_expert.gate_proj.weight" not in params:
        return y_D
    gate = params["shared_expert.gate_proj.weight"] @ x_D
    up = params["shared_expert.up_proj.weight"] @ x_D
    out = params["shared_expert.down_proj.weight"] @ (gate / (1.0 + torch.exp(-gate)) * up)
    if "shared_expert_gate.weight" in params:
        out = out / (1.0 + torch.exp(-(params["shared_expert_gate.weight"][0] @ x_D)))
    return y_D + out
