"""Small experts and a `Received` written by hand, so that the experts' tests do not depend on a dispatcher."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.config.model import ExpertsConfig
from moe_layer.experts import Experts
from moe_layer.types import DispatchPlan, Received

T, D, F, E, K = 11, 8, 4, 6, 3
ACTIVATIONS = ("swiglu", "swiglu_clamped", "geglu")


def make_experts(dtype: torch.dtype = torch.float64, num_experts: int = E, **config: Any) -> Experts:
    """Experts with parameters of about unit scale, so that clamps and biases matter."""
    config = {"intermediate_size": F} | config
    if config.get("activation") == "swiglu_clamped":
        config = {"clamp_limit": 1.0} | config
    experts = Experts(ExpertsConfig(**config), hidden_size=D, num_experts=num_experts, dtype=dtype)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.6)
    return experts


def make_inputs(dtype: torch.dtype = torch.float64, tokens: int = T) -> tuple[Tensor, Tensor, Tensor]:
    """x, ids with the last expert idle and some slots off, weights."""
    x = torch.randn(tokens, D, dtype=dtype, requires_grad=True)
    ids = torch.stack([torch.randperm(E - 1)[:K] for _ in range(tokens)]) if tokens else torch.zeros(0, K)
    ids = ids.int()
    ids[torch.rand(tokens, K) < 0.1] = -1
    weights = torch.rand(tokens, K, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return x, ids, weights.requires_grad_()


def gradients(
    experts: Experts, rows: Tensor, leaves: list[Tensor], upstream: Tensor, *, retain: bool = True
) -> list[Tensor]:
    wanted = [*leaves, *experts.parameters()]
    return list(torch.autograd.grad(rows, wanted, upstream, retain_graph=retain))


def received_rows(ids_TK: Tensor, experts: range) -> list[tuple[int, int, int]]:
    """(local expert, token, slot) of every real row, in expert-major order."""
    return [
        (expert - experts.start, int(token), int(slot))
        for expert in experts
        for token, slot in zip(*torch.where(ids_TK == expert), strict=True)
    ]


def make_received(
    x_TD: Tensor,
    ids_TK: Tensor,
    weights_TK: Tensor,
    *,
    num_experts: int,
    experts: range | None = None,
    compact: bool = False,
    alignment: int = 1,
    tail: int = 0,
    apply_probs: bool = True,
    poison: bool = False,
) -> Received:
    """One rank's rows for the local `experts`; `poison` writes NaN into pads and tail (rows and probabilities)."""
    experts = range(num_experts) if experts is None else experts
    row_TK = torch.full(ids_TK.shape, -1, dtype=torch.int32)
    offsets, counts, source = [0], [], []
    for local, _ in enumerate(experts):
        rows = [(token, slot) for e, token, slot in received_rows(ids_TK, experts) if e == local]
        for i, (token, slot) in enumerate(rows):
            row_TK[token, slot] = offsets[-1] + i
        pads = -len(rows) % alignment
        source += [(0, token, slot) for token, slot in rows] + [(-1, -1, -1)] * pads
        counts.append(len(rows))
        offsets.append(offsets[-1] + len(rows) + pads)
    src_N3 = torch.tensor(source + [(-1, -1, -1)] * tail, dtype=torch.int32).reshape(-1, 3)
    real_N = src_N3[:, 0] >= 0
    token_N, slot_N = src_N3[:, 1].clamp(min=0), src_N3[:, 2].clamp(min=0)
    fill = float("nan") if poison else 0.0
    probs_N = torch.where(real_N, weights_TK[token_N.long(), slot_N.long()], fill)
    rows_ND = x_TD if compact else torch.where(real_N[:, None], x_TD[token_N.long()], fill)
    counts_L = torch.tensor(counts, dtype=torch.int32)
    tokens = torch.arange(x_TD.shape[0], dtype=torch.int32)
    plan = DispatchPlan(
        ids_TK=ids_TK,
        num_experts=num_experts,
        num_ranks=1,
        make=lambda: (
            torch.bincount(ids_TK[ids_TK >= 0].long().flatten(), minlength=num_experts).int(),
            tokens,
            torch.tensor([x_TD.shape[0]], dtype=torch.int32),
            tokens[:, None],
        ),
    )
    return Received(
        rows=rows_ND,
        index_N=token_N if compact else None,
        probs_N=probs_N,
        act_probs_N=probs_N if apply_probs else None,
        offsets_L1=torch.tensor(offsets, dtype=torch.int32),
        counts_L=counts_L,
        split=counts_L[:, None],
        first_expert=experts.start,
        src=src_N3,
        row_CK=row_TK,
        ids_CK=torch.where(row_TK >= 0, ids_TK, -1),
        plan=plan,
    )
