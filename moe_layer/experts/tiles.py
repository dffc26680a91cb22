"""Tiles of the QuACK GEMMs on Hopper, by shape; measured, never autotuned at run time.

`tiles.json` holds what `moe-layer bench tune` measured: for each (D, F) the best tile of each GEMM at some numbers of
rows per expert. Other shapes follow a rule drawn from the same figures.
"""

from __future__ import annotations

import functools
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

TABLE = Path(__file__).with_name("tiles.json")


class Tile(NamedTuple):
    """CTA tile m x n, cluster m x n, ping-pong or cooperative warpgroups."""

    m: int
    n: int
    cluster_m: int
    cluster_n: int
    pingpong: bool


class Tiles(NamedTuple):
    """One tile per GEMM, in the order of a step; `add_*`: the weight gradients that add to an fp32 main_grad, where
    `add_by_load` reads the old value in the epilogue instead of reducing into memory."""

    up: Tile
    down: Tile
    d_activation: Tile
    d_down: Tile
    d_x: Tile
    d_gate_up: Tile
    add_down: Tile
    add_gate_up: Tile
    add_by_load: bool


SMALL_GROUP = 640
"""Rows per expert below which a 256-row quantum wastes more than the multicast of a 2x1 cluster saves."""


def default_tiles(*, rows_per_expert: float, width: int) -> Tiles:
    """The rule for shapes that the table does not have."""
    small = rows_per_expert < SMALL_GROUP
    narrow = width <= 256
    return Tiles(
        up=Tile(64, 256, 2, 1, True) if small else Tile(128, 192, 2, 1, True),
        down=Tile(128, 192, 1, 2, True) if narrow else Tile(128, 256, 1, 2, False),
        d_activation=Tile(64, 256, 2, 1, True),
        d_down=Tile(128, 256, 2, 1, False),
        d_x=Tile(128, 192, 2, 1, True) if narrow else Tile(128, 256, 1, 2, False),
        d_gate_up=Tile(128, 256, 2, 1, False),
        add_down=Tile(128, 256, 2, 1, False),
        add_gate_up=Tile(128, 256, 2, 1, False),
        add_by_load=False,
    )


@functools.cache
def read_table(path: Path) -> tuple[dict, ...]:
    """Entries {hidden, width, rows_per_expert, gpu, tiles: {gemm: [m, n, cluster_m, cluster_n, pingpong]}}.

    Raises:
        ValueError: an entry names an unknown GEMM or a tile without five fields.
    """
    if not path.is_file():
        return ()
    entries = json.loads(path.read_text())["entries"]
    for entry in entries:
        for name, tile in entry["tiles"].items():
            known = name in Tiles._fields and (isinstance(tile, bool) or len(tile) == len(Tile._fields))
            if not known:
                raise ValueError(
                    f"{path} has {name}: {tile}; write it with `moe-layer bench tune --write`, "
                    f"which knows {', '.join(Tiles._fields)} and tiles of {len(Tile._fields)} fields"
                )
    return tuple(entries)


@functools.lru_cache(maxsize=256)
def choose_tiles(*, rows_per_expert: float, hidden: int, width: int) -> Tiles:
    """Tiles for an average number of rows per expert, hidden size D and expert width F.

    From the table's entry of this (D, F) whose number of rows is nearest in ratio, else from the rule.
    """
    tiles = default_tiles(rows_per_expert=rows_per_expert, width=width)
    fitting = [e for e in read_table(TABLE) if (e["hidden"], e["width"]) == (hidden, width)]
    if not fitting:
        return tiles
    nearest = min(fitting, key=lambda e: abs(math.log(e["rows_per_expert"] / max(rows_per_expert, 1e-3))))
    found: Any = {name: t if isinstance(t, bool) else Tile(*t) for name, t in nearest["tiles"].items()}
    return tiles._replace(**found)


def row_buckets(*, hidden: int, width: int) -> list[int]:
    """Numbers of rows per expert that between them choose all tiles of this shape."""
    entries = [e["rows_per_expert"] for e in read_table(TABLE) if (e["hidden"], e["width"]) == (hidden, width)]
    return sorted({round(rows) for rows in entries}) or [SMALL_GROUP // 2, 2 * SMALL_GROUP]
