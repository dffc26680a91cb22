"""The nvlink dispatcher on CPU memory: the protocol's model in the same dispatcher that drives the kernels."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import CapacityError
from moe_layer.ops import ep
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import assert_same_bits, joined, make_case, run_case
from tests.distributed.ranks import ThreadRanks


def _config(**keys: Any) -> DispatchConfig:
    return DispatchConfig(**{"backend": "nvlink", "max_tokens_per_rank": 32, "deadline_s": 10.0, **keys})


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
@pytest.mark.parametrize("apply_probs", ["activation", "combine", "source"])
def test_bits(ranks: ThreadRanks, size: int, rows: str, apply_probs: str) -> None:
    case = make_case(size, T=26, D=16, E=16, K=4)
    want = run_case(case, DispatchConfig(apply_probs=apply_probs))
    config = _config(rows=rows, apply_probs=apply_probs)
    assert_same_bits(joined(ranks.run(size, lambda context: run_case(case, config, context))), want)


def _in_flight(depth: int, context: ParallelContext) -> None:
    case = make_case(1, T=8, D=16, E=8, K=2)
    dispatcher = make_dispatcher(_config(ring_depth=depth), num_experts=8, top_k=2, context=context)
    routing = Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8)
    _ = [dispatcher.dispatch_send(case.x_TD, routing) for _ in range(3)]


def test_ring_depth(ranks: ThreadRanks) -> None:
    """Three dispatches in flight need a ring of three."""
    for error in ranks.run(2, lambda context: _in_flight(2, context), fresh=True):
        assert isinstance(error, CapacityError) and "raise dispatch.ring_depth" in str(error)
    assert ranks.run(2, lambda context: _in_flight(3, context), fresh=True) == [None, None]


def test_sm_budget(ranks: ThreadRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    """The thread blocks of both sends, which occupy one multiprocessor each."""
    found: set[int] = set()
    for name in ("ep_push", "ep_reduce_push"):
        op = getattr(ep, name)

        def noted(*args: Any, op: Any = op, **options: Any) -> None:
            found.add(options["blocks"])
            op(*args, **options)

        monkeypatch.setattr(ep, name, noted)
    case = make_case(1, T=8, D=16, E=8, K=2)
    ranks.run(2, lambda context: run_case(case, _config(sm_budget=7), context))
    assert found == {7}


def test_window_bytes_are_known_before(ranks: ThreadRanks) -> None:
    def one(context: ParallelContext) -> tuple[int, int]:
        dispatcher: Any = make_dispatcher(_config(), num_experts=8, top_k=2, context=context)
        promised = dispatcher.buffer_bytes(16, torch.float32)
        case = make_case(1, T=8, D=16, E=8, K=2)
        dispatcher.dispatch(case.x_TD, Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8))
        return promised, context.window.memory.numel()

    for promised, made in ranks.run(2, one, fresh=True):
        assert promised == made
