"""The router's CUDA kernels against the PyTorch reference on the CPU: ids by rule, values and gradients against fp64.

Ids may differ from the CPU's only where the keys that decide differ by less than 8 ulp (docs/design.md, section 2).
Values and gradients are compared with fp64 at the same ids; the tolerance is twice the error of the fp32 CPU path, plus
a floor of a few ulp of the largest value, below which the fp32 path is exact by luck.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.ops import _ext
from moe_layer.ops import route_topk_select as ref
from moe_layer.ops.copy_ids import copy_ids
from moe_layer.ops.route_topk import RouteTopk, route_topk

pytestmark = pytest.mark.gpu

DEEPSEEK = {"score_function": "sigmoid", "num_groups": 8, "group_topk": 4, "scaling_factor": 2.5}
CASES: dict[str, tuple[int, dict[str, Any], bool]] = {  # experts, options, with a bias
    "e8-k2": (8, {"top_k": 2}, False),
    "e8-k8": (8, {"top_k": 8}, False),
    "e1-k1": (1, {"top_k": 1, "softmax_order": "pre", "renormalize": False}, False),
    "e60-k4-pre": (60, {"top_k": 4, "softmax_order": "pre", "renormalize": False}, False),
    "e64-k8-pre": (64, {"top_k": 8, "softmax_order": "pre", "renormalize": False}, False),
    "e128-k8": (128, {"top_k": 8}, False),
    "e128-k8-sigmoid": (128, {"top_k": 8, "score_function": "sigmoid"}, False),
    "e128-k8-sqrtsoftplus-bias": (128, {"top_k": 8, "score_function": "sqrtsoftplus"}, True),
    "e129-k5-bias": (129, {"top_k": 5, "score_function": "sigmoid"}, True),
    "e160-k6-groups-of-20": (160, {"top_k": 6, "num_groups": 8, "group_topk": 3, "softmax_order": "pre"}, False),
    "e256-k8-deepseek": (256, {"top_k": 8, **DEEPSEEK}, True),
    "e256-k16": (256, {"top_k": 16}, False),
    "e256-k8-megatron-groups": (
        256,
        {"top_k": 8, "num_groups": 4, "group_topk": 2, "group_rule": "sum_topk_per_group", "score_function": "sigmoid"},
        False,
    ),
    "e384-k8-bias": (384, {"top_k": 8, "score_function": "sigmoid"}, True),
    "e512-k10": (512, {"top_k": 10, "softmax_order": "pre"}, False),
    "e512-k10-post-bias": (512, {"top_k": 10}, True),
    "e1000-k32": (1000, {"top_k": 32, "score_function": "sigmoid", "renormalize": False}, False),
    "e1024-k4-groups": (1024, {"top_k": 4, "num_groups": 16, "group_topk": 2, "score_function": "sqrtsoftplus"}, False),
    "e40-k40-general": (40, {"top_k": 40, "score_function": "sigmoid"}, False),
    "e2000-k12-general": (2000, {"top_k": 12, **DEEPSEEK}, True),
}
ALL = {"aux_counts": "live", "want_z": True, "want_probs": True, "want_scores": True, "map_format": "bytemap"}
GRADIENTS = ("weights", "score_sum", "z_sum", "probs", "scores")
LOSSES = {"aux_counts": "live", "want_z": True}
"""What a training step asks for; without dense outputs, replay and sequences the lean kernels run."""
TRAINED = ("weights", "score_sum", "z_sum")


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    status = _ext.status()
    assert status.loaded, status.sentence()


def logits_for(experts: int, tokens: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(tokens, experts, generator=generator) * 2).to(dtype)


def bias_for(experts: int, with_bias: bool) -> Tensor | None:
    return torch.randn(experts, generator=torch.Generator().manual_seed(1)) * 0.1 if with_bias else None


def on(device: str, inputs: dict[str, Any]) -> dict[str, Any]:
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in inputs.items()}


def differing_rows(ours: Tensor, logits: Tensor, bias: Tensor | None, options: dict[str, Any]) -> int:
    """Rows whose ids are not the CPU's; fails unless every such pair of ids has keys less than 8 ulp apart."""
    selection = {name: options[name] for name in ("top_k", "score_function") if name in options}
    given = {"score_function": "softmax", "softmax_order": "post"} | options
    theirs = route_topk(logits, bias, **options).ids
    rows = (ours != theirs).any(dim=1).nonzero().flatten().tolist()
    x_TE = logits.float()
    plain = bias is None and not options.get("num_groups")
    key_TE = x_TE if plain else ref.selection_key(x_TE, None, bias, given["score_function"], given["softmax_order"])
    for row in rows:
        if options.get("num_groups"):
            continue  # a near tie of two groups' sums changes several ids; counted, and bounded by the caller
        mine, other = key_TE[row, ours[row].long()], key_TE[row, theirs[row].long()]
        ulp = torch.finfo(torch.float32).eps * torch.maximum(mine.abs(), other.abs())
        assert ((mine - other).abs() < 8 * ulp).all(), (row, selection, ours[row].tolist(), theirs[row].tolist())
    return len(rows)


def run(
    logits: Tensor, bias: Tensor | None, options: dict[str, Any], grads: dict[str, Tensor], **inputs: Any
) -> tuple[RouteTopk, Tensor]:
    leaf = logits.detach().clone().requires_grad_()
    out = route_topk(leaf, bias, **options, **inputs)
    kept = [(getattr(out, name), grad.to(getattr(out, name))) for name, grad in grads.items()]
    torch.autograd.backward([tensor for tensor, _ in kept], [grad for _, grad in kept])
    assert leaf.grad is not None
    return out, leaf.grad


def close(name: str, ours: Tensor, fp32: Tensor, exact: Tensor) -> None:
    """|ours - exact| at most twice the fp32 path's worst error, plus the rounding of the dtype and 4 ulp of fp32."""
    exact = exact.double().cpu()
    assert torch.equal(ours.cpu().isnan(), exact.isnan()), name
    ours, fp32, exact = ours.double().cpu().nan_to_num(), fp32.double().nan_to_num(), exact.nan_to_num()
    scale = exact.abs().max() if exact.numel() else torch.zeros(())
    allowed = 2 * (fp32 - exact).abs().max() + 4 * 1.2e-7 * scale + 1e-30 if exact.numel() else scale
    error = (ours - exact).abs().max() if exact.numel() else scale
    assert error <= allowed, f"{name}: error {error:.3e}, allowed {allowed:.3e}, largest value {scale:.3e}"


def gradients_for(out: RouteTopk, names: tuple[str, ...]) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(getattr(out, name).shape, generator=generator) for name in names}


def check(
    logits: Tensor, bias: Tensor | None, options: dict[str, Any], names: tuple[str, ...] = GRADIENTS, **inputs: Any
) -> RouteTopk:
    """Every output and the gradient, on CUDA, against the CPU's fp32 and fp64 paths given CUDA's ids."""
    with torch.no_grad():
        shape = route_topk(logits, bias, **options, **inputs)
    grads = gradients_for(shape, names)
    cuda = on("cuda", inputs)
    ours, d_ours = run(logits.cuda(), None if bias is None else bias.cuda(), options, on("cuda", grads), **cuda)
    fixed = dict(inputs)
    if "replay_ids" not in inputs:
        assert differing_rows_valid(ours.ids.cpu(), logits, bias, options, inputs) <= max(1, logits.shape[0] // 50)
        fixed["replay_ids"] = ours.ids.cpu()
    else:
        assert torch.equal(ours.ids.cpu(), shape.ids)
        assert ours.events.tolist() == shape.events.tolist()
    narrow, d_narrow = run(logits.float(), bias, options, grads, **fixed)
    wide, d_wide = run(logits.double(), bias, options, grads, **fixed)
    assert torch.equal(ours.counts.cpu(), wide.counts)
    assert (ours.aux_counts.cpu() - wide.aux_counts).abs().sum() <= 2 * max(1, logits.shape[0] // 50)
    assert torch.equal(ours.map.cpu(), wide.map)
    for name in ("weights", "score_sum", "z_sum", "scores"):
        close(name, getattr(ours, name), getattr(narrow, name), getattr(wide, name))
    close("probs", ours.probs, narrow.probs.to(ours.probs.dtype), wide.probs)
    close("d_logits", d_ours, d_narrow.to(d_ours.dtype), d_wide)
    return ours


def differing_rows_valid(
    ids: Tensor, logits: Tensor, bias: Tensor | None, options: dict[str, Any], inputs: dict[str, Any]
) -> int:
    kept = {name: value for name, value in options.items() if name not in ALL}
    valid = inputs.get("valid")
    if valid is None:
        return differing_rows(ids, logits, bias, kept)
    assert (ids[~valid] == -1).all()
    return differing_rows(ids[valid], logits[valid], bias, kept)


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
    ours = route_topk(logits.cuda(), **options, **LOSSES)
    theirs = route_topk(logits, **options, **LOSSES)
    assert torch.equal(ours.ids.cpu(), theirs.ids) and torch.equal(ours.aux_counts.cpu(), theirs.aux_counts)


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


@pytest.mark.parametrize("mode", ["live", "recorded", "straight_through"])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("name", ["e8-k2", "e64-k8-pre", "e128-k8", "e256-k8-deepseek", "e512-k10", "e40-k40-general"])
def test_replay(name: str, dtype: torch.dtype, mode: str) -> None:
    """Missing, duplicate and out-of-range ids; uint8 has no -1, so its missing slots are out of range."""
    experts, options, with_bias = CASES[name]
    top_k = options["top_k"]
    generator = torch.Generator().manual_seed(5)
    low = 0 if dtype == torch.uint8 else -experts // 3
    high = min(experts + experts // 4 + 1, 255) if dtype == torch.uint8 else experts + experts // 4 + 1
    recorded = torch.randint(low, high, (131, top_k), generator=generator).to(dtype)
    recorded[:40] = torch.stack([torch.randperm(min(experts, 255), generator=generator)[:top_k] for _ in range(40)]).to(
        dtype
    )
    inputs = {
        "replay_ids": recorded,
        "replay_weights": torch.rand(131, top_k, generator=generator),
        "valid": torch.arange(131) % 7 != 3,
    }
    logits = logits_for(experts, 131, torch.bfloat16)
    check(logits, bias_for(experts, with_bias), options | ALL | {"weights_mode": mode}, **inputs)


@pytest.mark.parametrize("name", CASES)
def test_ties_go_to_the_lower_id(name: str) -> None:
    """Constant rows, rows of few values, and fp32 keys that agree in all but the last bits."""
    experts, options, with_bias = CASES[name]
    logits = torch.randint(0, 3, (64, experts)).float()
    logits[0] = 0.5
    logits[1:32] = 1.0 + torch.randint(0, 4, (31, experts)) * torch.finfo(torch.float32).eps
    bias = torch.zeros(experts) if with_bias else None
    ours = route_topk(logits.cuda(), None if bias is None else bias.cuda(), **options)
    kept = {key: value for key, value in options.items()}
    if bias is None and not options.get("num_groups"):
        assert torch.equal(ours.ids.cpu(), route_topk(logits, bias, **kept).ids)
    same = route_topk(logits[:1].to(torch.bfloat16).cuda(), None if bias is None else bias.cuda(), **options).ids
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
    ours = route_topk(logits.cuda(), None if bias is None else bias.cuda(), **options, **outputs)
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
        logits = logits_for(experts, tokens, torch.bfloat16)
        ours = route_topk(logits.cuda().requires_grad_(), None if bias is None else bias.cuda(), **given)
        theirs = route_topk(logits, bias, **given, replay_ids=ours.ids.cpu())
        assert torch.equal(ours.map.cpu(), theirs.map) and ours.counts.sum() == tokens * options["top_k"]
        (ours.weights.sum() + ours.z_sum.sum() + ours.score_sum.sum()).backward()


def test_same_bits_twice_and_under_a_graph() -> None:
    """Run twice, then captured: the graph replays with other logits and gives what an eager call gives."""
    experts, options, _ = CASES["e256-k8-deepseek"]
    bias = bias_for(experts, True).cuda()
    first, second = (logits_for(experts, 4099, torch.float32, seed).cuda() for seed in (7, 8))
    grads = {"weights": torch.randn(4099, 8), "score_sum": torch.randn(1, experts), "z_sum": torch.randn(1)}
    given = options | {"aux_counts": "live", "want_z": True}
    eager = [run(x, bias, given, on("cuda", grads)) for x in (first, first, second)]
    for one, two in zip((*eager[0][0], eager[0][1]), (*eager[1][0], eager[1][1]), strict=True):
        assert torch.equal(one, two)
    static, buffer = first.clone().requires_grad_(), torch.empty(4099, 8, dtype=torch.int16, device="cuda")
    cuda_grads = list(on("cuda", grads).values())
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = route_topk(static, bias, **given)
        torch.autograd.grad([out.weights, out.score_sum, out.z_sum], static, cuda_grads)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = route_topk(static, bias, **given)
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
