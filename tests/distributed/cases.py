"""One forward and backward through a dispatcher with a small expert in between, on one rank or on many.

Letters: T tokens, K slots, E experts, L local experts, D hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.ops.tree_reduce import reduction_blocks, tree_reduce
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Received, Routing


@dataclass(frozen=True)
class Case:
    """Global inputs; rank r of R sees the tokens `[cuts[r], cuts[r+1])`."""

    x_TD: Tensor
    ids_TK: Tensor
    w_TK: Tensor
    dy_TD: Tensor
    experts: Tensor  # [E, 2, D, D]

    @property
    def num_experts(self) -> int:
        return self.experts.shape[0]

    @property
    def top_k(self) -> int:
        return self.ids_TK.shape[1]


def config_for(backend: str, **keys: Any) -> DispatchConfig:
    """A configuration of any backend: nvlink also wants to know how many tokens a rank may send. `nvlink:dense` is
    nvlink with that `push`."""
    backend, _, push = backend.partition(":")
    if push:
        keys = {"push": push} | keys
    if backend == "nvlink":
        keys = {"max_tokens_per_rank": 64} | keys
    return DispatchConfig(backend=backend, **keys)  # type: ignore[arg-type]


def make_case(
    seed: int, *, T: int, D: int, E: int, K: int, absent: float = 0.1, dtype: torch.dtype = torch.float32
) -> Case:
    g = torch.Generator().manual_seed(seed)
    ids_TK = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]) if T else torch.zeros(0, K).long()
    ids_TK = torch.where(torch.rand(T, K, generator=g) < absent, -1, ids_TK).int()
    wdtype = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        x_TD=torch.randn(T, D, generator=g).to(dtype),
        ids_TK=ids_TK,
        w_TK=torch.rand(T, K, generator=g).to(wdtype),
        dy_TD=torch.randn(T, D, generator=g).to(dtype),
        experts=(torch.randn(E, 2, D, D, generator=g) * D**-0.5).to(dtype),
    )


def even_cuts(T: int, R: int) -> list[int]:
    return [T * r // R for r in range(R + 1)]


class GatherCompact(torch.autograd.Function):
    """What experts owe compact rows: d(rows) of a token is summed by the tree, not by autograd's order."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, received: Received) -> Tensor:
        ctx.received, ctx.dtype = received, rows.dtype
        assert received.index_N is not None
        return rows[received.index_N.long()]

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor) -> tuple[Tensor, None]:
        received, E = ctx.received, ctx.received.plan.num_experts
        d_compact = tree_reduce(
            d_rows, received.row_CK, ids_MK=received.ids_CK, num_experts=E, blocks=reduction_blocks(E)
        )
        return d_compact.to(ctx.dtype), None


def apply_experts(received: Received, experts: Tensor) -> Tensor:
    """Per-expert loop over real rows; one GEMM per expert, so that a rank's plan does not depend on R. NaN in pads and
    tail."""
    off = received.offsets_L1.tolist()
    counts = received.counts_L.tolist()
    rows = received.rows if received.index_N is None else GatherCompact.apply(received.rows, received)
    out = []
    for e in range(experts.shape[0]):
        seg = slice(off[e], off[e] + counts[e])
        hidden = torch.tanh(rows[seg] @ experts[e, 0])
        if received.act_probs_N is not None:
            hidden = (hidden * received.act_probs_N[seg, None]).to(rows.dtype)
        out.append(hidden @ experts[e, 1])
        out.append(rows.new_full((off[e + 1] - off[e] - counts[e], rows.shape[1]), torch.nan))
    out.append(rows.new_full((received.probs_N.shape[0] - off[-1], rows.shape[1]), torch.nan))
    return torch.cat(out) + received.rows[:0].sum()  # the edge of the graph when there is no row; the tail is not read


@dataclass(frozen=True)
class Result:
    y: Tensor
    dx: Tensor
    dw: Tensor
    d_experts: Tensor


def run_case(
    case: Case,
    config: DispatchConfig,
    context: ParallelContext | None = None,
    *,
    cuts: list[int] | None = None,
    **options: Any,
) -> Result:
    """Forward and backward of this rank's share; `options` go to `make_dispatcher`."""
    r, R = (0, 1) if context is None else (context.ep_rank, context.ep_size)
    if config.backend == "replicated" or R == 1:
        mine = slice(None)
    else:
        cuts = cuts or even_cuts(case.x_TD.shape[0], R)
        mine = slice(cuts[r], cuts[r + 1])
    L = case.num_experts // R
    x = case.x_TD[mine].clone().requires_grad_()
    w = case.w_TK[mine].clone().requires_grad_()
    experts = case.experts[r * L : (r + 1) * L].clone().requires_grad_()
    dispatcher = make_dispatcher(config, num_experts=case.num_experts, top_k=case.top_k, context=context, **options)
    routing = Routing(ids_TK=case.ids_TK[mine], weights_TK=w, counts_E=torch.zeros(case.num_experts, dtype=torch.int32))
    received = dispatcher.dispatch(x, routing)
    y = dispatcher.combine(apply_experts(received, experts), received)
    y.backward(case.dy_TD[mine])
    assert x.grad is not None and w.grad is not None and experts.grad is not None
    return Result(y.detach(), x.grad, w.grad, experts.grad)


def joined(results: list[Result], *, replicated: bool = False) -> Result:
    """The ranks' shares as one rank would have them."""
    d_experts = torch.cat([r.d_experts for r in results])
    if replicated:
        for other in results[1:]:
            assert torch.equal(other.y, results[0].y) and torch.equal(other.dx, results[0].dx)
            assert torch.equal(other.dw, results[0].dw)
        return Result(results[0].y, results[0].dx, results[0].dw, d_experts)
    return Result(*(torch.cat([getattr(r, f) for r in results]) for f in ("y", "dx", "dw")), d_experts)


def assert_same_bits(a: Result, b: Result) -> None:
    for name in ("y", "dx", "dw", "d_experts"):
        left, right = getattr(a, name), getattr(b, name)
        assert left.shape == right.shape and left.dtype == right.dtype, name
        assert torch.equal(left, right), f"{name}: largest difference {(left - right).abs().max()}"
