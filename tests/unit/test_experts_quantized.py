"""Quantised experts: against dequantised loops, forward only, fresh after an update, equal on every dispatch
backend.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer import ConfigError, MoELayer, RoutingSession
from moe_layer.config import DispatchConfig, ExpertsConfig, MoEConfig, RouterConfig
from moe_layer.experts.quantized import dequantized

D, F, E, K, T = 160, 72, 6, 2, 23
FORMATS = ["int8", "fp8_1x128"]


def make_layer(
    weight_format: str, *, seed: int = 0, dispatch: DispatchConfig | None = None, **experts: Any
) -> MoELayer:
    torch.manual_seed(seed)
    config = MoEConfig(
        hidden_size=D,
        router=RouterConfig(num_experts=E, top_k=K),
        experts=ExpertsConfig(intermediate_size=F, init_std=0.1, weight_format=weight_format, **experts),  # type: ignore[arg-type]
        dispatch=dispatch or DispatchConfig(),
    )
    layer = MoELayer(config)
    with torch.no_grad():
        for bias in (layer.experts.gate_up_proj_bias, layer.experts.down_proj_bias):
            if bias is not None:
                bias.normal_()
    return layer


def quantize(x: Tensor, weight_format: str) -> Tensor:
    """Scales and rounding written out for one row at a time, fp64."""
    out = torch.empty(x.shape, dtype=torch.float64)
    flat, flat_out = x.reshape(-1, x.shape[-1]), out.view(-1, x.shape[-1])
    step = x.shape[-1] if weight_format == "int8" else 128
    for row in range(flat.shape[0]):
        for at in range(0, flat.shape[1], step):
            block = flat[row, at : at + step].float()
            peak = block.abs().max()
            if weight_format == "int8":
                scale = peak / 127 if peak > 0 else torch.tensor(1.0)
                codes = torch.round(block / scale)
            else:
                scale = peak / 448 if peak > 0 else torch.tensor(1.0)
                codes = (block / scale).to(torch.float8_e4m3fn).float()
            flat_out[row, at : at + step] = codes.double() * scale.double()
    return out


def oracle(layer: MoELayer, x: Tensor) -> Tensor:
    """Literal loops over tokens and slots on dequantised operands, fp64 between the quantisations."""
    weight_format = layer.config.experts.weight_format
    experts = layer.experts
    gate_up, down = (
        quantize(experts.gate_up_proj.detach(), weight_format),
        quantize(experts.down_proj.detach(), weight_format),
    )
    _, routing = layer(x, return_routing=True)
    y = torch.zeros(x.shape, dtype=torch.float64)
    for t in range(x.shape[0]):
        for k in range(K):
            e, p = int(routing.ids_TK[t, k]), float(routing.weights_TK[t, k])
            h = gate_up[e] @ quantize(x[t], weight_format)
            if experts.gate_up_proj_bias is not None:
                h = h + experts.gate_up_proj_bias[e].double()
            a = (h[:F] * torch.sigmoid(h[:F]) * h[F:] * p).float()
            y[t] += down[e] @ quantize(a, weight_format)
            if experts.down_proj_bias is not None:
                y[t] += p * experts.down_proj_bias[e].double()
    return y


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("weight_format", FORMATS)
def test_against_dequantised_loops(weight_format: str, bias: bool) -> None:
    """A value that lies on a rounding boundary may fall either way in fp32: one code of one activation is allowed."""
    layer, x = make_layer(weight_format, bias=bias), torch.randn(T, D)
    with torch.no_grad():
        y, expected = layer(x).double(), oracle(layer, x)
    error = (y - expected).abs().max() / expected.abs().max()
    assert error < 2e-3, error
    assert ((y - expected).abs() / expected.abs().max()).median() < 1e-6


@pytest.mark.parametrize("weight_format", FORMATS)
def test_quantisation_is_seen_and_small(weight_format: str) -> None:
    x = torch.randn(T, D)
    plain = make_layer("input")(x)
    y = make_layer(weight_format)(x)
    relative = (y - plain).norm() / plain.norm()
    assert 1e-3 < relative < 0.1, relative


@pytest.mark.parametrize("weight_format", FORMATS)
def test_dequantised_is_idempotent_and_keeps_zero(weight_format: str) -> None:
    x = torch.randn(5, 300)
    x[2] = 0
    once = dequantized(x, weight_format)
    assert torch.equal(once[2], x[2])
    torch.testing.assert_close(dequantized(once, weight_format), once, rtol=1e-6, atol=0)
    assert torch.equal(once.double(), quantize(x, weight_format).float().double())
    assert dequantized(torch.zeros(0, 300), weight_format).shape == (0, 300)


@pytest.mark.parametrize("weight_format", FORMATS)
def test_backward_raises(weight_format: str) -> None:
    layer = make_layer(weight_format)
    with pytest.raises(RuntimeError, match=f"experts.weight_format {weight_format} has no backward"):
        layer(torch.randn(T, D)).sum().backward()


def test_weights_follow_an_update_and_copies_start_afresh() -> None:
    layer, x = make_layer("int8"), torch.randn(T, D)
    with torch.no_grad():
        before = layer(x)
        layer.experts.down_proj.mul_(2)
        assert torch.equal(layer(x), 2 * before)
        for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert twin.experts._quantized.weights is None
            assert torch.equal(twin(x), 2 * before)
    assert list(layer.state_dict()) == list(make_layer("input").state_dict())


def _write(parameter: torch.Tensor) -> None:
    parameter.copy_(torch.randn_like(parameter))


def _write_to_data(parameter: torch.Tensor) -> None:
    parameter.data.copy_(torch.randn_like(parameter))


def _write_one_value(parameter: torch.Tensor) -> None:
    parameter.data[1, 2, 3] += 1.0


def _swap_experts(parameter: torch.Tensor) -> None:
    parameter.data.copy_(parameter.flip(0))


def _replace_data(parameter: torch.Tensor) -> None:
    parameter.data = torch.randn_like(parameter)


@pytest.mark.parametrize("write", [_write, _write_to_data, _write_one_value, _swap_experts, _replace_data])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_way_of_writing_is_seen(write: Callable[[torch.Tensor], None], dtype: torch.dtype) -> None:
    layer = make_layer("int8").to(dtype)
    x = torch.randn(T, D, dtype=dtype)
    with torch.no_grad():
        before = layer(x)
        kept = layer.experts._quantized.weights
        assert torch.equal(layer(x), before) and layer.experts._quantized.weights is kept
        for parameter in (layer.experts.gate_up_proj, layer.experts.down_proj):
            write(parameter)
        fresh = copy.deepcopy(layer)
        assert torch.equal(layer(x), fresh(x)) and not torch.equal(layer(x), before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_other_dtypes(dtype: torch.dtype) -> None:
    layer, x = make_layer("int8").to(dtype), torch.randn(T, D, dtype=dtype)
    y = layer(x)
    assert y.dtype == dtype and torch.isfinite(y).all()


@pytest.mark.parametrize("weight_format", FORMATS)
@pytest.mark.parametrize(
    "changes", [{"rows": "compact"}, {"alignment": 16}, {"apply_probs": "combine"}, {"apply_probs": "source"}]
)
def test_layouts(weight_format: str, changes: dict[str, Any]) -> None:
    """Where the probability multiplies decides what is quantised, so only layouts are equal to the bit."""
    x = torch.randn(T, D)
    with torch.no_grad():
        y = make_layer(weight_format)(x)
        other = make_layer(weight_format, dispatch=DispatchConfig(**changes))(x)
    tolerance = 0.03 * float(y.abs().max()) if "apply_probs" in changes else 0.0
    assert (y - other).abs().max() <= tolerance


@pytest.mark.parametrize("weight_format", FORMATS)
def test_forced_ids_and_recording(weight_format: str) -> None:
    layer, plain, x = make_layer(weight_format), make_layer("input"), torch.randn(T, D)
    with torch.no_grad(), RoutingSession(layer) as session:
        with session.record() as recording:
            layer(x)
        trace = recording.trace()
        with RoutingSession(plain) as other, other.replay(trace):
            _, routing = plain(x, return_routing=True)
    assert torch.equal(routing.ids_TK, trace.wide_ids()[:, 0])
    forced = torch.stack([torch.randperm(E)[:K] for _ in range(T)])
    with torch.no_grad():
        _, routing = layer(x, replay=forced, return_routing=True)
    assert torch.equal(routing.ids_TK, forced.int())


def test_rules() -> None:
    config = ExpertsConfig(intermediate_size=F, weight_format="int8")
    with pytest.raises(ConfigError, match=r"backend \(grouped_mm\) cannot run weight_format int8; use backend auto"):
        replace(config, backend="grouped_mm")
    with pytest.raises(ConfigError, match=r"recompute \(h\) has no effect without weight_format input"):
        replace(config, recompute="h")
