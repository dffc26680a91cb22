"""Tiles of the six QuACK GEMMs on Hopper, by shape; measured, never autotuned at run time.

Figures behind the table: one H200, torch 2.11.0+cu130, quack-kernels 0.6.5 (docs/benchmarks/quack_tiles.jsonl;
`moe-layer bench tune` writes one for another GPU).
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Tile(NamedTuple):
    """CTA tile m x n, cluster m x n, ping-pong or cooperative warpgroups."""

    m: int
    n: int
    cluster_m: int
    cluster_n: int
    pingpong: bool


class Tiles(NamedTuple):
    """One tile per GEMM, in the order of a step."""

    up: Tile
    down: Tile
    d_activation: Tile
    d_down: Tile
    d_x: Tile
    d_gate_up: Tile


SMALL_GROUP = 640
"""Rows per expert below which a 256-row quantum wastes more than the multicast of a 2x1 cluster saves."""


@functools.lru_cache(maxsize=256)
def choose_tiles(*, rows_per_expert: float, hidden: int, width: int) -> Tiles:
    """Tiles for an average number of rows per expert, hidden size D and expert width F."""
    small = rows_per_expert < SMALL_GROUP
    narrow = width <= 256
    return Tiles(
        up=Tile(128, 256, 1, 1, False) if small else Tile(128, 192, 2, 1, True),
        down=Tile(128, 192, 1, 2, True) if narrow else Tile(128, 256, 1, 2, False),
        d_activation=Tile(128, 128, 1 if small else 2, 1, True),
        d_down=Tile(128, 256, 2, 1, False),
        d_x=Tile(128, 192, 2, 1, True) if narrow else Tile(128, 256, 1, 2, False),
        d_gate_up=Tile(128, 256, 2, 1, False),
    )
