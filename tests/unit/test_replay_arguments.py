"""Arguments of the wrong kind: one sentence that names the argument, never a conversion that loses something."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from moe_layer import RoutingError, RoutingSession, RoutingTrace
from moe_layer.replay import index_map
from tests.unit.replay_models import LAYERS, E, T, batch, make_model, make_trace, random_ids


def _record(**arguments: object) -> None:
    model = make_model()
    with RoutingSession(model) as session, session.record(**arguments):  # type: ignore[arg-type]
        model(batch())


def _recorded(index: object) -> None:
    model = make_model()
    with RoutingSession(model) as session, session.record() as recording:
        model(batch())
    recording.trace(index)


def _build(**changes: object) -> RoutingTrace:
    return RoutingTrace.from_ids(**({"ids": random_ids(), "num_experts": E, "layers": LAYERS} | changes))  # type: ignore[arg-type]


WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "exclude a string": (
        lambda: RoutingSession(make_model(), exclude="blocks.0"),
        "exclude must be a list of patterns",
    ),
    "max_tokens below 0": (lambda: _record(max_tokens=-1), "max_tokens must be an integer from 0"),
    "max_tokens text": (lambda: _record(max_tokens="9"), "max_tokens must be an integer from 0"),
    "ids a list": (lambda: _build(ids=[[[1, 2]]]), "ids must be a tensor of integers, got list"),
    "ids fractions": (lambda: _build(ids=random_ids().float()), "ids must be integers, got torch.float32"),
    "num_experts text": (lambda: _build(num_experts="8"), "num_experts must be an integer, got '8'"),
    "layers a string": (lambda: _build(layers="ab"), "layers must be a list of module paths"),
    "weights integers": (lambda: _build(weights=random_ids()), "weights must be a floating tensor, got torch.int64"),
    "weights a list": (lambda: _build(weights=[0.5]), "weights must be a floating tensor, got list"),
    "cu_seqlens text": (lambda: _build(cu_seqlens=[0, "a"]), "cu_seqlens must be integers"),
    "cu_seqlens fractions": (
        lambda: _build(cu_seqlens=[0.0, float(T)]),
        "cu_seqlens must be integers, got torch.float32",
    ),
    "token_ids fractions": (lambda: _build(token_ids=torch.zeros(T)), "token_ids must be integers"),
    "token_ids a list": (lambda: _build(token_ids=[0] * T), "token_ids must be a tensor of integers, got list"),
    "version a fraction": (lambda: _build(weights_version=1.5), "weights_version must be integers, got torch.float32"),
    "version text": (lambda: _build(weights_version="a"), "weights_version must be integers"),
    "version of other rows": (lambda: _build(weights_version=torch.zeros(3, dtype=torch.int32)), "one int32 or"),
    "version too large": (lambda: _build(weights_version=2**40), "one int32 or"),
    "notes an object": (lambda: make_trace(notes={"a": object()}).save("a.npz"), "notes must map text to text"),
    "index a list": (lambda: make_trace().plan([0, 1]), "token_index must be a tensor of integers, got list"),  # type: ignore[arg-type]
    "tokens fractions": (lambda: make_trace().plan(tokens=torch.zeros(T)), "tokens must be integers"),
    "layers of a plan a string": (lambda: make_trace().plan(layers=LAYERS[0]), "layers must be a list of module paths"),
    "layers of a plan empty": (lambda: make_trace().plan(layers=[]), "layers is empty"),
    "index of a record fractions": (lambda: _recorded(torch.arange(T).float()), "token_index must be integers"),
    "index of a record a list": (lambda: _recorded(list(range(T))), "token_index must be a tensor of integers"),
    "lengths below 0": (lambda: index_map.packed_index([-1]), "lengths must be the rows"),
    "lengths below 0, left": (lambda: index_map.left_pad_index([-1]), "lengths must be the rows"),
    "lengths below 0, shards": (lambda: index_map.cp_zigzag_index([-1], size=2, rank=0), "lengths must be the rows"),
    "align 0": (lambda: index_map.packed_index([3], align=0), "align must be at least 1"),
    "steps below 0": (lambda: index_map.generation_index(torch.ones(2, 3), steps=-1), "steps from 0"),
    "mask of one dimension": (
        lambda: index_map.generation_index(torch.ones(3), steps=1),
        "must be \\[batch, prompt\\]",
    ),
    "map with a row twice": (lambda: index_map.inverse_index(torch.tensor([0, 1, -1, 1]), rows=2), "row 1 more than"),
    "map of fractions": (lambda: index_map.inverse_index(torch.zeros(2), rows=2), "index must be integers"),
    "map of another recording": (lambda: index_map.inverse_index(torch.tensor([5]), rows=2), "names row 5 of 2 rows"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_arguments(case: str) -> None:
    act, text = WRONG[case]
    with pytest.raises(ValueError, match=text):
        act()


def test_unsigned_maps_are_integers_too() -> None:
    for dtype in (torch.uint8, torch.uint16, torch.int32):
        plan = make_trace().plan(torch.tensor([3, 0]).to(dtype))
        assert torch.equal(plan.decision(0).ids.int(), make_trace().wide_ids()[[3, 0], 0])
    assert issubclass(RoutingError, ValueError)
