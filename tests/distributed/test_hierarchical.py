"""`p2p_world_size` < R: the bits of `all_to_all`, and a token crosses once per remote domain, both ways."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import ConfigError, DispatchTimeout, RankMismatch
from moe_layer.parallel import compat
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import Case, assert_same_bits, even_cuts, joined, make_case, run_case
from tests.distributed.ranks import ThreadRanks

SPLITS = [(4, 2), (4, 1), (8, 2), (8, 4)]


@pytest.mark.parametrize(("size", "domain"), SPLITS)
@pytest.mark.parametrize("apply_probs", ["activation", "combine", "source"])
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
def test_bits_of_one_rank(ranks: ThreadRanks, size: int, domain: int, apply_probs: str, rows: str) -> None:
    """y, dx, dprobs and expert dW in fp32."""
    case = make_case(size + domain, T=26, D=16, E=16, K=5)
    want = run_case(case, DispatchConfig(apply_probs=apply_probs, rows=rows))
    config = DispatchConfig(backend="all_to_all", apply_probs=apply_probs, rows=rows, p2p_world_size=domain)
    assert_same_bits(joined(ranks.run(size, lambda context: run_case(case, config, context))), want)


@pytest.mark.parametrize(("size", "domain"), SPLITS)
@pytest.mark.parametrize(
    "options",
    [
        {"combine_format": "bf16"},
        {"dispatch_format": "fp8_1x128"},
        {"alignment": 8},
        {"capacity": "static", "static_factor": 2.0, "max_tokens_per_rank": 13},
        {"capacity": "static", "static_factor": 0.5, "max_tokens_per_rank": 13, "overflow": "drop"},
    ],
    ids=lambda options: "-".join(map(str, options.values())),
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bits_of_all_to_all(
    ranks: ThreadRanks, size: int, domain: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    """Every format and capacity rule: what is rounded, dropped or padded does not depend on the way."""
    case = make_case(size * domain, T=26, D=16, E=16, K=4, dtype=dtype)
    flat, staged = (DispatchConfig(backend="all_to_all", p2p_world_size=p2p, **options) for p2p in (None, domain))
    want = joined(ranks.run(size, lambda context: run_case(case, flat, context)))
    assert_same_bits(joined(ranks.run(size, lambda context: run_case(case, staged, context))), want)


def test_any_split_of_the_tokens(ranks: ThreadRanks) -> None:
    """Other token counts every step, zero on one or all ranks included, on the same groups."""
    g = torch.Generator().manual_seed(0)
    config = DispatchConfig(backend="all_to_all", p2p_world_size=2)
    for step in range(16):
        T = int(torch.randint(0, 30, (), generator=g)) if step % 8 else 0
        cuts = [0, *sorted(torch.randint(0, T + 1, (3,), generator=g).tolist()), T]
        case = make_case(step, T=T, D=8, E=8, K=3, absent=0.3)
        want = run_case(case, DispatchConfig())
        got = ranks.run(4, lambda c, case=case, cuts=cuts: run_case(case, config, c, cuts=cuts))
        assert_same_bits(joined(got), want)


@contextmanager
def counted(rows: list[tuple[int, int, int]]) -> Iterator[None]:
    """Every all-to-all as (bytes a row, rows that stay in the sender's domain, rows that leave it), domains of 2."""
    original = compat.all_to_all

    def all_to_all(group: Any, out: Any, source: Any, *, out_rows: list[int], in_rows: list[int]) -> Any:
        mine = group.rank() // 2
        inside = sum(count for rank, count in enumerate(in_rows) if rank // 2 == mine)
        if source.ndim == 2 and source.dtype == torch.uint8:  # rows; headers are int64
            rows.append((source.shape[1], inside, sum(in_rows) - inside))
        return original(group, out, source, out_rows=out_rows, in_rows=in_rows)

    compat.all_to_all = all_to_all
    try:
        yield
    finally:
        compat.all_to_all = original


def pairs(case: Case, parts: int) -> int:
    """(token, part) pairs with the token's home part left out: rows that must leave it."""
    cuts, total = even_cuts(case.x_TD.shape[0], 4), 0
    for rank in range(4):
        for row in case.ids_TK[cuts[rank] : cuts[rank + 1]].tolist():
            total += len({e * parts // case.num_experts for e in row if e >= 0} - {rank * parts // 4})
    return total


def test_a_token_crosses_once(ranks: ThreadRanks) -> None:
    """R = 4, domains of 2, D = 20 so that rows of x and of partial sums (80 bytes) are recognised."""
    case = make_case(5, T=40, D=20, E=8, K=5)
    seen: dict[int | None, list[tuple[int, int, int]]] = {}
    for domain in (None, 2):
        config = DispatchConfig(backend="all_to_all", p2p_world_size=domain)
        with counted(seen.setdefault(domain, [])):
            ranks.run(4, lambda context, config=config: run_case(case, config, context))
    crossing = {domain: sum(out for width, _, out in found if width == 80) for domain, found in seen.items()}
    once = pairs(case, 2)
    assert crossing[2] == 4 * once  # dispatch, combine, and their backwards
    assert crossing[None] > crossing[2] > 0
    stages = [out for width, inside, out in seen[2] if width == 80 and inside]
    assert any(out == 0 for out in stages), "the second stage stays inside"


def test_a_missing_rank_is_named(ranks: ThreadRanks) -> None:
    config = DispatchConfig(backend="all_to_all", p2p_world_size=2, deadline_s=0.5)
    case = make_case(0, T=8, D=8, E=8, K=2)

    def work(context: ParallelContext) -> Any:
        dispatcher = make_dispatcher(config, num_experts=8, top_k=2, context=context)
        if context.ep_rank == 3:
            return None
        routing = Routing(ids_TK=case.ids_TK, weights_TK=case.w_TK, counts_E=torch.zeros(8, dtype=torch.int32))
        return dispatcher.dispatch(case.x_TD, routing)

    errors = ranks.run(4, work, fresh=True)
    for error in errors[:3]:
        assert isinstance(error, DispatchTimeout | RankMismatch), error
    assert any("ranks [3] of 4 did not report" in str(error) for error in errors)


def test_domains_must_be_equal(ranks: ThreadRanks) -> None:
    def work(context: ParallelContext) -> str:
        config = DispatchConfig(backend="all_to_all", p2p_world_size=3)
        with pytest.raises(ConfigError) as caught:
            make_dispatcher(config, num_experts=8, top_k=2, context=context)
        return str(caught.value)

    for text in ranks.run(4, work):
        assert text.startswith("dispatch.p2p_world_size (3) must divide parallel.ep (4)")
