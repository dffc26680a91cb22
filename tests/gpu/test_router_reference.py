"""The PyTorch reference of the router on a GPU: same ids as on the CPU, no host synchronisation, same bits twice."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.ops import route_topk as module
from moe_layer.ops import route_topk_bwd as backward_module
from moe_layer.ops.capacity import apply_capacity
from moe_layer.ops.route_topk import RouteTopk
from tests.ops.router_cases import ALL_OUTPUTS, bias_of, options
from tests.ops.test_route_topk import RULES

DEFAULTS: dict[str, Any] = {"weights_mode": "straight_through", "aux_counts": "live"} | ALL_OUTPUTS
DEFAULTS |= {"want_losses": False, "aux_coeff": 1.0, "z_coeff": 1.0}


def run_reference(logits: Tensor, rule: Any, inputs: dict[str, Tensor], grads: list[Tensor]) -> tuple[Any, ...]:
    """Forward and backward bodies of the two ops, whatever kernels are registered for the device."""
    names = ("replay_ids", "replay_weights", "valid", "cu_seqlens")
    given = options(rule) | DEFAULTS
    out = RouteTopk(*module._op._init_fn(logits, inputs.get("bias"), *(inputs[name] for name in names), **given))
    kept = ("score_function", "softmax_order", "renormalize", "scaling_factor", "weights_mode")
    rest = {name: given[name] for name in kept}
    d_logits = backward_module._op._init_fn(*grads, logits, out.ids, inputs["replay_ids"], inputs["cu_seqlens"], **rest)
    return (*out, d_logits)


@pytest.mark.parametrize("broken", [False, True])
@pytest.mark.parametrize("name", RULES)
def test_same_as_on_the_cpu_without_synchronising(name: str, broken: bool) -> None:
    rule = RULES[name]
    logits = torch.randn(259, 8)
    if broken:
        logits[5, 3], logits[7, :] = float("nan"), float("-inf")
    inputs = {
        "replay_ids": torch.randint(-1, 9, (259, rule.top_k)),
        "replay_weights": torch.rand(259, rule.top_k),
        "valid": torch.rand(259) < 0.9,
        "cu_seqlens": torch.tensor([0, 100, 100, 250]),
    }
    bias = bias_of(rule)
    if bias is not None:
        inputs["bias"] = bias
    shapes = ((259, rule.top_k), (3, 8), (1,), (259, 8), (259, 8))
    grads = [torch.randn(shape) for shape in shapes]
    want = run_reference(logits, rule, inputs, grads)
    device = {key: value.cuda() for key, value in inputs.items()}
    arguments = (logits.cuda(), rule, device, [grad.cuda() for grad in grads])
    run_reference(*arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        first, second = run_reference(*arguments), run_reference(*arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for ours, again, theirs in zip(first, second, want, strict=True):
        assert torch.equal(ours.nan_to_num(7.0), again.nan_to_num(7.0))
        if theirs.is_floating_point():
            torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-4, atol=1e-5, equal_nan=True)
        else:
            assert torch.equal(ours.cpu(), theirs)


@pytest.mark.parametrize("policy", ["probs", "position"])
def test_capacity(policy: str) -> None:
    ids, weights = torch.randint(-1, 8, (500, 2), dtype=torch.int32), torch.rand(500, 2)
    want = apply_capacity(ids, weights, 8, capacity=60, policy=policy)
    torch.cuda.set_sync_debug_mode("error")
    try:
        ids, weights = ids.pin_memory().cuda(non_blocking=True), weights.pin_memory().cuda(non_blocking=True)
        ours = apply_capacity(ids, weights, 8, capacity=60, policy=policy)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for mine, theirs in zip(ours, want, strict=True):
        assert torch.equal(mine.cpu(), theirs)
