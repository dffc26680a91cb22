"""Several calls of the nvlink dispatcher under way at once, recompute, deep stacks, whole layers."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_layer import MoELayer
from moe_layer.config import DispatchConfig, ExpertsConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_layer.dispatch import Dispatcher, make_dispatcher
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import Result, apply_experts, assert_same_bits, config_for, make_case, run_case
from tests.distributed.ranks import ThreadRanks
from tests.distributed.test_schedule import Share

# ---- recompute ------------------------------------------------------------------------------------------------------


def _interleaved(d: Dispatcher, shares: list[Share], *leaves: Tensor) -> tuple[Tensor, Tensor]:
    """Two micro-batches: both sends, other work, the recvs in the other order; combines likewise."""
    x0, w0, x1, w1 = leaves
    routings = [
        Routing(ids_TK=s.ids, weights_TK=w, counts_E=torch.zeros(0)) for s, w in zip(shares, (w0, w1), strict=True)
    ]
    sent = [d.dispatch_send(x, r) for x, r in zip((x0, x1), routings, strict=True)]
    between = torch.tanh(x0) + 1  # saves a tensor between the halves
    received = {i: d.dispatch_recv(*sent[i]) for i in (1, 0)}
    back = {i: d.combine_send(apply_experts(received[i], shares[i].experts), received[i]) for i in (0, 1)}
    beside = between * torch.sigmoid(x0)
    y1 = d.combine_recv(*back[1])
    return d.combine_recv(*back[0], add=beside), y1


@pytest.mark.parametrize(("rows", "push"), [("expert_major", "slots"), ("compact", "slots"), ("expert_major", "dense")])
@pytest.mark.parametrize("kind", ["none", "reentrant", "early stop", "to the end"])
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_pairs_of_calls_are_recomputed(
    ranks: ThreadRanks, rows: str, push: str, kind: str, order: tuple[int, int]
) -> None:
    """F0 F1 B0 B1 and F0 F1 B1 B0, each of them two calls whose halves interleave, under every kind of recompute."""
    cases = [[make_case(10 * i + j, T=18 + i, D=8, E=8, K=3) for j in range(2)] for i in range(2)]
    config = config_for("nvlink", rows=rows, deadline_s=10.0, push=push)

    def region(d: Dispatcher, shares: list[Share]) -> tuple[Tensor, Tensor]:
        leaves = (shares[0].x, shares[0].w, shares[1].x, shares[1].w)
        if kind == "none":
            return _interleaved(d, shares, *leaves)
        options: dict[str, Any] = {"use_reentrant": kind == "reentrant", "preserve_rng_state": False}
        if kind == "to the end":
            options["early_stop"] = False
        return checkpoint(lambda *args: _interleaved(d, shares, *args), *leaves, **options)  # type: ignore[return-value]

    def one(context: ParallelContext) -> list[tuple[Result, Result]]:
        found: list[list[Result]] = []
        for backend in ("nvlink", "all_to_all"):
            settings = config if backend == "nvlink" else DispatchConfig(backend="all_to_all", rows=rows)
            d = make_dispatcher(settings, num_experts=8, top_k=3, context=context)
            batches = [[Share(case, context, replicated=False) for case in pair] for pair in cases]
            ys = [region(d, shares) for shares in batches]
            for i in order:
                torch.autograd.backward(ys[i], [s.dy for s in batches[i]])
            found.append(
                [s.result(y) for pair, out in zip(batches, ys, strict=True) for s, y in zip(pair, out, strict=True)]
            )
        again = run_case(cases[0][0], config, context)  # nothing was left half done
        assert_same_bits(again, run_case(cases[0][0], DispatchConfig(rows=rows), context))
        return list(zip(*found, strict=True))  # type: ignore[arg-type]

    for pairs in ranks.run(2, one):
        for got, want in pairs:
            assert_same_bits(got, want)


# ---- many layers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("push", ["slots", "dense"])
@pytest.mark.parametrize("recompute", [False, True])
def test_48_layers_train_through_a_ring_of_two(ranks: ThreadRanks, recompute: bool, push: str) -> None:
    """All forwards, then all backwards: slots are free again as soon as they are received. The bits of all_to_all."""
    layers, case = 48, make_case(0, T=12, D=8, E=4, K=2)

    def train(context: ParallelContext, config: DispatchConfig) -> tuple[Tensor, Tensor]:
        rank = context.ep_rank
        mine = slice(6 * rank, 6 * rank + 6)
        weights = (
            torch.randn(layers, 2, 2, 8, 8, generator=torch.Generator().manual_seed(rank)).mul_(0.3).requires_grad_()
        )
        shape: dict[str, Any] = {"num_experts": 4, "top_k": 2, "context": context}
        stack = [make_dispatcher(config, **shape, layer_index=i) for i in range(layers)]
        routing = Routing(ids_TK=case.ids_TK[mine], weights_TK=case.w_TK[mine], counts_E=torch.zeros(0))

        def block(x: Tensor, d: Dispatcher, experts: Tensor) -> Tensor:
            received = d.dispatch(x, routing)
            return d.combine(apply_experts(received, experts), received, add=x)

        for step in range(1 if recompute else 2):
            context.step = step
            x = case.x_TD[mine].clone().requires_grad_()
            for i, d in enumerate(stack):
                if recompute:
                    x = checkpoint(block, x, d, weights[i], use_reentrant=False, preserve_rng_state=False)  # type: ignore[assignment]
                else:
                    x = block(x, d, weights[i])
            (gradient,) = torch.autograd.grad(x, weights, case.dy_TD[mine])
            with torch.no_grad():
                weights -= 0.01 * gradient
        return x.detach(), weights.detach()

    def one(context: ParallelContext) -> None:
        got = train(context, config_for("nvlink", max_tokens_per_rank=6, ring_depth=2, deadline_s=10.0, push=push))
        assert context.window.size.depth == 2
        want = train(context, DispatchConfig(backend="all_to_all"))
        assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True)) and torch.isfinite(got[0]).all()

    for error in ranks.run(2, one, fresh=True):
        assert error is None, error


# ---- whole layers ---------------------------------------------------------------------------------------------------


def _layer(context: ParallelContext | None, **dispatch: Any) -> MoELayer:
    """The rank's experts of one seeded layer."""
    config = MoEConfig(
        hidden_size=16,
        router=RouterConfig(num_experts=8, top_k=2),
        experts=ExpertsConfig(intermediate_size=12, init_std=0.3),
        shared_expert=SharedExpertConfig(intermediate_size=12, gate=True),
        dispatch=DispatchConfig(**dispatch),
    )
    layer = MoELayer(config)
    generator = torch.Generator().manual_seed(1)  # its own: ranks are threads here
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    if context is not None:
        share = 8 // context.ep_size
        for name in ("gate_up_proj", "down_proj"):
            whole = getattr(layer.experts, name).detach()
            mine = whole[context.ep_rank * share : (context.ep_rank + 1) * share].clone()
            setattr(layer.experts, name, nn.Parameter(mine))
        layer.bind(context)
    return layer


def _step(layer: MoELayer, rank: int) -> dict[str, Tensor]:
    x, dy = torch.randn(2, 7 + rank, 16, generator=torch.Generator().manual_seed(rank))
    x.requires_grad_()
    y = layer(x)
    y.backward(dy)
    found = {name: p.grad for name, p in layer.named_parameters()} | {"y": y.detach(), "dx": x.grad}
    assert all(t is not None for t in found.values())
    return found  # type: ignore[return-value]


LAYERS: dict[str, dict[str, Any]] = {
    "expert_major": {},
    "compact": {"rows": "compact"},
    "aligned": {"alignment": 8},
    "static": {"capacity": "static", "static_factor": 2.0},
    "static, aligned": {"capacity": "static", "static_factor": 3.0, "alignment": 8},
    "static, compact": {"capacity": "static", "static_factor": 2.0, "rows": "compact"},
    "combine": {"apply_probs": "combine"},
    "fp8 rows": {"dispatch_format": "fp8_1x128"},
    "dense": {"push": "dense"},
    "dense, static, compact": {"push": "dense", "capacity": "static", "static_factor": 2.0, "rows": "compact"},
}


@pytest.fixture(params=LAYERS)
def keys(request: pytest.FixtureRequest) -> dict[str, Any]:
    return LAYERS[request.param]


def test_a_layer_gives_the_bits_of_all_to_all(ranks: ThreadRanks, keys: dict[str, Any]) -> None:
    """Output, dx and every parameter's gradient. New memory is full of NaN: rows that nobody owns are never read."""

    def one(context: ParallelContext) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        keys_of_all = {"max_tokens_per_rank": 16} if keys.get("capacity") == "static" else {}
        plain = {name: value for name, value in keys.items() if name != "push"}
        want = _step(_layer(context, backend="all_to_all", **plain, **keys_of_all), context.ep_rank)
        return _step(
            _layer(context, **({"backend": "nvlink", "max_tokens_per_rank": 16} | keys)), context.ep_rank
        ), want

    torch.use_deterministic_algorithms(True)
    try:
        pairs = ranks.run(2, one)
    finally:
        torch.use_deterministic_algorithms(False)
    for got, want in pairs:
        for name, value in want.items():
            assert torch.equal(got[name], value), name


def test_copies_leave_the_window_behind(ranks: ThreadRanks) -> None:
    """deepcopy and pickle of a layer that has one: parameters only, on one rank; the layer itself goes on."""

    def one(context: ParallelContext) -> None:
        layer = _layer(context, backend="nvlink", max_tokens_per_rank=16)
        first = _step(layer, context.ep_rank)
        for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
            assert type(other.dispatcher).__name__ == "LocalDispatcher" and other.router.context is None
            for (name, a), (_, b) in zip(layer.state_dict().items(), other.state_dict().items(), strict=True):
                assert torch.equal(a, b) and a.data_ptr() != b.data_ptr(), name
        assert copy.deepcopy(layer.dispatcher) is None and pickle.loads(pickle.dumps(context)) is None
        layer.zero_grad()
        again = _step(layer, context.ep_rank)
        assert all(torch.equal(again[name], value) for name, value in first.items())

    ranks.run(2, one)


def test_one_rank_needs_no_window() -> None:
    """The same key at R = 1: the local dispatcher, its bits, no exchange."""
    layer = _layer(None, backend="nvlink", max_tokens_per_rank=16)
    assert type(layer.dispatcher).__name__ == "LocalDispatcher"
    want = _step(_layer(None), 0)
    got = _step(layer, 0)
    assert all(torch.equal(got[name], value) for name, value in want.items())
