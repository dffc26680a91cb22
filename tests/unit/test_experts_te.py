"""`experts.backend: transformer_engine` over a call-signature double, tests/te_double.py (the real: test_te_gpu.py)."""

from __future__ import annotations

import copy
import pickle
import sys
from collections.abc import Iterator

import pytest
import torch
from experts_inputs import ACTIVATIONS, D, E, gradients, make_experts, make_inputs, make_received

from moe_layer.config import DispatchConfig, ExpertsConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_layer.errors import ConfigError
from moe_layer.experts import Experts, transformer_engine
from moe_layer.experts.backend import resolve
from moe_layer.layer import MoELayer
from tests import te_double as double

FP32, BF16 = torch.float32, torch.bfloat16
RECIPES = ("none", "delayed", "current", "blockwise")
CUDA = torch.device("cuda")
SIZES = {"hidden_size": 32, "width": 16}


@pytest.fixture
def te(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """TransformerEngine's double, allowed to run on the CPU."""
    for name, module in double.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.setattr(transformer_engine, "obstacle", lambda *_, **__: None)
    double.seen.clear()
    yield


def _pair(recipe: str = "none", **config) -> tuple[Experts, Experts]:
    """Experts on the double and the same ones on the loop."""
    mine = make_experts(FP32, backend="transformer_engine", fp8_recipe=recipe, **config)
    loop = make_experts(FP32, backend="reference", **config)
    loop.load_state_dict(mine.state_dict())
    return mine, loop


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("apply_probs", [False, True])
def test_equals_the_loop(te: None, activation: str, compact: bool, apply_probs: bool) -> None:
    mine, loop = _pair(activation=activation)
    x, ids, weights = make_inputs(FP32, 20)
    tail = 0 if compact else 5
    received = make_received(x, ids, weights, num_experts=E, compact=compact, tail=tail, apply_probs=apply_probs)
    count = int(received.offsets_L1[-1])
    leaves = [x, weights] if apply_probs else [x]
    upstream = torch.randn(received.src_N3.shape[0], D)
    upstream[count:] = 0
    results = [[(rows := e(received))[:count], *gradients(e, rows, leaves, upstream)] for e in (mine, loop)]
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert [name for name, _ in double.seen] == ["NoneType"] * 2
    assert all(splits == received.counts_L.tolist() for _, splits in double.seen)


@pytest.mark.parametrize("recipe", RECIPES[1:])
@pytest.mark.parametrize("alignment", [1, 16])
def test_fp8_pads_groups_and_changes_the_numbers(te: None, recipe: str, alignment: int) -> None:
    mine, loop = _pair(recipe)
    x, ids, weights = make_inputs(FP32, 20)
    received = make_received(x, ids, weights, num_experts=E, alignment=alignment)
    upstream = torch.randn(received.src_N3.shape[0], D)
    upstream[received.src_N3[:, 0] < 0] = 0
    real = received.src_N3[:, 0] >= 0
    results = [[(rows := e(received))[real], *gradients(e, rows, [x, weights], upstream)] for e in (mine, loop)]
    for got, want in zip(*results, strict=True):
        error = float((got - want).detach().norm() / want.detach().norm())
        assert 0 < error < 0.1
    name = {"delayed": "DelayedScaling", "current": "Float8CurrentScaling", "blockwise": "Float8BlockScaling"}[recipe]
    padded = [(count + 15) // 16 * 16 for count in received.counts_L.tolist()]
    assert double.seen == [(name, padded)] * 2


def test_delayed_scaling_keeps_its_state_and_copies_start_anew(te: None) -> None:
    mine, _ = _pair("delayed")
    x, ids, weights = make_inputs(FP32, 20)
    received = make_received(x, ids, weights, num_experts=E)
    first, second = mine(received), mine(received)
    assert not torch.equal(first, second)
    for other in (copy.deepcopy(mine), pickle.loads(pickle.dumps(mine))):
        assert torch.equal(other(received), first)
    assert transformer_engine.make_recipe("delayed").settings["reduce_amax"] is False


def test_the_state_dict_is_that_of_every_backend(te: None) -> None:
    mine, loop = _pair("current")
    x, ids, weights = make_inputs(FP32)
    mine(make_received(x, ids, weights, num_experts=E))
    assert list(mine.state_dict()) == list(loop.state_dict()) == ["gate_up_proj", "down_proj"]
    assert [name for name, _ in mine.named_parameters()] == ["gate_up_proj", "down_proj"]


@pytest.mark.parametrize("names", [("gate_up_proj", "down_proj"), ("down_proj",)])
def test_main_grad_takes_the_weight_gradients(te: None, names: tuple[str, ...]) -> None:
    mine, plain = _pair()
    for name in names:
        parameter = getattr(mine, name)
        parameter.main_grad = torch.ones(parameter.shape)
    x, ids, weights = make_inputs(FP32, 20)
    received = make_received(x, ids, weights, num_experts=E)
    for experts in (mine, plain):
        experts(received).sum().backward(retain_graph=True)
    for name, parameter in mine.named_parameters():
        want = getattr(plain, name).grad
        if name in names:
            assert parameter.grad is None and parameter.grad_added_to_main_grad is True
            torch.testing.assert_close(parameter.main_grad - 1, want, rtol=1e-4, atol=1e-5)
        else:
            assert not hasattr(parameter, "grad_added_to_main_grad")
            torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-5)


def test_packed_gradients_are_not_copied(te: None) -> None:
    packed = torch.randn(3, 4, 5, requires_grad=True)
    whole = torch.randn(3, 4, 5)
    with torch.no_grad():
        parts = whole.unbind(0)
    slices = transformer_engine._Slices.apply(packed)
    (got,) = torch.autograd.grad(slices, packed, parts, retain_graph=True)
    assert got.data_ptr() == whole.data_ptr() and torch.equal(got, whole)
    swapped = (parts[1], parts[0], parts[2])
    (got,) = torch.autograd.grad(slices, packed, swapped, retain_graph=True)
    assert torch.equal(got, torch.stack(swapped))


def test_no_rows_frozen_weights_and_autocast(te: None) -> None:
    mine, _ = _pair("current")
    x, ids, weights = make_inputs(FP32)
    empty = make_received(x, torch.full_like(ids, -1), weights, num_experts=E, tail=3)
    rows = mine(empty)
    assert rows.shape == (3, D)
    rows[:0].sum().backward()
    assert not mine.gate_up_proj.grad.any() and not mine.down_proj.grad.any()
    mine.requires_grad_(False)
    x, ids, weights = make_inputs(FP32)
    received = make_received(x, ids, weights, num_experts=E)
    mine(received).sum().backward(retain_graph=True)
    assert x.grad.any()
    mine.requires_grad_(True)
    with torch.autocast("cpu", BF16):
        rows = mine(received)
    rows.sum().backward()
    assert rows.dtype == FP32 and mine.gate_up_proj.grad.dtype == FP32


def test_compile_breaks_the_graph_and_gives_the_same(te: None) -> None:
    mine, _ = _pair()
    x, ids, weights = make_inputs(FP32)
    received = make_received(x, ids, weights, num_experts=E)
    assert torch.equal(torch.compile(mine, backend="eager")(received), mine(received))


@pytest.mark.parametrize(
    ("device", "dtype", "change", "message"),
    [
        (torch.device("cpu"), BF16, {}, "runs on CUDA and the experts are on cpu; move them"),
        (CUDA, FP32, {}, "not torch.float32; use bfloat16"),
        (CUDA, BF16, {"bias": True}, "experts.bias is true .* use grouped_mm"),
        (CUDA, BF16, {"width": 12}, "multiples of 8, and hidden_size 32, width 12 .* round them up"),
        (CUDA, BF16, {"width": 24, "fp8_recipe": "current"}, "fp8_recipe current it needs multiples of 16"),
        (CUDA, BF16, {}, "TransformerEngine is not installed; pip install --no-build-isolation"),
    ],
)
def test_asked_for_by_name_and_impossible(
    monkeypatch: pytest.MonkeyPatch, device: torch.device, dtype: torch.dtype, change: dict, message: str
) -> None:
    transformer_engine._missing.cache_clear()
    monkeypatch.setattr(transformer_engine.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=f"experts.backend is transformer_engine, but .*{message}.*; or set"):
        resolve("transformer_engine", device, dtype, **({**SIZES, "fp8_recipe": "none"} | change))
    transformer_engine._missing.cache_clear()


def test_a_recipe_that_this_gpu_lacks(te: None, monkeypatch: pytest.MonkeyPatch) -> None:
    pytorch = sys.modules["transformer_engine.pytorch"]
    monkeypatch.setattr(pytorch, "is_fp8_available", lambda return_reason: (False, "too old"))
    transformer_engine._recipe_obstacle.cache_clear()
    assert transformer_engine._recipe_obstacle("delayed") == (
        "fp8_recipe delayed cannot run here (too old); use fp8_recipe none"
    )
    assert transformer_engine._recipe_obstacle("blockwise") is None
    transformer_engine._recipe_obstacle.cache_clear()


def test_settings_that_contradict() -> None:
    with pytest.raises(ConfigError, match=r"fp8_recipe \(current\) has no effect without backend transformer_engine"):
        ExpertsConfig(intermediate_size=16, fp8_recipe="current")
    with pytest.raises(ConfigError, match=r"recompute \(h\) cannot be had with backend transformer_engine"):
        ExpertsConfig(intermediate_size=16, backend="transformer_engine", recompute="h")
    with pytest.raises(ConfigError, match=r"weight_format int8; use backend auto"):
        ExpertsConfig(intermediate_size=16, backend="transformer_engine", weight_format="int8")
    with pytest.raises(ConfigError, match=r"packed\) cannot be had with experts.backend transformer_engine"):
        MoEConfig(
            hidden_size=32,
            router=RouterConfig(num_experts=8, top_k=2),
            experts=ExpertsConfig(intermediate_size=16, backend="transformer_engine"),
            shared_expert=SharedExpertConfig(intermediate_size=16, mode="packed"),
        )


@pytest.mark.parametrize("T", [13, 2])
def test_parts_of_the_tokens(te: None, T: int) -> None:
    """`dispatch.chunks`: several calls of the GEMMs in a pass, an empty one too; autograd adds up their gradients."""

    def run(backend: str, chunks: int) -> list[torch.Tensor]:
        config = MoEConfig(
            hidden_size=D,
            router=RouterConfig(num_experts=E, top_k=2),
            experts=ExpertsConfig(intermediate_size=16, backend=backend, init_std=0.3),  # type: ignore[arg-type]
            dispatch=DispatchConfig(chunks=chunks),
        )
        torch.manual_seed(0)
        layer, x, upstream = MoELayer(config), torch.randn(T, D, requires_grad=True), torch.randn(T, D)
        y = layer(x)
        return [y, *torch.autograd.grad(y, (x, *layer.parameters()), upstream)]

    for got, want in zip(run("transformer_engine", 3), run("reference", 1), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    assert len(double.seen) == 2 * min(T, 3)
