"""moe_layer.compat.transformer_engine: TE's signatures, returns and errors, values against the fp64 oracle."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.compat.transformer_engine import (
    RoutingMapFormat,
    fused_compute_score_for_moe_aux_loss,
    fused_moe_aux_loss,
    fused_topk_with_score_function,
)
from tests import oracle_router as oracle
from tests.ops.router_cases import TOLERANCE, close

SIGNATURES = {
    fused_topk_with_score_function: (
        "logits topk use_pre_softmax num_groups group_topk scaling_factor score_function expert_bias "
        "routing_map_format topk_indices qb_histogram qb_bin_bounds qb_histogram_mode"
    ),
    fused_compute_score_for_moe_aux_loss: "logits topk score_function routing_map_format",
    fused_moe_aux_loss: "probs tokens_per_expert total_num_tokens num_experts topk coeff",
}


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda f: f.__name__)
def test_signatures(function: Any) -> None:
    assert list(inspect.signature(function).parameters) == SIGNATURES[function].split()


def topk(logits: Tensor, **change: Any) -> tuple[Tensor, Tensor]:
    arguments: dict[str, Any] = {
        "topk": 4, "use_pre_softmax": False, "num_groups": None, "group_topk": None, "scaling_factor": None,
        "score_function": "softmax", "expert_bias": None,
    }  # fmt: skip
    return fused_topk_with_score_function(logits, **(arguments | change))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("groups", [None, 2])
@pytest.mark.parametrize("scale", [None, 1.2, 0.0])
@pytest.mark.parametrize(
    ("score_function", "pre", "biased"),
    [("softmax", True, False), ("softmax", False, False), ("sigmoid", True, False), ("sigmoid", False, True),
     ("sqrtsoftplus", False, True)],
)  # fmt: skip
def test_topk(
    score_function: str, pre: bool, biased: bool, scale: float | None, groups: int | None, dtype: torch.dtype
) -> None:
    logits = torch.randn(6, 16).to(dtype).requires_grad_()
    bias = torch.linspace(-0.25, 0.25, 16) if biased else None
    num_groups = None if groups is None else 4
    rule = oracle.Rule(
        top_k=4,
        score_function=score_function,
        softmax_order="pre" if pre and score_function == "softmax" else "post",
        renormalize=score_function != "softmax",
        scaling_factor=1.0 if scale is None else scale,
        num_groups=num_groups or 0,
        group_topk=groups or 0,
        group_rule="sum_topk_per_group",
        bias=None if bias is None else bias.tolist(),
    )
    probs, routing_map = topk(
        logits, use_pre_softmax=pre, score_function=score_function, scaling_factor=scale, num_groups=num_groups,
        group_topk=groups, expert_bias=bias,
    )  # fmt: skip
    exact = logits.detach().double().requires_grad_()
    answer = oracle.route(exact, rule)
    dense = torch.zeros(6, 16, dtype=torch.float64).scatter(
        1, torch.tensor(answer.ids), oracle.stack(answer.weights, 4)
    )
    assert probs.dtype == dtype and routing_map.dtype == torch.bool
    assert torch.equal(routing_map, torch.zeros(6, 16, dtype=torch.bool).scatter(1, torch.tensor(answer.ids), True))
    tolerance = max(TOLERANCE[dtype], TOLERANCE[torch.float32])
    close(probs, dense, tolerance, "probs")
    upstream = torch.randn(6, 16).to(dtype)
    (ours,) = torch.autograd.grad(probs, logits, upstream)
    (theirs,) = torch.autograd.grad(dense, exact, upstream.double())
    assert ours.dtype == dtype
    close(ours, theirs, tolerance * 4, "d_logits")


@pytest.mark.parametrize("value", [RoutingMapFormat.BITMAP_U8, 1, "bitmap_u8"])
@pytest.mark.parametrize("num_experts", [16, 130])
def test_bitmap_in_every_spelling(value: Any, num_experts: int) -> None:
    logits = torch.randn(2, 3, num_experts)
    _, full = topk(logits, routing_map_format=RoutingMapFormat.BYTEMAP)
    _, bits = topk(logits, routing_map_format=value)
    assert bits.dtype == torch.uint8 and bits.shape == (2, 3, (num_experts + 7) // 8)
    unpacked = (bits[..., None] >> torch.arange(8, dtype=torch.uint8)) & 1
    assert torch.equal(unpacked.flatten(-2)[..., :num_experts].bool(), full)
    scores_map, _ = fused_compute_score_for_moe_aux_loss(logits, 4, "softmax", value)
    assert torch.equal(scores_map, bits), "without bias and groups both select the same experts"


@pytest.mark.parametrize("dtype", [torch.int16, torch.int32, torch.int64])
def test_dense_indices(dtype: torch.dtype) -> None:
    logits = torch.randn(2, 5, 32)
    buffer = torch.full((2, 5, 4), -7, dtype=dtype)
    probs, indices = topk(logits, topk_indices=buffer)
    assert indices is buffer
    _, full = topk(logits)
    assert torch.equal(torch.zeros_like(full).scatter(2, buffer.long(), True), full)
    assert torch.equal(buffer.long(), logits.topk(4).indices), "descending keys"
    assert torch.equal(probs, topk(logits)[0])


@pytest.mark.parametrize("lead", [(0,), (2, 0), (3,), (2, 1, 3), ()])
def test_any_leading_dimensions_and_no_tokens(lead: tuple[int, ...]) -> None:
    logits = torch.randn(*lead, 16, requires_grad=True)
    probs, routing_map = topk(logits)
    _, scores = fused_compute_score_for_moe_aux_loss(logits, 4, "sigmoid")
    assert probs.shape == routing_map.shape == scores.shape == (*lead, 16)
    (probs.sum() + scores.sum()).backward()
    assert logits.grad.shape == logits.shape
    loss = fused_moe_aux_loss(
        scores.detach().reshape(-1, 16), torch.zeros(16, dtype=torch.int32), 0 if 0 in lead else 3, 16, 4, 0.1
    )
    assert loss.item() == 0.0


def test_non_contiguous_logits() -> None:
    logits = torch.randn(16, 6).t()
    for ours, contiguous in zip(topk(logits), topk(logits.contiguous()), strict=True):
        assert torch.equal(ours, contiguous)


@pytest.mark.parametrize("score_function", ["softmax", "sigmoid", "sqrtsoftplus"])
@pytest.mark.parametrize("top_k", [1, 3])
def test_scores_for_the_aux_loss(score_function: str, top_k: int) -> None:
    logits = torch.randn(5, 16).bfloat16().requires_grad_()
    routing_map, scores = fused_compute_score_for_moe_aux_loss(logits, top_k, score_function)
    exact = logits.detach().double().requires_grad_()
    answer = oracle.route(exact, oracle.Rule(top_k=top_k, score_function=score_function))
    assert scores.dtype == torch.float32
    want = oracle.stack(answer.scores, 16)
    close(scores, want, TOLERANCE[torch.float32], "scores")
    assert torch.equal(routing_map, torch.zeros(5, 16, dtype=torch.bool).scatter(1, torch.tensor(answer.ids), True))
    upstream = torch.randn(5, 16)
    (ours,) = torch.autograd.grad(scores, logits, upstream)
    (theirs,) = torch.autograd.grad(want, exact, upstream.double())
    assert ours.dtype == torch.bfloat16
    close(ours, theirs, TOLERANCE[torch.bfloat16], "d_logits")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("count_dtype", [torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("blocks", [1, 3])
def test_aux_loss(blocks: int, count_dtype: torch.dtype, dtype: torch.dtype) -> None:
    probs = torch.rand(7, 8 * blocks).to(dtype).requires_grad_()
    counts = torch.randint(0, 20, (8 * blocks,)).to(count_dtype)
    results = []
    for total in (50, torch.tensor(50)):
        loss = fused_moe_aux_loss(probs, counts, total, 8, 2, 0.3)
        (grad,) = torch.autograd.grad(loss, probs, torch.tensor(2.0, dtype=dtype))
        results.append((loss, grad))
    constant = 8 * 0.3 / 2 / 50**2
    want = (
        sum(float(counts[c]) * sum(float(probs[r, c].detach()) for r in range(7)) for c in range(8 * blocks)) * constant
    )
    for loss, grad in results:
        assert loss.ndim == 0 and loss.dtype == grad.dtype == dtype
        close(loss, torch.tensor(want), max(TOLERANCE[dtype], 4e-6), "loss")
        close(grad, (2 * constant * counts.double()).expand(7, -1), max(TOLERANCE[dtype], 4e-6), "d_probs")


def test_the_three_functions_make_megatrons_loss() -> None:
    """map and scores of the second, counts and loss of the third: 1.0 * coeff when balanced."""
    logits = torch.eye(8) * 30
    routing_map, scores = fused_compute_score_for_moe_aux_loss(logits, 1, "softmax")
    loss = fused_moe_aux_loss(scores, routing_map.sum(dim=0), 8, 8, 1, 0.01)
    assert abs(float(loss) - 0.01) < 1e-7


class TheirEnum:
    """TE's own enum is a pybind11 class that is no int."""

    def __init__(self, name: str) -> None:
        self.name = name


def test_their_enum_is_understood() -> None:
    assert topk(torch.randn(2, 16), routing_map_format=TheirEnum("BITMAP_U8"))[1].dtype == torch.uint8


L = torch.zeros(3, 16)
IDS = torch.zeros(3, 4, dtype=torch.int32)
BAD_TOPK: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (ValueError, "float64", {"logits": L.double()}),
    (RuntimeError, "fp32, bf16 or fp16", {"logits": L.long()}),
    (RuntimeError, "E > 0", {"logits": torch.zeros(3, 0)}),
    (RuntimeError, "topk must lie in 1..16", {"topk": 17}),
    (RuntimeError, "topk must lie in 1..16", {"topk": 0}),
    (RuntimeError, "score_function must be one of", {"score_function": "tanh"}),
    (RuntimeError, "sigmoid or sqrtsoftplus", {"expert_bias": torch.zeros(16)}),
    (RuntimeError, "must be float32", {"expert_bias": torch.zeros(16).bfloat16(), "score_function": "sigmoid"}),
    (RuntimeError, r"must be \[16\]", {"expert_bias": torch.zeros(15), "score_function": "sigmoid"}),
    (RuntimeError, "is on meta", {"expert_bias": torch.zeros(16, device="meta"), "score_function": "sigmoid"}),
    (ValueError, "'bytemap' or 'bitmap_u8'", {"routing_map_format": "BITMAP_U8"}),
    (ValueError, "must be 0", {"routing_map_format": 2}),
    (TypeError, "an int or a string", {"routing_map_format": 1.0}),
    (RuntimeError, "cannot be combined", {"routing_map_format": "bitmap_u8", "topk_indices": IDS}),
    (RuntimeError, "int16, int32 or int64", {"topk_indices": IDS.to(torch.uint8)}),
    (RuntimeError, "must have shape", {"topk_indices": IDS[:, :3].contiguous()}),
    (RuntimeError, "must be contiguous", {"topk_indices": torch.zeros(4, 3, dtype=torch.int32).t()}),
    (RuntimeError, "is on meta", {"topk_indices": IDS.to("meta")}),
    (RuntimeError, "at most 32767", {"logits": torch.zeros(3, 32768), "topk_indices": IDS.to(torch.int16)}),
    (RuntimeError, "divisible by num_groups", {"num_groups": 3, "group_topk": 1}),
    (RuntimeError, "must not exceed num_groups", {"num_groups": 2, "group_topk": 4}),
    (RuntimeError, "divisible by group_topk", {"num_groups": 4, "group_topk": 3}),
    (RuntimeError, "experts per group", {"num_groups": 8, "group_topk": 1}),
    (RuntimeError, "positive num_groups", {"group_topk": 1}),
    (ValueError, "qb_histogram is set", {"qb_histogram": torch.zeros(16, 8)}),
    (ValueError, "qb_bin_bounds is set", {"qb_bin_bounds": torch.zeros(2)}),
    (ValueError, "qb_histogram_mode is set", {"qb_histogram_mode": "two_kernel"}),
]


@pytest.mark.parametrize(("kind", "message", "change"), BAD_TOPK, ids=[f"{i}-{b[1]}" for i, b in enumerate(BAD_TOPK)])
def test_topk_refuses(kind: type[Exception], message: str, change: dict[str, Any]) -> None:
    arguments = {"logits": L} | change
    with pytest.raises(kind, match=message):
        topk(arguments.pop("logits"), **arguments)


def test_int16_indices_reach_expert_32766() -> None:
    logits = torch.zeros(1, 32767)
    logits[0, -1] = 1.0
    buffer = torch.zeros(1, 1, dtype=torch.int16)
    topk(logits, topk=1, topk_indices=buffer)
    assert buffer.item() == 32766


P, C = torch.rand(4, 8), torch.zeros(8, dtype=torch.int64)
BAD_LOSS: list[tuple[str, dict[str, Any]]] = [
    (r"\[rows, cols\]", {"probs": P[0]}),
    ("fp32, bf16 or fp16", {"probs": P.double()}),
    ("no multiple of num_experts", {"num_experts": 3}),
    ("num_experts must be greater than 0", {"num_experts": 0}),
    ("topk must be greater than 0", {"topk": 0}),
    ("to fit the columns", {"tokens_per_expert": C[:4]}),
    ("int16, int32, int64", {"tokens_per_expert": C.double()}),
    ("is on meta", {"tokens_per_expert": C.to("meta")}),
    ("must be greater than 0, got 0", {"total_num_tokens": 0}),
    ("0-d int64", {"total_num_tokens": torch.tensor(4.0)}),
    ("0-d int64", {"total_num_tokens": torch.tensor([4])}),
    ("is on meta", {"total_num_tokens": torch.tensor(4, device="meta")}),
]


@pytest.mark.parametrize(("message", "change"), BAD_LOSS, ids=[f"{i}-{b[0]}" for i, b in enumerate(BAD_LOSS)])
def test_aux_loss_refuses(message: str, change: dict[str, Any]) -> None:
    arguments = {
        "probs": P, "tokens_per_expert": C, "total_num_tokens": 4, "num_experts": 8, "topk": 2, "coeff": 0.1,
    }  # fmt: skip
    with pytest.raises(RuntimeError, match=message):
        fused_moe_aux_loss(**(arguments | change))


def test_second_derivatives_are_refused() -> None:
    """torch would return those of the other paths alone."""
    logits = torch.randn(3, 8, requires_grad=True)
    for result in (topk(logits)[0], fused_compute_score_for_moe_aux_loss(logits, 2, "sigmoid")[1]):
        with pytest.raises(RuntimeError, match="no second derivatives"):
            torch.autograd.grad((result.square() + logits**2).sum(), logits, create_graph=True)
