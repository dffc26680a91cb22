"""RoutingSession: bit-exact replay, recompute in any order, guards, counts, metrics."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from moe_layer import RoutingDecision, RoutingError, RoutingSession, RoutingTrace, TraceError
from moe_layer.config import ReplayConfig
from tests.unit.replay_models import LAYERS, D, E, K, Model, T, assert_same, grads, make_model, make_trace, random_ids

ROUTERS: dict[str, dict[str, Any]] = {
    "softmax post": {},
    "softmax pre": {"softmax_order": "pre", "renormalize": False},
    "sigmoid bias": {"score_function": "sigmoid", "expert_bias": True},
    "groups": {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus", "scaling_factor": 2.0},
}


def batch(seed: int = 0) -> Tensor:
    return torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(seed + 100))


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum()


def record(model: Model, x: Tensor, **options: Any) -> RoutingTrace:
    session = RoutingSession(model)
    with torch.no_grad(), session.record(**options) as recording:
        model(x)
    session.close()
    return recording.trace()


def explicit(model: Model, x: Tensor, trace: RoutingTrace) -> Tensor:
    """Forward with the trace's ids passed as arguments: no session involved."""
    for layer, block in enumerate(model.blocks):
        x = x + block.moe(block.norm(x), replay=RoutingDecision(trace.wide_ids()[:, layer]))
    return x


# ---- bits -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("router", ROUTERS)
def test_replay_of_a_recorded_run_is_the_run(router: str) -> None:
    """Ids, output and every gradient, bit for bit; also after a trip through a file's dtype."""
    model = make_model(**ROUTERS[router])
    x = batch()
    trace = record(model, x)
    loss_of(model(x)).backward()
    live, y = grads(model), model(x)
    session = RoutingSession(model)
    with session.record() as again, session.replay(trace):
        replayed = model(x)
    assert torch.equal(again.trace().ids, trace.ids)
    loss_of(replayed).backward()
    assert torch.equal(y, replayed)
    assert_same(grads(model), live)
    with session.replay(trace), session.record() as again:
        model(x)
    assert torch.equal(again.trace().ids, trace.ids)


@pytest.mark.parametrize("router", ROUTERS)
def test_forced_routing_reaches_the_router_gradient(router: str) -> None:
    """Other ids than live ones: as with explicit arguments, and the router still learns."""
    model = make_model(aux=False, **ROUTERS[router])
    trace, x = make_trace(seed=3), batch()
    loss_of(explicit(model, x, trace)).backward()
    expected = grads(model)
    with RoutingSession(model) as session, session.replay(trace):
        loss_of(model(x)).backward()
    found = grads(model)
    assert_same(found, expected)
    assert all(found[f"{layer}.router.weight"].abs().sum() > 0 for layer in LAYERS)
    loss_of(model(x)).backward()
    assert not torch.equal(grads(model)["blocks.0.moe.router.weight"], found["blocks.0.moe.router.weight"])


@pytest.mark.parametrize("weights", ["recorded", "straight_through"])
def test_recorded_weights(weights: Any) -> None:
    """The forward uses the recorded weights; the router learns under straight_through only."""
    model = make_model(aux=False, replay=ReplayConfig(weights=weights))
    x = batch()
    trace = record(model, x, weights=True)
    y = model(x)
    with torch.no_grad():
        for block in model.blocks:
            block.moe.router.weight.add_(0.5 * torch.randn_like(block.moe.router.weight))
    with RoutingSession(model) as session, session.replay(trace):
        replayed = model(x)
    torch.testing.assert_close(replayed, y, rtol=0, atol=1e-6)
    loss_of(replayed).backward()
    router = model.blocks[0].moe.router.weight.grad
    assert router is not None
    assert bool(router.abs().sum() > 0) == (weights == "straight_through")


def test_weights_are_needed_where_the_policy_uses_them() -> None:
    model = make_model(replay=ReplayConfig(weights="recorded"))
    session = RoutingSession(model)
    with pytest.raises(RoutingError, match="needs recorded weights"), session.replay(make_trace(weights=None)):
        model(batch())


# ---- recompute ------------------------------------------------------------------------------------------------------

Runner = Callable[[Any, Tensor], Tensor]


def runners(session: RoutingSession) -> dict[str, Runner]:
    """Ways to checkpoint a block under an open replay."""

    def selective() -> Any:
        def policy(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
            return CheckpointPolicy.MUST_SAVE if "route_topk" in str(op) else CheckpointPolicy.PREFER_RECOMPUTE

        return create_selective_checkpoint_contexts(policy)

    def nested(block: Any, x: Tensor) -> Tensor:
        def inner(x: Tensor) -> Tensor:
            return checkpoint(session.bind(block), x, use_reentrant=True)

        return checkpoint(session.bind(inner), x, use_reentrant=True)

    return {
        "context_fn": lambda b, x: checkpoint(b, x, use_reentrant=False, context_fn=session.context_fn),
        "bind, non-reentrant": lambda b, x: checkpoint(session.bind(b), x, use_reentrant=False),
        "bind, reentrant": lambda b, x: checkpoint(session.bind(b), x, use_reentrant=True),
        "bind, nested reentrant": nested,
        "selective": lambda b, x: checkpoint(b, x, use_reentrant=False, context_fn=session.composed(selective)),
    }


ORDERS = {"F0 B0 F1 B1": "f0b0f1b1", "F0 F1 B0 B1": "f0f1b0b1", "F0 F1 B1 B0": "f0f1b1b0", "one loss": "f0f1s"}


def schedule(order: str, forward: Callable[[int], Tensor]) -> None:
    losses: dict[int, Tensor] = {}
    for step, which in zip(order[::2], order[1::2] + " ", strict=False):
        if step == "f":
            losses[int(which)] = forward(int(which))
        elif step == "b":
            losses.pop(int(which)).backward()
        else:
            torch.stack(list(losses.values())).sum().backward()


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    "kind", ["context_fn", "bind, non-reentrant", "bind, reentrant", "bind, nested reentrant", "selective"]
)
def test_recompute_in_any_order(kind: str, order: str) -> None:
    """Gradient error exactly 0 against the same without checkpointing, and the counters count once."""
    model = make_model()
    traces = [make_trace(seed=seed) for seed in (3, 4)]
    session = RoutingSession(model)

    def forward(index: int, run: Runner | None) -> Tensor:
        x = batch(index).requires_grad_()
        with session.replay(traces[index]):
            return loss_of(model(x, run))

    def counters() -> list[list[int]]:
        return [block.moe.router.tokens_per_expert.tolist() for block in model.blocks]

    schedule(ORDERS[order], lambda i: forward(i, None))
    expected, counted, metrics = grads(model), counters(), session.metrics()
    schedule(ORDERS[order], lambda i: forward(i, runners(session)[kind]))
    assert_same(grads(model), expected)
    assert counters() == [[2 * n for n in row] for row in counted]
    assert session.metrics() == metrics, "a recompute is not a second replay"


def test_recompute_twice() -> None:
    model = make_model()
    session = RoutingSession(model)
    with session.replay(make_trace(seed=3)):
        loss = loss_of(model(batch(), runners(session)["context_fn"]))
    loss.backward(retain_graph=True)
    first = grads(model)
    loss.backward()
    assert_same(grads(model), first)


def test_live_micro_batches_between_replayed_ones() -> None:
    model = make_model()
    session = RoutingSession(model)
    run = runners(session)["context_fn"]

    def step(run: Runner | None) -> dict[str, Tensor]:
        with session.replay(make_trace(seed=3)):
            a = loss_of(model(batch(0), run))
        b = loss_of(model(batch(1), run))
        with session.replay(make_trace(seed=4)):
            c = loss_of(model(batch(2), run))
            with session.live():
                d = loss_of(model(batch(3), run))
        for loss in (b, d, c, a):
            loss.backward()
        return grads(model)

    assert_same(step(run), step(None))


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("inside", [False, True])
def test_unbound_recompute_raises(reentrant: bool, inside: bool) -> None:
    """The silent way to wrong gradients in other systems; `inside`: backward before the block is closed."""
    model = make_model()
    session = RoutingSession(model)

    def run(block: Any, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=reentrant)

    x = batch().requires_grad_()
    with pytest.raises(RoutingError, match=r"'blocks.1.moe' recomputes without replay binding.*session.context_fn"):
        if inside:
            with session.replay(make_trace(seed=3)):
                loss_of(model(x, run)).backward()
        else:
            with session.replay(make_trace(seed=3)):
                loss = loss_of(model(x, run))
            loss.backward()


def test_guard_lets_others_pass() -> None:
    """Live training with checkpointing, before and after a replay without it, raises nothing."""
    model = make_model()
    session = RoutingSession(model)

    def run(block: Any, x: Tensor) -> Tensor:
        return checkpoint(block, x, use_reentrant=False)

    loss_of(model(batch(), run)).backward()
    with session.replay(make_trace(seed=3)):
        loss_of(model(batch())).backward()
    gc.collect()
    loss_of(model(batch(), run)).backward()
    with session.record():
        loss_of(model(batch(), run)).backward()


def test_bound_function_serves_one_forward() -> None:
    model = make_model()
    session = RoutingSession(model)
    bound = session.bind(model.blocks[0])
    bound(batch())
    with pytest.raises(RoutingError, match=r"session\.bind for each forward"):
        bound(batch())


# ---- counts and names -----------------------------------------------------------------------------------------------


def _replay(model: Model, trace: Any, x: Tensor | None = None) -> None:
    with RoutingSession(model) as session, session.replay(trace):
        model(batch() if x is None else x)


def _plan(**settings: Any) -> Any:
    return make_trace(**settings).plan(layers=LAYERS)


def _other(experts: int, top_k: int) -> RoutingTrace:
    ids = random_ids(experts=experts, top_k=top_k)
    return RoutingTrace.from_ids(ids, num_experts=experts, layers=LAYERS)


MISFITS: dict[str, tuple[Callable[[Model], None], type[Exception], str]] = {
    "fewer rows": (
        lambda m: _replay(m, make_trace(T - 1)),
        TraceError,
        f"runs {T} tokens but its plan of {T - 1} rows",
    ),
    "more rows": (lambda m: _replay(m, make_trace(T + 1)), TraceError, f"ended after {T} of the plan's {T + 1} rows"),
    "nothing runs": (lambda m: _replay(m, make_trace(), batch()[:0]), TraceError, "ended after 0 of"),
    "K": (lambda m: _replay(m, _other(E, 3)), TraceError, "top_k 3, the model has 8 and 2"),
    "E": (lambda m: _replay(m, _other(16, 2)), TraceError, "num_experts 16 and top_k 2, the model has 8"),
    "layers": (
        lambda m: _replay(m, RoutingTrace.from_ids(random_ids(), num_experts=E, layers=["a", "b"])),
        TraceError,
        "no layers",
    ),
    "layers of a plan": (
        lambda m: _replay(m, make_trace().plan(layers=LAYERS[:1])),
        TraceError,
        r"missing \['blocks.1.moe'\]",
    ),
    "order of layers": (lambda m: _replay(m, make_trace().plan(layers=LAYERS[::-1])), TraceError, "or their order"),
    "device": (
        lambda m: _replay(m, make_trace().plan().to("meta")),
        TraceError,
        "the plan is on meta and the model on cpu",
    ),
    "no plan": (lambda m: _replay(m, random_ids()), TraceError, "got Tensor"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_misfits_raise(case: str) -> None:
    act, kind, text = MISFITS[case]
    with pytest.raises(kind, match=text):
        act(make_model())


def test_an_error_in_the_block_is_the_one_to_see() -> None:
    with RoutingSession(make_model()) as session, pytest.raises(ZeroDivisionError), session.replay(make_trace()):
        raise ZeroDivisionError


def test_one_plan_at_a_time() -> None:
    with (
        RoutingSession(make_model()) as session,
        pytest.raises(RoutingError, match="replay is open already"),
        session.replay(make_trace()),
        session.replay(make_trace()),
    ):
        pass


def test_explicit_argument_inside_a_replay_is_a_conflict() -> None:
    model = make_model()
    with (
        RoutingSession(model) as session,
        pytest.raises(RoutingError, match="use one of them"),
        session.replay(make_trace()),
    ):
        model.blocks[0].moe(batch(), replay=random_ids()[:, 0])


def test_recording_refuses_layers_that_ran_differently() -> None:
    model = make_model()
    with (
        RoutingSession(model) as session,
        pytest.raises(TraceError, match="run the whole model inside record"),
        session.record(),
    ):
        model.blocks[0](batch())


def test_excluded_layers_stay_live() -> None:
    model = make_model()
    session = RoutingSession(model, exclude=["blocks.0.*"])
    assert session.layers == LAYERS[1:]
    trace = make_trace(seed=3)
    with session.replay(trace.plan(layers=session.layers)):
        y = model(batch())
    x = model.blocks[0](batch())
    block = model.blocks[1]
    assert torch.equal(y, x + block.moe(block.norm(x), replay=trace.wide_ids()[:, 1]))
    session.close()
    with pytest.raises(RoutingError, match="2 MoE layers of ours and 0 after exclude"):
        RoutingSession(model, exclude=["blocks.*"])


def test_a_model_that_is_one_layer_and_wrapped_names() -> None:
    layer = make_model().blocks[0].moe
    with RoutingSession(layer) as session:
        assert session.layers == (".",)
        with session.record() as recording:
            layer(torch.randn(3, D))
        assert recording.trace().num_tokens == 3
    wrapped = torch.nn.Sequential()
    wrapped.add_module("module", make_model())
    with RoutingSession(wrapped) as session:
        assert session.layers == LAYERS


def test_copies_carry_no_session() -> None:
    model = make_model()
    session = RoutingSession(model)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert all(block.moe.router.routing_tap is None for block in twin.blocks)
        with session.replay(make_trace()):
            assert torch.equal(twin(batch()), make_model()(batch()))
            model(batch())


def test_one_session_at_a_time() -> None:
    model = make_model()
    session = RoutingSession(model)
    with pytest.raises(RoutingError, match="another session is attached"):
        RoutingSession(model)
    session.close()
    RoutingSession(model)  # dropped at once: it must not block the next one
    gc.collect()
    RoutingSession(model).close()


def test_two_models_do_not_see_each_other() -> None:
    a, b = make_model(), make_model()
    with RoutingSession(a) as session, RoutingSession(b) as other, session.replay(make_trace(seed=3)):
        with other.record() as recording:
            y = b(batch())
        a(batch())
    assert torch.equal(y, make_model()(batch()))
    assert torch.equal(recording.trace().ids, record(make_model(), batch()).ids)


# ---- padding, chunks, static recording ------------------------------------------------------------------------------


def test_padding_is_recorded_as_missing() -> None:
    layer = make_model().blocks[0].moe
    valid = torch.tensor([True, False, True, True])
    x = torch.randn(4, D)
    with RoutingSession(layer) as session:
        with session.record() as recording:
            layer(x, valid=valid)
        trace = recording.trace()
        assert (trace.wide_ids()[:, 0] >= 0).all(1).tolist() == valid.tolist()
        packed = recording.trace(torch.tensor([0, -1, 1, 2]), cu_seqlens=[0, 1, 3])
        assert packed.num_tokens == 3 and torch.equal(packed.ids, trace.ids[valid])
        with session.replay(trace):
            y = layer(x, valid=valid)
        assert torch.equal(y, layer(x, valid=valid))


def test_recording_and_replaying_in_chunks() -> None:
    """Prefill and decode steps: several calls of each layer in one block, one plan for all."""
    model = make_model()
    x = batch().flatten(0, 1)
    session = RoutingSession(model)
    with session.record() as recording:
        parts = [model(x[:7]), model(x[7:8]), model(x[8:])]
    trace = recording.trace()
    assert torch.equal(trace.ids, record(make_model(), x).ids)
    with session.replay(trace):
        again = [model(x[:7]), model(x[7:8]), model(x[8:])]
    assert torch.equal(torch.cat(parts), torch.cat(again))


def test_static_recording_takes_each_launch_home() -> None:
    model = make_model()
    session = RoutingSession(model)
    with session.record(max_tokens=T + 4) as recording:
        model(batch())
        recording.commit(T)
        model(batch(1))
        recording.commit(T)
    trace = recording.trace()
    expected = RoutingTrace.concat([record(make_model(), batch(i)) for i in (0, 1)])
    assert torch.equal(trace.ids, expected.ids)
    with pytest.raises(TraceError, match="raise max_tokens"), session.record(max_tokens=3):
        model(batch())
    with pytest.raises(RoutingError, match="keeps no weights"), session.record(max_tokens=3, weights=True):
        pass


def test_partial_traces_are_filled_live() -> None:
    """Missing rows and slots: on_missing decides; the fill never repeats an expert."""
    ids = random_ids(seed=6)
    ids[:3] = -1
    ids[5, :, 1] = -1
    trace = RoutingTrace.from_ids(ids, num_experts=E, layers=LAYERS)
    model = make_model()
    session = RoutingSession(model)
    with session.replay(trace), session.record() as recording:
        y = model(batch())
    assert torch.equal(y, explicit(model, batch(), trace))
    used = recording.trace().wide_ids()
    assert bool((used.sort(-1).values.diff(dim=-1) > 0).all())
    assert torch.equal(torch.where(ids >= 0, used, -1), ids.int())
    strict = make_model(replay=ReplayConfig(on_missing="raise"))
    with pytest.raises(RoutingError, match="replay slots are -1"):
        _replay(strict, trace)


# ---- metrics --------------------------------------------------------------------------------------------------------


def test_metrics_against_loops() -> None:
    model = make_model()
    live = record(model, batch())
    other = make_trace(seed=8)
    session = RoutingSession(model)
    with session.compare(other):
        y = model(batch())
    assert torch.equal(y, model(batch())), "compare changes nothing"
    m = session.metrics()
    a, b = live.wide_ids().tolist(), other.wide_ids().tolist()
    pairs = [(set(a[t][i]), set(b[t][i])) for t in range(T) for i in range(2)]
    assert m.rows_compared == len(pairs)
    assert m.mismatch == pytest.approx(sum(p != q for p, q in pairs) / len(pairs))
    assert m.overlap == pytest.approx(sum(len(p & q) for p, q in pairs) / len(pairs) / K)
    assert m.zero_overlap == pytest.approx(sum(not p & q for p, q in pairs) / len(pairs))
    assert m.token_mismatch == pytest.approx(
        sum(any(set(a[t][i]) != set(b[t][i]) for i in range(2)) for t in range(T)) / T
    )
    assert m.mismatch_by_layer[LAYERS[0]] == pytest.approx(sum(p != q for p, q in pairs[::2]) / T)
    assert m.margin > 0 and m.margin_mismatched > 0 and m.rows_replayed == 0
    assert session.metrics().rows_compared == 0, "reading starts a new interval"


def test_replay_counts_and_measures() -> None:
    ids = random_ids(seed=6)
    ids[0, :, 1] = -1
    ids[1] = -1
    trace = RoutingTrace.from_ids(ids, num_experts=E, layers=LAYERS)
    model = make_model()
    session = RoutingSession(model)
    with session.replay(trace, measure=True):
        model(batch())
    m = session.metrics()
    assert (m.rows_replayed, m.slots_replayed, m.slots_filled) == (2 * (T - 1), 2 * (K * T - 3), 6)
    assert m.rows_compared == 2 * T and 0 < m.mismatch < 1
    assert m.scalars()["replay/slots_filled"] == 6.0


def test_alarm_for_a_trace_shifted_by_one_token() -> None:
    """Aligned: silent. Shifted by one row: it fires, as does the token check when ids are at hand."""
    model = make_model(seed=5, experts=8)
    x = torch.randn(1, 400, D)
    trace = record(model, x)
    session = RoutingSession(model)
    with session.compare(trace):
        model(x)
    session.metrics().check_alignment()
    index = torch.arange(400) - 1
    with session.compare(trace.plan(index, layers=session.layers)):
        model(x)
    with pytest.raises(TraceError, match="the trace is shifted"):
        session.metrics().check_alignment()
    with session.replay(trace.plan(index, layers=session.layers), measure=True):
        model(x)
    assert session.metrics().zero_overlap > 0.2


def test_session_under_compile() -> None:
    """A session is no graph break, and another plan no new graph; values and gradients as in eager."""
    from torch._dynamo.testing import CompileCounter

    model = make_model().blocks[0].moe
    session, counter = RoutingSession(model), CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for seed in range(3):
        trace = RoutingTrace.from_ids(random_ids(layers=1, seed=seed), num_experts=E, layers=["."])
        found = []
        for run in (model, compiled):
            with session.replay(trace):
                y = run(batch())
            loss_of(y).backward()
            found.append(grads(model) | {"y": y.detach()})
        assert_same(*found)
    assert counter.frame_count == 1
    assert torch.equal(compiled(batch()), model(batch()))
    with session.record() as recording:
        compiled(batch())
    assert torch.equal(recording.trace().wide_ids()[:, 0], model(batch(), return_routing=True)[1].ids_TK)


def test_transformers_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers", reason="sessions on replaced transformers blocks")
    from moe_layer.compat.transformers import replace_moe_blocks
    from tests.unit.hf_blocks import hf_model

    model = hf_model("qwen3_moe")
    paths = replace_moe_blocks(model)
    ids = torch.randint(0, 64, (2, 9))
    session = RoutingSession(model)
    assert session.layers == paths
    with session.record() as recording:
        expected = model(input_ids=ids).logits
    trace = recording.trace()
    assert copy.deepcopy(model)(input_ids=ids).logits.equal(expected)
    with torch.no_grad():
        for path in paths:
            model.get_submodule(path).gate.weight.add_(0.3)
    model.train()
    kwargs = {"use_reentrant": False, "context_fn": session.context_fn}
    found = []
    for enable in (False, True):
        if enable:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)
        with session.replay(trace):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        found.append(grads(model))
    assert_same(*found)


def test_capacity_is_refused_unless_allowed_and_ids_are_recorded_before_it() -> None:
    model = make_model(capacity_factor=0.25)
    trace = record(model, batch())
    assert bool((trace.wide_ids() >= 0).all()), "what capacity drops is recorded all the same"
    with pytest.raises(RoutingError, match=r"replay with router\.capacity_factor 0\.25 would drop replayed slots"):
        _replay(model, trace)
    allowed = make_model(capacity_factor=0.25, replay=ReplayConfig(allow_capacity=True))
    with RoutingSession(allowed) as session, session.replay(trace):
        y = allowed(batch())
    assert torch.equal(y, allowed(batch()))
