"""The bit promise: the same ids and weights give the same y, dx, dprobs and expert dW on 1, 2, 4 and 8 ranks."""

from __future__ import annotations

import pytest
import torch

from moe_layer.config.model import DispatchConfig
from tests import oracle_dispatch
from tests.distributed.cases import Case, assert_same_bits, config_for, even_cuts, joined, make_case, run_case
from tests.distributed.ranks import ThreadRanks

BACKENDS = ("all_to_all", "all_gather", "replicated", "nvlink", "nvlink:dense")
PROBS = ("activation", "combine", "source")


@pytest.mark.parametrize("size", [2, 4, 8])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apply_probs", PROBS)
@pytest.mark.parametrize("K", [2, 6])
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
def test_ranks_do_not_change_bits(
    ranks: ThreadRanks, size: int, backend: str, apply_probs: str, K: int, rows: str
) -> None:
    """The reference is expert-major on one rank; compact rows, there and everywhere, give its bits too."""
    case = make_case(size + K, T=26, D=16, E=16, K=K)
    want = run_case(case, DispatchConfig(apply_probs=apply_probs, rows="expert_major"))
    assert_same_bits(run_case(case, DispatchConfig(apply_probs=apply_probs, rows="compact")), want)
    config = config_for(backend, apply_probs=apply_probs, rows=rows)
    got = joined(ranks.run(size, lambda context: run_case(case, config, context)), replicated=backend == "replicated")
    assert_same_bits(got, want)


@pytest.mark.parametrize("backend", ["all_to_all", "all_gather", "nvlink", "nvlink:dense"])
def test_any_split_of_the_tokens(ranks: ThreadRanks, backend: str) -> None:
    """Other token counts every step, zero on one or all ranks included, on the same groups."""
    g = torch.Generator().manual_seed(0)
    config = config_for(backend)
    for step in range(25):
        T = int(torch.randint(0, 30, (), generator=g)) if step % 8 else 0
        cuts = [0, *sorted(torch.randint(0, T + 1, (3,), generator=g).tolist()), T]
        case = make_case(step, T=T, D=8, E=8, K=3, absent=0.3)
        want = run_case(case, DispatchConfig())
        assert_same_bits(
            joined(ranks.run(4, lambda c, case=case, cuts=cuts: run_case(case, config, c, cuts=cuts))), want
        )


def _only(case: Case, experts: list[int]) -> Case:
    """The same case with every token on the given experts."""
    ids = torch.tensor(experts, dtype=torch.int32).expand(case.ids_TK.shape[0], len(experts)).contiguous()
    return Case(case.x_TD, ids, case.w_TK[:, : len(experts)], case.dy_TD, case.experts)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("experts", [[0], [7], [2, 3], [0, 7]])
def test_idle_ranks_and_experts(ranks: ThreadRanks, backend: str, experts: list[int]) -> None:
    """All tokens on one rank: the others give zeros, not None, and nobody hangs."""
    case = _only(make_case(3, T=10, D=8, E=8, K=2, absent=0.0), experts)
    want = run_case(case, DispatchConfig())
    config = config_for(backend)
    got = joined(ranks.run(4, lambda context: run_case(case, config, context)), replicated=backend == "replicated")
    assert_same_bits(got, want)
    idle = [e for e in range(8) if e not in experts]
    assert torch.count_nonzero(got.d_experts[idle]) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_slot_at_all(ranks: ThreadRanks, backend: str) -> None:
    case = make_case(4, T=6, D=8, E=8, K=2, absent=1.0)
    config = config_for(backend)
    got = joined(ranks.run(2, lambda context: run_case(case, config, context)), replicated=backend == "replicated")
    for tensor in (got.y, got.dx, got.dw, got.d_experts):
        assert torch.count_nonzero(tensor) == 0


@pytest.mark.parametrize("backend", BACKENDS)
def test_twice_the_same_bits(ranks: ThreadRanks, backend: str) -> None:
    """Also for a number of ranks that does not divide the tree's blocks."""
    case = make_case(5, T=40, D=16, E=12, K=4)
    config = config_for(backend, combine_format="bf16")
    first, second = (ranks.run(3, lambda context: run_case(case, config, context)) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert_same_bits(a, b)


def _oracle(case: Case, *, before: bool) -> tuple[torch.Tensor, ...]:
    x, w, experts = (t.double().requires_grad_() for t in (case.x_TD, case.w_TK, case.experts))
    y = oracle_dispatch.layer(x, case.ids_TK.tolist(), w, experts, before=before)
    return y.detach(), *torch.autograd.grad(y, (x, w, experts), case.dy_TD.double())


@pytest.mark.parametrize("size", [1, 3, 4])
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apply_probs", PROBS)
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_fp64_oracle(
    ranks: ThreadRanks, size: int, backend: str, apply_probs: str, rows: str, dtype: torch.dtype
) -> None:
    """Values and all gradients against literal loops, with random upstream gradients."""
    case = make_case(6, T=17, D=8, E=12, K=3, dtype=dtype)
    config = config_for(backend, apply_probs=apply_probs, rows=rows)
    replicated = backend == "replicated" and size > 1
    if size == 1:
        got = run_case(case, config)
    else:
        got = joined(ranks.run(size, lambda context: run_case(case, config, context)), replicated=replicated)
    wants = _oracle(case, before=apply_probs == "activation")
    bound = 1e-12 if dtype == torch.float64 else 5e-6
    for got_one, want in zip((got.y, got.dx, got.dw, got.d_experts), wants, strict=True):
        assert got_one.dtype == dtype
        error = (got_one.double() - want).abs().max() / want.abs().max()
        assert error < bound, error


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("wire", ["input", "bf16", "fp32"])
def test_bf16_rows(ranks: ThreadRanks, size: int, wire: str) -> None:
    case = make_case(7, T=24, D=16, E=8, K=3, dtype=torch.bfloat16)
    config = DispatchConfig(backend="all_to_all" if size > 1 else "auto", combine_format=wire)
    if size == 1:
        got = run_case(case, config)
    else:
        got = joined(ranks.run(size, lambda context: run_case(case, config, context)))
    wants = _oracle(case, before=True)
    for got_one, want in zip((got.y, got.dx, got.dw, got.d_experts), wants, strict=True):
        assert (got_one.double() - want).abs().max() / want.abs().max() < 2e-2
    if wire == "fp32" and size > 1:
        # the wire keeps fp32, so that only the rank tree and one last rounding remain: the bits of one rank
        assert_same_bits(got, run_case(case, DispatchConfig(combine_format="fp32")))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apply_probs", PROBS)
def test_bf16_wire_rounds_local_rows_too(ranks: ThreadRanks, backend: str, apply_probs: str) -> None:
    """With every token on one rank's experts nothing is added at home: the rounding alone shows, and is the same at R =
    1."""
    case = _only(make_case(8, T=12, D=8, E=8, K=2, absent=0.0), [0, 1])
    one = run_case(case, DispatchConfig(combine_format="bf16", apply_probs=apply_probs))
    assert torch.equal(one.dx, one.dx.bfloat16().float())
    assert not torch.equal(one.y, run_case(case, DispatchConfig(apply_probs=apply_probs)).y)
    config = config_for(backend, combine_format="bf16", apply_probs=apply_probs)
    got = joined(ranks.run(2, lambda context: run_case(case, config, context)), replicated=backend == "replicated")
    assert_same_bits(got, one)


def test_cuts_are_shares() -> None:
    assert even_cuts(10, 4) == [0, 2, 5, 7, 10]
