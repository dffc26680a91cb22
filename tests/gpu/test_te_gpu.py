"""`experts.backend: transformer_engine` on a GPU with the real TransformerEngine: precision, FP8 recipes, one step."""

from __future__ import annotations

import inspect

import pytest
import torch
from experts_inputs import received_rows
from oracle_experts import oracle_experts
from torch import Tensor

from moe_layer import MoELayer
from moe_layer.config import ExpertsConfig, MoEConfig, RouterConfig
from moe_layer.experts import Experts
from tests import te_double as double
from tests.experts_inputs import make_received
from tests.gpu.test_experts_gpu import BF16, _gradients, _inputs, _to_cuda

te = pytest.importorskip("transformer_engine.pytorch", reason="TransformerEngine is not installed")
T, D, F, E, K = 96, 64, 32, 8, 2
RECIPES = ("delayed", "current", "blockwise")


def _experts(recipe: str = "none", backend: str = "transformer_engine") -> Experts:
    settings = ExpertsConfig(intermediate_size=F, backend=backend, fp8_recipe=recipe)  # type: ignore[arg-type]
    experts = Experts(settings, hidden_size=D, num_experts=E, device="cuda", dtype=BF16)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return experts


def test_the_double_has_the_real_signatures() -> None:
    for mine, real in (
        (double.GroupedLinear.__init__, te.GroupedLinear.__init__),
        (double.GroupedLinear.forward, te.GroupedLinear.forward),
        (double.autocast, te.autocast.__init__),
    ):
        wanted = [(p.name, p.default) for p in inspect.signature(real).parameters.values() if p.name != "self"]
        got = [(p.name, p.default) for p in inspect.signature(mine).parameters.values() if p.name != "self"]
        assert got == wanted


def _results(experts: Experts, compact: bool) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """(ours, plain bf16 loop, fp64 loop): rows, dx, dprobs, dW of gate_up and down."""
    torch.manual_seed(1)
    x, ids, weights = _inputs()
    received = _to_cuda(make_received(x, ids, weights, num_experts=E, compact=compact))
    rows = experts(received)
    upstream = torch.randn(T * K, D, device="cuda").to(BF16)
    d_rows, *rest = _gradients(experts, received, rows, upstream)
    if not compact:  # the loop's gradient is per token: add our rows up
        d_rows = torch.zeros(T, D, device="cuda").index_add_(0, received.src_N3[:, 1], d_rows.float())
    found = []
    order = received_rows(ids, range(E))
    places = tuple(torch.tensor([row[i] for row in order], device="cuda") for i in (1, 2))
    for wide in (BF16, torch.float64):
        source, probs = x.to(wide).cuda().requires_grad_(), weights.to(wide).cuda().requires_grad_()
        parameters = {name: p.detach().to(wide).requires_grad_() for name, p in experts.named_parameters()}
        out = oracle_experts(order, source, probs, parameters, activation="swiglu")
        d_x, d_w, *d_parameters = torch.autograd.grad(out, [source, probs, *parameters.values()], upstream.to(wide))
        found.append([out, d_x, d_w[places], *d_parameters])
    return [rows, d_rows, *rest], found[0], found[1]


@pytest.mark.parametrize("compact", [False, True])
def test_bf16_is_within_twice_the_plain_path(compact: bool) -> None:
    for mine, plain, truth in zip(*_results(_experts(), compact), strict=True):
        floor = torch.finfo(BF16).eps * truth.abs().max()
        assert (mine.double() - truth).abs().max() <= 2 * (plain.double() - truth).abs().max() + floor


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_is_near_and_is_not_bf16(recipe: str) -> None:
    """e4m3 has 3 mantissa bits and e5m2 (gradients) 2: a rounding error of up to 6% and 12% an element, averaged."""
    experts, plain = _experts(recipe), _experts()
    plain.load_state_dict(experts.state_dict())
    _results(experts, True)  # delayed scaling measures its first scales
    mine, _, truth = _results(experts, True)
    bf16 = _results(plain, True)[0]
    for name, got, exact, coarse in zip(("y", "dx", "dp", "dW1", "dW2"), mine, truth, bf16, strict=True):
        error = float((got.double() - exact).norm() / exact.norm())
        print(f"{recipe} {name} {error:.4f} (bf16 {float((coarse.double() - exact).norm() / exact.norm()):.4f})")
        assert 0.005 < error < 0.15, (name, error)


def test_main_grad_and_bits() -> None:
    experts = _experts()
    first, _, _ = _results(experts, True)
    assert all(torch.equal(a, b) for a, b in zip(first, _results(experts, True)[0], strict=True))
    for parameter in experts.parameters():
        parameter.main_grad = torch.ones(parameter.shape, device="cuda")
    x, ids, weights = _inputs()
    received = _to_cuda(make_received(x, ids, weights, num_experts=E, compact=True))
    plain = _experts()
    plain.load_state_dict(experts.state_dict())
    for layer in (experts, plain):
        layer(received).backward(torch.ones(T * K, D, device="cuda", dtype=BF16))
    for mine, theirs in zip(experts.parameters(), plain.parameters(), strict=True):
        assert mine.grad is None and mine.grad_added_to_main_grad is True
        torch.testing.assert_close(mine.main_grad - 1, theirs.grad.float(), rtol=1e-2, atol=2e-2)


@pytest.mark.parametrize("recipe", ["none", *RECIPES])
def test_a_training_step_lowers_the_loss(recipe: str) -> None:
    """Every parameter of a whole layer gets a finite gradient; ten steps learn a fixed target."""
    config = MoEConfig(
        hidden_size=D,
        router=RouterConfig(num_experts=E, top_k=K),
        experts=ExpertsConfig(intermediate_size=F, backend="transformer_engine", fp8_recipe=recipe, init_std=0.1),  # type: ignore[arg-type]
    )
    layer = MoELayer(config, device="cuda", dtype=BF16)
    x, target = torch.randn(2, 1, T, D, device="cuda").to(BF16)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    losses = []
    for _ in range(10):
        y = layer(x)
        loss = (y - target).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        for name, parameter in layer.named_parameters():
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
        optimizer.step()
        losses.append(float(loss))
    print(recipe, [round(loss, 3) for loss in losses])
    assert losses[-1] < 0.9 * losses[0]


def test_capture_is_refused() -> None:
    experts = _experts()
    received = _to_cuda(make_received(*_inputs(), num_experts=E))
    experts(received)
    with pytest.raises(RuntimeError, match="a CUDA graph cannot hold"), torch.cuda.graph(torch.cuda.CUDAGraph()):
        experts(received)
