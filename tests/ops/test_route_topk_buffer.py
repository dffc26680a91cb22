"""route_topk's id_buffer: the ids in the caller's memory too, with every way to call the op."""

from __future__ import annotations

import pytest
import torch

from moe_layer.ops.route_topk import route_topk


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("grad", [False, True])
def test_the_buffer_holds_the_ids_and_the_gradient_stays(dtype: torch.dtype, grad: bool) -> None:
    logits = torch.randn(3, 7, 16, requires_grad=grad)
    valid = torch.rand(3, 7) < 0.7
    buffer = torch.full((3, 7, 4), -9, dtype=dtype)
    out = route_topk(logits, top_k=4, valid=valid, id_buffer=buffer)
    plain = route_topk(logits, top_k=4, valid=valid)
    assert torch.equal(buffer.to(torch.int32), plain.ids) and torch.equal(out.ids, plain.ids)
    if grad:
        upstream = torch.randn_like(out.weights)
        ours, wanted = (torch.autograd.grad(o.weights, logits, upstream)[0] for o in (out, plain))
        assert torch.equal(ours, wanted)


def test_under_torch_compile() -> None:
    logits, buffer = torch.randn(9, 16, requires_grad=True), torch.zeros(9, 4, dtype=torch.int16)

    def weights(x: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        return route_topk(x, top_k=4, id_buffer=ids).weights

    torch.compile(weights, backend="aot_eager", fullgraph=True)(logits, buffer)
    assert torch.equal(buffer.to(torch.int32), route_topk(logits, top_k=4).ids)


def test_a_buffer_that_cannot_take_the_ids() -> None:
    logits = torch.randn(9, 16)
    with pytest.raises(TypeError, match="the id buffer must be int16"):
        route_topk(logits, top_k=4, id_buffer=torch.zeros(9, 4))
    with pytest.raises(ValueError, match="the id buffer must have shape"):
        route_topk(logits, top_k=4, id_buffer=torch.zeros(9, 5, dtype=torch.int32))
    with pytest.raises(ValueError, match="the id buffer must be contiguous"):
        route_topk(logits, top_k=4, id_buffer=torch.zeros(4, 9, dtype=torch.int32).t())
