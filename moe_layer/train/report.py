"""What the run says at its end: validation loss, a text bar chart of every layer's expert load, the paths."""

from __future__ import annotations

from collections.abc import Sequence

from moe_layer.observe.metrics import Counts, layer_load

_BARS = "▁▂▃▄▅▆▇█"
_ASCII_BARS = ".:-=+*#@"
_PER_LINE = 64


def load_chart(counts: Counts, *, layers: Sequence[int] | None = None, encoding: str | None = "utf-8") -> str:
    """One bar per expert and a line of numbers per layer; a dead expert shows as `x`.

    Bars are scaled to twice the mean load: a balanced expert is half as high as the tallest bar, and whoever has more
    than twice the mean is cut there (its number is printed).

    Args:
        counts: tokens per expert, one row per MoE layer. layers: block number of each row.
        encoding: of the terminal; ASCII bars unless it is a UTF one.
    """
    bars = _BARS if (encoding or "").lower().replace("-", "").startswith("utf") else _ASCII_BARS
    lines = ["expert load, final validation pass (one bar per expert, half height = the mean, x = no token):"]
    for row, layer in zip(counts, layers if layers is not None else range(len(counts)), strict=True):
        lines += _layer_lines(row, layer, bars)
    return "\n".join(lines)


def _layer_lines(row: Sequence[int], layer: int, bars: str) -> list[str]:
    total = sum(row)
    mean = total / len(row)
    cells = [_bar(count, mean, bars) for count in row]
    joined = " ".join(cells) if len(row) <= _PER_LINE // 2 else "".join(cells)
    width = _PER_LINE
    chunks = [joined[i : i + width] for i in range(0, len(joined), width)]
    load = layer_load(row)
    least, most = min(range(len(row)), key=row.__getitem__), max(range(len(row)), key=row.__getitem__)
    share = 100.0 / max(1, total)
    numbers = (
        f"min {share * row[least]:.1f}% (e{least})  max {share * row[most]:.1f}% (e{most})  "
        f"mean {100 / len(row):.1f}%  imb {load.imbalance:.2f}  dead {load.dead}"
    )
    first = f"  L{layer:<3d} {chunks[0]}  {numbers}"
    return [first, *(f"       {chunk}" for chunk in chunks[1:])]


def _bar(count: int, mean: float, bars: str) -> str:
    if count == 0 or mean == 0:
        return "x"
    level = round(count / (2 * mean) * len(bars)) - 1
    return bars[min(len(bars) - 1, max(0, level))]
