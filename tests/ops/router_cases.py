"""Shared by the router tests: run the op and the oracle on the same numbers and compare values and gradients."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.ops.route_topk import RouteTopk, route_topk
from tests import oracle_router as oracle

# fp32 arithmetic over at most a few hundred terms against fp64; low-precision outputs round once to their own ulp.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 4e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}
ALL_OUTPUTS: dict[str, Any] = {"want_z": True, "want_probs": True, "want_scores": True, "map_format": "bytemap"}


def options(rule: oracle.Rule) -> dict[str, Any]:
    """The op's keywords for an oracle rule."""
    names = ("top_k", "score_function", "softmax_order", "renormalize", "scaling_factor")
    names += ("num_groups", "group_topk", "group_rule")
    return {name: getattr(rule, name) for name in names}


def bias_of(rule: oracle.Rule) -> Tensor | None:
    return None if rule.bias is None else torch.tensor(rule.bias, dtype=torch.float32)


def run_op(logits: Tensor, rule: oracle.Rule, **more: Any) -> RouteTopk:
    return route_topk(logits, bias_of(rule), **options(rule), **more)


def close(ours: Tensor, theirs: Tensor, tolerance: float, name: str) -> None:
    """|ours - theirs| <= tolerance * max(1, largest |theirs|), NaN equal to NaN."""
    theirs = theirs.to(torch.float64)
    scale = max(1.0, float(theirs.detach().nan_to_num().abs().max())) if theirs.numel() else 1.0
    torch.testing.assert_close(
        ours.double(), theirs, rtol=0, atol=tolerance * scale, equal_nan=True, msg=lambda m: f"{name}: {m}"
    )


def check_against_oracle(
    logits: Tensor,
    rule: oracle.Rule,
    *,
    recorded: Tensor | None = None,
    recorded_weights: Tensor | None = None,
    weights_mode: str = "live",
    valid: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    aux_counts: str = "live",
    seed: int = 0,
) -> RouteTopk:
    """Compare every output and the gradient of a random combination of all differentiable outputs."""
    leaf = logits.detach().requires_grad_()
    out = run_op(
        leaf,
        rule,
        replay_ids=recorded,
        replay_weights=recorded_weights,
        weights_mode=weights_mode,
        valid=valid,
        cu_seqlens=cu_seqlens,
        aux_counts=aux_counts,
        **ALL_OUTPUTS,
    )
    exact = logits.detach().double().requires_grad_()
    want = oracle.route(
        exact,
        rule,
        recorded=None if recorded is None else recorded.tolist(),
        recorded_weights=recorded_weights,
        weights_mode=weights_mode,
        valid=None if valid is None else valid.tolist(),
        cu_seqlens=None if cu_seqlens is None else cu_seqlens.tolist(),
    )
    assert out.ids.tolist() == want.ids
    assert out.events.tolist() == want.events
    counts = want.live_counts if aux_counts == "live" else want.effective_counts
    assert out.aux_counts.tolist() == counts
    check_dense(out, want.ids, logits.shape[1])

    num_experts = logits.shape[1]
    weights = oracle.stack(want.weights, rule.top_k)
    scores = oracle.stack(want.scores, num_experts)
    score_sum = oracle.stack(want.score_sum, num_experts)
    wide = TOLERANCE[torch.float64 if logits.dtype == torch.float64 else torch.float32]
    narrow = max(TOLERANCE[logits.dtype], wide)
    close(out.weights, weights, wide * rule.scaling_factor, "weights")
    close(out.scores, scores, wide, "scores")
    close(out.score_sum, score_sum, wide * 4, "score_sum")
    close(out.z_sum, want.z_sum.reshape(1), wide * 4, "z_sum")

    dense = torch.zeros(logits.shape, dtype=torch.float64)
    for token, ids in enumerate(want.ids):
        for slot, expert in enumerate(ids):
            if expert >= 0:
                dense[token, expert] = weights[token, slot]
    close(out.probs, dense, narrow * rule.scaling_factor, "probs")

    generator = torch.Generator().manual_seed(seed)
    ours = [out.weights, out.scores, out.score_sum, out.z_sum, out.probs]
    dense_of_weights = _dense(weights, out.ids, num_experts)
    theirs = [weights, scores, score_sum, want.z_sum.reshape(1), dense_of_weights]
    upstream = [torch.randn(tensor.shape, generator=generator).to(tensor.dtype) for tensor in ours]
    (d_ours,) = torch.autograd.grad(ours, leaf, upstream)
    tracked = [(tensor, u.double()) for tensor, u in zip(theirs, upstream, strict=True) if tensor.requires_grad]
    d_theirs = torch.zeros_like(exact)  # without valid tokens nothing depends on the logits
    if tracked:
        (d_theirs,) = torch.autograd.grad([t for t, _ in tracked], exact, [u for _, u in tracked])
    assert d_ours.dtype == logits.dtype
    close(d_ours, d_theirs, narrow * 8, "d_logits")
    return out


def _dense(weights: Tensor, ids: Tensor, num_experts: int) -> Tensor:
    dense = weights.new_zeros(weights.shape[0], num_experts)
    return dense.scatter_add(1, ids.long().clamp(min=0), torch.where(ids >= 0, weights, 0.0))


def check_dense(out: RouteTopk, ids: list[list[int]], num_experts: int) -> None:
    """counts and the byte map agree with the ids; a row's ids are distinct."""
    counts = [0] * num_experts
    chosen = torch.zeros(len(ids), num_experts, dtype=torch.bool)
    for token, row in enumerate(ids):
        live = [expert for expert in row if expert >= 0]
        assert len(set(live)) == len(live)
        for expert in live:
            counts[expert] += 1
            chosen[token, expert] = True
    assert out.counts.tolist() == counts
    assert torch.equal(out.map, chosen)
