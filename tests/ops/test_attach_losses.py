"""attach_losses: identity, gradients to the losses, counters that grow exactly once per backward."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_layer.losses import load_balancing_loss, z_loss
from moe_layer.ops.attach_losses import attach_losses
from moe_layer.ops.count_pass import count_pass
from moe_layer.ops.route_topk import route_topk


class Layer:
    """A router reduced to its weights, with the buffers a layer keeps."""

    def __init__(self) -> None:
        self.load = torch.zeros(8, dtype=torch.int64)
        self.history = torch.zeros(8, dtype=torch.int64)
        self.log = torch.zeros(2)
        self.scale = torch.tensor(2.0)

    def __call__(self, logits: Tensor) -> Tensor:
        out = route_topk(logits, top_k=2, aux_counts="live", want_z=True)
        aux = load_balancing_loss(out.aux_counts, out.score_sum, top_k=2)
        losses = torch.stack([0.1 * aux, 0.01 * z_loss(out.z_sum, logits.shape[0])])
        return attach_losses(
            out.weights,
            losses,
            self.scale,
            out.counts,
            self.load,
            aux_counts=out.aux_counts,
            aux_history=self.history,
            log_values=losses,
            log_sums=self.log,
        )


RUNS: dict[str, Callable[[Layer], Callable[[Tensor], Tensor]]] = {
    "eager": lambda layer: layer,
    "reentrant checkpoint": lambda layer: lambda x: checkpoint(layer, x, use_reentrant=True),
    "non-reentrant checkpoint": lambda layer: lambda x: checkpoint(layer, x, use_reentrant=False),
    "nested checkpoints": lambda layer: (
        lambda x: checkpoint(lambda y: checkpoint(layer, y, use_reentrant=False), x, use_reentrant=False)
    ),
    "compiled": lambda layer: torch.compile(layer.__call__, fullgraph=True, backend="aot_eager"),
    "checkpointed and compiled": lambda layer: (
        lambda x: checkpoint(torch.compile(layer.__call__, fullgraph=True, backend="aot_eager"), x, use_reentrant=False)
    ),
}


@pytest.mark.parametrize("name", RUNS)
def test_counted_and_sent_exactly_once(name: str) -> None:
    logits = torch.randn(6, 8)
    upstream = torch.randn(6, 2)
    plain, leaf = Layer(), logits.clone().requires_grad_()
    out = route_topk(leaf, top_k=2, aux_counts="live", want_z=True)
    aux = load_balancing_loss(out.aux_counts, out.score_sum, top_k=2)
    total = (out.weights * upstream).sum() + 2.0 * (0.1 * aux + 0.01 * z_loss(out.z_sum, 6))
    (expected,) = torch.autograd.grad(total, leaf)

    leaf = logits.clone().requires_grad_()
    weights = RUNS[name](plain)(leaf)
    assert not plain.load.any() and not plain.history.any() and not plain.log.any(), "nothing is counted in the forward"
    assert torch.equal(weights, out.weights)
    weights.backward(upstream)
    torch.testing.assert_close(leaf.grad, expected, rtol=1e-5, atol=1e-7)
    assert torch.equal(plain.load, out.counts.long())
    assert torch.equal(plain.history, out.aux_counts[0].long())
    assert plain.log[0] > 0 and plain.log[1] > 0


def test_no_grad_counts_nothing() -> None:
    layer = Layer()
    logits = torch.randn(6, 8, requires_grad=True)
    with torch.no_grad():
        layer(logits)
    layer(logits)  # a forward without backward
    assert not layer.load.any() and not layer.log.any()


def test_any_order_of_forwards_and_backwards_and_a_scale_set_in_between() -> None:
    layer = Layer()
    first, second = (torch.randn(6, 8, requires_grad=True) for _ in range(2))
    outs = [layer(first), layer(second)]
    layer.scale.fill_(0.0)
    for out in outs:
        out.backward(torch.zeros(6, 2))
    assert int(layer.load.sum()) == 24
    assert not first.grad.any() and not second.grad.any()


def test_two_compiled_forwards_before_a_backward_are_refused_not_miscounted() -> None:
    layer = Layer()
    compiled = torch.compile(layer.__call__, fullgraph=True, backend="aot_eager")
    outs = [compiled(torch.randn(6, 8, requires_grad=True)) for _ in range(2)]
    outs[1].sum().backward()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        outs[0].sum().backward()


def test_opcheck() -> None:
    weights, losses = torch.randn(3, 2, requires_grad=True), torch.randn(2, requires_grad=True)
    counts, buffer = torch.ones(4, dtype=torch.int32), torch.zeros(4, dtype=torch.int64)
    args: tuple[Any, ...] = (weights, losses, torch.tensor(1.5), counts, buffer, None, None, None, None)
    torch.library.opcheck(torch.ops.moe_layer.attach_losses.default, args)
    torch.library.opcheck(torch.ops.moe_layer.attach_losses.default, (weights, None, torch.tensor(1.0), *(None,) * 6))
    torch.library.opcheck(torch.ops.moe_layer.add_counts_.default, (buffer, counts))
    torch.library.opcheck(torch.ops.moe_layer.with_history.default, (buffer, buffer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradcheck(dtype: torch.dtype) -> None:
    weights = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    losses = torch.randn(2, dtype=dtype, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: attach_losses(w, None, torch.tensor(1.0)), weights)
    attach_losses(weights, losses, torch.tensor(3.0)).sum().backward()
    assert losses.grad.tolist() == [3.0, 3.0]


@pytest.mark.parametrize(
    ("kind", "message", "change"),
    [
        (ValueError, "scale must be a 0-d tensor", {"scale": torch.ones(1)}),
        (ValueError, "losses must be", {"losses": torch.ones(())}),
        (TypeError, "tokens_per_expert must be int64", {"tokens_per_expert": torch.zeros(4)}),
        (TypeError, "tokens_per_expert must be int64", {"counts": torch.zeros(4)}),
        (ValueError, "tokens_per_expert has 5 entries", {"tokens_per_expert": torch.zeros(5, dtype=torch.int64)}),
    ],
)
def test_bad_arguments(kind: type[Exception], message: str, change: dict[str, Tensor]) -> None:
    arguments = {
        "losses": torch.ones(2),
        "scale": torch.ones(()),
        "counts": torch.ones(4, dtype=torch.int32),
        "tokens_per_expert": torch.zeros(4, dtype=torch.int64),
    }
    with pytest.raises(kind, match=message):
        attach_losses(torch.randn(3, 2), **(arguments | change))


def test_count_pass_adds_each_pair_and_skips_absent_ones() -> None:
    load, history, sums = torch.arange(4), torch.ones(4, dtype=torch.int64), torch.arange(6.0)
    counts = torch.tensor([1, 2, 3, 4], dtype=torch.int32)
    events = torch.tensor([10, 20, 30, 40, 50, 60, 0, 0], dtype=torch.int32)
    count_pass(
        tokens_per_expert=load,
        counts=counts,
        log_sums=sums,
        log_values=torch.tensor([0.5, 1.5]),
        log_events=events,
        aux_history=history,
        aux_counts=None,
    )
    assert load.tolist() == [1, 3, 5, 7] and history.tolist() == [1, 1, 1, 1]
    assert sums.tolist() == [0.5, 2.5, 12.0, 23.0, 34.0, 45.0]
    arguments = (load, counts, sums, torch.zeros(2), events, history, counts.view(1, 4))
    torch.library.opcheck(torch.ops.moe_layer.count_pass_.default, arguments)
    torch.library.opcheck(torch.ops.moe_layer.count_pass_.default, (load, counts, *[None] * 5))
