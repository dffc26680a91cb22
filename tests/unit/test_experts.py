"""Values and gradients of the expert MLP: oracle, edge cases, poison, precision, bits, transformers."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from experts_inputs import (
    ACTIVATIONS,
    D,
    E,
    F,
    K,
    T,
    gradients,
    make_experts,
    make_inputs,
    make_received,
    received_rows,
)
from oracle_experts import oracle_experts, oracle_shared
from torch import Tensor

from moe_layer.config.model import SharedExpertConfig
from moe_layer.experts import SharedExpert
from moe_layer.types import Received

# grouped_mm has no fp64 kernel, so it meets the oracle in fp32: 100 ulp covers sums of at most 3*T products.
BACKENDS = [("reference", torch.float64, 1e-11), ("grouped_mm", torch.float32, 1e-5)]
every_backend = pytest.mark.parametrize(("backend", "dtype", "tolerance"), BACKENDS)


def real_rows(received: Received) -> Tensor:
    return torch.where(received.src_N3[:, 0] >= 0)[0]


@every_backend
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(
    "layout",
    [{}, {"alignment": 4, "tail": 3}, {"compact": True}, {"compact": True, "tail": 2, "apply_probs": False}],
    ids=["expert_major", "padded", "compact", "compact_no_probs"],
)
def test_matches_the_oracle(
    backend: str, dtype: torch.dtype, tolerance: float, activation: str, bias: bool, layout: dict
) -> None:
    experts = make_experts(dtype, activation=activation, bias=bias, backend=backend)
    x, ids, weights = make_inputs(dtype)
    apply_probs = layout.get("apply_probs", True)
    received = make_received(x, ids, weights, num_experts=E, **layout)
    rows = experts(received)
    real = real_rows(received)

    exact_x, exact_w = x.detach().double().requires_grad_(), weights.detach().double().requires_grad_()
    exact = {name: p.detach().double().requires_grad_() for name, p in experts.named_parameters()}
    want = oracle_experts(
        received_rows(ids, range(E)),
        exact_x,
        exact_w,
        exact,
        activation=activation,
        limit=1.0,
        apply_probs=apply_probs,
    )
    torch.testing.assert_close(rows[real].double(), want, rtol=tolerance, atol=tolerance)
    upstream = torch.zeros_like(rows)
    upstream[real] = torch.randn_like(rows[real])
    leaves, exact_leaves = ([x, weights], [exact_x, exact_w]) if apply_probs else ([x], [exact_x])
    got = gradients(experts, rows, leaves, upstream)
    truth = torch.autograd.grad(want, [*exact_leaves, *exact.values()], upstream[real].double())
    for mine, theirs in zip(got, truth, strict=True):
        torch.testing.assert_close(mine.double(), theirs, rtol=10 * tolerance, atol=10 * tolerance)
    assert all(not g[E - 1].any() for g in got[len(leaves) :]), "an idle expert's gradient is zero"


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradcheck(activation: str, compact: bool) -> None:
    experts = make_experts(activation=activation, bias=True)
    x, ids, weights = make_inputs(tokens=3)

    def run(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        received = make_received(x, ids, weights, num_experts=E, compact=compact)
        named = dict(zip(dict(experts.named_parameters()), parameters, strict=True))
        return torch.func.functional_call(experts, named, (received,))

    torch.autograd.gradcheck(run, (x, weights, *experts.parameters()), fast_mode=True)


@every_backend
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("tokens", [0, 4])
def test_no_rows_still_has_a_graph(
    backend: str, dtype: torch.dtype, tolerance: float, compact: bool, tokens: int
) -> None:
    experts = make_experts(dtype, bias=True, backend=backend)
    x, ids, weights = make_inputs(dtype, tokens)
    received = make_received(x, torch.full_like(ids, -1), weights, num_experts=E, compact=compact)
    rows = experts(received)
    assert rows.shape == (0, D) and rows.requires_grad
    for leaf, gradient in zip((x, weights), gradients(experts, rows, [x, weights], rows.detach()), strict=False):
        assert gradient.shape == leaf.shape and not gradient.any()
    for parameter in experts.parameters():
        assert parameter.grad is None
    experts(received).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("recompute", ["none", "h"])
@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_poison_stays_outside(backend: str, recompute: str, bias: bool) -> None:
    """NaN in the tail (and, for the loop, in the pads), in rows, probabilities and the upstream gradient."""
    experts = make_experts(torch.float32, backend=backend, recompute=recompute, bias=bias)
    x, ids, weights = make_inputs(torch.float32)
    where = {"alignment": 4 if backend == "reference" else 1, "tail": 5}
    results = []
    for poison in (False, True):
        received = make_received(x.detach(), ids, weights.detach(), num_experts=E, poison=poison, **where)
        received = dataclasses.replace(
            received, rows=received.rows.requires_grad_(), act_probs_N=received.act_probs_N.requires_grad_()
        )
        real = real_rows(received)
        rows = experts(received)
        torch.manual_seed(1)
        upstream = torch.full_like(rows, float("nan") if poison else 0.0)
        upstream[real] = torch.randn(len(real), D)
        d_rows, d_probs, *rest = gradients(experts, rows, [received.rows, received.act_probs_N], upstream)
        results.append([rows[real], d_rows[real], d_probs[real], *rest])
    for clean, poisoned in zip(*results, strict=True):
        assert torch.equal(clean, poisoned) and clean.isfinite().all()


def test_reference_zeroes_pads_and_tail() -> None:
    experts = make_experts(bias=True)
    x, ids, weights = make_inputs()
    received = make_received(x.detach(), ids, weights.detach(), num_experts=E, alignment=8, tail=3, poison=True)
    received = dataclasses.replace(received, rows=received.rows.requires_grad_())
    rows = experts(received)
    gaps = received.src_N3[:, 0] < 0
    assert not rows[gaps].any()
    assert not torch.autograd.grad(rows, received.rows, torch.ones_like(rows))[0][gaps].any()


@every_backend
def test_strided_and_expanded_gradients(backend: str, dtype: torch.dtype, tolerance: float) -> None:
    experts = make_experts(dtype, backend=backend)
    x, ids, weights = make_inputs(dtype)
    received = make_received(x, ids, weights, num_experts=E)

    def run(upstream: Tensor) -> list[Tensor]:
        return gradients(experts, experts(received), [], upstream)

    num_rows = received.src_N3.shape[0]
    strided = torch.randn(D, num_rows, dtype=dtype).t()
    expanded = torch.randn(1, 1, dtype=dtype).expand(num_rows, D)
    for upstream in (strided, expanded):
        for a, b in zip(run(upstream), run(upstream.contiguous()), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_bf16_is_within_twice_the_plain_path(backend: str, bias: bool) -> None:
    """Errors against fp64 at most twice those of the same loop in bf16, plus one rounding of the largest value."""
    dtype = torch.bfloat16
    experts = make_experts(dtype, backend=backend, bias=bias, intermediate_size=8)
    x, ids, weights = make_inputs(dtype, 64)
    ids = ids.clamp(min=0)
    received = make_received(x, ids, weights, num_experts=E)
    rows = experts(received)
    upstream = torch.randn_like(rows)
    got = [rows, *gradients(experts, rows, [x, weights], upstream)]
    results = []
    for wide in (dtype, torch.float64):
        leaves = [t.detach().to(wide).requires_grad_() for t in (x, weights)]
        parameters = {name: p.detach().to(wide).requires_grad_() for name, p in experts.named_parameters()}
        out = oracle_experts(received_rows(ids, range(E)), *leaves, parameters, activation="swiglu")
        results.append([out, *torch.autograd.grad(out, [*leaves, *parameters.values()], upstream.to(wide))])
    assert rows.dtype == dtype and got[2].dtype == torch.float32
    for mine, plain, truth in zip(got, *results, strict=True):
        floor = torch.finfo(dtype).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + floor


@pytest.mark.parametrize("width", [3, 4, 16])
@pytest.mark.parametrize("compact", [False, True])
def test_bits_do_not_depend_on_the_number_of_ranks(compact: bool, width: int) -> None:
    """Each expert's rows are the same matrix for R = 1, 2, 3, so output, dx and dW have the same bits."""
    x, ids, weights = make_inputs(torch.float32, 40)
    experts = make_experts(torch.float32, intermediate_size=width)
    whole = make_received(x, ids, weights, num_experts=E, compact=compact)
    rows = experts(whole)
    upstream = torch.randn_like(rows)
    _, d_weights, *d_parameters = gradients(experts, rows, [x, weights], upstream)
    for ranks in (2, 3):
        share, start = E // ranks, 0
        d_weights_sum = torch.zeros_like(d_weights)
        for rank in range(ranks):
            mine = range(rank * share, (rank + 1) * share)
            local = make_experts(torch.float32, share, intermediate_size=width)
            local.load_state_dict({name: value[mine.start : mine.stop] for name, value in experts.state_dict().items()})
            received = make_received(x, ids, weights, num_experts=E, experts=mine, compact=compact)
            out = local(received)
            stop = start + out.shape[0]
            assert torch.equal(out, rows[start:stop])
            _, d_w, *d_local = gradients(local, out, [x, weights], upstream[start:stop])
            for part, full in zip(d_local, d_parameters, strict=True):
                assert torch.equal(part, full[mine.start : mine.stop])
            d_weights_sum += d_w
            start = stop
        assert torch.equal(d_weights_sum, d_weights)


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_run_twice_same_bits(backend: str) -> None:
    experts = make_experts(torch.float32, backend=backend, bias=True)
    x, ids, weights = make_inputs(torch.float32, 64)
    received = make_received(x, ids, weights, num_experts=E, compact=True)
    upstream = torch.randn(received.src_N3.shape[0], D)
    first, second = (
        [rows, *gradients(experts, rows, [x, weights], upstream)] for rows in (experts(received), experts(received))
    )
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_gpt_oss_experts_of_transformers() -> None:
    """Clamped activation and both biases; its weights are interleaved and transposed."""
    gpt_oss = pytest.importorskip("transformers.models.gpt_oss.modeling_gpt_oss")
    config = gpt_oss.GptOssConfig(hidden_size=D, intermediate_size=F, num_local_experts=E, num_experts_per_tok=K)
    config._experts_implementation = "eager"
    theirs = gpt_oss.GptOssExperts(config).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=2.0)  # so that the limit of 7 is reached
    ours = make_experts(activation="swiglu_clamped", bias=True, clamp_limit=theirs.limit, clamp_alpha=theirs.alpha)

    def to_ours(name: str, value: Tensor) -> Tensor:
        if name.startswith("gate_up"):
            value = torch.cat((value[..., ::2], value[..., 1::2]), dim=-1)
        return value if name.endswith("bias") else value.transpose(1, 2)

    ours.load_state_dict({name: to_ours(name, value) for name, value in theirs.state_dict().items()})
    x, ids, weights = make_inputs()
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(T)]).int()
    received = make_received(x, ids, weights, num_experts=E)
    mine = torch.zeros_like(x).index_add(0, received.src_N3[:, 1], ours(received))
    want = theirs(x, ids.long(), weights)
    torch.testing.assert_close(mine, want, rtol=1e-11, atol=1e-11)
    upstream = torch.randn_like(x)
    got = gradients(ours, mine, [x, weights], upstream)
    truth = torch.autograd.grad(want, [x, weights, *theirs.parameters()], upstream)
    named = dict(zip(dict(theirs.named_parameters()), truth[2:], strict=True))
    for (name, _), gradient in zip(ours.named_parameters(), got[2:], strict=True):
        torch.testing.assert_close(gradient, to_ours(name, named[name]), rtol=1e-10, atol=1e-10)
    for mine_leaf, their_leaf in zip(got[:2], truth[:2], strict=True):
        torch.testing.assert_close(mine_leaf, their_leaf, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("tokens", [0, 5])
def test_shared_expert(tokens: int) -> None:
    shared = SharedExpert(SharedExpertConfig(intermediate_size=F), D, dtype=torch.float64)
    shared.reset_parameters(0.5)
    assert list(shared.state_dict()) == ["gate_proj.weight", "up_proj.weight", "down_proj.weight"]
    x = torch.randn(tokens, D, dtype=torch.float64, requires_grad=True)
    leaves = [x, *shared.parameters()]
    got, want = shared(x), oracle_shared(*leaves)
    torch.testing.assert_close(got, want)
    if not tokens:
        return
    upstream = torch.randn_like(want)
    for a, b in zip(
        torch.autograd.grad(got, leaves, upstream), torch.autograd.grad(want, leaves, upstream), strict=True
    ):
        torch.testing.assert_close(a, b)
