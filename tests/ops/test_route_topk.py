"""route_topk: values and gradients against the fp64 oracle, with random upstream gradients for every output."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_layer.ops.route_topk import route_topk
from tests.ops.router_cases import ALL_OUTPUTS, check_against_oracle, run_op
from tests.oracle_router import Rule

RULES = {
    "softmax-post": Rule(top_k=3),
    "softmax-pre": Rule(top_k=3, softmax_order="pre", renormalize=False),
    "softmax-pre-renormalised": Rule(top_k=3, softmax_order="pre"),
    "softmax-k1": Rule(top_k=1, softmax_order="pre", renormalize=False),
    "sigmoid": Rule(top_k=3, score_function="sigmoid", scaling_factor=2.5),
    "sigmoid-raw": Rule(top_k=3, score_function="sigmoid", renormalize=False),
    "sigmoid-k1": Rule(top_k=1, score_function="sigmoid"),
    "sqrtsoftplus": Rule(top_k=3, score_function="sqrtsoftplus"),
    "sigmoid-bias": Rule(top_k=2, score_function="sigmoid", bias=[0.5, -0.5, 0.1, 0.0, -0.2, 0.7, -1.0, 0.3]),
    "softmax-post-bias": Rule(top_k=2, bias=[0.5, -0.5, 0.1, 0.0, -0.2, 0.7, -1.0, 0.3]),
    "softmax-pre-bias": Rule(top_k=2, softmax_order="pre", bias=[0.05, -0.5, 0.1, 0.0, -0.2, 0.07, -1.0, 0.3]),
    "deepseek": Rule(
        top_k=2,
        score_function="sigmoid",
        scaling_factor=2.5,
        num_groups=4,
        group_topk=2,
        bias=[0.1, -0.1, 0.0, 0.2, -0.2, 0.3, 0.0, 0.05],
    ),
    "groups-megatron": Rule(top_k=4, num_groups=2, group_topk=1, group_rule="sum_topk_per_group"),
    "groups-pre": Rule(top_k=2, softmax_order="pre", num_groups=4, group_topk=2, group_rule="sum_topk_per_group"),
    "groups-sqrtsoftplus": Rule(top_k=3, score_function="sqrtsoftplus", num_groups=2, group_topk=2),
    "all-experts": Rule(top_k=8, score_function="sigmoid"),
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", RULES)
def test_values_and_gradients(name: str, dtype: torch.dtype) -> None:
    logits = (torch.randn(9, 8) * 2).to(dtype)
    check_against_oracle(logits, RULES[name])


@pytest.mark.parametrize("aux_counts", ["live", "effective"])
@pytest.mark.parametrize("name", ["softmax-post", "sigmoid-bias", "deepseek", "softmax-pre"])
def test_valid_rows_and_sequences(name: str, aux_counts: str) -> None:
    valid = torch.tensor([True, False, True, True, False, True, True])
    cu_seqlens = torch.tensor([0, 2, 2, 5, 7], dtype=torch.int32)  # one sequence is empty
    logits = torch.randn(7, 8)
    out = check_against_oracle(logits, RULES[name], valid=valid, cu_seqlens=cu_seqlens, aux_counts=aux_counts)
    assert out.ids[1].tolist() == [-1] * RULES[name].top_k and not out.weights[1].any()


def test_tokens_outside_every_sequence_are_routed_but_not_in_the_sums() -> None:
    logits = torch.randn(6, 8)
    out = check_against_oracle(logits, RULES["softmax-post"], cu_seqlens=torch.tensor([1, 3, 5]))
    assert out.aux_counts.sum() == 4 * 3 and out.counts.sum() == 6 * 3


@pytest.mark.parametrize("name", ["softmax-pre", "deepseek", "sigmoid"])
def test_large_and_tiny_logits(name: str) -> None:
    """Saturated sigmoids, underflowing softmax, denormal logits: finite values and gradients, as in fp64."""
    logits = torch.tensor(
        [
            [90.0, -90.0, 30.0, -30.0, 1e-40, -1e-40, 0.0, 5.0],
            [-80.0, -81.0, -82.0, -83.0, -84.0, -85.0, -86.0, -87.0],
            [1e-45, 2e-45, 3e-45, 0.0, -0.0, -1e-45, 1e-38, -1e-38],
        ]
    )
    check_against_oracle(logits, RULES[name])


def test_sqrtsoftplus_is_continuous_where_it_changes_formula() -> None:
    logits = torch.tensor([[19.99, 20.0, 20.01, 25.0, -25.0, -60.0, 0.0, 1.0]])
    check_against_oracle(logits, RULES["sqrtsoftplus"])


@pytest.mark.parametrize("name", RULES)
def test_no_tokens(name: str) -> None:
    logits = torch.zeros(0, 8, requires_grad=True)
    out = run_op(logits, RULES[name], aux_counts="live", **ALL_OUTPUTS)
    assert out.weights.shape == out.ids.shape == (0, RULES[name].top_k)
    assert out.counts.tolist() == [0] * 8 and out.score_sum.tolist() == [[0.0] * 8] and out.z_sum.tolist() == [0.0]
    grads = [torch.ones_like(t) for t in (out.weights, out.score_sum, out.z_sum, out.probs, out.scores)]
    (d_logits,) = torch.autograd.grad([out.weights, out.score_sum, out.z_sum, out.probs, out.scores], logits, grads)
    assert d_logits.shape == (0, 8)


@pytest.mark.parametrize("lead", [(), (5,), (2, 3), (0, 4), (2, 1, 3)])
def test_leading_dimensions(lead: tuple[int, ...]) -> None:
    logits = torch.randn(*lead, 8)
    wanted = {"aux_counts": "live", "want_scores": True, "want_probs": True, "map_format": "bitmap"}
    out = route_topk(logits, top_k=2, valid=torch.rand(lead) > 0.3, **wanted)
    flat = route_topk(logits.reshape(-1, 8), top_k=2, **wanted)
    assert out.ids.shape == (*lead, 2) and out.probs.shape == out.scores.shape == (*lead, 8)
    assert out.map.shape == (*lead, 1)
    kept = out.ids.reshape(-1, 2)[:, :1] >= 0
    assert torch.equal(torch.where(kept, flat.ids, -1), out.ids.reshape(-1, 2))


def test_strides_of_inputs_and_gradients_do_not_matter() -> None:
    wide = torch.randn(8, 24)
    layouts = {"transposed": wide[:, :8].t(), "sliced": wide[:, 3:19:2], "expanded": wide[:1, :8].expand(6, 8)}
    for name, view in layouts.items():
        results = []
        for logits in (view.detach().requires_grad_(), view.contiguous().detach().requires_grad_()):
            out = route_topk(logits, top_k=3, score_function="sigmoid", want_probs=True)
            d_weights = torch.tensor([[0.3], [1.0]]).expand(2, 3).repeat(4, 1)[: logits.shape[0]]
            d_probs = torch.randn(8, logits.shape[0], generator=torch.Generator().manual_seed(1)).t()
            results.append(
                (out.ids, out.weights, *torch.autograd.grad([out.weights, out.probs], logits, [d_weights, d_probs]))
            )
        for ours, contiguous in zip(*results, strict=True):
            assert torch.equal(ours, contiguous), name


def test_expanded_gradients_of_a_sum() -> None:
    """`.sum().backward()` sends stride-0 gradients; for renormalised weights the true gradient is zero."""
    logits = torch.randn(5, 8, requires_grad=True)
    route_topk(logits, top_k=3, scaling_factor=2.0).weights.sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-6
    logits.grad = None
    route_topk(logits, top_k=3, softmax_order="pre", renormalize=False).weights.sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() > 1e-3


def test_the_weight_of_a_biased_expert_is_its_raw_score() -> None:
    """(s+b)-b would lose 1e-3 of a score of 1e-5 under a bias of 1."""
    logits = torch.full((1, 4), -11.5129)
    out = route_topk(logits, torch.tensor([1.0, 0.0, 0.0, 0.0]), top_k=1, score_function="sigmoid")
    assert out.ids.tolist() == [[0]]
    assert abs(float(out.weights) / float(torch.sigmoid(torch.tensor(-11.5129).double())) - 1) < 1e-6


def test_nothing_unasked_is_returned() -> None:
    out = route_topk(torch.randn(4, 8), top_k=2)
    for name in ("aux_counts", "score_sum", "z_sum", "probs", "scores", "map"):
        assert getattr(out, name).numel() == 0, name


def test_bitmap_has_expert_e_at_bit_e_mod_8() -> None:
    for num_experts in (3, 8, 9, 130):
        logits = torch.randn(6, num_experts)
        bits = route_topk(logits, top_k=3, map_format="bitmap").map
        full = route_topk(logits, top_k=3, map_format="bytemap").map
        assert bits.dtype == torch.uint8 and bits.shape == (6, (num_experts + 7) // 8)
        for token in range(6):
            for expert in range(bits.shape[1] * 8):
                bit = bool(int(bits[token, expert // 8]) >> (expert % 8) & 1)
                assert bit == (expert < num_experts and bool(full[token, expert]))


@pytest.mark.parametrize("softmax", [{}, {"softmax_order": "pre", "renormalize": False}], ids=["post", "pre"])
@pytest.mark.parametrize("mean", [0.0, 10.0])
def test_saturated_rows_keep_the_digits_of_their_gradient(softmax: dict[str, Any], mean: float) -> None:
    """One expert takes nearly all: the fp32 gradient of every row stays within 1e-5 of fp64 (it was off by up to 1)."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(512, 32, generator=generator) * 2
    logits[:, 3] += torch.linspace(0, 14, 512)
    upstream = [torch.randn(shape, generator=generator) + mean for shape in ((512, 4), (1, 32), (512, 32))]
    found: list[list[torch.Tensor]] = []
    for dtype in (torch.float32, torch.float64):
        x = logits.to(dtype).requires_grad_()
        out = route_topk(x, top_k=4, aux_counts="live", want_scores=True, **softmax)
        pairs = zip((out.weights, out.score_sum, out.scores), upstream, strict=True)
        found.append([torch.autograd.grad(value, x, g.to(dtype), retain_graph=True)[0] for value, g in pairs])
    for narrow, wide in zip(*found, strict=True):
        assert ((narrow.double() - wide).norm(dim=1) / wide.norm(dim=1)).max() < 1e-5
