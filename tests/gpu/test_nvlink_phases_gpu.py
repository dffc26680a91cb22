"""The nvlink kernels with all ranks on one GPU, phase by phase: no kernel waits for one that was not launched before.

So these run on any one GPU and under a sanitizer, which makes every launch wait for its end:
`bash scripts/sanitize.sh memcheck tests/gpu/test_nvlink_phases_gpu.py -k small`.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest
import torch

from moe_layer.config.model import DispatchConfig
from moe_layer.errors import CapacityError, DispatchTimeout
from moe_layer.ops import ep
from moe_layer.ops.kernels import require_kernels
from moe_layer.types import Routing
from tests.distributed.cases import Case, Result, assert_same_bits, config_for, joined, make_case, run_case
from tests.distributed.phases import PhaseRanks, large_case

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def kernels() -> None:
    require_kernels("cuda")


def _on(case: Case, device: str) -> Case:
    return Case(**{f.name: getattr(case, f.name).to(device) for f in dataclasses.fields(case)})


def _cpu(result: Result) -> Result:
    return Result(**{f.name: getattr(result, f.name).cpu() for f in dataclasses.fields(result)})


def _play(case: Case, config: DispatchConfig, ranks: int, turns: int = 1) -> Result:
    phases = PhaseRanks(config, case, ranks, device="cuda")
    for _ in range(turns):
        results = phases.run(case)
    return _cpu(joined(results))


@pytest.mark.parametrize("rows", ["expert_major", "compact"])
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"push": "dense"},
        {"apply_probs": "combine"},
        {"apply_probs": "source"},
        {"capacity": "static", "static_factor": 3.0},
    ],
)
def test_small(rows: str, keys: dict[str, Any]) -> None:
    """Two ranks, forward and backward twice through the same slots."""
    case = _on(make_case(2, T=13, D=16, E=8, K=3), "cuda")
    want = run_case(case, DispatchConfig(apply_probs=keys.get("apply_probs", "activation")))
    assert_same_bits(_play(case, config_for("nvlink", rows=rows, **keys), 2, turns=2), _cpu(want))


@pytest.mark.parametrize("push", ["slots", "dense"])
def test_small_fp8(push: str) -> None:
    """Encoded by the push (slots) or before it (dense)."""
    case = _on(make_case(3, T=13, D=128, E=8, K=3, dtype=torch.bfloat16), "cuda")
    keys = {"dispatch_format": "fp8_1x128", "combine_format": "fp32"}
    want = run_case(case, DispatchConfig(**keys))
    assert_same_bits(_play(case, config_for("nvlink", push=push, **keys), 2, turns=2), _cpu(want))


@pytest.mark.parametrize("name", ["one slot", "every expert", "nothing", "no token", "the same expert twice"])
@pytest.mark.parametrize(("rows", "push"), [("expert_major", "slots"), ("compact", "slots"), ("expert_major", "dense")])
def test_small_shapes_of_the_routing(name: str, rows: str, push: str) -> None:
    """K = 1, one expert a rank, K = E, only absent slots, T = 0, an expert twice; four ranks."""
    cases = {
        "one slot": make_case(1, T=19, D=8, E=4, K=1),
        "every expert": make_case(4, T=19, D=8, E=8, K=8, absent=0.0),
        "nothing": make_case(5, T=19, D=8, E=8, K=3, absent=1.0),
        "no token": make_case(5, T=0, D=8, E=8, K=3),
        "the same expert twice": make_case(6, T=19, D=8, E=8, K=4, absent=0.2),
    }
    case = cases[name]
    if name == "the same expert twice":
        case = dataclasses.replace(case, ids_TK=case.ids_TK[:, [0, 1, 0, 0]].contiguous())
    case = _on(case, "cuda")
    assert_same_bits(_play(case, config_for("nvlink", rows=rows, push=push), 4), _cpu(run_case(case, DispatchConfig())))


@pytest.mark.parametrize(("rows", "alignment"), [("expert_major", 8), ("compact", 1)])
def test_deterministic_algorithms(monkeypatch: pytest.MonkeyPatch, rows: str, alignment: int) -> None:
    """New memory is full of NaN then: pads are written, tails are not read; twice the same bits."""
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # the experts' GEMMs ask for it
    case = _on(make_case(2, T=40, D=16, E=8, K=3), "cuda")
    config = config_for("nvlink", rows=rows, alignment=alignment, capacity="static", static_factor=3.0)
    want = _cpu(run_case(case, DispatchConfig()))
    torch.use_deterministic_algorithms(True)
    try:
        for _ in range(2):
            assert_same_bits(_play(case, config, 2), want)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("push", ["slots", "dense"])
@pytest.mark.parametrize(("rows", "alignment"), [("expert_major", 1), ("expert_major", 8), ("compact", 1)])
def test_small_overflow_stays_inside_and_is_found(rows: str, alignment: int, push: str) -> None:
    """Without a look at the host: offsets end with the rows, outputs are NaN, `check()` raises, again and again.

    Rank 0, whose own rows fit, learns it at once and not by its deadline.
    """
    case = make_case(0, T=20, D=8, E=8, K=2)
    case = _on(dataclasses.replace(case, ids_TK=torch.full_like(case.ids_TK, 7)), "cuda")
    config = config_for(
        "nvlink",
        capacity="static",
        static_factor=0.25,
        max_tokens_per_rank=32,
        rows=rows,
        alignment=alignment,
        push=push,
        deadline_s=60.0,
    )
    phases = PhaseRanks(config, case, 2, device="cuda")
    xs = [case.x_TD[:10].clone(), case.x_TD[10:].clone()]
    routings = [Routing.from_ids(case.ids_TK[s], case.w_TK[s], num_experts=8) for s in (slice(0, 10), slice(10, 20))]
    received = phases.dispatch(xs, routings)
    assert received[1].probs_N.shape[0] == 16 and int(received[1].offsets_L1[-1]) == 16
    assert int(received[1].counts_L.sum()) <= 16 and received[1].rows.isnan().all()
    began = time.monotonic()
    assert all(y.isnan().all() for y in phases.combine([torch.ones(16, 8, device="cuda")] * 2, received))
    with pytest.raises(CapacityError, match=r"of rank 1 overflowed, which this rank learnt at .* phase combine"):
        phases.dispatchers[0].check()
    assert time.monotonic() - began < 30.0
    for _ in range(2):
        with pytest.raises((CapacityError, RuntimeError), match=r"overflowed|unusable since"):
            phases.dispatchers[1].check()


def test_small_rows_that_may_be_overwritten_are_not_trusted() -> None:
    """Rank 1 fails and goes on with copies that cannot be held back: rank 0 finds that out after it has read."""
    case = _on(make_case(1, T=12, D=8, E=8, K=2, absent=0.0), "cuda")
    phases = PhaseRanks(config_for("nvlink", push="dense"), case, 2, device="cuda")
    shares = [slice(0, 6), slice(6, 12)]
    routings = [Routing.from_ids(case.ids_TK[s], case.w_TK[s], num_experts=8) for s in shares]
    first, second = phases.dispatchers
    handle = first.dispatch_send(case.x_TD[shares[0]], routings[0])
    _ = second.dispatch_send(case.x_TD[shares[1]], routings[1])
    phases.windows[1].state[0] = ep.TIMEOUT
    _ = second.dispatch_begin(case.x_TD[shares[1]])
    assert first.dispatch_recv(*handle).rows.isnan().all()
    with pytest.raises(DispatchTimeout, match=r"rank 1 went on after an error .* phase dispatch"):
        first.check()


def test_send_returns_before_its_rows_have_moved() -> None:
    """The window's stream is kept busy: the host and a GEMM on the caller's stream go on, the send has not begun."""
    case = _on(make_case(2, T=40, D=16, E=8, K=3), "cuda")
    phases = PhaseRanks(config_for("nvlink"), case, 2, device="cuda")
    phases.run(case)  # loads every kernel
    shares = [slice(0, 20), slice(20, 40)]
    routings = [Routing.from_ids(case.ids_TK[s], case.w_TK[s], num_experts=8) for s in shares]
    a = torch.randn(512, 512, device="cuda")
    a = a @ a  # loads cuBLAS
    for window in phases.windows:
        window.stream = torch.cuda.Stream(priority=-1)
    torch.cuda.synchronize()
    for window in phases.windows:
        with torch.cuda.stream(window.stream):
            torch.cuda._sleep(400_000_000)  # about 0.2 s
    sent = [d.dispatch_send(case.x_TD[s], r) for d, s, r in zip(phases.dispatchers, shares, routings, strict=True)]
    a = a @ a
    beside = torch.cuda.Event()
    beside.record()
    beside.synchronize()
    moved = [handle.trips["dispatch"].sent.query() for handle, _ in sent]
    received = [d.dispatch_recv(*half) for d, half in zip(phases.dispatchers, sent, strict=True)]
    assert moved == [False, False]
    plain = PhaseRanks(config_for("nvlink"), case, 2, device="cuda").dispatch([case.x_TD[s] for s in shares], routings)
    for got, want in zip(received, plain, strict=True):
        assert torch.equal(got.rows, want.rows)


def test_more_than_2_to_the_31_elements() -> None:
    """Rows of one trip, their windows, what arrives and what comes home: offsets past 2^31 elements, 2^32 bytes."""
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < 68 * 2**30:
        pytest.skip("needs 68 GiB of free GPU memory")
    tokens, hidden = 1_100_000, 2048
    assert tokens * hidden > 2**31
    large_case("cuda", tokens=tokens, max_tokens=tokens, hidden=hidden, dtype=torch.bfloat16)
    torch.cuda.empty_cache()
