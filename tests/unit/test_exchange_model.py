"""The exchange model's arithmetic, against the plan of random routing and against the survey's own numbers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moe_layer.dispatch import make_plan
from moe_layer.observe.exchange_model import FIXED_US, exchange, needed_share, table


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("top_k", [1, 3, 8])
def test_rows_are_what_random_routing_sends(ranks: int, top_k: int) -> None:
    """Rows per token against the deduplicated plan of 20000 random tokens: within 4 standard errors."""
    tokens, experts = 20000, 32
    ids = torch.rand(tokens, experts, generator=torch.Generator().manual_seed(ranks)).topk(top_k).indices
    plan = make_plan(ids.int(), num_experts=experts, num_ranks=ranks)
    found = exchange(tokens=tokens, hidden=8, num_experts=experts, top_k=top_k, ranks=ranks)
    needed = plan.send_counts_R.sum() / tokens  # this rank's own included
    assert float(needed) == pytest.approx(ranks * needed_share(experts, top_k, parts=ranks), abs=4 * ranks / 2 / 141)
    plain = (ids // (experts // ranks) != 0).sum() / tokens
    assert float(plain) == pytest.approx(found.plain_rows, abs=4 * top_k / 2 / 141)
    assert found.rows == pytest.approx(found.plain_rows) if top_k == 1 else found.rows < found.plain_rows


@pytest.mark.parametrize(
    ("ranks", "rows", "plain", "megabytes", "plain_megabytes", "microseconds", "plain_microseconds"),
    [(2, 0.996, 4, 58, 235, 172, 691), (4, 2.7, 6, 159, 352, 466, 1036), (8, 4.59, 7, 270, 411, 794, 1209)],
)
def test_reference_table(
    ranks: int,
    rows: float,
    plain: float,
    megabytes: float,
    plain_megabytes: float,
    microseconds: float,
    plain_microseconds: float,
) -> None:
    """The survey's table for T=4096, D=7168, K=8, which takes K choices with repetition: within 1% at 256 experts."""
    found = exchange(tokens=4096, hidden=7168, num_experts=256, top_k=8, ranks=ranks)
    assert found.rows == pytest.approx(rows, rel=1e-2) and found.plain_rows == plain
    assert found.bytes * 1e-6 == pytest.approx(megabytes, rel=1.5e-2)
    assert found.plain_bytes * 1e-6 == pytest.approx(plain_megabytes, rel=1.5e-2)
    assert found.wire_us == pytest.approx(microseconds, rel=1.5e-2)
    assert found.plain_wire_us == pytest.approx(plain_microseconds, rel=1.5e-2)


def test_time_is_the_slower_of_link_and_memory() -> None:
    sizes = {"tokens": 1000, "hidden": 100, "num_experts": 8, "top_k": 8, "ranks": 2}
    link = exchange(**sizes, link_gbps=1.0, memory_gbps=1e6)
    assert link.rows == 1.0 and link.wire_us == pytest.approx(1000 * 200 / 1e9 * 1e6)
    assert link.total_us == pytest.approx(link.wire_us + FIXED_US)
    memory = exchange(**sizes, link_gbps=1e6, memory_gbps=1.0)
    assert memory.memory_us == pytest.approx(1000 * 200 * (8 + 2) / 1e9 * 1e6)
    assert memory.total_us == pytest.approx(memory.memory_us + FIXED_US)


def test_bad_sizes() -> None:
    with pytest.raises(ValueError, match=r"num_experts \(10\) must be divisible by parts \(4\)"):
        needed_share(10, 2, parts=4)
    with pytest.raises(ValueError, match=r"at least top_k \(9\)"):
        needed_share(8, 9, parts=4)


def test_the_page_shows_this_table() -> None:
    page = Path(__file__).resolve().parents[2] / "docs/dispatch.md"
    assert table() in page.read_text(), "docs/dispatch.md: paste the output of moe-layer bench dispatch --model"
