"""RoutingSession.replay and compare: bit-exact, refused when anything does not fit, counted, and the alarm."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer import RoutingError, RoutingSession, RoutingTrace, TraceError
from moe_layer.config import ReplayConfig
from tests.unit.replay_models import (
    LAYERS,
    ROUTERS,
    D,
    E,
    Model,
    T,
    assert_same,
    batch,
    explicit,
    grads,
    loss_of,
    make_model,
    make_trace,
    random_ids,
    record,
)

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


@pytest.mark.parametrize(("first", "second"), list(itertools.product(("replay", "compare"), repeat=2)))
def test_one_plan_at_a_time(first: str, second: str) -> None:
    """A comparison inside a replay would find no difference, whatever the trace; inside `live` it is one."""
    model, trace = make_model(), make_trace(seed=8)
    with (
        RoutingSession(model) as session,
        pytest.raises(RoutingError, match=f"{first} is open already, so {second} would not see live routing"),
        getattr(session, first)(trace),
        getattr(session, second)(trace),
    ):
        pass
    with RoutingSession(model) as session, session.replay(trace):
        with session.live(), session.compare(trace):
            model(batch())
        model(batch())
        assert session.metrics().mismatch > 0


def test_explicit_argument_inside_a_replay_is_a_conflict() -> None:
    model = make_model()
    with (
        RoutingSession(model) as session,
        pytest.raises(RoutingError, match="use one of them"),
        session.replay(make_trace()),
    ):
        model.blocks[0].moe(batch(), replay=random_ids()[:, 0])


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


@pytest.mark.parametrize("suffix", ["safetensors", "npz"])
def test_ranks_without_tokens(tmp_path: Path, suffix: str) -> None:
    """An empty micro-batch is recorded, saved, replayed and compared; pads of an empty trace are live."""
    model = make_model()
    session, x = RoutingSession(model), torch.zeros(0, D, requires_grad=True)
    with session.record(weights=True) as recording:
        model(x)
    path = tmp_path / f"a.{suffix}"
    recording.trace(token_ids=torch.zeros(0, dtype=torch.int64)).save(path)
    trace = RoutingTrace.open(path)
    trace.validate(complete=True)
    assert (trace.num_tokens, trace.lengths) == (0, [0])
    with session.replay(trace, measure=True):
        model(x).sum().backward()
    with session.compare(trace):
        model(x)
    assert session.metrics().rows_compared == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.blocks[0].moe.parameters())
    whole = make_trace()
    for source in (trace, whole):
        with session.replay(source.plan(torch.full((T,), -1), layers=session.layers)):
            assert torch.equal(model(batch()), make_model()(batch()))
    with session.replay(whole.plan(torch.zeros(0, dtype=torch.int64), layers=session.layers)):
        model(x)
    assert RoutingTrace.concat([trace, whole.rows(0, 5)]).lengths == [0, 5]


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
