"""route_topk inside PyTorch: gradcheck, opcheck, fullgraph compile, checkpointing, determinism, argument errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.checkpoint import checkpoint

from moe_layer.ops.route_topk import RouteTopk, route_topk
from tests.ops.router_cases import ALL_OUTPUTS, check_against_oracle
from tests.oracle_router import Rule

FLOATING = ("weights", "score_sum", "z_sum", "probs", "scores")
VARIANTS: dict[str, dict[str, Any]] = {
    "post": {"top_k": 3},
    "pre": {"top_k": 3, "softmax_order": "pre", "renormalize": False},
    "sigmoid": {"top_k": 3, "score_function": "sigmoid", "scaling_factor": 2.5},
    "sqrtsoftplus": {"top_k": 3, "score_function": "sqrtsoftplus"},
    "k1": {"top_k": 1, "score_function": "sigmoid"},
    "groups": {"top_k": 2, "score_function": "sigmoid", "num_groups": 4, "group_topk": 2},
}


def floats(out: RouteTopk) -> list[torch.Tensor]:
    return [getattr(out, name) for name in FLOATING]


@pytest.mark.parametrize("name", VARIANTS)
def test_gradcheck(name: str) -> None:
    """fp64, logits spaced so that a perturbation never changes the selection."""
    logits = (torch.stack([torch.randperm(8) for _ in range(4)]) * 0.37 - 1.0).double().requires_grad_()
    valid = torch.tensor([True, True, False, True])
    cu_seqlens = torch.tensor([0, 1, 4])
    weights = torch.rand(4, VARIANTS[name]["top_k"])
    ids = torch.stack([torch.randperm(8)[: weights.shape[1]] for _ in range(4)])
    ids[0, 0] = -1
    extra = {"aux_counts": "live", "valid": valid, "cu_seqlens": cu_seqlens, **ALL_OUTPUTS, **VARIANTS[name]}
    replays = ({}, {"replay_ids": ids}, {"replay_ids": ids, "replay_weights": weights, "weights_mode": "recorded"})
    for replay in replays:
        assert torch.autograd.gradcheck(lambda x, r=replay: floats(route_topk(x, **extra, **r)), logits)


@pytest.mark.parametrize("name", VARIANTS)
@pytest.mark.parametrize("everything", [False, True])
def test_opcheck(name: str, everything: bool) -> None:
    options: dict[str, Any] = {
        "score_function": "softmax", "softmax_order": "post", "renormalize": True, "scaling_factor": 1.0,
        "num_groups": 0, "group_topk": 0, "group_rule": "sum_top2", "weights_mode": "live", "aux_counts": "none",
        "want_z": False, "want_probs": False, "want_scores": False, "map_format": "none",
        "want_losses": False, "aux_coeff": 0.1, "z_coeff": 0.2,
    }  # fmt: skip
    options |= VARIANTS[name]
    top_k = options["top_k"]
    replay_ids = valid = cu_seqlens = bias = weights = None
    if everything:
        options |= {**ALL_OUTPUTS, "aux_counts": "live", "weights_mode": "recorded", "map_format": "bitmap"}
        replay_ids, valid = torch.randint(-1, 8, (5, top_k)), torch.tensor([True, False, True, True, True])
        cu_seqlens, bias, weights = torch.tensor([0, 2, 5]), torch.rand(8), torch.rand(5, top_k)
    logits = torch.randn(5, 8, requires_grad=True)
    args = (logits, bias, replay_ids, weights, valid, cu_seqlens)
    torch.library.opcheck(torch.ops.moe_layer.route_topk.default, args, options)
    buffer = torch.zeros(5, top_k, dtype=torch.int16)
    torch.library.opcheck(torch.ops.moe_layer.route_topk_into.default, (logits.detach(), *args[1:], buffer), options)
    finished = options | {"aux_counts": "live", "want_losses": True}
    torch.library.opcheck(torch.ops.moe_layer.route_topk.default, (*args[:5], None), finished)

    kept = {
        key: options[key]
        for key in ("score_function", "softmax_order", "renormalize", "scaling_factor", "weights_mode")
    }
    ids = route_topk(logits, bias, top_k=top_k).ids
    sequences = 2 if everything else 1
    dense = (torch.randn(sequences, 8), torch.randn(1), torch.randn(5, 8), torch.randn(5, 8))
    grads = (torch.randn(5, top_k), *(dense if everything else (None,) * 4))
    torch.library.opcheck(
        torch.ops.moe_layer.route_topk_bwd.default, (*grads, logits.detach(), ids, replay_ids, cu_seqlens), kept
    )


@pytest.mark.parametrize("name", ["post", "groups"])
def test_fullgraph_compile_gives_the_same_bits(name: str) -> None:
    upstream = torch.randn(6, VARIANTS[name]["top_k"])

    def step(logits: torch.Tensor, valid: torch.Tensor, ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = route_topk(logits, valid=valid, replay_ids=ids, aux_counts="live", want_z=True, **VARIANTS[name])
        loss = (out.weights * upstream).sum() + out.z_sum.sum() + out.score_sum.square().sum()
        return loss, out.ids, out.counts

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for valid in (torch.ones(6, dtype=torch.bool), torch.tensor([True, False, True, True, False, True])):
        results = []
        for function in (step, compiled):
            logits = torch.randn(6, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
            ids = torch.randint(-1, 8, upstream.shape, generator=torch.Generator().manual_seed(2))
            loss, *rest = function(logits, valid, ids)
            loss.backward()
            results.append((loss, *rest, logits.grad))
        for eager, other in zip(*results, strict=True):
            assert torch.equal(eager, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_gives_the_same_gradients(use_reentrant: bool) -> None:
    def weights(logits: torch.Tensor) -> torch.Tensor:
        return route_topk(logits, top_k=3, score_function="sigmoid").weights

    logits = torch.randn(6, 8, requires_grad=True)
    upstream = torch.randn(6, 3)
    (expected,) = torch.autograd.grad(weights(logits), logits, upstream)
    checkpoint(weights, logits, use_reentrant=use_reentrant).backward(upstream)
    assert torch.equal(logits.grad, expected)


def test_no_graph_without_grad_and_no_gradient_for_unused_outputs() -> None:
    with torch.no_grad():
        assert not route_topk(torch.randn(3, 8, requires_grad=True), top_k=2).weights.requires_grad
    logits = torch.randn(3, 8, requires_grad=True)
    out = route_topk(logits, top_k=2, want_z=True, aux_counts="live")
    assert not out.ids.requires_grad and not out.counts.requires_grad and not out.aux_counts.requires_grad
    (only_z,) = torch.autograd.grad(out.z_sum, logits, torch.ones(1))
    lse = torch.logsumexp(logits, dim=1, keepdim=True)
    torch.testing.assert_close(only_z, 2 * lse * torch.softmax(logits, dim=1))


@pytest.mark.parametrize("name", VARIANTS)
def test_run_twice_same_bits(name: str) -> None:
    logits = (torch.randn(300, 8) * 3).bfloat16()
    results = []
    for _ in range(2):
        leaf = logits.clone().requires_grad_()
        out = route_topk(
            leaf, cu_seqlens=torch.tensor([0, 100, 300]), aux_counts="live", **ALL_OUTPUTS, **VARIANTS[name]
        )
        grads = [torch.ones_like(t) * 0.1 for t in floats(out)]
        results.append((*out, *torch.autograd.grad(floats(out), leaf, grads)))
    for first, second in zip(*results, strict=True):
        assert torch.equal(first, second)


def test_rows_do_not_depend_on_their_batch() -> None:
    """A token routed alone gets the ids and the bits of the weights it gets in a batch."""
    logits = torch.randn(37, 24)
    for name in ("pre", "sigmoid", "sqrtsoftplus", "groups"):
        batch = route_topk(logits, torch.linspace(-0.1, 0.1, 24), **VARIANTS[name])
        for token in (0, 5, 36):
            alone = route_topk(logits[token : token + 1], torch.linspace(-0.1, 0.1, 24), **VARIANTS[name])
            assert torch.equal(alone.ids[0], batch.ids[token])
            torch.testing.assert_close(alone.weights[0], batch.weights[token], rtol=1e-6, atol=0)


@settings(max_examples=250)
@given(
    st.integers(0, 6), st.integers(1, 12), st.data(),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]),
)  # fmt: skip
def test_any_shape_dtype_and_mask(num_tokens: int, num_experts: int, data: st.DataObject, dtype: torch.dtype) -> None:
    top_k = data.draw(st.integers(1, num_experts))
    seed = data.draw(st.integers(0, 2**31))
    generator = torch.Generator().manual_seed(seed)
    logits = (torch.randn(num_tokens, num_experts, generator=generator) * 2).to(dtype)
    valid = torch.rand(num_tokens, generator=generator) < 0.7
    cuts = sorted(data.draw(st.lists(st.integers(0, num_tokens), max_size=3)))
    rule = Rule(
        top_k=top_k,
        score_function=data.draw(st.sampled_from(["softmax", "sigmoid", "sqrtsoftplus"])),
        softmax_order=data.draw(st.sampled_from(["pre", "post"])),
        renormalize=data.draw(st.booleans()),
    )
    cu_seqlens = torch.tensor([0, *cuts, num_tokens])
    check_against_oracle(logits, rule, valid=valid, cu_seqlens=cu_seqlens, seed=seed)


IDS = torch.zeros(3, 2, dtype=torch.int64)
PER_GROUP = {"group_rule": "sum_topk_per_group"}
BAD: list[tuple[str, type[Exception], dict[str, Any]]] = [
    ("logits must be fp32", TypeError, {"logits": torch.zeros(3, 8, dtype=torch.int32)}),
    ("0-d", ValueError, {"logits": torch.zeros(())}),
    ("1 to", ValueError, {"logits": torch.zeros(3, 0)}),
    ("top_k must lie in 1..8", ValueError, {"top_k": 9}),
    ("top_k must lie in 1..8", ValueError, {"top_k": 0}),
    ("score_function must be one of", ValueError, {"score_function": "tanh"}),
    ("weights_mode must be one of", ValueError, {"weights_mode": "both"}),
    ("needs replay_weights", ValueError, {"weights_mode": "recorded", "replay_ids": IDS}),
    ("expert_bias must have dtype", TypeError, {"expert_bias": torch.zeros(8, dtype=torch.bfloat16)}),
    ("expert_bias must have shape", ValueError, {"expert_bias": torch.zeros(7)}),
    ("replay_ids must have shape", ValueError, {"replay_ids": torch.zeros(3, 3, dtype=torch.int64)}),
    ("replay_ids must have dtype", TypeError, {"replay_ids": torch.zeros(3, 2)}),
    ("valid must have dtype", TypeError, {"valid": torch.zeros(3)}),
    ("valid must have shape", ValueError, {"valid": torch.zeros(2, dtype=torch.bool)}),
    ("cu_seqlens must be int32", TypeError, {"cu_seqlens": torch.zeros(3)}),
    ("cu_seqlens must be \\[S", ValueError, {"cu_seqlens": torch.zeros(0, dtype=torch.int32)}),
    ("num_groups must divide", ValueError, {"num_groups": 3, "group_topk": 1}),
    ("group_topk must lie", ValueError, {"num_groups": 4, "group_topk": 5}),
    ("top_k 3 exceeds", ValueError, {"num_groups": 4, "group_topk": 1, "top_k": 3}),
    ("divisible by group_topk", ValueError, {"num_groups": 4, "group_topk": 2, "top_k": 3} | PER_GROUP),
    ("at least 2 experts", ValueError, {"num_groups": 8, "group_topk": 4}),
    ("on meta", ValueError, {"valid": torch.zeros(3, dtype=torch.bool, device="meta")}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "kind", "change"), BAD, ids=[f"{i}-{b[0][:24]}" for i, b in enumerate(BAD)])
def test_bad_arguments(message: str, kind: type[Exception], change: dict[str, Any]) -> None:
    arguments = {"logits": torch.zeros(3, 8), "top_k": 2} | change
    with pytest.raises(kind, match=message):
        route_topk(arguments.pop("logits"), **arguments)


def test_one_compiled_graph_serves_every_token_count() -> None:
    def step(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        out = route_topk(logits, top_k=3, score_function="sigmoid", aux_counts="live")
        return out.weights, out.score_sum

    graphs = []

    def count(graph: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=count)
    for num_tokens in (5, 9, 33):
        logits = torch.randn(num_tokens, 8)
        for ours, eager in zip(compiled(logits), step(logits), strict=True):
            assert torch.equal(ours, eager)
    assert len(graphs) == 1


def test_modes_of_torch_change_nothing() -> None:
    """inference_mode, autocast and deterministic algorithms: same bits, fp32 weights."""
    logits = torch.randn(40, 8).bfloat16()
    expected = route_topk(logits, top_k=3, want_probs=True, want_z=True)
    with torch.inference_mode():
        inference = route_topk(logits, top_k=3, want_probs=True, want_z=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        autocast = route_topk(logits, top_k=3, want_probs=True, want_z=True)
    torch.use_deterministic_algorithms(True)
    try:
        leaf = logits.clone().requires_grad_()
        deterministic = route_topk(leaf, top_k=3, want_probs=True, want_z=True)
        deterministic.weights.sum().backward()
    finally:
        torch.use_deterministic_algorithms(False)
    for other in (inference, autocast, deterministic):
        for ours, theirs in zip(other, expected, strict=True):
            assert ours.dtype == theirs.dtype and torch.equal(ours, theirs)


def test_backward_needs_only_logits_and_the_chosen_ids() -> None:
    """Saved: the logits and [T, K] ids; nothing of size [T, E] besides, and no copy of the logits."""
    logits = torch.randn(64, 32, requires_grad=True)
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        route_topk(logits, top_k=4, want_z=True, aux_counts="live")
    dense = [t for t in saved if t.numel() == logits.numel()]
    assert all(t.data_ptr() == logits.data_ptr() for t in dense)
    assert {tuple(t.shape) for t in saved} <= {(64, 32), (64, 4)}


def test_a_second_derivative_is_an_error_not_a_zero() -> None:
    logits = torch.randn(4, 8, requires_grad=True)
    weights = route_topk(logits, top_k=3).weights
    with pytest.raises(RuntimeError, match="no second derivatives"):  # the other path has one: it would be all of it
        torch.autograd.grad(weights.square().sum() + (logits**3).sum(), logits, create_graph=True)
