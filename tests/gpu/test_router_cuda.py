"""The router's CUDA kernels against the PyTorch reference on the CPU: ids by rule, values and gradients against fp64.

Ids may differ from the CPU's only where the keys that decide differ by less than 8 ulp (docs/design.md, section 2).
Values and gradients are compared with fp64 at the same ids; the tolerance is twice the error of the fp32 CPU path, plus
a floor of a few ulp of the largest value, below which the fp32 path is exact by luck.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_layer.ops import _ext
from moe_layer.ops.copy_ids import copy_ids
from moe_layer.ops.route_topk import route_topk
from tests.gpu.router_cases import (
    ALL,
    CASES,
    LOSSES,
    TRAINED,
    bias_for,
    check,
    differing_rows,
    gradients_for,
    logits_for,
    on,
    on_cuda,
    run,
)

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    status = _ext.status()
    assert status.loaded, status.sentence()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    experts, options, with_bias = CASES[name]
    check(logits_for(experts, 259, dtype), bias_for(experts, with_bias), options | ALL)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_what_training_asks_for(name: str, dtype: torch.dtype, masked: bool) -> None:
    experts, options, with_bias = CASES[name]
    inputs = {"valid": torch.rand(1031) < 0.8} if masked else {}
    check(logits_for(experts, 1031, dtype), bias_for(experts, with_bias), options | LOSSES, TRAINED, **inputs)


@pytest.mark.parametrize("name", CASES)
def test_near_ties_are_settled_by_whole_keys(name: str) -> None:
    """Keys that agree in the bits a packed key keeps: pairs, runs across the K-th place, whole rows."""
    experts, options, _ = CASES[name]
    if options.get("num_groups"):
        pytest.skip("a group's sum of nearly equal keys may round either way")
    eps = torch.finfo(torch.float32).eps
    logits = torch.randn(300, experts).sort(dim=1, descending=True).values
    for row in range(300):
        first = torch.randint(0, experts, ()).item()
        run = logits[row, first : first + 1 + row % 9]
        run.copy_(run[0] * (1 + eps * torch.randint(-4, 5, run.shape)))
        logits[row] = logits[row, torch.randperm(experts)]
    logits[:8] = 1 + eps * torch.randint(0, 9, (8, experts))
    logits[8:40] = torch.exp(4 * logits[8:40])  # the best key is far above the K-th
    logits[40:44] = 0.0
    ours = route_topk(logits.cuda(), **options, **LOSSES)
    theirs = route_topk(logits, **options, **LOSSES)
    assert torch.equal(ours.ids.cpu(), theirs.ids) and torch.equal(ours.aux_counts.cpu(), theirs.aux_counts)


@pytest.mark.parametrize("name", ["e129-k5-bias", "e256-k8-deepseek", "e384-k8-bias", "e512-k10-post-bias"])
def test_biased_keys_of_every_size(name: str) -> None:
    """Biases from 1e-6 to 1 and negative ones, scores near 0: packed keys keep what lies near the best key only."""
    experts, options, _ = CASES[name]
    generator = torch.Generator().manual_seed(4)
    logits = logits_for(experts, 200, torch.float32) - 8
    for sign, least in ((1, 6), (-1, 6), (-1, 1)):
        bias = sign * 10 ** (-least * torch.rand(experts, generator=generator))
        ours = route_topk(logits.cuda(), bias.cuda(), **options, **LOSSES)
        assert differing_rows(ours.ids.cpu(), logits, bias, options) <= 4
        theirs = route_topk(logits, None, top_k=options["top_k"], aux_counts="live")
        assert (ours.aux_counts.cpu() - theirs.aux_counts).abs().sum() <= 8


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["e24-k12-sigmoid", "e128-k8-sigmoid", "e256-k8-deepseek", "e384-k8-bias", "e512-k10"])
def test_logits_beyond_the_range_of_exp(name: str, dtype: torch.dtype) -> None:
    """Rows whose exponentials overflow, vanish, or do neither, side by side in a warp; whole rows of one sign."""
    experts, options, with_bias = CASES[name]
    logits = logits_for(experts, 300, torch.float32)
    logits[::3] *= 60
    logits[1::12] -= 150
    logits[2::12] += 150
    logits, bias = logits.to(dtype), bias_for(experts, with_bias)
    ours = route_topk(logits.cuda(), on_cuda(bias), **options, **LOSSES)
    theirs = route_topk(logits.double(), bias, **options, **LOSSES)
    for name in ("score_sum", "z_sum"):
        torch.testing.assert_close(getattr(ours, name).cpu().double(), getattr(theirs, name), rtol=2e-6, atol=2e-6)
    assert differing_rows(ours.ids.cpu(), logits, bias, options) <= 6
    weights = route_topk(logits.double(), bias, **options, replay_ids=ours.ids.cpu()).weights
    torch.testing.assert_close(ours.weights.cpu().double(), weights, rtol=1e-5, atol=1e-6)
    grads, given = gradients_for(theirs, TRAINED), options | LOSSES
    d_ours = run(logits.cuda(), on_cuda(bias), given, on("cuda", grads))[1]
    d_narrow, d_wide = (
        run(x, bias, given, grads, replay_ids=ours.ids.cpu())[1].double() for x in (logits, logits.double())
    )
    error, narrow = ((d - d_wide).abs().max() for d in (d_ours.double().cpu(), d_narrow))
    assert error <= 4 * narrow, (
        f"error {error:.2e}, the CPU's in {dtype} {narrow:.2e}, largest {d_wide.abs().max():.2e}"
    )


@pytest.mark.parametrize("case", [(64, 16), (512, 16), (512, 32), (1000, 32)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_neighbours_win(case: tuple[int, int], dtype: torch.dtype) -> None:
    """The best experts stand side by side, so that one lane of a warp holds many of them, or all of its own."""
    experts, top_k = case
    order = torch.arange(experts).float()
    lanes = torch.tensor([(e // 8 % 32) * 1000 - e / 2000 for e in range(experts)])
    logits = torch.stack([order, -order, order.flip(0), lanes, -lanes]).repeat(20, 1).to(dtype)
    ours, theirs = route_topk(logits.cuda(), top_k=top_k, **LOSSES), route_topk(logits, top_k=top_k, **LOSSES)
    assert torch.equal(ours.ids.cpu(), theirs.ids) and torch.equal(ours.counts.cpu(), theirs.counts)


@pytest.mark.parametrize("names", [("weights",), ("score_sum",), ("weights", "score_sum", "z_sum", "scores")])
@pytest.mark.parametrize("name", ["e8-k2", "e60-k4-pre", "e64-k8-pre", "e128-k8", "e512-k10", "e40-k40-general"])
def test_gradient_of_saturated_rows(name: str, names: tuple[str, ...]) -> None:
    """One probability near 1: the gradients of a row cancel, and each row keeps its own digits (softmax_backward)."""
    experts, options, with_bias = CASES[name]
    logits, bias = logits_for(experts, 101, torch.float32) * 15, bias_for(experts, with_bias)
    given = options | LOSSES | {"want_scores": True}
    with torch.no_grad():
        shape = route_topk(logits, bias, **given)
    grads = gradients_for(shape, names)
    ours, d_ours = run(logits.cuda(), on_cuda(bias), given, on("cuda", grads))
    ids = {"replay_ids": ours.ids.cpu()}
    d_narrow = run(logits, bias, given, grads, **ids)[1].double()
    d_wide = run(logits.double(), bias, given, grads, **ids)[1]
    # Below 1e-8 the rounding of what the correction adds up shows (ulp of an ulp of the upstream gradient).
    scale = d_wide.abs().amax(dim=1, keepdim=True).clamp(min=1e-8)
    error, narrow = (((d - d_wide).abs() / scale).max() for d in (d_ours.double().cpu(), d_narrow))
    assert error <= max(2 * float(narrow), 1e-5), f"relative error of a row {error:.2e}, the CPU's {narrow:.2e}"


@pytest.mark.parametrize(
    "names", [("weights",), ("probs",), ("score_sum",), ("z_sum",), ("scores",), ("weights", "score_sum", "z_sum")]
)
@pytest.mark.parametrize("name", ["e128-k8", "e64-k8-pre", "e256-k8-deepseek", "e512-k10"])
def test_each_gradient_alone(name: str, names: tuple[str, ...]) -> None:
    experts, options, with_bias = CASES[name]
    check(logits_for(experts, 67, torch.bfloat16), bias_for(experts, with_bias), options | ALL, names)


@pytest.mark.parametrize("aux_counts", ["live", "effective"])
@pytest.mark.parametrize("name", ["e8-k2", "e128-k8", "e256-k8-deepseek", "e160-k6-groups-of-20", "e2000-k12-general"])
def test_valid_rows_and_sequences(name: str, aux_counts: str) -> None:
    experts, options, with_bias = CASES[name]
    valid = torch.rand(523) < 0.8
    boundaries = torch.tensor([3, 40, 40, 41, 42, 300, 520], dtype=torch.int32)
    for cu_seqlens in (None, boundaries, torch.tensor([0, 523])):
        inputs = {"valid": valid} | ({} if cu_seqlens is None else {"cu_seqlens": cu_seqlens})
        check(
            logits_for(experts, 523, torch.float32),
            bias_for(experts, with_bias),
            options | ALL | {"aux_counts": aux_counts},
            **inputs,
        )


@pytest.mark.parametrize("name", CASES)
def test_ties_go_to_the_lower_id(name: str) -> None:
    """Constant rows, rows of few values, and fp32 keys that agree in all but the last bits."""
    experts, options, with_bias = CASES[name]
    logits = torch.randint(0, 3, (64, experts)).float()
    logits[0] = 0.5
    logits[1:32] = 1.0 + torch.randint(0, 4, (31, experts)) * torch.finfo(torch.float32).eps
    bias = torch.zeros(experts) if with_bias else None
    ours = route_topk(logits.cuda(), on_cuda(bias), **options)
    kept = {key: value for key, value in options.items()}
    if bias is None and not options.get("num_groups"):
        assert torch.equal(ours.ids.cpu(), route_topk(logits, bias, **kept).ids)
    same = route_topk(logits[:1].to(torch.bfloat16).cuda(), on_cuda(bias), **options).ids
    assert torch.equal(same.cpu(), route_topk(logits[:1], bias, **kept).ids)
    assert all(len(set(row)) == options["top_k"] for row in ours.ids.tolist())


@pytest.mark.parametrize("outputs", [ALL, LOSSES], ids=["all", "losses"])
@pytest.mark.parametrize("name", CASES)
def test_nan_and_infinite_logits(name: str, outputs: dict[str, Any]) -> None:
    experts, options, with_bias = CASES[name]
    logits = logits_for(experts, 64, torch.float32)
    bad = torch.tensor([float("nan"), float("inf"), float("-inf")])
    for row in range(60):
        where = torch.randperm(experts)[: 1 + row % max(1, experts)]
        logits[row, where] = bad[torch.randint(0, 3, (len(where),))] if row % 4 else bad[row // 4 % 3]
    bias = bias_for(experts, with_bias)
    ours = route_topk(logits.cuda(), on_cuda(bias), **options, **outputs)
    theirs = route_topk(logits, bias, **options, **outputs)
    assert ours.events.tolist() == theirs.events.tolist()
    assert (ours.ids.cpu() != theirs.ids).any(dim=1).sum() <= 2
    assert all(len(set(row)) == options["top_k"] and 0 <= min(row) and max(row) < experts for row in ours.ids.tolist())
    same = (ours.ids.cpu() == theirs.ids).all(dim=1)
    torch.testing.assert_close(ours.weights.cpu()[same], theirs.weights[same], rtol=1e-5, atol=1e-6, equal_nan=True)
    torch.testing.assert_close(ours.score_sum.cpu(), theirs.score_sum, rtol=1e-4, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(ours.z_sum.cpu(), theirs.z_sum, rtol=1e-4, atol=1e-5, equal_nan=True)
    assert (ours.aux_counts.cpu() - theirs.aux_counts).abs().sum() <= 4


@pytest.mark.parametrize("map_format", ["bytemap", "bitmap"])
@pytest.mark.parametrize("name", CASES)
def test_no_tokens_and_maps(name: str, map_format: str) -> None:
    experts, options, with_bias = CASES[name]
    bias = bias_for(experts, with_bias)
    given = options | ALL | {"map_format": map_format}
    for tokens in (0, 1, 33):
        short = logits_for(experts, tokens, torch.bfloat16)
        lean, plain = (route_topk(x, b, **options, **LOSSES) for x, b in ((short.cuda(), on_cuda(bias)), (short, bias)))
        assert lean.counts.sum() == tokens * options["top_k"] == lean.aux_counts.sum()
        torch.testing.assert_close(lean.score_sum.cpu(), plain.score_sum, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lean.z_sum.cpu(), plain.z_sum, rtol=1e-5, atol=1e-6)
        logits = logits_for(experts, tokens, torch.bfloat16)
        ours = route_topk(logits.cuda().requires_grad_(), on_cuda(bias), **given)
        theirs = route_topk(logits, bias, **given, replay_ids=ours.ids.cpu())
        assert torch.equal(ours.map.cpu(), theirs.map) and ours.counts.sum() == tokens * options["top_k"]
        (ours.weights.sum() + ours.z_sum.sum() + ours.score_sum.sum()).backward()


@pytest.mark.parametrize("replayed", [False, True])
@pytest.mark.parametrize("name", ["e8-k2", "e128-k8", "e256-k8-deepseek", "e512-k10"])
def test_same_bits_twice_and_under_a_graph(name: str, replayed: bool) -> None:
    """Run twice, then captured: the graph replays with other logits and gives what an eager call gives."""
    experts, options, with_bias = CASES[name]
    top_k, bias = options["top_k"], on_cuda(bias_for(experts, with_bias))
    recorded = torch.randint(-1, experts, (4099, top_k)).cuda() if replayed else None
    first, second = (logits_for(experts, 4099, torch.float32, seed).cuda() for seed in (7, 8))
    grads = {"weights": torch.randn(4099, top_k), "score_sum": torch.randn(1, experts), "z_sum": torch.randn(1)}
    given = options | LOSSES | {"replay_ids": recorded}
    eager = [run(x, bias, given, on("cuda", grads)) for x in (first, first, second)]
    for one, two in zip((*eager[0][0], eager[0][1]), (*eager[1][0], eager[1][1]), strict=True):
        assert torch.equal(one, two)
    static, buffer = first.clone().requires_grad_(), torch.empty(4099, top_k, dtype=torch.int16, device="cuda")
    written = torch.empty(4099, top_k, dtype=torch.int64, device="cuda")
    cuda_grads = list(on("cuda", grads).values())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = route_topk(static, bias, **given)
        torch.autograd.grad([out.weights, out.score_sum, out.z_sum], static, cuda_grads)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = route_topk(static, bias, **given, id_buffer=written)
        (d_logits,) = torch.autograd.grad([out.weights, out.score_sum, out.z_sum], static, cuda_grads)
        copy_ids(out.ids, buffer, num_experts=experts)
    for _ in range(3):
        with torch.no_grad():
            static.copy_(second)
        graph.replay()
        torch.cuda.synchronize()
        for one, two in zip((*out, d_logits), (*eager[2][0], eager[2][1]), strict=True):
            assert torch.equal(one, two)
        assert torch.equal(buffer, eager[2][0].ids.to(torch.int16))
        assert torch.equal(written, eager[2][0].ids.to(torch.int64))


@pytest.mark.parametrize("outputs", [ALL, LOSSES], ids=["all", "losses"])
@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["e8-k2", "e128-k8", "e256-k8-deepseek", "e40-k40-general"])
def test_ids_into_a_buffer(name: str, dtype: torch.dtype, outputs: dict[str, Any]) -> None:
    experts, options, with_bias = CASES[name]
    for tokens in (0, 77):
        logits, valid = logits_for(experts, tokens, torch.bfloat16).cuda(), torch.rand(tokens) < 0.8
        buffer = torch.full((tokens, options["top_k"]), -9, dtype=dtype).cuda()
        bias = on_cuda(bias_for(experts, with_bias))
        out = route_topk(logits, bias, **options, **outputs, valid=valid.cuda(), id_buffer=buffer)
        assert torch.equal(buffer, out.ids.to(dtype)) and (out.ids.cpu()[~valid] == -1).all()


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_copy_ids(dtype: torch.dtype) -> None:
    for source in (torch.uint8, torch.int16, torch.int32, torch.int64):
        ids = torch.randint(0, 200, (1003, 8), device="cuda").to(source)
        assert torch.equal(
            copy_ids(ids, torch.empty(1003, 8, dtype=dtype, device="cuda"), num_experts=200), ids.to(dtype)
        )


def test_more_than_2_to_31_logits() -> None:
    """E = 512, T*E > 2^31: sampled rows agree with the same rows routed alone; counts add up."""
    tokens, experts = (1 << 22) + 77, 512
    if torch.cuda.mem_get_info()[0] < 16 << 30:
        pytest.skip("needs 16 GiB of free GPU memory")
    logits = torch.empty(tokens, experts, dtype=torch.bfloat16, device="cuda").normal_()
    leaf = logits.requires_grad_()
    out = route_topk(leaf, top_k=10, aux_counts="live", want_z=True)
    rows = torch.cat([torch.randint(0, tokens, (200,), device="cuda"), torch.tensor([0, tokens - 1], device="cuda")])
    alone = route_topk(logits.detach()[rows], top_k=10)
    assert torch.equal(out.ids[rows], alone.ids) and torch.equal(out.weights[rows], alone.weights)
    assert int(out.counts.sum()) == tokens * 10 and abs(float(out.score_sum.double().sum()) / tokens - 1) < 1e-5
    d_weights = torch.randn_like(out.weights)
    (grad,) = torch.autograd.grad(out.weights, leaf, d_weights)
    part = logits.detach()[rows].requires_grad_()
    (want,) = torch.autograd.grad(route_topk(part, top_k=10).weights, part, d_weights[rows])
    assert torch.equal(grad[rows], want)


def test_gradients_that_are_not_contiguous_and_logits_that_are_strided() -> None:
    base = logits_for(128, 130, torch.float32).cuda()
    leaf = base.t().contiguous().t().requires_grad_()  # column-major
    route_topk(leaf, top_k=8).weights.sum().backward()  # an expanded gradient
    plain = base.clone().requires_grad_()
    route_topk(plain, top_k=8).weights.sum().backward()
    assert torch.equal(leaf.grad, plain.grad)
