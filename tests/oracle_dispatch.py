"""Literal loops for the dispatcher, importing nothing of moe_layer: plan, row order, sum tree, and a small expert layer
in fp64."""

from __future__ import annotations

import torch
from torch import Tensor


def plan(ids: list[list[int]], num_experts: int, num_ranks: int) -> dict[str, list]:
    """counts per expert; tokens per destination rank; position of each (token, rank) in their concatenation."""
    per_rank = num_experts // num_ranks
    counts = [0] * num_experts
    tokens: list[list[int]] = [[] for _ in range(num_ranks)]
    for t, slots in enumerate(ids):
        for e in slots:
            if e >= 0:
                counts[e] += 1
        for r in range(num_ranks):
            if num_ranks == 1 or any(e >= 0 and e // per_rank == r for e in slots):
                tokens[r].append(t)
    position = [[-1] * num_ranks for _ in ids]
    n = 0
    for r in range(num_ranks):
        for t in tokens[r]:
            position[t][r] = n
            n += 1
    return {"counts": counts, "tokens": tokens, "position": position}


def rows(ids_by_rank: list[list[list[int]]], num_experts: int, rank: int, alignment: int = 1) -> list[tuple | None]:
    """The rows rank `rank` holds: (expert, source rank, token, slot) in that order, None for pads."""
    per_rank = num_experts // len(ids_by_rank)
    out: list[tuple | None] = []
    for e in range(rank * per_rank, (rank + 1) * per_rank):
        for source, ids in enumerate(ids_by_rank):
            for t, slots in enumerate(ids):
                for k, found in enumerate(slots):
                    if found == e:
                        out.append((e, source, t, k))
        while len(out) % alignment:
            out.append(None)
    return out


def tree_sum(values: Tensor, row: Tensor, ids: Tensor, weights: Tensor | None, num_experts: int, blocks: int) -> Tensor:
    """The sum tree, one rounding per operation in the dtype of `values` (fp32 or fp64)."""
    tokens, slots = row.shape
    out = torch.zeros(tokens, values.shape[1], dtype=values.dtype)
    for m in range(tokens):
        level: list[Tensor | None] = [None] * blocks
        for k in sorted(range(slots), key=lambda k: (int(ids[m, k]), k)):
            if row[m, k] < 0:
                continue
            term = values[row[m, k]]
            if weights is not None:
                term = term * weights[m, k].to(values.dtype)
            block = int(ids[m, k]) * blocks // num_experts
            level[block] = term if level[block] is None else level[block] + term
        while len(level) > 1:
            pairs = [level[i : i + 2] for i in range(0, len(level), 2)]
            level = [p[0] if len(p) == 1 or p[1] is None else p[1] if p[0] is None else p[0] + p[1] for p in pairs]
        if level[0] is not None:
            out[m] = level[0] + 0.0
    return out


def expert(x: Tensor, weight: Tensor, prob: Tensor | None) -> Tensor:
    """A stand-in for the expert MLP: nonlinear, with the probability before the second product."""
    hidden = torch.tanh(x @ weight[0])
    if prob is not None:
        hidden = hidden * prob
    return hidden @ weight[1]


def layer(x: Tensor, ids: list[list[int]], weights: Tensor, experts: Tensor, *, before: bool) -> Tensor:
    """y of every token by loops; `before`: the probability multiplies inside the expert, else its output."""
    out = []
    for t, slots in enumerate(ids):
        y = torch.zeros_like(x[t])
        for k, e in enumerate(slots):
            if e >= 0:
                if before:
                    y = y + expert(x[t], experts[e], weights[t, k])
                else:
                    y = y + weights[t, k] * expert(x[t], experts[e], None)
        out.append(y)
    return torch.stack(out) if out else x * weights.sum()
