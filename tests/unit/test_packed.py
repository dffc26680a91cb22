"""`shared_expert.mode: packed` against the separate path: same outputs and gradients, one grouped call, one storage."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.config import load_config
from moe_layer.config.model import MoEConfig
from moe_layer.errors import ConfigError
from moe_layer.experts import compute
from moe_layer.experts.packed import NAMES, _joint, _owners
from moe_layer.layer import MoELayer
from tests.unit.config_cases import ROOT
from tests.unit.layers import inputs, random_layer

T = 13


def make(mode: str, dtype: torch.dtype = torch.float64, **changes: Any) -> MoELayer:
    base = {"shared_expert": {"intermediate_size": 64, "mode": mode}, "experts.intermediate_size": 64}
    config = load_config(ROOT / "configs/bench/cpu.yaml", {**base, **changes}, kind=MoEConfig)
    return random_layer(config, dtype)


def run(layer: MoELayer, tokens: int = T, valid: Tensor | None = None) -> dict[str, Tensor]:
    x, upstream = inputs(layer, tokens)
    y = layer(x, valid=valid)
    y.backward(upstream)
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {"y": y.detach(), "dx": x.grad, **found}


CASES: dict[str, dict[str, Any]] = {
    "compact": {},
    "expert_major": {"dispatch.rows": "expert_major"},
    "aligned": {"dispatch.rows": "expert_major", "dispatch.alignment": 8},
    "gate": {"shared_expert.gate": True},
    "static": {"dispatch.capacity": "static", "dispatch.static_factor": 1.5},
    "static expert_major": {
        "dispatch.capacity": "static",
        "dispatch.static_factor": 1.5,
        "dispatch.rows": "expert_major",
    },
    "combine": {"dispatch.apply_probs": "combine"},
    "source": {"dispatch.apply_probs": "source"},
    "fp8": {"dispatch.dispatch_format": "fp8_1x128"},
    "grouped_mm": {"experts.backend": "grouped_mm"},
    "recompute": {"experts.recompute": "h"},
    "pad_to_capacity": {"router.capacity_factor": 1.25, "router.pad_to_capacity": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [T, 0])
def test_equals_the_separate_path(case: str, tokens: int) -> None:
    """fp64: 1e-12 of the largest value; grouped_mm has no fp64 and is compared in fp32."""
    dtype = torch.float32 if case == "grouped_mm" else torch.float64
    got, want = (run(make(mode, dtype, **CASES[case]), tokens) for mode in ("packed", "overlap"))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value is not None and got[name] is not None and got[name].shape == value.shape, name
        bound = (1e-12 if dtype == torch.float64 else 2e-6) * float(value.abs().max()) if value.numel() else 0.0
        assert float((got[name] - value).abs().max()) <= bound if value.numel() else True, name
    if tokens:
        assert all(float(want[name].abs().max()) > 0 for name in NAMES)


def test_padding_tokens_still_pass_the_shared_expert() -> None:
    valid = torch.arange(T) % 3 > 0
    got, want = (run(make(mode), valid=valid) for mode in ("packed", "overlap"))
    for name, value in want.items():
        torch.testing.assert_close(got[name], value, rtol=1e-12, atol=1e-12, msg=name)
    assert float(got["y"][0].abs().max()) > 0


def test_one_grouped_call(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shared and routed rows go through one call of the backend, shared first."""
    calls: list[tuple[int, list[int]]] = []
    backend = compute.BACKENDS["reference"]
    original = backend.forward

    def forward(layout: Any, weights: Any, spec: Any) -> Any:
        calls.append((weights.down.shape[0], layout.offsets.tolist()))
        return original(layout, weights, spec)

    monkeypatch.setattr(backend, "forward", forward)
    layer = make("packed")
    monkeypatch.setattr(layer.shared_expert, "forward", None)  # not called
    layer(torch.randn(T, layer.config.hidden_size, dtype=torch.float64))
    ((groups, offsets),) = calls
    router = layer.config.router
    assert groups == router.num_experts + 1
    assert offsets[:2] == [0, T] and offsets[-1] == T + T * router.top_k


def together(layer: MoELayer) -> bool:
    assert layer.shared_expert is not None
    return _joint(*(owner.detach() for owner in _owners(layer.experts, layer.shared_expert))) is not None


def test_weights_stay_in_one_storage() -> None:
    """Through casts, copies, files and meta construction; names and values as in the separate mode."""
    layer, separate = make("packed"), make("overlap")
    assert together(layer) and not together(separate)
    assert layer.state_dict().keys() == separate.state_dict().keys()
    before = run(layer)["y"]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    optimizer.step()
    assert together(layer)
    stepped = run(layer)["y"]
    assert not torch.equal(before, stepped)

    copied = copy.deepcopy(layer)
    assert together(copied) and torch.equal(run(copied)["y"], stepped)
    buffer = io.BytesIO()
    torch.save(layer.state_dict(), buffer)
    buffer.seek(0)
    loaded = make("packed")
    loaded.load_state_dict(torch.load(buffer))
    assert together(loaded) and torch.equal(run(loaded)["y"], stepped)
    assert together(layer.to(torch.float32))
    meta = MoELayer(layer.config, device="meta").to_empty(device="cpu")
    meta.reset_parameters()
    assert together(meta)


def test_weights_that_left_are_an_error_with_a_remedy() -> None:
    layer = make("packed")
    assert layer.shared_expert is not None
    layer.shared_expert.up_proj.weight.data = layer.shared_expert.up_proj.weight.data.clone()
    with pytest.raises(RuntimeError, match="no longer lie beside the routed ones") as caught:
        run(layer)
    assert "layer.bind(layer.router.context)" in str(caught.value)
    layer.bind(layer.router.context)
    torch.testing.assert_close(run(layer)["y"], run(make("overlap"))["y"], rtol=1e-12, atol=1e-12)


def test_main_grad_of_every_weight() -> None:
    layer, want = make("packed", torch.float32), run(make("packed", torch.float32))
    assert layer.shared_expert is not None
    owners = _owners(layer.experts, layer.shared_expert)
    for owner in owners:
        owner.main_grad = torch.ones_like(owner)
    got = run(layer)
    for name, owner in zip(NAMES, owners, strict=True):
        assert got[name] is None and owner.grad_added_to_main_grad
        torch.testing.assert_close(owner.main_grad, want[name] + 1, msg=name)


def test_under_compile() -> None:
    """A graph break around the grouped call, and the same bits."""
    layer, want = make("packed", torch.float32), run(make("packed", torch.float32))
    compiled = torch.compile(layer, backend="eager")
    x, upstream = inputs(layer, T)
    y = compiled(x)
    y.backward(upstream)
    assert torch.equal(y, want["y"]) and x.grad is not None and torch.equal(x.grad, want["dx"])
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and torch.equal(parameter.grad, want[name]), name


def test_frozen_weights_get_no_gradient() -> None:
    layer, want = make("packed"), run(make("packed"))
    assert layer.shared_expert is not None
    layer.shared_expert.requires_grad_(False)
    got = run(layer)
    for name, value in want.items():
        assert got[name] is None if name.startswith("shared_expert.") else torch.equal(got[name], value), name


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"shared_expert.intermediate_size": 32}, r"needs shared_expert.intermediate_size \(32\) equal to"),
        ({"experts.activation": "geglu"}, "needs experts.activation swiglu, got geglu"),
        ({"experts.bias": True}, "needs experts.bias false, got true"),
        ({"experts.weight_format": "int8"}, "needs experts.weight_format input, got int8"),
    ],
)
def test_what_cannot_be_packed(changes: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigError, match=text):
        make("packed", **changes)
