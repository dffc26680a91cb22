"""What only the nvlink dispatcher promises, on CPU memory: the protocol's model under the dispatcher that drives the
kernels. What every backend promises is tested with it in test_bits, test_modes, test_schedule and test_formats."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.dispatch.base import static_rows
from moe_layer.dispatch.nvlink import FusedCall
from moe_layer.errors import CapacityError, DispatchTimeout, RankMismatch
from moe_layer.ops import ep
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import Case, apply_experts, assert_same_bits, joined, make_case, run_case
from tests.distributed.phases import PhaseRanks, large_case
from tests.distributed.ranks import ThreadRanks
from tests.distributed.test_bits import _oracle


def _config(**keys: Any) -> DispatchConfig:
    return DispatchConfig(**{"backend": "nvlink", "max_tokens_per_rank": 32, "deadline_s": 10.0, **keys})


both_pushes = pytest.mark.parametrize("push", ["slots", "dense"])


def _dispatch(case: Case, config: DispatchConfig, context: ParallelContext, **options: Any) -> Any:
    dispatcher = make_dispatcher(config, num_experts=case.num_experts, top_k=case.top_k, context=context, **options)
    return dispatcher.dispatch(case.x_TD, Routing.from_ids(case.ids_TK, case.w_TK, num_experts=case.num_experts))


# ---- any number of ranks, any routing -------------------------------------------------------------------------------


@both_pushes
@pytest.mark.parametrize("size", [3, 6, 16])
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
@pytest.mark.parametrize("apply_probs", ["activation", "combine", "source"])
def test_any_number_of_ranks(ranks: ThreadRanks, size: int, rows: str, apply_probs: str, push: str) -> None:
    """All ranks in one thread, phase by phase; the slots of the ring are used again and again. No process group: what
    travels goes through the windows."""
    case = make_case(size, T=26, D=16, E=48, K=4)
    keys: dict[str, Any] = {"rows": rows, "apply_probs": apply_probs}
    phases = PhaseRanks(_config(push=push, **keys), case, size)
    for turn in range(3):
        got = joined(phases.run(case, cuts=[0] * size + [26] if turn == 1 else None))
    if size == 16:
        want = run_case(case, DispatchConfig(**keys))
    else:
        plain = DispatchConfig(backend="all_to_all", **keys)
        want = joined(ranks.run(size, lambda context: run_case(case, plain, context)))
    assert_same_bits(got, want)


def _with_ids(case: Case, change: Callable[[Tensor], Tensor]) -> Case:
    return Case(case.x_TD, change(case.ids_TK), case.w_TK, case.dy_TD, case.experts)


ROUTINGS: dict[str, Case] = {
    "one slot": make_case(1, T=19, D=8, E=8, K=1),
    "one expert a rank": make_case(2, T=19, D=8, E=4, K=2),
    "one slot, one expert a rank": make_case(3, T=19, D=8, E=4, K=1, absent=0.3),
    "every expert": make_case(4, T=19, D=8, E=8, K=8, absent=0.0),
    "nothing": make_case(5, T=19, D=8, E=8, K=3, absent=1.0),
    "the same expert twice": _with_ids(
        make_case(6, T=19, D=8, E=8, K=4, absent=0.2), lambda ids: ids[:, [0, 1, 0, 0]].contiguous()
    ),
    "one token": make_case(7, T=1, D=8, E=8, K=2, absent=0.0),
}


@both_pushes
@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
def test_shapes_of_the_routing(ranks: ThreadRanks, name: str, rows: str, push: str) -> None:
    case = ROUTINGS[name]
    got = joined(ranks.run(4, lambda context: run_case(case, _config(rows=rows, push=push), context)))
    assert_same_bits(got, run_case(case, DispatchConfig()))
    if name == "nothing":
        assert not any(torch.count_nonzero(t) for t in (got.y, got.dx, got.dw, got.d_experts))
        return
    for found, want in zip((got.y, got.dx, got.dw, got.d_experts), _oracle(case, before=True), strict=True):
        assert (found.double() - want).abs().max() <= 5e-6 * want.abs().max()


@both_pushes
@pytest.mark.parametrize("alignment", [8, 16, 128])
def test_pads_are_zero_after_a_larger_step(ranks: ThreadRanks, alignment: int, push: str) -> None:
    """Deterministic algorithms fill new memory with NaN: a pad that nobody writes would show. Same bits as without."""
    large, small = (make_case(seed, T=T, D=16, E=8, K=3) for seed, T in ((1, 60), (2, 14)))
    want = run_case(small, DispatchConfig())
    config = _config(alignment=alignment, push=push)

    def pads(context: ParallelContext) -> Tensor:
        rank = context.ep_rank
        run_case(large, config, context)
        mine = Case(small.x_TD[7 * rank :][:7], small.ids_TK[7 * rank :][:7], small.w_TK[7 * rank :][:7], *[None] * 2)  # type: ignore[arg-type]
        d = make_dispatcher(config, num_experts=8, top_k=3, context=context)
        received = d.dispatch(mine.x_TD, Routing.from_ids(mine.ids_TK, mine.w_TK, num_experts=8))
        end = int(received.offsets_L1[-1])
        pad_N = received.src_N3[:end, 0] < 0
        assert pad_N.any() and torch.count_nonzero(received.probs_N[:end][pad_N]) == 0
        return received.rows[:end][pad_N]

    torch.use_deterministic_algorithms(True)
    try:
        for rows in ranks.run(2, pads):
            assert torch.count_nonzero(rows) == 0
        assert torch.empty(4).isnan().all()
        assert_same_bits(joined(ranks.run(2, lambda context: run_case(small, config, context))), want)
        compact = _config(rows="compact", push=push)
        assert_same_bits(joined(ranks.run(2, lambda context: run_case(small, compact, context))), want)
    finally:
        torch.use_deterministic_algorithms(False)


# ---- static capacity ------------------------------------------------------------------------------------------------


@both_pushes
@pytest.mark.parametrize(("rows", "alignment"), [("expert_major", 1), ("expert_major", 8), ("compact", 1)])
def test_static_rows_have_one_size_and_the_same_bits(ranks: ThreadRanks, rows: str, alignment: int, push: str) -> None:
    config = _config(capacity="static", static_factor=3.0, rows=rows, alignment=alignment, push=push)
    want_rows = static_rows(config, slots=32 * 3) if rows == "expert_major" else 2 * 32
    for seed, T in ((0, 40), (1, 7), (2, 0)):
        case = make_case(seed, T=T, D=8, E=8, K=3)
        got = joined(ranks.run(2, lambda context, case=case: run_case(case, config, context)))
        assert_same_bits(got, run_case(case, DispatchConfig()))
    case = make_case(3, T=9, D=8, E=8, K=3)
    for received in ranks.run(2, lambda context: _dispatch(case, config, context)):
        assert received.rows.shape == (want_rows, 8)


@both_pushes
@pytest.mark.parametrize(("rows", "alignment"), [("expert_major", 1), ("expert_major", 8), ("compact", 1)])
def test_overflow_raises(ranks: ThreadRanks, rows: str, alignment: int, push: str) -> None:
    """Every slot wants rank 1, whose rows do not fit: an error there for ever, which tells rank 0 at once."""
    case = _with_ids(make_case(0, T=10, D=8, E=8, K=2), lambda ids: torch.full_like(ids, 7))
    config = _config(capacity="static", static_factor=0.25, deadline_s=60.0, rows=rows, alignment=alignment, push=push)

    def one(context: ParallelContext) -> list[str]:
        found = []
        for _ in range(2):
            with pytest.raises((CapacityError, DispatchTimeout)) as error:
                run_case(case, config, context)
            found.append(f"{error.type.__name__}: {error.value}")
        return found

    waiting, full = ranks.run(2, one, fresh=True)
    assert waiting[0] == (
        "CapacityError: the static dispatch buffer of rank 1 overflowed, which this rank learnt at layer 0, step 0, "
        "phase combine; raise dispatch.static_factor or set dispatch.overflow drop"
    )
    assert full[0] == (
        "CapacityError: static dispatch buffer of 16 rows overflowed at layer 0, step 0, phase dispatch: "
        f"{20 if alignment == 1 else 24} rows arrived; raise dispatch.static_factor or set dispatch.overflow drop"
    )
    assert "unusable since" in full[1] and "unusable since" in waiting[1]


@both_pushes
@pytest.mark.parametrize(("rows", "alignment"), [("expert_major", 1), ("expert_major", 8), ("compact", 1)])
def test_overflow_as_on_a_gpu(
    ranks: ThreadRanks, monkeypatch: pytest.MonkeyPatch, rows: str, alignment: int, push: str
) -> None:
    """Where nothing is read on the host: no row out of bounds, NaN in every output from there on, then `check()`."""
    monkeypatch.setattr(FusedCall, "report", lambda call: None)
    small = make_case(1, T=10, D=8, E=8, K=2)
    case = _with_ids(small, lambda ids: torch.full_like(ids, 7))
    config = _config(capacity="static", static_factor=0.25, deadline_s=0.5, rows=rows, alignment=alignment, push=push)

    def one(context: ParallelContext) -> str:
        d = make_dispatcher(config, num_experts=8, top_k=2, context=context)
        received = d.dispatch(case.x_TD, Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8))
        places = received.probs_N.shape[0]
        assert places == 16 and int(received.offsets_L1[-1]) == (16 if context.ep_rank else 0)
        assert int(received.counts_L.sum()) <= places
        assert context.ep_rank == 0 or received.rows.isnan().all()
        y = d.combine(torch.ones(places, 8), received)
        assert y.isnan().all()
        again = d.dispatch(small.x_TD, Routing.from_ids(small.ids_TK, small.w_TK, num_experts=8))
        assert again.rows.isnan().all()
        with pytest.raises(RuntimeError) as error:
            d.check()
        return type(error.value).__name__

    assert ranks.run(2, one, fresh=True) == ["CapacityError", "CapacityError"]


# ---- the window -----------------------------------------------------------------------------------------------------


def _in_flight(depth: int, push: str, context: ParallelContext) -> None:
    case = make_case(1, T=8, D=16, E=8, K=2)
    dispatcher = make_dispatcher(_config(ring_depth=depth, push=push), num_experts=8, top_k=2, context=context)
    routing = Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8)
    _ = [dispatcher.dispatch_send(case.x_TD, routing) for _ in range(3)]


@both_pushes
def test_ring_depth(ranks: ThreadRanks, push: str) -> None:
    """Three dispatches in flight need a ring of three."""
    for error in ranks.run(2, lambda context: _in_flight(2, push, context), fresh=True):
        assert isinstance(error, CapacityError) and "raise dispatch.ring_depth" in str(error)
    assert ranks.run(2, lambda context: _in_flight(3, push, context), fresh=True) == [None, None]


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


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"ring_depth": 3, "max_tokens_per_rank": 300},
        {"combine_format": "fp32"},
        {"apply_probs": "source"},
        {"apply_probs": "source", "combine_format": "fp32", "dispatch_format": "fp8_1x128"},
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_window_bytes_are_known_before(ranks: ThreadRanks, keys: dict[str, Any], dtype: torch.dtype) -> None:
    """`buffer_bytes` is the allocation, and steps of any size leave it alone: growth would be a collective."""

    def one(context: ParallelContext) -> tuple[int, int]:
        dispatcher: Any = make_dispatcher(_config(**keys), num_experts=8, top_k=2, context=context)
        promised = dispatcher.buffer_bytes(16, dtype)
        windows = set()
        for T in (2, 0, 32, 1):
            case = make_case(1, T=T * 2, D=16, E=8, K=2, dtype=dtype)
            run_case(case, _config(**keys), context)
            windows.add(id(context.window))
        assert len(windows) == 1
        return promised, context.window.memory.numel()

    for promised, made in ranks.run(2, one, fresh=True):
        assert promised == made


def test_a_wider_layer_makes_the_window_grow_once(ranks: ThreadRanks) -> None:
    """Layers of one context share the window; static facts alone decide its size, so all ranks make it together."""

    def one(context: ParallelContext) -> list[int]:
        sizes = []
        for D in (8, 32, 8, 32):
            case = make_case(D, T=6, D=D, E=8, K=2)
            want = run_case(case, DispatchConfig(), context)
            assert_same_bits(run_case(case, _config(), context), want)
            sizes.append(context.window.memory.numel())
        return sizes

    for sizes in ranks.run(2, one, fresh=True):
        assert sizes[0] < sizes[1] == sizes[2] == sizes[3]


@both_pushes
def test_addresses_beyond_2_to_the_31(push: str) -> None:
    """A window of 9 GB of which a few pages exist; the GPU test fills one."""
    large_case("cpu", tokens=100, max_tokens=2**20 + 1000, hidden=512, dtype=torch.float32, push=push)


# ---- disagreement and exceptions ------------------------------------------------------------------------------------


@both_pushes
@pytest.mark.parametrize("what", ["layer", "step", "width"])
def test_a_rank_that_is_elsewhere(ranks: ThreadRanks, what: str, push: str) -> None:
    """Rank 1 skips a layer, is a step behind, or has other rows: everybody gets the error, at once."""

    def one(context: ParallelContext) -> None:
        odd = context.ep_rank == 1
        context.step = 7
        run_case(make_case(0, T=9, D=16, E=12, K=2), _config(push=push), context)
        dispatcher: Any = make_dispatcher(_config(push=push), num_experts=12, top_k=2, context=context, layer_index=3)
        dispatcher.link.layer += odd and what == "layer"
        context.step -= odd and what == "step"
        case = make_case(0, T=9, D=8 if odd and what == "width" else 16, E=12, K=2)
        routing = Routing.from_ids(case.ids_TK, case.w_TK, num_experts=12)
        dispatcher.dispatch(case.x_TD, routing)

    errors = ranks.run(3, one, fresh=True)
    for rank, error in enumerate(errors):
        assert isinstance(error, RankMismatch), error
        at = f"layer {3 + (rank == 1 and what == 'layer')}, step {7 - (rank == 1 and what == 'step')}, phase dispatch"
        assert f"rank {0 if rank == 1 else 1} is elsewhere at {at}" in str(error)


class Bug(Exception):
    """Of the model around the layer."""


def _fail(where: str, case: Case, config: DispatchConfig, context: ParallelContext) -> None:
    def raise_bug(*_: Any) -> None:
        raise Bug(where)

    rank, L = context.ep_rank, case.num_experts // context.ep_size
    x, experts = case.x_TD.clone().requires_grad_(), case.experts[rank * L : (rank + 1) * L]
    d = make_dispatcher(config, num_experts=case.num_experts, top_k=case.top_k, context=context)
    begun = d.dispatch_begin(x)
    if where == "router":
        raise_bug()
    routing = Routing.from_ids(case.ids_TK, case.w_TK, num_experts=case.num_experts)
    handle, token = d.dispatch_send(x, routing, begun=begun)
    if where == "dispatch":
        raise_bug()
    received = d.dispatch_recv(handle, token)
    if where == "experts":
        raise_bug()
    received.rows.register_hook(raise_bug) if where == "backward of the experts" else None
    back = d.combine_send(apply_experts(received, experts), received)
    if where == "combine":
        raise_bug()
    y = d.combine_recv(*back)
    y.register_hook(raise_bug) if where == "backward" else None
    y.backward(case.dy_TD)


@both_pushes
@pytest.mark.parametrize("where", ["router", "dispatch", "experts", "combine", "backward", "backward of the experts"])
def test_works_after_exceptions(ranks: ThreadRanks, where: str, push: str) -> None:
    """More often than the ring has slots; what is left half done is dropped and its slot given back."""
    case = make_case(4, T=12, D=8, E=8, K=3)

    def one(context: ParallelContext) -> None:
        want = run_case(case, DispatchConfig(), context)
        for _ in range(5):
            with pytest.raises(Bug, match=where):
                _fail(where, case, _config(push=push), context)
        assert_same_bits(run_case(case, _config(push=push), context), want)

    ranks.run(2, one)


def test_closed(ranks: ThreadRanks) -> None:
    case = make_case(4, T=12, D=8, E=8, K=3)

    def one(context: ParallelContext) -> None:
        run_case(case, _config(), context)
        d = make_dispatcher(_config(), num_experts=8, top_k=3, context=context)
        context.close()
        context.close()
        assert context.window is None
        d.dispatch(case.x_TD, Routing.from_ids(case.ids_TK, case.w_TK, num_experts=8))

    for error in ranks.run(2, one, fresh=True):
        assert isinstance(error, DispatchTimeout) and "the context was closed" in str(error)
