"""`dispatch.chunks`: parts of the tokens behind one routing give what one part gives, with one part's rows alive."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_layer.config import load_config
from moe_layer.config.model import MoEConfig
from moe_layer.errors import ConfigError
from moe_layer.experts import compute
from moe_layer.layer import MoELayer
from moe_layer.replay.session import RoutingSession
from moe_layer.types import RoutingDecision
from tests.unit.config_cases import ROOT
from tests.unit.layers import inputs, random_layer

T = 13
MATRICES = ("experts.gate_up_proj", "experts.down_proj")


def make(chunks: int, dtype: torch.dtype = torch.float64, **changes: Any) -> MoELayer:
    config = load_config(ROOT / "configs/bench/cpu.yaml", {**changes, "dispatch.chunks": chunks}, kind=MoEConfig)
    return random_layer(config, dtype)


def run(layer: MoELayer, tokens: int = T, call: Callable[..., Any] | None = None, **options: Any) -> dict[str, Tensor]:
    """y, every gradient and what the router counted."""
    x, upstream = inputs(layer, tokens)
    y = (layer if call is None else call)(x, **options)
    y.backward(upstream)
    found = {name: parameter.grad for name, parameter in layer.named_parameters()}
    stats = {f"stat {name}": value for name, value in layer.collect_stats().items()}
    return {"y": y.detach(), "dx": x.grad, **found, **stats}  # type: ignore[dict-item]


def assert_close(got: dict[str, Tensor], want: dict[str, Tensor], bound: float = 1e-12) -> None:
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert value is not None and got[name] is not None and got[name].shape == value.shape, name
        if value.numel():
            assert float((got[name] - value).abs().max()) <= bound * float(value.abs().max()), name


LOSSES = {"losses.aux": "batch", "losses.aux_coeff": 0.01, "losses.z_coeff": 1e-3}
CASES: dict[str, dict[str, Any]] = {
    "compact": LOSSES,
    "expert_major": {"dispatch.rows": "expert_major"},
    "aligned": {"dispatch.rows": "expert_major", "dispatch.alignment": 8},
    "overlap": {"shared_expert": {"intermediate_size": 40, "gate": True}},
    "packed": {"shared_expert": {"intermediate_size": 64, "mode": "packed"}, "experts.intermediate_size": 64},
    "static": {"dispatch.capacity": "static", "dispatch.static_factor": 3.0},
    "static, sized": {
        "dispatch.capacity": "static",
        "dispatch.static_factor": 3.0,
        "dispatch.max_tokens_per_rank": T + 1,
    },
    "combine": {"dispatch.apply_probs": "combine"},
    "source": {"dispatch.apply_probs": "source"},
    "wire": {"dispatch.combine_format": "bf16"},
    "fp8": {"dispatch.dispatch_format": "fp8_1x128"},
    "grouped_mm": {"experts.backend": "grouped_mm"},
    "recompute": {"experts.recompute": "h"},
    "capacity": {"router.capacity_factor": 1.0, **LOSSES},
    "biases": {"experts.bias": True, "router.linear_bias": True},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("tokens", [T, 3, 0])
def test_equals_one_part(case: str, tokens: int) -> None:
    """fp64, parts of unequal sizes and empty ones: 1e-12 of the largest value; grouped_mm has no fp64."""
    dtype = torch.float32 if case == "grouped_mm" else torch.float64
    want = run(make(1, dtype, **CASES[case]), tokens)
    for chunks in (2, 5):
        got = run(make(chunks, dtype, **CASES[case]), tokens)
        assert_close(got, want, 1e-12 if dtype == torch.float64 else 2e-6)


def _row_by_row(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """A matrix product whose rows do not depend on how many there are, as BLAS does not promise."""
    total = a.new_zeros(a.shape[0], b.shape[1])
    for k in range(a.shape[1]):
        total = total + a[:, k : k + 1] * b[k]
    return total if out is None else out.copy_(total)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("changes", [{}, {"dispatch.rows": "expert_major"}, CASES["overlap"], LOSSES])
def test_bits_of_one_part(dtype: torch.dtype, changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """With GEMMs that compute every row alike, only dW sees the parts."""
    monkeypatch.setattr(torch, "mm", _row_by_row)
    want = run(make(1, dtype, **changes))
    for chunks in (2, 5):
        got = run(make(chunks, dtype, **changes))
        assert all(torch.equal(got[name], value) for name, value in want.items() if name not in MATRICES)


@pytest.mark.parametrize("chunks", [2, 4, 16])
@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_error_of_bf16_sums(chunks: int, backend: str) -> None:
    """dW in bf16 is rounded once more a part (measured: 1.03, 1.09 and 1.38 times the error of one part; grouped_mm,
    which rounds the part too, 1.07, 1.14 and 1.44); ids are given, so that no near tie decides."""
    layer, changes = make(1), {"experts.backend": backend}
    scores = torch.rand(256, layer.config.router.num_experts, generator=torch.Generator().manual_seed(1))
    ids = scores.topk(layer.config.router.top_k).indices
    exact = run(layer.bfloat16().double(), 256, replay=ids)
    one, several = (run(make(count, **changes).bfloat16(), 256, replay=ids) for count in (1, chunks))
    for name in MATRICES:
        ours, theirs = ((found[name].double() - exact[name]).norm() for found in (several, one))
        assert ours <= (1.25 if chunks <= 4 else 1.6) * theirs, (name, float(ours / theirs))


@pytest.mark.parametrize("mode", ["none", "packed"])
def test_main_grad(mode: str) -> None:
    """fp32 sums of all parts, on top of what is there; nothing in `.grad`."""
    changes = CASES["packed"] if mode == "packed" else {}
    want, layer = run(make(1, torch.float32, **changes)), make(3, torch.float32, **changes)
    for name in MATRICES:
        layer.get_parameter(name).main_grad = torch.ones(layer.get_parameter(name).shape)  # type: ignore[attr-defined]
    x, upstream = inputs(layer, T)
    layer(x).backward(upstream)
    for name in MATRICES:
        parameter = layer.get_parameter(name)
        assert parameter.grad is None and parameter.grad_added_to_main_grad  # type: ignore[attr-defined]
        torch.testing.assert_close(parameter.main_grad - 1, want[name], rtol=1e-4, atol=1e-5)  # type: ignore[attr-defined]


def test_one_part_is_alive_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward: no rows of earlier parts are left when the next part's are made. Backward: the last part goes first, and
    its H, d(H) and d(rows) are gone when the next one starts."""
    backend, order, alive = compute.BACKENDS["reference"], [], []
    forward, backward = backend.forward, backend.backward
    rows: list[weakref.ref[Tensor]] = []
    h_of: dict[int, weakref.ref[Tensor]] = {}

    def track_forward(layout: Any, weights: Any, spec: Any) -> Any:
        alive.append(sum(ref() is not None for ref in rows))
        found = forward(layout, weights, spec)
        rows.append(weakref.ref(found[0]))
        h_of[layout.offsets.data_ptr()] = weakref.ref(found[1])
        return found

    def track_backward(d_out: Any, h: Tensor, layout: Any, *arguments: Any, **options: Any) -> Any:
        order.append(list(h_of).index(layout.offsets.data_ptr()))
        alive.append(sum(ref() is not None for ref in rows))
        found = backward(d_out, h, layout, *arguments, **options)
        rows.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(backend, "forward", track_forward)
    monkeypatch.setattr(backend, "backward", track_backward)
    layer = make(4)
    x, upstream = inputs(layer, T)
    gc.disable()  # a reference cycle would keep rows until the collector runs
    try:
        layer(x).backward(upstream)
    finally:
        gc.enable()
    assert order == [3, 2, 1, 0]
    assert alive == [0] * 8


def test_gradients_of_the_parts_are_joined_not_padded() -> None:
    """Slices would write [T, D] for each part."""
    layer = make(4)
    x, _ = inputs(layer, T)
    seen, names = [layer(x).grad_fn], set()
    while seen:
        node = seen.pop()
        if node is not None and node not in names:
            names.add(node)
            seen += [following for following, _ in node.next_functions]
    kinds = {type(node).__name__ for node in names}
    assert "SplitWithSizesBackward0" in kinds and not any(kind.startswith("Slice") for kind in kinds)


def test_routes_once() -> None:
    """The router, its losses, statistics and a session see all tokens in one call; `valid` and ids reach every part."""
    layer, calls = make(4, **LOSSES), []
    layer.router.register_forward_hook(lambda *_: calls.append(1))
    valid = torch.arange(T) % 3 > 0
    got, want = run(layer, valid=valid), run(make(1, **LOSSES), valid=valid)
    assert calls == [1]
    assert_close(got, want)
    assert float(got["stat tokens"]) == int(valid.sum()) and float(got["stat micro_batches"]) == 1
    ids = torch.stack([torch.arange(layer.config.router.top_k)] * T).int()
    assert_close(run(make(4), replay=RoutingDecision(ids)), run(make(1), replay=RoutingDecision(ids)))
    model = make(4)
    with RoutingSession(model) as session:
        with session.record() as recording:
            y = model(inputs(model, T)[0])
        with session.replay(recording.trace()):
            assert torch.equal(model(inputs(model, T)[0]), y)
    assert recording.trace().num_tokens == T


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("changes", [{}, CASES["packed"], CASES["expert_major"]])
def test_recompute(reentrant: bool, changes: dict[str, Any]) -> None:
    want, layer = run(make(3, **changes)), make(3, **changes)
    got = run(layer, call=lambda x: checkpoint(layer, x, use_reentrant=reentrant))
    assert all(torch.equal(got[name], value) for name, value in want.items())


def test_a_second_backward_begins_anew() -> None:
    layer = make(3)
    x, upstream = inputs(layer, T)
    y = layer(x)
    y.backward(upstream, retain_graph=True)
    first = {name: layer.get_parameter(name).grad.clone() for name in MATRICES}  # type: ignore[union-attr]
    y.backward(upstream)
    for name in MATRICES:
        assert torch.equal(layer.get_parameter(name).grad, 2 * first[name])  # type: ignore[arg-type]


def test_frozen_weights_and_frozen_input() -> None:
    frozen, want = make(3), run(make(1))
    frozen.experts.requires_grad_(False)
    x, upstream = inputs(frozen, T)
    frozen(x).backward(upstream)
    torch.testing.assert_close(x.grad, want["dx"], rtol=1e-11, atol=1e-12)
    assert frozen.experts.down_proj.grad is None
    layer = make(3)
    layer(x.detach()).backward(upstream)
    torch.testing.assert_close(layer.experts.down_proj.grad, want["experts.down_proj"], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("changes", [{}, CASES["overlap"]])
def test_compiles_as_one_graph(changes: dict[str, Any]) -> None:
    want, layer = run(make(3, torch.float32, **changes)), make(3, torch.float32, **changes)
    torch._dynamo.reset()
    got = run(layer, call=torch.compile(layer, fullgraph=True, backend="aot_eager"))
    assert_close(got, want, 2e-6)


def test_evaluation_without_gradients() -> None:
    layer, one = make(4), make(1)
    with torch.no_grad():
        x = torch.randn(2, 5, layer.config.hidden_size, dtype=torch.float64)
        torch.testing.assert_close(layer(x), one(x), rtol=1e-12, atol=1e-12)


def test_drop_and_pad_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"dispatch.chunks \(2\) contradicts router.pad_to_capacity.*set it to 1"):
        make(2, **{"router.capacity_factor": 1.25, "router.pad_to_capacity": True})
