"""The layer against the fp64 oracle, and what a host model may do with it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from moe_layer import MoEConfig, MoELayer, RoutingDecision
from moe_layer.config import (
    BalanceConfig,
    DispatchConfig,
    ExpertsConfig,
    LossesConfig,
    ReplayConfig,
    RouterConfig,
    SharedExpertConfig,
)
from tests import oracle

D, F, E, K = 16, 8, 8, 3


def make_config(**changes) -> MoEConfig:
    base = {
        "hidden_size": D,
        "router": RouterConfig(num_experts=E, top_k=K),
        "experts": ExpertsConfig(intermediate_size=F, init_std=0.3),
    }
    return MoEConfig(**{**base, **changes})


def make_layer(config: MoEConfig, *, dtype=torch.float64, seed=0) -> MoELayer:
    torch.manual_seed(seed)
    layer = MoELayer(config, dtype=dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if "bias" in name:
                parameter.normal_(0, 0.3)
    return layer


LOSSES = LossesConfig(aux="batch", aux_coeff=0.3, z_coeff=0.1)
CASES = {
    "softmax_post": ({}, {}),
    "softmax_pre_no_renorm": (
        {"router": RouterConfig(num_experts=E, top_k=K, softmax_order="pre", renormalize=False)},
        {"softmax_order": "pre", "renormalize": False},
    ),
    "sigmoid_scaled_shared": (
        {
            "router": RouterConfig(num_experts=E, top_k=K, score_function="sigmoid", scaling_factor=2.5),
            "shared_expert": SharedExpertConfig(intermediate_size=12, gate=True),
        },
        {"score_function": "sigmoid", "scaling_factor": 2.5},
    ),
    "sqrtsoftplus_geglu": (
        {
            "router": RouterConfig(num_experts=E, top_k=K, score_function="sqrtsoftplus"),
            "experts": ExpertsConfig(intermediate_size=F, init_std=0.3, activation="geglu"),
        },
        {"score_function": "sqrtsoftplus", "activation": "geglu"},
    ),
    "gpt_oss": (
        {
            "router": RouterConfig(num_experts=E, top_k=K, linear_bias=True),
            "experts": ExpertsConfig(intermediate_size=F, init_std=0.6, activation="swiglu_clamped", bias=True),
            "shared_expert": SharedExpertConfig(intermediate_size=12),
        },
        {"activation": "swiglu_clamped"},
    ),
    "losses": ({"losses": LOSSES}, {"aux_coeff": 0.3, "z_coeff": 0.1}),
    "losses_sigmoid": (
        {"router": RouterConfig(num_experts=E, top_k=K, score_function="sigmoid"), "losses": LOSSES},
        {"score_function": "sigmoid", "aux_coeff": 0.3, "z_coeff": 0.1},
    ),
}
LAYOUTS = {
    "expert_major": DispatchConfig(),
    "compact": DispatchConfig(rows="compact"),
    "aligned": DispatchConfig(alignment=8),
    "combine": DispatchConfig(apply_probs="combine"),
    "source": DispatchConfig(apply_probs="source"),
}


def compare(layer, options, *, tokens=13, call=None, seed=1):
    """Outputs and every gradient of the layer against the oracle, random upstream gradient."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(tokens, D, dtype=torch.float64, generator=generator, requires_grad=True)
    upstream = torch.randn(tokens, D, dtype=torch.float64, generator=generator)
    layer.zero_grad()
    y = layer(x) if call is None else call(x)
    y.backward(upstream)

    x_ref = x.detach().clone().requires_grad_()
    params = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    y_ref, loss, _ = oracle.layer(x_ref, params, options)
    ((y_ref * upstream).sum() + loss).backward()

    torch.testing.assert_close(y, y_ref, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(x.grad, x_ref.grad, rtol=1e-8, atol=1e-11)
    for name, parameter in layer.named_parameters():
        want = params[name].grad if params[name].grad is not None else torch.zeros_like(parameter)
        torch.testing.assert_close(parameter.grad, want, rtol=1e-8, atol=1e-11, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_matches_oracle(case):
    changes, options = CASES[case]
    compare(make_layer(make_config(**changes)), oracle.LayerOptions(top_k=K, **options))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_row_layout_matches_oracle(layout):
    changes, options = CASES["gpt_oss"]
    layer = make_layer(make_config(dispatch=LAYOUTS[layout], **changes))
    compare(layer, oracle.LayerOptions(top_k=K, **options))


def test_padding_is_not_routed_not_counted():
    layer = make_layer(make_config(losses=LOSSES))
    valid = torch.tensor([True, False, True, True, False] * 3)
    options = oracle.LayerOptions(top_k=K, aux_coeff=0.3, z_coeff=0.1, valid=valid.tolist())
    compare(layer, options, tokens=15, call=lambda x: layer(x, valid=valid))
    assert layer.collect_stats()["load"].sum() == 9 * K


def test_replay_matches_oracle_with_forced_experts():
    layer = make_layer(make_config())
    forced = [[(t + 2 * k) % E for k in range(K)] for t in range(13)]
    ids = torch.tensor(forced, dtype=torch.uint8)
    compare(layer, oracle.LayerOptions(top_k=K, forced=forced), call=lambda x: layer(x, replay=ids))


def test_replay_of_own_decision_is_bitwise_the_live_run():
    layer = make_layer(make_config(losses=LOSSES), dtype=torch.float32)
    x = torch.randn(3, 5, D)
    live, routing = layer(x, return_routing=True)
    replayed, again = layer(x, replay=RoutingDecision(routing.ids_TK), return_routing=True)
    assert torch.equal(live, replayed)
    assert torch.equal(routing.weights_TK, again.weights_TK)


@pytest.mark.parametrize("mode", ["recorded", "straight_through"])
def test_recorded_weights(mode):
    layer = make_layer(make_config(replay=ReplayConfig(weights=mode)))
    x = torch.randn(6, D, dtype=torch.float64)
    ids = torch.stack([torch.randperm(E)[:K] for _ in range(6)])
    recorded = torch.rand(6, K)
    y, routing = layer(x, replay=RoutingDecision(ids, recorded), return_routing=True)
    torch.testing.assert_close(routing.weights_TK, recorded.double())
    y.sum().backward()
    moved = layer.router.weight.grad is not None and layer.router.weight.grad.abs().sum() > 0
    assert moved == (mode == "straight_through")


def test_no_tokens_give_zero_gradients():
    layer = make_layer(make_config(losses=LOSSES, shared_expert=SharedExpertConfig(intermediate_size=4)))
    x = torch.zeros(0, D, dtype=torch.float64, requires_grad=True)
    layer(x).sum().backward()
    assert x.grad.shape == (0, D)
    for name, parameter in layer.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


def test_experts_without_tokens_get_zero_gradients():
    layer = make_layer(make_config())
    x = torch.randn(4, D, dtype=torch.float64)
    layer(x, replay=torch.tensor([[0, 1, 2]] * 4)).sum().backward()
    grad = layer.experts.gate_up_proj.grad
    assert grad[:3].abs().sum() > 0 and not grad[3:].any()


def gradients(layer, x, call, upstream):
    layer.zero_grad()
    x.grad = None
    call(x).backward(upstream)
    return [x.grad.clone(), *(p.grad.clone() for p in layer.parameters()), layer.collect_stats()["load"]]


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_same_bits_and_counts_once(reentrant):
    layer = make_layer(make_config(losses=LOSSES), dtype=torch.float32)
    x, upstream = torch.randn(9, D, requires_grad=True), torch.randn(9, D)
    plain = gradients(layer, x, layer, upstream)
    recomputed = gradients(layer, x, lambda x: checkpoint(layer, x, use_reentrant=reentrant), upstream)
    assert all(torch.equal(a, b) for a, b in zip(plain, recomputed, strict=True))
    assert plain[-1].sum() == 9 * K


COMPILED = {
    "expert_major": DispatchConfig(rows="expert_major"),
    "compact": DispatchConfig(rows="compact"),
    "static": DispatchConfig(capacity="static"),
}


@pytest.mark.parametrize("dispatch", COMPILED)
def test_fullgraph_compile_same_bits(dispatch):
    layer = make_layer(make_config(losses=LOSSES, dispatch=COMPILED[dispatch]), dtype=torch.float32)
    x, upstream = torch.randn(9, D, requires_grad=True), torch.randn(9, D)
    plain = gradients(layer, x, layer, upstream)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(layer, x, compiled, upstream), strict=True))


def test_compiled_static_buffers_overflow_with_an_error():
    torch._dynamo.reset()  # the second static_factor of a process would be a symbol
    layer = make_layer(make_config(dispatch=DispatchConfig(capacity="static", static_factor=0.5)), dtype=torch.float32)
    with pytest.raises(RuntimeError, match=r"static dispatch buffer overflowed; raise dispatch\.static_factor"):
        torch.compile(layer, fullgraph=True, dynamic=False, backend="aot_eager")(torch.randn(9, D))


def test_export_with_any_number_of_tokens():
    layer = make_layer(make_config(losses=LOSSES), dtype=torch.float32).eval()
    batch, length = torch.export.Dim("batch"), torch.export.Dim("length")
    exported = torch.export.export(layer, (torch.randn(2, 5, D),), dynamic_shapes={"x": {0: batch, 1: length}})
    for shape in ((2, 5, D), (3, 7, D)):
        x = torch.randn(shape)
        assert torch.equal(exported.module()(x), layer(x))


def test_runs_twice_with_the_same_bits():
    layer = make_layer(make_config(losses=LOSSES), dtype=torch.float32)
    x, upstream = torch.randn(64, D, requires_grad=True), torch.randn(64, D)
    first = gradients(layer, x, layer, upstream)
    assert all(torch.equal(a, b) for a, b in zip(first, gradients(layer, x, layer, upstream), strict=True))


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("dispatch", [DispatchConfig(), DispatchConfig(alignment=16)], ids=["compact", "aligned"])
@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_anomaly_detection_finds_nothing_where_nothing_is_wrong(backend, dispatch):
    """Rows that belong to nobody may hold NaN; here torch.empty does."""
    experts = ExpertsConfig(intermediate_size=F, init_std=0.3, backend=backend)
    layer = make_layer(make_config(experts=experts, dispatch=dispatch), dtype=torch.float32)
    x, upstream = torch.randn(9, D, requires_grad=True), torch.randn(9, D)
    valid = torch.arange(9) % 3 > 0
    plain = gradients(layer, x, lambda x: layer(x, valid=valid), upstream)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autograd.detect_anomaly():
            checked = gradients(layer, x, lambda x: layer(x, valid=valid), upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(a, b) for a, b in zip(plain, checked, strict=True))


@pytest.mark.parametrize("shared", [None, "overlap", "packed"])
@pytest.mark.parametrize("of", ["x", "parameters"])
def test_a_second_derivative_is_an_error_not_a_zero(of, shared):
    """The residual gives torch a path from the gradient to x, along which it would find a part of the answer."""
    shared = None if shared is None else SharedExpertConfig(intermediate_size=F, mode=shared)
    layer = make_layer(make_config(shared_expert=shared))
    x = torch.randn(5, D, dtype=torch.float64, requires_grad=of == "x")
    loss = (x**2 + layer(x)).square().sum()
    with pytest.raises(RuntimeError, match="moe_layer has no second derivatives"):
        torch.autograd.grad(loss, [x] if of == "x" else list(layer.parameters()), create_graph=True)
    loss.backward()


def test_loss_scale_scales_the_attached_losses_only():
    layer = make_layer(make_config(losses=LOSSES))
    x = torch.randn(7, D, dtype=torch.float64)
    grads = []
    for scale in (1.0, 3.0):
        layer.set_loss_scale(torch.tensor(scale))
        layer.zero_grad()
        (layer(x) * 0.0).sum().backward()
        grads.append(layer.router.weight.grad.clone())
    torch.testing.assert_close(grads[1], 3.0 * grads[0])
    assert grads[0].abs().sum() > 0


def test_bias_update_moves_against_the_load():
    router = RouterConfig(num_experts=E, top_k=K, score_function="sigmoid", expert_bias=True)
    layer = make_layer(make_config(router=router, balance=BalanceConfig(bias_update_rate=0.5)))
    layer(torch.randn(8, D, dtype=torch.float64), replay=torch.tensor([[0, 1, 2]] * 8)).sum().backward()
    layer.update_bias()
    assert layer.router.expert_bias.tolist() == [-0.5] * 3 + [0.5] * 5
    layer.update_bias()
    assert layer.router.expert_bias.tolist() == [-0.5] * 3 + [0.5] * 5  # no load since: nothing moves


def test_global_loss_remembers_earlier_micro_batches():
    losses = LossesConfig(aux="global", aux_coeff=1.0)
    layer = make_layer(make_config(losses=losses))
    x = torch.randn(2, 6, D, dtype=torch.float64)
    _, first = layer(x[0], return_routing=True)
    layer(x[0]).sum().backward()
    _, second = layer(x[0], return_routing=True)
    torch.testing.assert_close(first.losses["aux"], second.losses["aux"])  # the same f_e twice
    layer(x[1]).sum().backward()
    assert layer.router.aux_history.sum() == 2 * 6 * K
    layer.update_bias()
    assert not layer.router.aux_history.any()


def test_global_loss_compiled_with_recompute():
    """The backward changes the history and reads it again; inductor has to read first."""
    layer = make_layer(make_config(losses=LossesConfig(aux="global", aux_coeff=1.0)))
    compiled = torch.compile(lambda x: checkpoint(layer, x, use_reentrant=False), fullgraph=True)
    x = torch.randn(2, 6, D, dtype=torch.float64, requires_grad=True)
    grads = []
    for call in (layer, compiled):
        layer.update_bias()  # forgets the history
        for part in x:
            layer.zero_grad()
            (call(part) * 0.0).sum().backward()
            grads.append(layer.router.weight.grad)
    torch.testing.assert_close(grads[2:], grads[:2])


class _Wrapped(torch.nn.Module):
    """What PEFT's target_parameters puts in the place of the experts: it has none of their attributes."""

    def __init__(self, base_layer):
        super().__init__()
        self.base_layer = base_layer

    def forward(self, *arguments, **options):
        return self.base_layer(*arguments, **options)


def test_wrapped_experts():
    layer = make_layer(make_config(), dtype=torch.float32)
    x = torch.randn(5, D)
    y = layer(x)
    layer.experts = _Wrapped(layer.experts)
    assert torch.equal(layer(x), y)
    with pytest.raises(TypeError, match=r"received.rows is torch.bfloat16 and experts.gate_up_proj torch.float32"):
        layer(x.bfloat16())


def test_amp_leaves_the_router_in_fp32():
    layer = make_layer(make_config(), dtype=torch.float32)
    x = torch.randn(6, D)
    _, plain = layer(x, return_routing=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y, routing = layer(x, return_routing=True)
    assert torch.equal(plain.weights_TK, routing.weights_TK)
    assert y.dtype in (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("backend", ["reference", "grouped_mm"])
def test_drop_and_pad_gives_every_expert_capacity_rows_and_changes_no_value(backend):
    experts = ExpertsConfig(intermediate_size=F, init_std=0.3, backend=backend)
    layers = []
    for pad in (False, True):
        router = RouterConfig(num_experts=E, top_k=K, capacity_factor=1.0, pad_to_capacity=pad)
        layers.append(make_layer(make_config(router=router, experts=experts), dtype=torch.float32))
    x, upstream = torch.randn(19, D, requires_grad=True), torch.randn(19, D)
    received = layers[1].dispatcher.dispatch(x, layers[1].router(x))
    capacity = -(-19 * K // E)
    assert received.offsets_L1.tolist() == [capacity * e for e in range(E + 1)]
    assert not received.rows[received.src_N3[:, 0] < 0].any()
    for a, b in zip(*(gradients(layer, x, layer, upstream) for layer in layers), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rows", ["compact", "expert_major"])
@pytest.mark.parametrize("between", ["nothing", "scaled", "also_used"])
def test_row_gradients_add_up_whatever_stands_between_experts_and_combine(rows, between):
    """The linked shortcut of combine's backward must not change any gradient (types.GradientLink)."""
    layer = make_layer(make_config(dispatch=DispatchConfig(rows=rows)))
    x, upstream = torch.randn(9, D, dtype=torch.float64, requires_grad=True), torch.randn(9, D, dtype=torch.float64)
    results = []
    for linked in (True, False):
        routing = layer.router(x)
        received = layer.dispatcher.dispatch(x, routing)
        if not linked:
            received = dataclasses.replace(received, link=None)
        out = layer.experts(received)
        into = out * 1.5 if between == "scaled" else out
        loss = (layer.dispatcher.combine(into, received) * upstream).sum()
        if between == "also_used":
            loss = loss + (out**2).sum()
        results.append(torch.autograd.grad(loss, [x, *layer.parameters()]))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
