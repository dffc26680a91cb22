"""Literal routing in fp64: one token, one expert at a time. Imports nothing of the package under test.

Selection works on Python floats, weights and losses on 0-d fp64 tensors so that autograd supplies the gradients.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

EPS = 1e-20


@dataclass(frozen=True)
class Rule:
    """How to route; the names are those of the op."""

    top_k: int
    score_function: str = "softmax"
    softmax_order: str = "post"
    renormalize: bool = True
    scaling_factor: float = 1.0
    num_groups: int = 0
    group_topk: int = 0
    group_rule: str = "sum_top2"
    bias: list[float] | None = None


@dataclass
class Answer:
    """Per-token lists, and the loss sums as tensors with history."""

    ids: list[list[int]] = field(default_factory=list)
    weights: list[list[Tensor]] = field(default_factory=list)
    scores: list[list[Tensor]] = field(default_factory=list)
    score_sum: list[list[Tensor]] = field(default_factory=list)
    live_counts: list[list[int]] = field(default_factory=list)
    effective_counts: list[list[int]] = field(default_factory=list)
    z_sum: Tensor | None = None
    events: list[int] = field(default_factory=lambda: [0] * 8)


def sigmoid(x: float) -> float:
    return 1.0 / (1.0 + math.exp(-x)) if x > -700 else 0.0


def float_score(x: float, name: str) -> float:
    if math.isnan(x):
        return math.nan
    if name == "sigmoid":
        return sigmoid(x)
    if x > 20:
        return math.sqrt(x)
    return math.sqrt(math.log1p(math.exp(x)))


def keys_of_row(row: list[float], rule: Rule) -> list[float]:
    """Selection keys; NaN for an expert whose logit is not finite."""
    finite = [math.isfinite(x) for x in row]
    if rule.bias is None and rule.num_groups == 0:
        keys = list(row)
    elif rule.score_function != "softmax":
        keys = [float_score(x, rule.score_function) if ok else math.nan for x, ok in zip(row, finite, strict=True)]
    elif rule.softmax_order == "post":
        keys = list(row)
    else:
        best = max((x for x, ok in zip(row, finite, strict=True) if ok), default=0.0)
        total = sum(math.exp(x - best) for x, ok in zip(row, finite, strict=True) if ok)
        keys = [math.exp(x - best) / total if ok else math.nan for x, ok in zip(row, finite, strict=True)]
    if rule.bias is not None:
        keys = [key + b for key, b in zip(keys, rule.bias, strict=True)]
    return [key if ok and math.isfinite(key) else math.nan for key, ok in zip(keys, finite, strict=True)]


def order(keys: list[float], closed: set[int]) -> list[int]:
    """Experts that are not closed, best first."""

    def rank(expert: int) -> tuple[int, float, int]:
        if math.isnan(keys[expert]):
            return (1, 0.0, expert)
        return (0, -keys[expert], expert)

    return sorted((e for e in range(len(keys)) if e not in closed), key=rank)


def closed_experts(keys: list[float], rule: Rule) -> set[int]:
    """Experts outside the best groups."""
    if rule.num_groups == 0:
        return set()
    size = len(keys) // rule.num_groups
    count = 2 if rule.group_rule == "sum_top2" else rule.top_k // rule.group_topk
    totals = []
    for group in range(rule.num_groups):
        members = [-1e30 if math.isnan(key) else key for key in keys[group * size : (group + 1) * size]]
        totals.append(sum(sorted(members, reverse=True)[:count]))
    ranked = sorted(range(rule.num_groups), key=lambda group: (-totals[group], group))
    return {e for group in ranked[rule.group_topk :] for e in range(group * size, (group + 1) * size)}


def ids_of_row(
    row: list[float], rule: Rule, recorded: list[int] | None = None, events: list[int] | None = None
) -> list[int]:
    """Effective ids of one token; adds to `events` when ids were recorded."""
    keys = keys_of_row(row, rule)
    closed = closed_experts(keys, rule)
    if recorded is None:
        return order(keys, closed)[: rule.top_k]
    ids: list[int] = []
    kinds = []
    for slot, expert in enumerate(recorded):
        if expert < 0:
            kinds.append("missing")
        elif expert >= len(row):
            kinds.append("range")
        elif expert in recorded[:slot]:
            kinds.append("duplicate")
        else:
            kinds.append("kept")
    taken = {expert for expert, kind in zip(recorded, kinds, strict=True) if kind == "kept"}
    fill = iter(order(keys, closed | taken))
    for expert, kind in zip(recorded, kinds, strict=True):
        ids.append(expert if kind == "kept" else next(fill))
    if events is not None:
        events[0] += "kept" in kinds
        for position, kind in enumerate(("kept", "missing", "duplicate", "range"), start=1):
            events[position] += kinds.count(kind)
    return ids


def tensor_score(x: Tensor, name: str) -> Tensor:
    if name == "sigmoid":
        return 1 / (1 + torch.exp(-x))
    if float(x.detach()) > 20:
        return torch.sqrt(x)
    return torch.sqrt(torch.log1p(torch.exp(x)))


def softmax_of(values: list[Tensor]) -> list[Tensor]:
    shift = max((float(v.detach()) for v in values), default=0.0)
    shift = shift if math.isfinite(shift) else 0.0
    powers = [torch.exp(v - shift) for v in values]
    total = sum(powers[1:], powers[0])
    return [power / total for power in powers]


def weights_of_row(row: Tensor, ids: list[int], rule: Rule) -> list[Tensor]:
    if rule.score_function == "softmax":
        if rule.softmax_order == "post":
            chosen = softmax_of([row[e] for e in ids])
        else:
            dense = softmax_of(list(row.unbind()))
            chosen = [dense[e] for e in ids]
            if rule.renormalize:
                total = sum(chosen[1:], chosen[0])
                chosen = [value / total for value in chosen]
    else:
        chosen = [tensor_score(row[e], rule.score_function) for e in ids]
        if rule.renormalize and rule.top_k > 1:
            total = sum(chosen[1:], chosen[0]) + EPS
            chosen = [value / total for value in chosen]
    return [value * rule.scaling_factor for value in chosen]


def scores_of_row(row: Tensor, rule: Rule) -> list[Tensor]:
    if rule.score_function == "softmax":
        return softmax_of(list(row.unbind()))
    scores = [tensor_score(x, rule.score_function) for x in row.unbind()]
    total = sum(scores[1:], scores[0]) + EPS
    return [score / total for score in scores]


def route(
    logits: Tensor,
    rule: Rule,
    *,
    recorded: list[list[int]] | None = None,
    recorded_weights: Tensor | None = None,
    weights_mode: str = "live",
    valid: list[bool] | None = None,
    cu_seqlens: list[int] | None = None,
    ids: list[list[int]] | None = None,
) -> Answer:
    """Everything for fp64 `[T, E]` logits. `ids` forces the selection (to compare weights where keys nearly tie)."""
    num_tokens, num_experts = logits.shape
    bounds = [0, num_tokens] if cu_seqlens is None else cu_seqlens
    sequences = len(bounds) - 1
    zero = logits.new_zeros(())
    answer = Answer(z_sum=zero)
    answer.score_sum = [[zero] * num_experts for _ in range(sequences)]
    answer.live_counts = [[0] * num_experts for _ in range(sequences)]
    answer.effective_counts = [[0] * num_experts for _ in range(sequences)]
    plain = Rule(top_k=rule.top_k, score_function=rule.score_function)
    for token in range(num_tokens):
        row = logits[token]
        floats = row.detach().tolist()
        if valid is not None and not valid[token]:
            answer.ids.append([-1] * rule.top_k)
            answer.weights.append([zero] * rule.top_k)
            answer.scores.append([zero] * num_experts)
            continue
        own = ids_of_row(floats, rule, None if recorded is None else recorded[token], answer.events)
        own = own if ids is None else ids[token]
        weights = weights_of_row(row, own, rule)
        if weights_mode != "live" and recorded is not None:
            for slot in range(rule.top_k):
                if own[slot] == recorded[token][slot]:
                    fixed = recorded_weights[token, slot].double()
                    live = weights[slot]
                    weights[slot] = fixed if weights_mode == "recorded" else fixed + (live - live.detach())
        scores = scores_of_row(row, rule)
        answer.ids.append(own)
        answer.weights.append(weights)
        answer.scores.append(scores)
        answer.z_sum = answer.z_sum + torch.logsumexp(row, 0) ** 2
        answer.events[5] += not all(math.isfinite(x) for x in floats)
        for sequence in range(sequences):
            if bounds[sequence] <= token < bounds[sequence + 1]:
                answer.score_sum[sequence] = [a + b for a, b in zip(answer.score_sum[sequence], scores, strict=True)]
                for expert in own:
                    answer.effective_counts[sequence][expert] += 1
                for expert in ids_of_row(floats, plain):
                    answer.live_counts[sequence][expert] += 1
    return answer


def stack(rows: list[list[Tensor]], width: int) -> Tensor:
    """`[len(rows), width]` fp64 tensor with history."""
    if not rows:
        return torch.zeros(0, width, dtype=torch.float64)
    return torch.stack([torch.stack(list(row)) for row in rows])
