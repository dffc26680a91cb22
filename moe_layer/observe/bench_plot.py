"""Bars of `moe-layer bench layer`'s rows. matplotlib (Agg) is imported when a figure is drawn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

VARIANTS = {  # key of a row's `ms`, its label, in the order of the bars
    "gemms": "six GEMMs",
    "graph": "ours, CUDA graph",
    "eager": "ours, eager",
    "sonic_graph": "SonicMoE, CUDA graph",
    "sonic_eager": "SonicMoE, eager",
    "grouped_mm": "ours over torch grouped_mm",
}


def latest_rows(path: Path) -> dict[str, dict[str, Any]]:
    """The last row of each shape (and of each routing) that has timings.

    Raises:
        ValueError: the file has no row of `moe-layer bench layer`, or a line that is no JSON.
    """
    found: dict[str, dict[str, Any]] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}:{number} is no JSON ({error}); give a file of `moe-layer bench layer`") from None
        if "gemms" in row.get("ms", {}):
            name = row["shape"] if "routing" not in row else f"{row['shape']} ({row['routing']})"
            found[name] = row
    if not found:
        raise ValueError(f"{path} has no row of `moe-layer bench layer`; write one with its --out")
    return found


def plot_bench(path: Path, *, out: Path | None = None) -> Path:
    """Draw each shape's variants, as multiples of the run's own six GEMMs.

    Returns:
        The PNG's path (default: beside `path`, with its name).

    Raises:
        ImportError: matplotlib is not installed. ValueError: see `latest_rows`.
    """
    rows = latest_rows(path)
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("a plot needs matplotlib; pip install matplotlib, then: moe-layer plot FILE") from error
    present = [key for key in VARIANTS if any(key in row["ms"] for row in rows.values())]
    figure = Figure(figsize=(3 + 2 * len(rows), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    width = 0.85 / len(present)
    for i, key in enumerate(present):
        bars = [(x, row["ms"][key], row["ms"]["gemms"]) for x, row in enumerate(rows.values()) if key in row["ms"]]
        places = [x + (i - (len(present) - 1) / 2) * width for x, _, _ in bars]
        drawn = axis.bar(places, [ms / gemms for _, ms, gemms in bars], width * 0.95, label=VARIANTS[key])
        axis.bar_label(drawn, [f"{ms:.2f}" for _, ms, _ in bars], fontsize="x-small", rotation=90, padding=2)
    axis.set_xticks(range(len(rows)), list(rows))
    axis.set(ylabel="forward + backward / the run's six GEMMs", title=f"{path.name}: ms above the bars")
    axis.margins(y=0.15)
    axis.legend(fontsize="small")
    target = out or path.with_suffix(".png")
    figure.savefig(target, dpi=110)
    return target
