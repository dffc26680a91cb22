"""Inputs and literal loops for moe_layer.compat.perplexity; nothing of the package is used in the expectations.

Letters: T tokens, K slots, H hidden, S scales a token, E experts, L local experts, R ranks, C padded rows per expert.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_layer.compat.perplexity import AllToAll
from moe_layer.config.model import DispatchConfig
from moe_layer.parallel.context import ParallelContext
from tests import oracle_dispatch
from tests.distributed.ranks import ThreadRanks

E, K, H, S, MOST = 8, 3, 6, 2, 9
FILL = 7  # what buffers hold before a call


@dataclass(frozen=True)
class Tokens:
    """One rank's tokens."""

    x_TH: Tensor
    scale_TS: Tensor
    ids_TK: Tensor
    w_TK: Tensor


def make_tokens(seed: int, T: int, *, dtype: torch.dtype = torch.float32, idle: tuple[int, ...] = ()) -> Tokens:
    """Distinct experts, some absent; experts in `idle` get nothing."""
    g = torch.Generator().manual_seed(seed)
    ids_TK = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(T)]) if T else torch.zeros(0, K).long()
    ids_TK = torch.where(torch.rand(T, K, generator=g) < 0.15, -1, ids_TK)
    for e in idle:
        ids_TK = torch.where(ids_TK == e, -1, ids_TK)
    x_TH = torch.randn(T, H, generator=g).to(dtype)
    return Tokens(x_TH, torch.rand(T, S, generator=g).half(), ids_TK.int(), torch.rand(T, K, generator=g))


def ids_as(ids_TK: Tensor, dtype: torch.dtype) -> Tensor:
    return ids_TK.view(torch.uint32) if dtype == torch.uint32 else ids_TK.to(dtype)


def on_ranks(ranks: ThreadRanks, size: int, fn: Callable[[ParallelContext | None], Any]) -> list[Any]:
    return [fn(None)] if size == 1 else ranks.run(size, fn)


def rank_of(context: ParallelContext | None) -> int:
    return 0 if context is None else context.ep_rank


@dataclass(frozen=True)
class Out:
    """The caller's buffers: padded `[L, rows, ...]` or `[rows, ...]`."""

    count_L: Tensor
    x: Tensor
    prob: Tensor
    scale: Tensor

    def arguments(self, *, prob: bool, scale: bool) -> dict[str, Any]:
        return {
            "out_expert_num_tokens": self.count_L,
            "out_expert_x": self.x,
            "out_expert_prob": self.prob if prob else None,
            "out_expert_x_scale": self.scale if scale else None,
        }


def make_out(local: int, rows: int, *, padded: bool, dtype: torch.dtype = torch.float32) -> Out:
    shape = (local, rows) if padded else (rows,)
    return Out(
        torch.full((local,), -FILL, dtype=torch.int32),
        torch.full((*shape, H), FILL, dtype=torch.float32).to(dtype),
        torch.full(shape, FILL, dtype=torch.float32),
        torch.full((*shape, S), FILL, dtype=torch.float16),
    )


def where_rows_lie(
    tokens: list[Tokens], local: int, rank: int, *, padded: bool, alignment: int = 1
) -> tuple[dict[tuple[int, ...], tuple[int, ...]], list[tuple[int, ...]]]:
    """place in the buffer -> (expert, source rank, token, slot); places of pads. Sources are `tokens` by rank."""
    rows = oracle_dispatch.rows([one.ids_TK.tolist() for one in tokens], local * len(tokens), rank, alignment)
    places, pads, used = {}, [], [0] * local
    for n, row in enumerate(rows):
        if row is None:
            pads.append((n,))
            continue
        e = row[0] - rank * local
        places[(e, used[e]) if padded else (n,)] = row
        used[e] += 1
    return places, [] if padded else pads


def expert(e: int, x_H: Tensor, scale_S: Tensor) -> Tensor:
    """What expert e makes of a row, in fp64."""
    return x_H.double() * (e + 1) - scale_S.double().sum() + e


def combined(tokens: Tokens, w_TK: Tensor) -> Tensor:
    """Weighted loops in fp64."""
    y_TH = torch.zeros(tokens.x_TH.shape[0], H, dtype=torch.float64)
    for t, ids in enumerate(tokens.ids_TK.tolist()):
        for k, e in enumerate(ids):
            if e >= 0:
                y_TH[t] += w_TK[t, k].double() * expert(e, tokens.x_TH[t], tokens.scale_TS[t])
    return y_TH


def run_experts(places: dict[tuple[int, ...], tuple[int, ...]], out: Out) -> Tensor:
    """expert_y fp64 in the layout of `out`; NaN wherever no row lies."""
    y = torch.full(out.x.shape, torch.nan, dtype=torch.float64)
    for place, row in places.items():
        y[place] = expert(row[0], out.x[place], out.scale[place])
    return y


def make(context: ParallelContext | None, **options: Any) -> AllToAll:
    return AllToAll(
        options.pop("config", None),
        context,
        num_experts=E,
        experts_per_token=K,
        hidden_dim=H,
        max_num_tokens=MOST,
        in_dtype=options.pop("in_dtype", torch.float32),
        **options,
    )


def config_of(backend: str = "auto", **options: Any) -> DispatchConfig:
    if backend == "nvlink":
        options["max_tokens_per_rank"] = MOST
    return DispatchConfig(backend=backend, apply_probs="source", **options)  # type: ignore[arg-type]


def inputs(tokens: Tokens, *, scale: bool = False, ids_dtype: torch.dtype = torch.int32) -> dict[str, Any]:
    return {
        "dp_x": tokens.x_TH,
        "dp_x_scale": tokens.scale_TS if scale else None,
        "indices": ids_as(tokens.ids_TK, ids_dtype),
        "weights": tokens.w_TK,
    }


def check_buffers(out: Out, sources: list[Tokens], rank: int, *, alignment: int, prob: bool, scale: bool) -> dict:
    """Counts, every row, its probability and scales; pads are zeros, everything else is untouched. Returns places."""
    padded, local = out.x.ndim == 3, out.count_L.shape[0]
    places, pads = where_rows_lie(sources, local, rank, padded=padded, alignment=alignment)
    counts = [sum(row[0] == rank * local + e for row in places.values()) for e in range(local)]
    assert out.count_L.tolist() == counts
    free = torch.ones(out.x.shape[:-1], dtype=torch.bool)
    for place, (_, source, t, k) in places.items():
        free[place] = False
        one = sources[source]
        assert torch.equal(out.x[place].float(), one.x_TH[t].float())
        assert not prob or out.prob[place] == one.w_TK[t, k]
        assert not scale or torch.equal(out.scale[place], one.scale_TS[t])
    for place in pads:
        free[place] = False
        assert (
            not out.x[place].float().any() and not (prob and out.prob[place]) and not (scale and out.scale[place].any())
        )
    assert (out.x.float()[free] == FILL).all()
    assert (out.prob[free if prob else ...] == FILL).all() and (out.scale[free if scale else ...] == FILL).all()
    return places


class CountingGroup:
    """A process group that notes the bytes each collective sends from this rank."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.sent: list[int] = []

    def alltoall_base(self, out: Tensor, source: Tensor, *splits: Any) -> Any:
        self.sent.append(source.numel() * source.element_size())
        return self.group.alltoall_base(out, source, *splits)

    def _allgather_base(self, out: Tensor, source: Tensor) -> Any:
        self.sent.append(source.numel() * source.element_size())
        return self.group._allgather_base(out, source)
