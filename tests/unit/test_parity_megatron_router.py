"""Our router, losses and bias update against megatron-core 0.16.1's own functions, values and gradients."""

from __future__ import annotations

import itertools
import sys
import warnings
from typing import Any

import pytest
import torch

from moe_layer.balance import update_expert_bias
from moe_layer.losses import load_balancing_loss, z_loss
from moe_layer.ops.route_topk import route_topk
from moe_layer.ops.route_topk_select import blocked_by_groups


@pytest.fixture(scope="module")
def moe_utils() -> Any:
    with warnings.catch_warnings():  # it warns about every optional package it lacks
        warnings.simplefilter("ignore")
        pytest.importorskip("megatron.core", reason="megatron-core is a test extra (pip install .[megatron])")
        from megatron.core.transformer.moe import moe_utils as module
    return module


CASES = [
    (score_function, pre, groups, biased, scale, top_k)
    for (score_function, pre), groups, biased, scale, top_k in itertools.product(
        [("softmax", True), ("softmax", False), ("sigmoid", False)], [None, (4, 2)], [False, True], [None, 2.5], [1, 4]
    )
    if not (biased and score_function == "softmax")
    and not (groups and top_k == 1)
    and not (score_function == "softmax" and not pre and top_k == 1)
]


@pytest.mark.parametrize("case", CASES, ids=["-".join(map(str, case)) for case in CASES])
def test_topk_routing_with_score_function(moe_utils: Any, case: tuple[Any, ...]) -> None:
    score_function, pre, groups, biased, scale, top_k = case
    bias = torch.linspace(-0.2, 0.2, 16) if biased else None
    num_groups, group_topk = groups or (None, None)
    upstream = torch.randn(33, 16)
    logits = torch.randn(33, 16)
    theirs_leaf, ours_leaf = logits.clone().requires_grad_(), logits.clone().requires_grad_()
    probs, routing_map = moe_utils.topk_routing_with_score_function(
        theirs_leaf, top_k, use_pre_softmax=pre, num_groups=num_groups, group_topk=group_topk, scaling_factor=scale,
        score_function=score_function, expert_bias=bias,
    )  # fmt: skip
    ours = route_topk(
        ours_leaf, bias, top_k=top_k, score_function=score_function, softmax_order="pre" if pre else "post",
        renormalize=score_function != "softmax", scaling_factor=scale or 1.0, num_groups=num_groups or 0,
        group_topk=group_topk or 0, group_rule="sum_topk_per_group", want_probs=True, map_format="bytemap",
    )  # fmt: skip
    assert torch.equal(ours.map, routing_map)
    torch.testing.assert_close(ours.probs, probs, rtol=1e-6, atol=1e-7)
    (want,) = torch.autograd.grad(probs, theirs_leaf, upstream)
    (got,) = torch.autograd.grad(ours.probs, ours_leaf, upstream)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("top_k", "num_groups", "group_topk"), [(4, 4, 2), (8, 8, 4), (2, 2, 1)])
def test_group_limited_topk(moe_utils: Any, top_k: int, num_groups: int, group_topk: int) -> None:
    scores = torch.randn(50, 32)
    _, indices = moe_utils.group_limited_topk(
        scores, topk=top_k, num_tokens=50, num_experts=32, num_groups=num_groups, group_topk=group_topk
    )
    ours = route_topk(
        scores, top_k=top_k, num_groups=num_groups, group_topk=group_topk, group_rule="sum_topk_per_group"
    )
    assert torch.equal(ours.ids.long(), indices)
    blocked = blocked_by_groups(scores, None, num_groups, group_topk, "sum_topk_per_group", top_k)
    assert (
        not blocked.gather(1, indices).any() and int(blocked.sum()) == 50 * 32 * (num_groups - group_topk) // num_groups
    )


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid"])
@pytest.mark.parametrize("padded", [False, True])
def test_switch_load_balancing_loss_func(moe_utils: Any, score_function: str, padded: bool) -> None:
    logits, top_k = torch.randn(40, 16), 3
    valid = torch.rand(40) < 0.8 if padded else torch.ones(40, dtype=torch.bool)
    leaf = logits.clone().requires_grad_()
    routing_map, scores = moe_utils.compute_routing_scores_for_aux_loss(
        leaf, top_k, score_function, padding_mask=~valid
    )
    want = moe_utils.switch_load_balancing_loss_func(
        scores, routing_map.sum(dim=0), int(valid.sum()), top_k, 16, moe_aux_loss_coeff=0.01
    )
    (want_grad,) = torch.autograd.grad(want, leaf)
    leaf = logits.clone().requires_grad_()
    # The selection itself may be biased: the loss counts the unbiased one, there and here.
    out = route_topk(leaf, torch.randn(16), top_k=top_k, score_function=score_function, valid=valid, aux_counts="live")
    ours = 0.01 * load_balancing_loss(out.aux_counts, out.score_sum, top_k=top_k)
    assert torch.equal(out.aux_counts[0].long(), routing_map.sum(dim=0))
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, leaf)[0], want_grad, rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("padded", [False, True])
def test_z_loss_func(moe_utils: Any, padded: bool) -> None:
    logits = torch.randn(40, 16)
    valid = torch.rand(40) < 0.8 if padded else torch.ones(40, dtype=torch.bool)
    leaf = logits.clone().requires_grad_()
    want = moe_utils.z_loss_func(leaf, 0.01, padding_mask=~valid if padded else None)
    (want_grad,) = torch.autograd.grad(want, leaf)
    leaf = logits.clone().requires_grad_()
    ours = 0.01 * z_loss(route_topk(leaf, top_k=2, valid=valid, want_z=True).z_sum, valid.sum())
    torch.testing.assert_close(ours, want, rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.autograd.grad(ours, leaf)[0], want_grad, rtol=1e-4, atol=1e-9)


def test_get_updated_expert_bias(moe_utils: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One rank: their all-reduce over Megatron's global groups is replaced by nothing."""
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *_, **__: None)
    monkeypatch.setattr(moe_utils.parallel_state, "get_tensor_and_data_parallel_group", lambda **_: None)
    for _ in range(10):
        bias, load = torch.randn(16), torch.randint(0, 50, (16,))
        want = moe_utils.get_updated_expert_bias(load.float(), bias, 1e-3)
        update_expert_bias(bias, load, 1e-3)
        assert torch.equal(bias, want)
    assert "megatron.core" in sys.modules
