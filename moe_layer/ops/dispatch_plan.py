"""What a rank's ids say about its traffic: per-expert counts, tokens per destination rank, their positions.

At one rank every token is kept, so no size depends on the routing and nothing synchronises with the host.

Shape letters: T tokens, K slots, E experts, R ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.kernels import load_kernels


def dispatch_plan(ids_TK: Tensor, *, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Args: int32 ids, -1 = absent. Returns int32 `(counts_E, send_tokens, send_counts_R, position_TR)`: see
    `DispatchPlan`."""
    load_kernels(ids_TK)
    return call_plain(torch.ops.moe_layer.dispatch_plan, ids_TK, num_experts, num_ranks)


@torch.library.custom_op("moe_layer::dispatch_plan", mutates_args=())
def _dispatch_plan(ids: Tensor, num_experts: int, num_ranks: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    T = ids.shape[0]
    flat_P = torch.where(ids >= 0, ids, num_experts).flatten().long()
    counts_E = torch.zeros(num_experts + 1, dtype=torch.int32, device=ids.device)
    counts_E.scatter_add_(0, flat_P, torch.ones_like(flat_P, dtype=torch.int32))
    token_T = torch.arange(T, dtype=torch.int32, device=ids.device)
    if num_ranks == 1:
        counts_R = torch.full((1,), T, dtype=torch.int32, device=ids.device)
        return counts_E[:-1].clone(), token_T, counts_R, token_T.clone().unsqueeze(1)
    rank_TK = torch.where(ids >= 0, ids * num_ranks // num_experts, num_ranks).long()
    goes_TR = torch.zeros(T, num_ranks + 1, dtype=torch.bool, device=ids.device).scatter_(1, rank_TK, True)[:, :-1]
    counts_R = goes_TR.sum(0)
    within_TR = goes_TR.to(torch.int64).cumsum(0) - 1
    position_TR = torch.where(goes_TR, within_TR + (counts_R.cumsum(0) - counts_R), -1)
    send_tokens = goes_TR.T.nonzero()[:, 1]
    return counts_E[:-1].clone(), send_tokens.to(torch.int32), counts_R.to(torch.int32), position_TR.to(torch.int32)


@_dispatch_plan.register_fake
def _(ids, num_experts, num_ranks):  # type: ignore[no-untyped-def]
    T = ids.shape[0]
    sent = T if num_ranks == 1 else torch.library.get_ctx().new_dynamic_size()
    new = [ids.new_empty(shape, dtype=torch.int32) for shape in ((num_experts,), (sent,), (num_ranks,), (T, num_ranks))]
    return tuple(new)
