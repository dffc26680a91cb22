"""Bytes and time of an expert-parallel exchange, from counts alone: what more ranks than were measured would take.

Routing is uniform: every token chooses K distinct experts of E at random. A token then needs a given rank (E/R experts)
with probability 1 - C(E-E/R, K) / C(E, K), which for many experts is 1 - (1-1/R)^K. A deduplicated row travels once to
each remote rank that a token needs; without deduplication K*(R-1)/R copies of it leave the rank. The link and the
local memory work at the same time, so a trip takes the longer of the two plus a fixed cost.

Shape letters: T tokens of a rank, D hidden, E experts, K top-k, R ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import comb

# Two H200s, measured: SM movers over NVLink, HBM copy (read + write), one flag round and two launches.
LINK_GBPS = 340.0
MEMORY_GBPS = 3800.0
FIXED_US = 18.0


def needed_share(num_experts: int, top_k: int, *, parts: int) -> float:
    """Probability that a token needs one given of `parts` equal parts of the experts.

    Raises:
        ValueError: the experts do not split into `parts`, or there are fewer experts than `top_k`.
    """
    if parts < 1 or num_experts % parts or not 0 < top_k <= num_experts:
        raise ValueError(
            f"num_experts ({num_experts}) must be divisible by parts ({parts}) and at least top_k ({top_k}); change one"
        )
    return 1.0 - comb(num_experts - num_experts // parts, top_k) / comb(num_experts, top_k)


@dataclass(frozen=True)
class Exchange:
    """One dispatch or combine on one rank.

    Attributes:
        rows: deduplicated rows that leave the rank, per token. plain_rows: without deduplication.
        bytes, plain_bytes: the same for all tokens.
        wire_us, plain_wire_us: on the link. memory_us: the expansion to expert-major rows, or the sum of a token's rows
            before the return trip, in local memory. total_us: the longer of link and memory, plus the fixed cost.
    """

    rows: float
    plain_rows: float
    bytes: float
    plain_bytes: float
    wire_us: float
    plain_wire_us: float
    memory_us: float
    total_us: float


def exchange(
    *,
    tokens: int,
    hidden: int,
    num_experts: int,
    top_k: int,
    ranks: int,
    row_bytes: float | None = None,
    link_gbps: float = LINK_GBPS,
    memory_gbps: float = MEMORY_GBPS,
    fixed_us: float = FIXED_US,
) -> Exchange:
    """Bytes and time of one trip; `row_bytes` of a row on the wire defaults to 2*D (bf16).

    Raises:
        ValueError: see `needed_share`.
    """
    share = needed_share(num_experts, top_k, parts=ranks)
    row_bytes = 2.0 * hidden if row_bytes is None else row_bytes
    rows, plain_rows = (ranks - 1) * share, top_k * (ranks - 1) / ranks
    expanded = tokens * (top_k + ranks * share) * 2.0 * hidden  # written: T*K rows in bf16; read: those received once
    wire_us, memory_us = tokens * rows * row_bytes / link_gbps * 1e-3, expanded / memory_gbps * 1e-3
    return Exchange(
        rows=rows,
        plain_rows=plain_rows,
        bytes=tokens * rows * row_bytes,
        plain_bytes=tokens * plain_rows * row_bytes,
        wire_us=wire_us,
        plain_wire_us=tokens * plain_rows * row_bytes / link_gbps * 1e-3,
        memory_us=memory_us,
        total_us=max(wire_us, memory_us) + fixed_us,
    )


def table(*, link_gbps: float = LINK_GBPS) -> str:
    """Markdown: DeepSeek-V3's and qwen3-30b's exchange at R = 2, 4, 8, bf16 and fp8 rows."""
    lines = [
        "| T D E K | R | rows a token: ours / plain | MB out: bf16 / fp8 / plain bf16 | wire us: bf16 / fp8 / plain |"
        " memory us | dispatch us: bf16 / fp8 compact |",
        "|---|---|---|---|---|---|---|",
    ]
    for tokens, hidden, experts, top_k in ((4096, 7168, 256, 8), (4096, 2048, 128, 8)):
        for ranks in (2, 4, 8):
            sizes = {"tokens": tokens, "hidden": hidden, "num_experts": experts, "top_k": top_k, "ranks": ranks}
            wide = exchange(**sizes, link_gbps=link_gbps)
            fp8 = exchange(**sizes, row_bytes=hidden + 4 * -(-hidden // 128), link_gbps=link_gbps)
            lines.append(
                f"| {tokens} {hidden} {experts} {top_k} | {ranks} | {wide.rows:.2f} / {wide.plain_rows:.0f} | "
                f"{wide.bytes * 1e-6:.0f} / {fp8.bytes * 1e-6:.0f} / {wide.plain_bytes * 1e-6:.0f} | "
                f"{wide.wire_us:.0f} / {fp8.wire_us:.0f} / {wide.plain_wire_us:.0f} | {wide.memory_us:.0f} | "
                f"{wide.total_us:.0f} / {fp8.wire_us + FIXED_US:.0f} |"
            )
    return "\n".join(lines)
