"""Load-balancing and z losses from the sums that `route_topk` returns.

S sequences (1 for the batch loss), E experts, K top-k, R data ranks. With f_e = E/(K*n) * slots of expert e and P_e
the mean normalised score of expert e over n tokens, the load-balancing loss is sum_e f_e * P_e: 1.0 when balanced, up
to E/K.

With a process group, f_e and n are those of the whole group (one all-reduce), P_e stays local, and the loss is
multiplied by R: its mean over the ranks is the loss of the global batch, so averaging gradients over the ranks gives
the global gradient. That makes the batch loss independent of how tokens are split over ranks. It does depend on how
they are split over micro-batches; the per-sequence loss depends on neither. Losses are fp32 (fp64 for fp64 sums),
counts stay integers.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from moe_layer.errors import RoutingError
from moe_layer.ops.attach_losses import with_history


def sequence_boundaries(x: Tensor) -> Tensor:
    """int32 `[B+1]` boundaries of the flattened tokens of x `[B, S, D]`, one sequence a row.

    Raises:
        RoutingError: x has another number of dimensions.
    """
    if x.ndim != 3:
        raise RoutingError(
            f"losses.aux: sequence needs x of shape [B, S, D] or cu_seqlens, got x of shape {tuple(x.shape)}"
        )
    return torch.arange(x.shape[0] + 1, dtype=torch.int32, device=x.device) * x.shape[1]


def tokens_per_sequence(
    num_tokens: int, valid: Tensor | None, cu_seqlens: Tensor | None, device: torch.device | str | None = None
) -> Tensor:
    """int64 `[S]` valid tokens per sequence (S = 1 without `cu_seqlens`), without reading device memory."""
    if cu_seqlens is None:
        if valid is None:
            return torch.full((1,), num_tokens, dtype=torch.int64, device=device)
        return valid.reshape(-1).sum(dim=0, keepdim=True)
    bounds = cu_seqlens.to(torch.int64)
    if valid is not None:
        before = torch.cat([bounds.new_zeros(1), torch.cumsum(valid.reshape(-1), dim=0)])
        bounds = before[bounds.clamp(0, num_tokens)]
    return torch.diff(bounds)


def load_balancing_loss(
    aux_counts_SE: Tensor,
    score_sum_SE: Tensor,
    *,
    top_k: int,
    num_tokens: Tensor | None = None,
    per_sequence: bool = False,
    history_E: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
) -> Tensor:
    """0-d unscaled load-balancing loss, differentiable in `score_sum_SE`.

    Args:
        aux_counts_SE: integer `[S, E]` slots per expert (K per valid token).
        score_sum_SE: floating `[S, E]` sums of normalised scores over valid tokens.
        top_k: K.
        num_tokens: `[S]` valid tokens per sequence (any dtype); None derives them as counts / K.
        per_sequence: mean over the sequences that have tokens, instead of one loss over the batch.
        history_E: integer `[E]` local counts of earlier micro-batches, added to f_e (the `global` loss).
        group: data ranks that share f_e; None keeps it local.

    Raises:
        ValueError: shapes that do not fit, or history together with per_sequence.
    """
    if aux_counts_SE.ndim != 2 or aux_counts_SE.shape != score_sum_SE.shape:
        raise ValueError(
            "aux_counts and score_sum must both be [S, E], "
            f"got {tuple(aux_counts_SE.shape)} and {tuple(score_sum_SE.shape)}"
        )
    if per_sequence and history_E is not None:
        raise ValueError("history_E belongs to the global loss; per_sequence needs none")
    counts_SE = aux_counts_SE.to(torch.int64)
    tokens_S = counts_SE.sum(dim=1) // top_k if num_tokens is None else num_tokens.reshape(-1)
    if per_sequence:
        return _sequence_loss(counts_SE, score_sum_SE, tokens_S, top_k=top_k, group=group)
    return _batch_loss(counts_SE, score_sum_SE, tokens_S, top_k=top_k, history_E=history_E, group=group)


def _sequence_loss(
    counts_SE: Tensor, score_sum_SE: Tensor, tokens_S: Tensor, *, top_k: int, group: dist.ProcessGroup | None
) -> Tensor:
    wide = score_sum_SE.dtype
    safe_S = tokens_S.clamp(min=1).to(wide)
    loss_S = (counts_SE.to(wide) * score_sum_SE).sum(dim=1) * (counts_SE.shape[1] / top_k) / (safe_S * safe_S)
    (sequences,), ranks = _over_group([(tokens_S > 0).sum()], group)
    return loss_S.sum() * (ranks / sequences.clamp(min=1).to(wide))


def _batch_loss(
    counts_SE: Tensor,
    score_sum_SE: Tensor,
    tokens_S: Tensor,
    *,
    top_k: int,
    history_E: Tensor | None,
    group: dist.ProcessGroup | None,
) -> Tensor:
    wide = score_sum_SE.dtype
    num_experts = counts_SE.shape[1]
    slots_E = counts_SE.sum(dim=0)
    if history_E is not None:
        slots_E = with_history(slots_E, history_E.to(torch.int64))
    (slots_E, tokens), ranks = _over_group([slots_E, tokens_S.sum().to(torch.int64)], group)
    share_E = slots_E.to(wide) / slots_E.sum().clamp(min=1).to(wide)
    mean_score_E = score_sum_SE.sum(dim=0) / tokens.clamp(min=1).to(wide)
    return (share_E * mean_score_E).sum() * (num_experts * ranks)


def z_loss(z_sum: Tensor, num_valid: Tensor | int, *, group: dist.ProcessGroup | None = None) -> Tensor:
    """0-d mean over valid tokens (of the group) of logsumexp(logits)^2, from `route_topk`'s `z_sum` [1].

    With a group, the mean over its ranks is the global mean, also when they hold different numbers of tokens.
    """
    tokens = torch.as_tensor(num_valid, device=z_sum.device).to(torch.int64).sum()
    (tokens,), ranks = _over_group([tokens], group)
    return z_sum.sum() * (ranks / tokens.clamp(min=1).to(z_sum.dtype))


def is_local(group: dist.ProcessGroup | None) -> bool:
    """Whether the losses of this rank need no other rank."""
    return group is None or dist.get_world_size(group) == 1


def _over_group(values: list[Tensor], group: dist.ProcessGroup | None) -> tuple[list[Tensor], int]:
    """Integer tensors summed over the group in one collective, and the number of ranks."""
    if is_local(group):
        return values, 1
    assert group is not None
    packed = torch.cat([value.reshape(-1).to(torch.int64) for value in values])
    dist.all_reduce(packed, group=group)
    pieces = packed.split([value.numel() for value in values])
    return [piece.view(value.shape) for piece, value in zip(pieces, values, strict=True)], dist.get_world_size(group)
