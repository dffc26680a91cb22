"""Dense push (`dispatch.push`), what the tests of both pushes do not show: all rows go first, by copy engine."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.dispatch import window as window_module
from moe_layer.dispatch.nvlink import dense_push
from moe_layer.dispatch.window import Window
from moe_layer.errors import CapacityError, DispatchTimeout, RoutingError
from moe_layer.ops import ep
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import Result, assert_same_bits, config_for, joined, make_case, run_case
from tests.distributed.phases import PhaseRanks
from tests.distributed.ranks import ThreadRanks


def _config(**keys: Any) -> DispatchConfig:
    return config_for("nvlink", **{"max_tokens_per_rank": 32, "deadline_s": 10.0, **keys})


def test_auto_is_dense_where_nearly_all_rows_are_needed() -> None:
    """1 - (1 - 1/R)^K against 340 / 364, the rates of kernels and of copy engines."""
    chosen = {
        (R, K): dense_push(_config(push="auto"), ranks=R, top_k=K) for R in (2, 4, 8) for K in (1, 2, 3, 4, 8, 10)
    }
    assert [key for key, dense in chosen.items() if dense] == [(2, 4), (2, 8), (2, 10), (4, 10)]
    assert dense_push(_config(push="dense"), ranks=8, top_k=1) and not dense_push(
        _config(push="slots"), ranks=2, top_k=8
    )


@pytest.mark.parametrize("rows", ["expert_major", "compact"])
@pytest.mark.parametrize("fp8", [False, True])
def test_rows_in_several_pieces(ranks: ThreadRanks, monkeypatch: pytest.MonkeyPatch, rows: str, fp8: bool) -> None:
    """The last piece is shorter, some have no row that anybody needs, some ranks have fewer of them than others."""
    monkeypatch.setattr(window_module, "_PIECE_BYTES", 16 * 128 * (1 if fp8 else 2))
    case = make_case(2, T=100, D=128, E=8, K=2, dtype=torch.bfloat16)
    case.ids_TK[20:56] = -1
    keys: dict[str, Any] = {"rows": rows, "dispatch_format": "fp8_1x128" if fp8 else "input"}
    config = _config(max_tokens_per_rank=72, push="dense", **keys)

    def one(context: ParallelContext, config: DispatchConfig) -> Result:
        return run_case(case, config, context, cuts=[0, 68, 100])

    got = joined(ranks.run(2, lambda context: one(context, config), fresh=True))
    want = joined(ranks.run(2, lambda context: one(context, DispatchConfig(backend="all_to_all", **keys))))
    assert_same_bits(got, want)


def test_rows_that_may_be_overwritten_are_not_trusted() -> None:
    """Rank 1 fails and goes on, over rows that rank 0 has not read: rank 0 finds that out after it has read them."""
    case = make_case(1, T=12, D=8, E=8, K=2, absent=0.0)
    phases = PhaseRanks(_config(push="dense"), case, 2)
    shares = [slice(0, 6), slice(6, 12)]
    routings = [Routing.from_ids(case.ids_TK[s], case.w_TK[s], num_experts=8) for s in shares]
    first, second = phases.dispatchers
    handle = first.dispatch_send(case.x_TD[shares[0]], routings[0])
    _ = second.dispatch_send(case.x_TD[shares[1]], routings[1])
    phases.windows[1].state[0] = ep.TIMEOUT
    _ = second.dispatch_begin(case.x_TD[shares[1]])
    with pytest.raises(DispatchTimeout, match=r"rank 1 went on after an error .* layer 0, step 0, phase dispatch"):
        first.dispatch_recv(*handle)


def test_begun_with_another_x(ranks: ThreadRanks) -> None:
    case = make_case(1, T=12, D=8, E=8, K=2)

    def one(context: ParallelContext) -> None:
        d = make_dispatcher(_config(push="dense"), num_experts=8, top_k=2, context=context)
        begun = d.dispatch_begin(case.x_TD)
        with pytest.raises(RoutingError, match="x is not what dispatch_begin was called with"):
            d.dispatch(case.x_TD.clone(), Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8), begun=begun)
        with pytest.raises(CapacityError, match=r"33 tokens exceed dispatch\.max_tokens_per_rank"):
            d.dispatch_begin(torch.zeros(33, 8))

    ranks.run(2, one)


@pytest.mark.parametrize(("push", "calls"), [("slots", []), ("dense", ["dispatch", "combine backward"])])
def test_the_key(ranks: ThreadRanks, monkeypatch: pytest.MonkeyPatch, push: str, calls: list[str]) -> None:
    """Which trips send all rows; the bits do not depend on it."""
    case = make_case(1, T=12, D=8, E=8, K=2)
    found: list[str] = []
    whole = Window.push_rows

    def noted(window: Window, trip: Any, rows: Tensor, encoded: Tensor | None) -> None:
        assert rows.shape == (6, 8)
        found.append(trip.at.phase)
        whole(window, trip, rows, encoded)

    monkeypatch.setattr(Window, "push_rows", noted)
    got = joined(ranks.run(2, lambda context: run_case(case, _config(push=push), context)))
    assert sorted(found) == sorted(2 * calls)
    assert_same_bits(got, run_case(case, DispatchConfig()))
