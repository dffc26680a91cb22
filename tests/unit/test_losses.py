"""Load-balancing and z losses: the formula, padding, splits over ranks and over sequences."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_layer import losses
from moe_layer.losses import load_balancing_loss, tokens_per_sequence, z_loss
from moe_layer.ops.route_topk import RouteTopk, route_topk
from tests import oracle_router as oracle
from tests.unit.thread_group import ThreadGroup

E, K = 8, 2


def routed(logits: Tensor, **options: Tensor | str) -> RouteTopk:
    return route_topk(logits, top_k=K, score_function="sigmoid", want_z=True, **({"aux_counts": "live"} | options))


def literal_loss(logits: Tensor, valid: list[bool] | None = None) -> Tensor:
    """E * sum_e f_e P_e over the valid tokens, in fp64 loops."""
    answer = oracle.route(logits.double(), oracle.Rule(top_k=K, score_function="sigmoid"), valid=valid)
    tokens = sum(valid) if valid is not None else logits.shape[0]
    total = logits.new_zeros((), dtype=torch.float64)
    for expert in range(E):
        f = answer.live_counts[0][expert] / (K * max(tokens, 1))
        total = total + E * f * answer.score_sum[0][expert] / max(tokens, 1)
    return total


@settings(max_examples=50)
@given(st.integers(0, 5), st.integers(0, 2**31))
def test_batch_loss_is_the_formula(num_tokens: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(num_tokens, E, generator=generator)
    valid = torch.rand(num_tokens, generator=generator) < 0.7
    out = routed(logits, valid=valid)
    ours = load_balancing_loss(out.aux_counts, out.score_sum, top_k=K)
    want = literal_loss(logits, valid.tolist())
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=1e-6)
    counted = load_balancing_loss(out.aux_counts, out.score_sum, top_k=K, num_tokens=valid.sum()[None].float())
    assert torch.equal(ours, counted)


def test_balanced_is_one_and_collapsed_is_e_over_k() -> None:
    logits = torch.eye(E) * 30
    logits = logits + logits.roll(1, dims=1)
    out = route_topk(logits, top_k=K, aux_counts="live")
    assert abs(float(load_balancing_loss(out.aux_counts, out.score_sum, top_k=K)) - 1) < 1e-5
    out = route_topk(torch.tensor([[30.0, 30.0, *[0.0] * 6]]).repeat(5, 1), top_k=K, aux_counts="live")
    assert abs(float(load_balancing_loss(out.aux_counts, out.score_sum, top_k=K)) - E / K) < 1e-5


def test_no_tokens_gives_zero_loss_and_zero_gradient() -> None:
    logits = torch.zeros(0, E, requires_grad=True)
    out = routed(logits)
    for per_sequence in (False, True):
        loss = load_balancing_loss(out.aux_counts, out.score_sum, top_k=K, per_sequence=per_sequence)
        loss = loss + z_loss(out.z_sum, 0)
        assert loss.item() == 0.0
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        assert grad.shape == (0, E)


@pytest.mark.parametrize("valid_rows", [None, [True, True, False, True, False, True, True]])
def test_sequence_loss_is_the_mean_over_sequences_with_tokens(valid_rows: list[bool] | None) -> None:
    logits = torch.randn(7, E)
    bounds = [0, 3, 3, 5, 7]
    valid = None if valid_rows is None else torch.tensor(valid_rows)
    out = routed(logits, cu_seqlens=torch.tensor(bounds), valid=valid)
    ours = load_balancing_loss(out.aux_counts, out.score_sum, top_k=K, per_sequence=True)
    pieces = [
        literal_loss(logits[a:b], None if valid_rows is None else valid_rows[a:b])
        for a, b in itertools.pairwise(bounds)
        if b > a
    ]
    torch.testing.assert_close(ours.double(), torch.stack(pieces).mean(), rtol=1e-5, atol=1e-6)


def test_tokens_per_sequence() -> None:
    valid = torch.tensor([True, False, True, True, True])
    cu_seqlens = torch.tensor([0, 2, 2, 5], dtype=torch.int32)
    assert tokens_per_sequence(5, None, None).tolist() == [5]
    assert tokens_per_sequence(5, valid, None).tolist() == [4]
    assert tokens_per_sequence(5, None, cu_seqlens).tolist() == [2, 0, 3]
    assert tokens_per_sequence(5, valid, cu_seqlens).tolist() == [1, 0, 3]
    assert tokens_per_sequence(0, valid[:0], torch.tensor([0])).tolist() == []


def whole(logits: Tensor, kind: str, cu_seqlens: Tensor | None) -> tuple[Tensor, Tensor]:
    leaf = logits.clone().requires_grad_()
    out = routed(leaf, cu_seqlens=cu_seqlens)
    if kind == "z":
        loss = z_loss(out.z_sum, logits.shape[0])
    else:
        loss = load_balancing_loss(out.aux_counts, out.score_sum, top_k=K, per_sequence=kind == "sequence")
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("cuts", [[0, 6, 12], [0, 2, 12], [0, 0, 5, 12], [0, 3, 6, 9, 12]])
@pytest.mark.parametrize("kind", ["batch", "sequence", "z"])
def test_any_split_over_ranks_gives_the_global_loss(
    kind: str, cuts: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The mean over ranks of losses and of gradients is the global batch's, also with unequal and empty ranks."""
    logits = torch.randn(12, E)
    # Sequences of one token each can be cut anywhere.
    want_loss, want_grad = whole(logits, kind, torch.arange(13) if kind == "sequence" else None)
    group = ThreadGroup(len(cuts) - 1)

    def rank_work(rank: int) -> tuple[Tensor, Tensor]:
        leaf = logits[cuts[rank] : cuts[rank + 1]].clone().requires_grad_()
        out = routed(leaf, cu_seqlens=torch.arange(leaf.shape[0] + 1) if kind == "sequence" else None)
        if kind == "z":
            loss = z_loss(out.z_sum, leaf.shape[0], group=group)
        else:
            per_sequence = kind == "sequence"
            loss = load_balancing_loss(out.aux_counts, out.score_sum, top_k=K, per_sequence=per_sequence, group=group)
        return loss.detach(), torch.autograd.grad(loss, leaf)[0]

    results = group.run(monkeypatch, losses, rank_work)
    assert group.calls == 1, "one collective a loss"
    mean = torch.stack([loss for loss, _ in results]).mean()
    torch.testing.assert_close(mean, want_loss, rtol=1e-5, atol=1e-6)
    grad = torch.cat([g for _, g in results]) / group.world
    torch.testing.assert_close(grad, want_grad, rtol=1e-4, atol=1e-7)


def test_one_rank_group_is_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    out = routed(torch.randn(5, E))
    alone = load_balancing_loss(out.aux_counts, out.score_sum, top_k=K)
    group = ThreadGroup(1)
    (same,) = group.run(
        monkeypatch, losses, lambda _: load_balancing_loss(out.aux_counts, out.score_sum, top_k=K, group=group)
    )
    assert torch.equal(alone, same) and group.calls == 0


def test_history_makes_f_that_of_all_micro_batches() -> None:
    """With equal micro-batches, Megatron's running average of the counts."""
    first, second = routed(torch.randn(6, E)), routed(torch.randn(6, E))
    ours = load_balancing_loss(second.aux_counts, second.score_sum, top_k=K, history_E=first.aux_counts[0].long())
    average = (first.aux_counts + second.aux_counts).double() / 2
    want = (average * second.score_sum.double()).sum() * E / (K * 6 * 6)
    torch.testing.assert_close(ours.double(), want, rtol=1e-5, atol=0)


def test_bad_arguments() -> None:
    out = routed(torch.randn(5, E))
    with pytest.raises(ValueError, match=r"must both be \[S, E\]"):
        load_balancing_loss(out.counts, out.score_sum, top_k=K)
    with pytest.raises(ValueError, match="history_E belongs to the global loss"):
        load_balancing_loss(out.aux_counts, out.score_sum, top_k=K, per_sequence=True, history_E=out.counts.long())
