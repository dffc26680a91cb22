"""batch_losses on CUDA against the CPU's fp64 formulas, alone, behind the router and in a graph."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_layer.ops import _ext
from moe_layer.ops.batch_losses import batch_losses
from moe_layer.ops.route_topk import route_topk

pytestmark = pytest.mark.gpu
LOSSES: dict[str, Any] = {"aux_counts": "live", "want_z": True}


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    status = _ext.status()
    assert status.loaded, status.sentence()


@pytest.mark.parametrize("losses", ["both", "aux", "z"])
@pytest.mark.parametrize("experts", [1, 8, 128, 512, 2000])
@pytest.mark.parametrize("tokens", [0, 1, 1000])
def test_values_and_gradients(tokens: int, experts: int, losses: str) -> None:
    top_k = min(4, experts)
    ids = torch.rand(tokens, experts).argsort(dim=1)[:, :top_k]
    counts = torch.bincount(ids.flatten(), minlength=experts).to(torch.int32)
    live = counts.flip(0)[None].contiguous()
    scores = torch.softmax(torch.randn(tokens, experts), dim=1).sum(dim=0, keepdim=True)
    z_sum = torch.randn(tokens).square().sum(dim=0, keepdim=True)
    number = 2 if losses == "both" else 1
    d_summary, d_scaled = torch.randn(5), torch.randn(number)
    results = []
    for dtype, device in ((torch.float32, "cuda"), (torch.float64, "cpu")):
        leaves = [scores.to(device, dtype).requires_grad_(), z_sum.to(device, dtype).requires_grad_()]
        given = (live.to(device), leaves[0]) if losses != "z" else (None, None)
        z = leaves[1] if losses != "aux" else None
        out = batch_losses(counts.to(device), *given, z, top_k=top_k, aux_coeff=0.02, z_coeff=0.003)
        used = [leaf for leaf, kept in zip(leaves, (losses != "z", losses != "aux"), strict=True) if kept]
        grads = torch.autograd.grad(list(out), used, [d.to(device, dtype) for d in (d_summary, d_scaled)])
        results.append([value.double().cpu() for value in (*out, *grads)])
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(
            ours, wanted, rtol=1e-6, atol=1e-7 * float(wanted.abs().max()) if wanted.numel() else 0
        )


def test_behind_the_router_in_a_graph() -> None:
    """The losses' kernel is launched beside the router's last one and has to wait for it, with other logits too."""

    def step(logits: torch.Tensor) -> list[torch.Tensor]:
        leaf = logits.detach().requires_grad_()
        out = route_topk(leaf, top_k=8, aux_counts="live", want_z=True)
        found = batch_losses(out.counts, out.aux_counts, out.score_sum, out.z_sum, top_k=8)
        return [*found, *torch.autograd.grad(found.scaled.sum(), leaf)]

    first, second = torch.randn(4096, 128, device="cuda"), torch.randn(4096, 128, device="cuda") * 2
    eager = [step(x) for x in (first, second)]
    static = first.clone()
    with torch.cuda.stream(torch.cuda.Stream()):
        step(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step(static)
    for logits, wanted in ((second, eager[1]), (first, eager[0]), (second, eager[1])):
        static.copy_(logits)
        graph.replay()
        torch.cuda.synchronize()
        assert all(torch.equal(one, two) for one, two in zip(captured, wanted, strict=True))
    exact = route_topk(second.double().cpu(), top_k=8, aux_counts="live", want_z=True)
    found = batch_losses(exact.counts, exact.aux_counts, exact.score_sum, exact.z_sum, top_k=8)
    torch.testing.assert_close(eager[1][0].double().cpu(), found.summary, rtol=1e-5, atol=1e-7)


SHAPES = {
    "lean": (1000, 128, {"top_k": 8}),
    "lean, one row": (1, 512, {"top_k": 10}),
    "lean, 8 experts": (4096, 8, {"top_k": 2}),
    "lean, 384 experts": (777, 384, {"top_k": 8}),
    "lean, groups": (900, 256, {"top_k": 8, "score_function": "sigmoid", "num_groups": 8, "group_topk": 4}),
    "general": (300, 600, {"top_k": 8}),
    "no tokens": (0, 64, {"top_k": 2}),
}


@pytest.mark.parametrize("wanted", [LOSSES, {"aux_counts": "effective"}, {"want_z": True}], ids=["both", "aux", "z"])
@pytest.mark.parametrize("name", SHAPES)
def test_finished_by_the_router(name: str, wanted: dict[str, Any]) -> None:
    """Losses and gradients are those of batch_losses on the sums, up to roundings."""
    tokens, experts, options = SHAPES[name]
    logits = torch.randn(tokens, experts, device="cuda").to(torch.bfloat16)
    valid = torch.rand(tokens, device="cuda") < 0.9
    number = len(wanted)
    d_summary, d_scaled = torch.randn(5, device="cuda"), torch.randn(number, device="cuda")
    results = []
    for fused in (True, False):
        leaf = logits.detach().requires_grad_()
        out = route_topk(leaf, valid=valid, loss_coeffs=(0.02, 0.003) if fused else None, **options, **wanted)
        if fused:
            found = (out.losses, out.scaled_losses)
        else:
            aux = (out.aux_counts, out.score_sum) if "aux_counts" in wanted else (None, None)
            z_sum = out.z_sum if "want_z" in wanted else None
            found = tuple(batch_losses(out.counts, *aux, z_sum, top_k=options["top_k"], aux_coeff=0.02, z_coeff=0.003))
        results.append([*found, *torch.autograd.grad(found, leaf, [d_summary, d_scaled])])
    assert results[0][1].numel() == number
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6 if ours.ndim == 1 else 2e-2, atol=1e-8, equal_nan=True)


def test_finished_losses_against_fp64() -> None:
    logits = torch.randn(5000, 256) * 2
    given = {"top_k": 8, "score_function": "sigmoid", "loss_coeffs": (0.5, 0.25), **LOSSES}
    ours = route_topk(logits.cuda(), **given)
    theirs = route_topk(logits.double(), **given)
    torch.testing.assert_close(ours.losses.cpu().double(), theirs.losses, rtol=2e-6, atol=0)
    torch.testing.assert_close(ours.scaled_losses.cpu().double(), theirs.scaled_losses, rtol=2e-6, atol=0)


def test_finished_losses_are_the_same_bits_in_a_graph() -> None:
    logits = torch.randn(4096, 512, device="cuda")
    given = {"top_k": 10, "loss_coeffs": (0.5, 0.25), **LOSSES}
    eager = [route_topk(x, **given) for x in (logits, logits * 2)]
    static = logits.clone()
    with torch.cuda.stream(torch.cuda.Stream()):
        route_topk(static, **given)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = route_topk(static, **given)
    for _ in range(20):
        for values, wanted in ((logits, eager[0]), (logits * 2, eager[1])):
            static.copy_(values)
            graph.replay()
            assert torch.equal(out.losses, wanted.losses) and torch.equal(out.scaled_losses, wanted.scaled_losses)
            assert torch.equal(out.counts, wanted.counts) and torch.equal(out.score_sum, wanted.score_sum)


def test_finished_losses_of_fp64_logits_are_refused() -> None:
    with pytest.raises(RuntimeError, match="finished losses are fp32 on CUDA"):
        route_topk(torch.randn(4, 8, dtype=torch.float64, device="cuda"), top_k=2, loss_coeffs=(1.0, 1.0), **LOSSES)
