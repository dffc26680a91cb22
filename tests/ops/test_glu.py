"""The activation op against fp64 loops: values, gradients, schema, compile, precision, bad input."""

from __future__ import annotations

import pytest
import torch
from oracle_experts import oracle_glu
from torch import Tensor

from moe_layer.ops.glu import ACTIVATIONS, glu, glu_bwd

LIMIT, ALPHA = 1.5, 1.702
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def _inputs(num_rows: int = 7, width: int = 5, dtype: torch.dtype = torch.float64, scale: float = 2.0):
    h = (torch.randn(num_rows, 2 * width, dtype=torch.float64) * scale).to(dtype)
    probs = torch.rand(num_rows, dtype=torch.float64 if dtype == torch.float64 else torch.float32)
    return h.requires_grad_(), probs.requires_grad_()


def _run(h: Tensor, probs: Tensor | None, activation: str) -> Tensor:
    return glu(h, probs, activation=activation, limit=LIMIT, alpha=ALPHA)


@every_activation
@pytest.mark.parametrize("with_probs", [True, False])
@pytest.mark.parametrize("scale", [1e-3, 2.0, 60.0])
def test_matches_the_oracle(activation: str, with_probs: bool, scale: float) -> None:
    h, probs = _inputs(scale=scale)
    leaves = [h, probs] if with_probs else [h]
    ours = _run(h, probs if with_probs else None, activation)
    theirs = oracle_glu(h, probs if with_probs else None, activation, LIMIT, ALPHA)
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-13)
    upstream = torch.randn_like(ours)
    mine = torch.autograd.grad(ours, leaves, upstream)
    for ours_grad, theirs_grad in zip(mine, torch.autograd.grad(theirs, leaves, upstream), strict=True):
        torch.testing.assert_close(ours_grad, theirs_grad, rtol=1e-10, atol=1e-13 * scale)


@every_activation
def test_backward_op_returns_the_output_again(activation: str) -> None:
    h, probs = _inputs(dtype=torch.float32)
    with torch.no_grad():
        a = _run(h, probs, activation)
        again = glu_bwd(torch.randn_like(a), h, probs, activation=activation, limit=LIMIT, alpha=ALPHA)
    torch.testing.assert_close(again.a_NF, a, rtol=1e-6, atol=1e-7)
    assert again.d_probs_N.dtype == torch.float32 and again.d_h_N2F.is_contiguous()


def test_clamped_gradient_at_the_limits() -> None:
    """As torch.clamp: the gradient passes at the limit itself and is zero beyond it."""
    edge = torch.tensor([LIMIT, LIMIT + 1e-9, -LIMIT, -LIMIT - 1e-9], dtype=torch.float64)
    h = torch.cat((edge[:, None].expand(4, 4).reshape(16, 1), edge.repeat(4)[:, None]), dim=1).requires_grad_()
    upstream = torch.ones(16, 1, dtype=torch.float64)
    mine = torch.autograd.grad(_run(h, None, "swiglu_clamped"), h, upstream)[0]
    g, u = h[:, :1].clamp(max=LIMIT), h[:, 1:].clamp(-LIMIT, LIMIT)
    theirs = torch.autograd.grad(g * torch.sigmoid(ALPHA * g) * (u + 1), h, upstream)[0]
    torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-14)


@every_activation
def test_gradcheck(activation: str) -> None:
    h, probs = _inputs(3, 2, scale=1.0)
    torch.autograd.gradcheck(lambda h, p: _run(h, p, activation), (h, probs))


@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(activation: str, dtype: torch.dtype) -> None:
    h, probs = _inputs(dtype=dtype)
    for p in (probs, None):
        torch.library.opcheck(torch.ops.moe_layer.glu.default, (h, p, activation, LIMIT, ALPHA))
        d_a = torch.randn(7, 5).to(dtype)
        arguments = (d_a, h.detach(), None if p is None else p.detach(), activation, LIMIT, ALPHA)
        torch.library.opcheck(torch.ops.moe_layer.glu_bwd.default, arguments)


@every_activation
def test_fullgraph_compile_gives_the_same_bits(activation: str) -> None:
    compiled = torch.compile(_run, fullgraph=True, backend="aot_eager", dynamic=True)
    for num_rows in (7, 1, 4):
        h, probs = _inputs(num_rows, dtype=torch.float32)
        upstream = torch.randn(num_rows, 5)
        eager = torch.autograd.grad(_run(h, probs, activation), (h, probs), upstream)
        graph = torch.autograd.grad(compiled(h, probs, activation), (h, probs), upstream)
        assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))


@every_activation
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_within_twice_the_plain_path(activation: str, dtype: torch.dtype) -> None:
    """Error against fp64 at most twice that of the same formula written in this dtype, plus one rounding."""
    h, probs = _inputs(64, 32, dtype=dtype, scale=1.0)
    exact_h, exact_p = h.detach().double().requires_grad_(), probs.detach().double().requires_grad_()
    upstream = torch.randn(64, 32).to(dtype)
    exact = oracle_glu(exact_h, exact_p, activation, LIMIT, ALPHA)
    plain = oracle_glu(h, probs.to(dtype), activation, LIMIT, ALPHA)
    ours = _run(h, probs, activation)
    assert ours.dtype == dtype
    leaves = (h, probs)
    triples = zip(
        (ours, *torch.autograd.grad(ours, leaves, upstream)),
        (plain, *torch.autograd.grad(plain, leaves, upstream)),
        (exact, *torch.autograd.grad(exact, (exact_h, exact_p), upstream.double())),
        strict=True,
    )
    for mine, theirs, truth in triples:
        floor = torch.finfo(dtype).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= 2 * (theirs.double() - truth).abs().max() + floor


@every_activation
def test_strided_inputs_and_expanded_gradients(activation: str) -> None:
    wide = torch.randn(14, 10, dtype=torch.float64)
    h, probs = wide[::2].requires_grad_(), torch.rand(14, dtype=torch.float64)[::2].requires_grad_()
    got = torch.autograd.grad(_run(h, probs, activation).sum(), (h, probs))
    dense = (h.detach().contiguous().requires_grad_(), probs.detach().contiguous().requires_grad_())
    want = torch.autograd.grad(_run(*dense, activation), dense, torch.ones(7, 5, dtype=torch.float64))
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=1e-15)


def test_no_rows_and_nan_rows() -> None:
    h, probs = _inputs(0)
    assert _run(h, probs, "swiglu").shape == (0, 5)
    assert [g.shape for g in torch.autograd.grad(_run(h, probs, "swiglu").sum(), (h, probs))] == [(0, 10), (0,)]
    h, probs = _inputs()
    with torch.no_grad():
        h[2] = float("nan")
    out = _run(h, probs, "swiglu")
    gradients = torch.autograd.grad(out, (h, probs), torch.ones_like(out))
    for rows in (out, *gradients):
        assert rows[2].isnan().all() and rows[[0, 1, 3, 4, 5, 6]].isfinite().all()


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"activation": "relu"}, ValueError, "activation is 'relu'; use one of swiglu"),
        ({"h_N2F": torch.zeros(2, 3)}, ValueError, r"h must be \[N, 2F\].*\(2, 3\)"),
        ({"h_N2F": torch.zeros(2, 4, dtype=torch.int64)}, TypeError, "floating point tensor, got torch.int64"),
        ({"probs_N": torch.zeros(3)}, ValueError, r"probs must be \[2\].*\(3,\)"),
        ({"probs_N": torch.zeros(2, dtype=torch.bfloat16)}, TypeError, "float32.*got torch.bfloat16"),
        ({"probs_N": torch.zeros(2, device="meta")}, ValueError, "probs is on meta and h on cpu"),
    ],
)
def test_bad_input(change: dict, error: type[Exception], text: str) -> None:
    arguments = {"h_N2F": torch.zeros(2, 4), "probs_N": torch.zeros(2)} | change
    with pytest.raises(error, match=text):
        glu(**arguments)


def test_backward_checks_the_gradient() -> None:
    with pytest.raises(ValueError, match=r"d_a must be \[N, F\].*got \(2, 4\)"):
        glu_bwd(torch.zeros(2, 4), torch.zeros(2, 4))
