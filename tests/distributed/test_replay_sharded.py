"""Replay and recording under expert, data, context and sequence parallelism: each against the unsharded run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from moe_layer import MoELayer, RoutingSession, RoutingTrace
from moe_layer.compat.mojo_opset import MojoMoE
from moe_layer.config import ExpertsConfig, MoEConfig, ReplayConfig, RouterConfig
from moe_layer.parallel.context import ParallelContext
from moe_layer.replay import index_map
from tests.distributed.cases import config_for, even_cuts
from tests.distributed.ranks import ThreadRanks
from tests.unit.replay_models import Model, make_model, make_trace, random_ids

D, F, E, K, T = 32, 24, 8, 2, 24
BACKENDS = ("all_to_all", "all_gather", "replicated", "nvlink")


def config(backend: str = "auto", weight_format: str = "input") -> MoEConfig:
    return MoEConfig(
        hidden_size=D,
        router=RouterConfig(num_experts=E, top_k=K),
        experts=ExpertsConfig(intermediate_size=F, init_std=0.2, weight_format=weight_format),  # type: ignore[arg-type]
        dispatch=config_for(backend),
    )


def sharded_layer(whole: MoELayer, settings: MoEConfig, context: ParallelContext) -> MoELayer:
    """This rank's experts of `whole`."""
    layer = MoELayer(settings)
    layer.load_state_dict(whole.state_dict())
    share = E // context.ep_size
    mine = slice(context.ep_rank * share, (context.ep_rank + 1) * share)
    for name in ("gate_up_proj", "down_proj"):
        setattr(layer.experts, name, nn.Parameter(getattr(whole.experts, name).detach()[mine].clone()))
    layer.bind(context)
    return layer


def forced(seed: int = 0) -> Tensor:
    ids = random_ids(T, 1, seed=seed)[:, 0]
    ids[3, 1] = -1
    ids[5] = -1
    return ids


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("weight_format", ["input", "int8", "fp8_1x128"])
def test_forced_ids_and_recording_under_ep(ranks: ThreadRanks, backend: str, size: int, weight_format: str) -> None:
    """Output to the bit, the recorded shards merged, and (trained formats) the gradients of experts and router."""
    torch.manual_seed(0)
    whole = MoELayer(config(weight_format=weight_format))
    x, trains = torch.randn(T, D), weight_format == "input"
    with RoutingSession(whole) as session, session.record() as recording:
        y = MojoMoE(whole)(x, forced())
    if trains:
        y.square().sum().backward()
    cuts = [0, *even_cuts(T, size)[1:]]

    def one(context: ParallelContext) -> tuple[Tensor, RoutingTrace, Any]:
        layer = sharded_layer(whole, config(backend, weight_format), context)
        mine = slice(0, T) if backend == "replicated" else slice(cuts[context.ep_rank], cuts[context.ep_rank + 1])
        with RoutingSession(layer) as session, session.record() as recording:
            out = MojoMoE(layer)(x[mine], forced()[mine].to(torch.int16))
        if trains:
            out.square().sum().backward()
        index = torch.arange(T)[mine]
        grads = (layer.experts.gate_up_proj.grad, layer.router.weight.grad)
        return out.detach(), recording.trace(index, num_tokens=T), grads

    found = ranks.run(size, one)
    outputs = [out for out, _, _ in found]
    joined = outputs[0] if backend == "replicated" else torch.cat(outputs)
    assert torch.equal(joined, y.detach())
    trace = found[0][1]
    for _, other, _ in found[1:]:
        trace = trace.merged(other)
    assert torch.equal(trace.wide_ids(), recording.trace().wide_ids())
    if trains and backend != "replicated":
        assert whole.experts.gate_up_proj.grad is not None and whole.router.weight.grad is not None
        assert torch.equal(torch.cat([grads[0] for *_, grads in found]), whole.experts.gate_up_proj.grad)
        total = torch.stack([grads[1] for *_, grads in found]).sum(0)
        torch.testing.assert_close(total, whole.router.weight.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_forced_gate_weights_under_ep(ranks: ThreadRanks, backend: str, size: int, dtype: torch.dtype) -> None:
    """Half precision: weights stay fp32 and are those of one rank to the bit; outputs within the wire's rounding."""
    torch.manual_seed(0)
    whole = MoELayer(config()).to(dtype)
    x = torch.randn(T, D).to(dtype)
    y, routing = whole(x, replay=forced(), return_routing=True)
    cuts = [0, *even_cuts(T, size)[1:]]

    def one(context: ParallelContext) -> tuple[Tensor, Tensor]:
        layer = sharded_layer(whole, config(backend), context).to(dtype)
        mine = slice(0, T) if backend == "replicated" else slice(cuts[context.ep_rank], cuts[context.ep_rank + 1])
        ids = forced()[mine].to(torch.int8)
        out, mine_routed = layer(x[mine], replay=ids, return_routing=True)
        assert torch.equal(MojoMoE(layer)(x[mine], ids), out)
        return out.detach(), mine_routed.weights_TK

    found = ranks.run(size, one)
    outputs, weights = ([pair[i] for pair in found] for i in range(2))
    joined = outputs[0] if backend == "replicated" else torch.cat(outputs)
    assert weights[0].dtype == torch.float32 and joined.dtype == dtype
    assert torch.equal(weights[0] if backend == "replicated" else torch.cat(weights), routing.weights_TK)
    tolerance = 4 * torch.finfo(dtype).eps * float(y.detach().abs().max())
    torch.testing.assert_close(joined, y.detach(), rtol=0, atol=tolerance)


# ---- maps: token-wise models, so that a shard is exactly its tokens -------------------------------------------------

LENGTHS = [7, 3, 10]
N = sum(LENGTHS)


def inputs() -> Tensor:
    return torch.randn(N, 16, generator=torch.Generator().manual_seed(3))


def unsharded(model: Model, trace: RoutingTrace) -> Tensor:
    with RoutingSession(model) as session, session.replay(trace):
        return model(inputs())


def maps(kind: str) -> list[Tensor]:
    """The micro-batches of every rank."""
    if kind == "zigzag":
        return [index_map.cp_zigzag_index(LENGTHS, size=2, rank=rank) for rank in range(2)]
    if kind == "contiguous":
        return [index_map.cp_contiguous_index(LENGTHS, size=4, rank=rank) for rank in range(4)]
    if kind == "zigzag and sequence parallel":
        return [index_map.sp_index(index, size=2, rank=rank) for index in maps("zigzag") for rank in range(2)]
    if kind == "packed":
        return [index_map.packed_index(LENGTHS, align=8, total=40)]
    if kind == "left padding":
        return [index_map.left_pad_index(LENGTHS)]
    return [torch.arange(0, 12), torch.arange(12, N)]  # data parallel


KINDS = ("zigzag", "contiguous", "zigzag and sequence parallel", "packed", "left padding", "data parallel")


@pytest.mark.parametrize("kind", KINDS)
def test_shards_of_a_batch(kind: str) -> None:
    """One trace, one map per shard: every token's output as without sharding, and what is recorded comes back whole."""
    model, x = make_model(aux=False), inputs()
    trace = make_trace(N, seed=5, cu_seqlens=[0, 7, 10, 20])
    expected = unsharded(model, trace)
    got, recorded = torch.full_like(expected, torch.nan), None
    session = RoutingSession(model)
    for index in maps(kind):
        present = index >= 0
        batch = torch.where(present.unsqueeze(-1), x[index.clamp(min=0)], 0.0)
        plan = trace.plan(index, layers=session.layers, allow_missing=False)
        with session.replay(plan), session.record() as recording:
            y = model(batch)
        got[index[present]] = y[present]
        part = recording.trace(index.flatten(), num_tokens=N, cu_seqlens=[0, 7, 10, 20])
        recorded = part if recorded is None else recorded.merged(part)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)
    assert recorded is not None and torch.equal(recorded.wide_ids(), trace.wide_ids())


def test_partial_rollout_and_turns_equal_the_whole() -> None:
    """Rows of two policies, spliced: replay equals the replay of each row's own decision."""
    model = make_model(aux=False)
    first, later = make_trace(N, seed=1, token_ids=None), make_trace(N, seed=2, token_ids=None)
    spliced = first.rows(0, 8).splice(later)
    y = unsharded(model, spliced)
    torch.testing.assert_close(y[:8], unsharded(model, first)[:8])  # other rows share the experts' GEMMs
    torch.testing.assert_close(y[8:], unsharded(model, later)[8:])
    assert (y[8:] - unsharded(model, first)[8:]).abs().max() > 0.01


@pytest.mark.parametrize("bias_counts", ["effective", "live", "off"])
def test_bias_updates_of_shards(bias_counts: str) -> None:
    """Counters of data-parallel shards add up to the unsharded ones; `live` counts what routing would have chosen."""
    policy = ReplayConfig(bias_counts=bias_counts)  # type: ignore[arg-type]
    settings = {"score_function": "sigmoid", "expert_bias": True, "replay": policy, "aux": False}
    trace = make_trace(N, seed=5)
    counters = []
    for parts in ([torch.arange(N)], maps("data parallel")):
        model = make_model(**settings)
        session = RoutingSession(model)
        for index in parts:
            with session.replay(trace.plan(index, layers=session.layers)):
                model(inputs()[index]).sum().backward()
        counters.append([block.moe.router.tokens_per_expert for block in model.blocks])
        for block in model.blocks:
            block.moe.update_bias()
        assert bool((model.blocks[0].moe.router.expert_bias != 0).any()) == (bias_counts != "off")
    assert all(torch.equal(a, b) for a, b in zip(*counters, strict=True))
    forced_E = torch.bincount(trace.wide_ids()[:, 0].flatten(), minlength=E)
    model = make_model(**(settings | {"replay": ReplayConfig()}))
    model(inputs()).sum().backward()
    live_E = model.blocks[0].moe.router.tokens_per_expert
    want = {"effective": forced_E, "live": live_E, "off": torch.zeros(E)}[bias_counts]
    assert torch.equal(counters[0][0].long(), want.long())
