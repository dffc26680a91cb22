"""Both doors of the expert MLP and what surrounds them: compile, main_grad, recompute, autocast, DTensor, backends."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import re
import warnings

import pytest
import torch
from experts_inputs import ACTIVATIONS, D, E, F, gradients, make_experts, make_inputs, make_received
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from moe_layer.config.model import ExpertsConfig
from moe_layer.experts import Experts
from moe_layer.experts.backend import resolve
from moe_layer.types import Received

FP32 = torch.float32
BACKENDS = ("reference", "grouped_mm")


def _received(experts_dtype: torch.dtype = FP32, tokens: int = 20, **layout) -> tuple[list[Tensor], Received]:
    x, ids, weights = make_inputs(experts_dtype, tokens)
    return [x, weights], make_received(x, ids, weights, num_experts=E, **layout)


def _as_arguments(experts: Experts, received: Received) -> tuple:
    config = experts.config
    layout = (received.rows, received.index_N, received.act_probs_N, received.offsets_L1, received.counts_L)
    return (
        *layout,
        received.row_CK,
        received.ids_CK,
        experts.gate_up_proj,
        experts.down_proj,
        experts.gate_up_proj_bias,
        experts.down_proj_bias,
        config.backend,
        config.activation,
        config.clamp_limit,
        config.clamp_alpha,
        {"none": "input", "h": "none", "fp8_h": "fp8"}[config.recompute],
        received.rows.dtype,
        E,
    )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("recompute", ["none", "h", "fp8_h"])
def test_opcheck(backend: str, compact: bool, recompute: str) -> None:
    experts = make_experts(FP32, backend=backend, bias=compact, recompute=recompute)
    _, received = _received(compact=compact)
    received = dataclasses.replace(
        received,
        rows=received.rows.detach().requires_grad_(),
        act_probs_N=received.act_probs_N.detach().requires_grad_(),
    )
    arguments = _as_arguments(experts, received)
    torch.library.opcheck(torch.ops.moe_layer.experts_fwd.default, arguments)
    with torch.no_grad():
        rows, h = torch.ops.moe_layer.experts_fwd(*arguments)
        plain = [a.detach() if isinstance(a, Tensor) else a for a in arguments]
    for needs in ([True] * 4 + [compact] * 2, [False, True] + [False] * 4):
        torch.library.opcheck(
            torch.ops.moe_layer.experts_bwd.default,
            (torch.randn_like(rows), h, *plain, needs),
            test_utils="test_schema",
        )
        torch.library.opcheck(
            torch.ops.moe_layer.experts_bwd.default,
            (torch.randn_like(rows), h, *plain, needs),
            test_utils="test_faketensor",
        )


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compact", [False, True])
def test_fullgraph_compile_gives_the_same_bits(backend: str, compact: bool) -> None:
    experts = make_experts(FP32, backend=backend, bias=True)
    compiled = torch.compile(experts, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (20, 7):
        leaves, received = _received(tokens=tokens, compact=compact)
        upstream = torch.randn(received.src_N3.shape[0], D)
        eager = gradients(experts, experts(received), leaves, upstream)
        graph = gradients(experts, compiled(received), leaves, upstream, retain=False)
        assert all(torch.equal(a, b) for a, b in zip(eager, graph, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("compact", [False, True])
def test_recompute_keeps_no_h_and_changes_no_bit(backend: str, activation: str, compact: bool) -> None:
    leaves, received = _received(compact=compact)
    num_rows = received.src_N3.shape[0]
    upstream = torch.randn(num_rows, D)
    results, saved = {}, {}
    for recompute in ("none", "h"):
        torch.manual_seed(5)
        experts = make_experts(FP32, backend=backend, activation=activation, recompute=recompute, intermediate_size=12)
        shapes: list[torch.Size] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=shapes: s.append(t.shape) or t, lambda t: t):
            rows = experts(received)
        results[recompute] = [rows, *gradients(experts, rows, leaves, upstream)]
        saved[recompute] = shapes
    assert all(torch.equal(a, b) for a, b in zip(results["none"], results["h"], strict=True))
    assert (num_rows, 24) in saved["none"] and (num_rows, 24) not in saved["h"]
    if compact:
        assert all(shape != (num_rows, D) for shape in saved["none"]), "compact keeps x, not its permuted copy"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fp8_h_keeps_a_byte_an_element_and_only_rounds_h(backend: str, activation: str) -> None:
    leaves, received = _received(compact=True)
    num_rows = received.src_N3.shape[0]
    upstream = torch.randn(num_rows, D)
    results = {}
    for recompute in ("none", "fp8_h"):
        torch.manual_seed(5)
        experts = make_experts(FP32, backend=backend, activation=activation, recompute=recompute, intermediate_size=12)
        saved: list[tuple] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append((t.dtype, t.shape)) or t, lambda t: t
        ):
            rows = experts(received)
        results[recompute] = [rows, *gradients(experts, rows, leaves, upstream)]
        assert ((torch.uint8, (num_rows, 24 + 4)) in saved) == (recompute == "fp8_h")
        assert ((FP32, (num_rows, 24)) in saved) == (recompute == "none")
    assert torch.equal(results["none"][0], results["fp8_h"][0])
    for exact, rounded in zip(results["none"][1:], results["fp8_h"][1:], strict=True):
        error = float((exact - rounded).norm() / exact.norm())
        # Half a unit of e4m3 is 6%; at the clamp's edge rounding also switches whole elements on or off.
        assert 0 < error < (0.2 if activation == "swiglu_clamped" else 0.06)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [FP32, torch.bfloat16])
def test_main_grad_takes_the_weight_gradients(backend: str, dtype: torch.dtype) -> None:
    sizes = {"intermediate_size": 8}
    experts = make_experts(dtype, backend=backend, bias=True, **sizes)
    plain = copy.deepcopy(experts)
    for parameter in experts.parameters():
        parameter.main_grad = torch.zeros(parameter.shape)
    leaves, received = _received(dtype)
    upstream = torch.randn(received.src_N3.shape[0], D).to(dtype)
    plain(received).backward(upstream, retain_graph=True)
    leaf_grads = [leaf.grad.clone() for leaf in leaves]
    for leaf in leaves:
        leaf.grad = None
    experts(received).backward(upstream, retain_graph=True)
    assert all(torch.equal(leaf.grad, grad) for leaf, grad in zip(leaves, leaf_grads, strict=True))
    for (name, mine), theirs in zip(experts.named_parameters(), plain.parameters(), strict=True):
        assert mine.grad is None and mine.grad_added_to_main_grad is True, name
        once = mine.main_grad.clone()
        torch.testing.assert_close(once, theirs.grad.float(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
        assert not once[E - 1].any()
    experts(received).backward(upstream)
    for mine, theirs in zip(experts.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine.main_grad, 2 * theirs.grad.float(), rtol=4 * torch.finfo(dtype).eps, atol=1e-5)


def test_main_grad_of_some_parameters_only() -> None:
    experts = make_experts(FP32)
    experts.down_proj.main_grad = torch.zeros(experts.down_proj.shape)
    _, received = _received()
    experts(received).sum().backward()
    assert experts.down_proj.grad is None and experts.down_proj.main_grad.any()
    assert experts.gate_up_proj.grad is not None and not hasattr(experts.gate_up_proj, "grad_added_to_main_grad")


def test_frozen_parameters_get_no_gradient() -> None:
    experts = make_experts(FP32)
    experts.down_proj.requires_grad_(False)
    experts.down_proj.main_grad = torch.zeros(experts.down_proj.shape)
    leaves, received = _received()
    experts(received).sum().backward()
    assert experts.down_proj.grad is None and not experts.down_proj.main_grad.any()
    assert experts.gate_up_proj.grad.any() and leaves[0].grad.any()


@pytest.mark.parametrize(
    "main_grad", [torch.zeros(E, D, F, dtype=torch.bfloat16), torch.zeros(E, F, D), torch.zeros(E, D, F, device="meta")]
)
def test_main_grad_that_does_not_fit(main_grad: Tensor) -> None:
    experts = make_experts(FP32)
    experts.down_proj.main_grad = main_grad
    with pytest.raises(ValueError, match=r"experts\.down_proj\.main_grad is .* must be float32 \(6, 8, 4\) on cpu"):
        experts(_received()[1])


def test_main_grad_under_compile_is_an_error() -> None:
    experts = make_experts(FP32)
    experts.down_proj.main_grad = torch.zeros(experts.down_proj.shape)
    with pytest.raises(RuntimeError, match=r"experts\.down_proj has a main_grad.*delete the attribute"):
        torch.compile(experts, backend="aot_eager", fullgraph=True)(_received()[1])


@pytest.fixture
def one_rank():
    """A process group of this process alone."""
    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield torch.distributed.init_device_mesh("cpu", (1,))
    torch.distributed.destroy_process_group()


def test_dtensor_parameters(one_rank: torch.distributed.DeviceMesh) -> None:
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor

    experts = make_experts(FP32, bias=True)
    sharded = copy.deepcopy(experts)
    for name, parameter in list(sharded.named_parameters()):
        setattr(sharded, name, torch.nn.Parameter(distribute_tensor(parameter.detach(), one_rank, [Shard(0)])))
    leaves, received = _received()
    upstream = torch.randn(received.src_N3.shape[0], D)
    want = gradients(experts, experts(received), leaves, upstream)
    got = gradients(sharded, sharded(received), leaves, upstream)
    assert all(isinstance(g, DTensor) for g in got[2:])
    for mine, theirs in zip(got, want, strict=True):
        assert torch.equal(mine.to_local() if isinstance(mine, DTensor) else mine, theirs)
    sharded.gate_up_proj.main_grad = torch.zeros(experts.gate_up_proj.shape)
    with pytest.raises(ValueError, match=r"experts\.gate_up_proj has a main_grad but is sharded .*delete"):
        sharded(received)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_changes_no_bit(use_reentrant: bool) -> None:
    experts = make_experts(FP32)
    x, ids, weights = make_inputs(FP32)

    def run(x: Tensor, weights: Tensor) -> Tensor:
        return experts(make_received(x, ids, weights, num_experts=E, compact=True))

    upstream = torch.randn_like(run(x, weights))
    leaves = [x, weights, *experts.parameters()]
    results = []
    for rows in (run(x, weights), checkpoint(run, x, weights, use_reentrant=use_reentrant)):
        for leaf in leaves:
            leaf.grad = None
        rows.backward(upstream)
        results.append([leaf.grad.clone() for leaf in leaves])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize(("compiled", "main_grad"), [(False, False), (False, True), (True, False)])
def test_autocast_casts_rows_and_weights(compiled: bool, main_grad: bool) -> None:
    experts = make_experts(FP32, intermediate_size=8)
    leaves, received = _received()
    if main_grad:
        for parameter in experts.parameters():
            parameter.main_grad = torch.zeros(parameter.shape)
    call = torch.compile(experts, fullgraph=True, backend="aot_eager") if compiled else experts
    with torch.autocast("cpu", torch.bfloat16):
        rows = call(received)
    rows.sum().backward()
    low = make_experts(torch.bfloat16, intermediate_size=8)
    low.load_state_dict(experts.state_dict())
    probs = received.act_probs_N.detach()
    want = low(dataclasses.replace(received, rows=received.rows.detach().bfloat16(), act_probs_N=probs))
    assert rows.dtype == FP32 and torch.equal(rows, want.float())
    want.sum().backward()
    for mine, theirs in zip(experts.parameters(), low.parameters(), strict=True):
        gradient = mine.main_grad if main_grad else mine.grad
        assert gradient.dtype == FP32
        torch.testing.assert_close(gradient, theirs.grad.float(), rtol=2**-7, atol=1e-3)
    assert leaves[0].grad.dtype == FP32


def test_errors_name_value_and_remedy() -> None:
    experts = make_experts(FP32)
    _, received = _received()
    with pytest.raises(TypeError, match=r"received\.rows is torch\.bfloat16 and experts\.gate_up_proj torch\.float32"):
        experts(dataclasses.replace(received, rows=received.rows.bfloat16()))
    with pytest.raises(ValueError, match=r"received\.rows is \(\d+, 7\) for 6 experts.*hidden_size 8"):
        experts(dataclasses.replace(received, rows=received.rows[:, :7]))
    with pytest.raises(ValueError, match="for 5 experts, but this module has 6"):
        experts(dataclasses.replace(received, offsets_L1=received.offsets_L1[:-1]))


@pytest.mark.parametrize(
    ("device", "dtype", "width", "reason"),
    [
        ("cpu", torch.float64, 8, "no torch.float64 kernel; use bfloat16"),
        ("cpu", torch.bfloat16, 12, "multiple of 16 bytes.*width 12 are not both multiples of 8"),
        ("cuda", torch.float32, 8, "fast in bfloat16 only, not torch.float32"),
    ],
)
def test_a_backend_that_cannot_run_is_an_error(device: str, dtype: torch.dtype, width: int, reason: str) -> None:
    with pytest.raises(ValueError, match=f"experts.backend is grouped_mm, but .*{reason}"):
        resolve("grouped_mm", torch.device(device), dtype, hidden_size=8, width=width)


def test_auto_warns_once_when_it_falls_back() -> None:
    assert resolve("auto", torch.device("cpu"), torch.float64, hidden_size=8, width=5) == "reference"
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert resolve("auto", torch.device("cuda"), torch.float16, hidden_size=8, width=24) == "reference"
    assert len(caught) == 1
    assert re.search("backend auto uses the per-expert loop.*host.*use bfloat16", str(caught[0].message))


def test_backends_agree_and_are_really_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from moe_layer.experts import grouped_mm, reference

    calls: list[str] = []
    for module, name in ((reference, "reference"), (grouped_mm, "grouped_mm")):
        forward = module.forward
        monkeypatch.setattr(module, "forward", lambda *a, f=forward, n=name: calls.append(n) or f(*a))
    _, received = _received()
    rows = []
    for backend in ("auto", *BACKENDS):
        torch.manual_seed(3)
        rows.append(make_experts(FP32, backend=backend)(received))
    assert calls == ["reference", "reference", "grouped_mm"]
    torch.testing.assert_close(rows[1], rows[2], rtol=1e-5, atol=1e-5)


def test_construction_and_state() -> None:
    config = ExpertsConfig(intermediate_size=F, bias=True, init_std=0.1)
    torch.manual_seed(0)
    whole = Experts(config, hidden_size=D, num_experts=E)
    shapes = {name: tuple(p.shape) for name, p in whole.named_parameters()}
    assert shapes == {
        "gate_up_proj": (E, 2 * F, D),
        "down_proj": (E, D, F),
        "gate_up_proj_bias": (E, 2 * F),
        "down_proj_bias": (E, D),
    }
    assert 0.07 < whole.gate_up_proj.std() < 0.13 and not whole.down_proj_bias.any()
    part = Experts(config, hidden_size=D, num_experts=E // 2, device="meta").to_empty(device="cpu")
    torch.manual_seed(0)
    part.reset_parameters(first_expert=E // 2)
    for name, value in part.named_parameters():
        assert torch.equal(value, whole.get_parameter(name)[E // 2 :]), name
    _, received = _received()
    for twin in (copy.deepcopy(whole), pickle.loads(pickle.dumps(whole))):
        assert torch.equal(twin(received), whole(received))
