"""load.png: where the tokens went. matplotlib (Agg) is imported here and only here."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from moe_layer.observe.metrics import layer_load, read_metrics


def plot_run(folder: Path, *, out: Path | None = None) -> Path:
    """Draw a run's losses, final expert load (layer x expert), load over time and imbalance from its metrics.jsonl.

    Returns:
        The PNG's path (default `folder/load.png`).

    Raises:
        ImportError: matplotlib is not installed. OSError: no metrics.jsonl. ValueError: no step was logged.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("load.png needs matplotlib; pip install matplotlib, then: moe-layer plot RUN") from error
    records = read_metrics(folder)
    train = [r for r in records if r["kind"] == "train"]
    val = [r for r in records if r["kind"] == "val"]
    if not train:
        raise ValueError(f"{folder}/metrics.jsonl has no training step yet; run at least one")
    counted = [r for r in records if "moe/counts" in r]
    figure = Figure(figsize=(13, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    _draw_losses(axes[0][0], train, val)
    _draw_imbalance(axes[0][1], train)
    if counted:
        final = next((r for r in reversed(val) if "moe/counts" in r), counted[-1])
        _draw_heatmap(figure, axes[1][0], final)
        _draw_history(axes[1][1], counted)
    figure.suptitle(f"{folder.name}: {train[-1]['step']} steps")
    path = out or folder / "load.png"
    figure.savefig(path, dpi=110)
    return path


def _draw_losses(axis: Any, train: list[dict[str, Any]], val: list[dict[str, Any]]) -> None:
    axis.plot([r["step"] for r in train], [r["loss/train"] for r in train], lw=1, label="train")
    if val:
        axis.plot(
            [r["step"] for r in val], [r["loss/val"] for r in val], "o-", label=f"validation {val[-1]['loss/val']:.3f}"
        )
    axis.set(title="loss", xlabel="step", ylabel="nats per byte")
    axis.grid(alpha=0.3)
    axis.legend()


def _draw_imbalance(axis: Any, train: list[dict[str, Any]]) -> None:
    steps = [r["step"] for r in train]
    for key in sorted(k for k in train[-1] if k.startswith("moe/imbalance/layer_")):
        axis.plot(steps, [r.get(key) for r in train], lw=1, label=f"L{int(key[-2:])}")
    axis.axhline(1.0, color="grey", lw=0.8, ls="--")
    axis.set(title="imbalance: most loaded expert / mean (1 = balanced)", xlabel="step")
    axis.grid(alpha=0.3)
    axis.legend(ncols=4, fontsize="small")


def _draw_heatmap(figure: Any, axis: Any, record: dict[str, Any]) -> None:
    relative = _relative(record["moe/counts"])
    image = axis.imshow(relative, aspect="auto", cmap="coolwarm", vmin=0.0, vmax=2.0, interpolation="nearest")
    for row, values in enumerate(relative):
        for column, value in enumerate(values):
            if value == 0:
                axis.text(column, row, "x", ha="center", va="center", color="black")
    what = "validation" if record["kind"] == "val" else "training"
    axis.set(title=f"expert load, {what} at step {record['step']} (x = no token)", xlabel="expert", ylabel="MoE layer")
    axis.set_yticks(range(len(relative)))
    figure.colorbar(image, ax=axis, label="load / mean (blue: starved, red: above twice)")


def _draw_history(axis: Any, counted: list[dict[str, Any]]) -> None:
    """Each expert of the least balanced layer over time: the layer to look at first."""
    last = counted[-1]["moe/counts"]
    layer = max(range(len(last)), key=lambda i: layer_load(last[i]).imbalance)
    train = [r for r in counted if r["kind"] == "train"] or counted
    steps = [r["step"] for r in train]
    shares = [_relative(r["moe/counts"])[layer] for r in train]
    for expert in range(len(last[layer])):
        axis.plot(steps, [row[expert] for row in shares], lw=0.8, label=f"e{expert}")
    axis.axhline(1.0, color="grey", lw=0.8, ls="--")
    axis.set(title=f"load / mean of each expert over time, layer {layer} (least balanced)", xlabel="step")
    axis.grid(alpha=0.3)
    if len(last[layer]) <= 16:
        axis.legend(ncols=4, fontsize="x-small")


def _relative(counts: list[list[int]]) -> list[list[float]]:
    return [[count * len(row) / max(1, sum(row)) for count in row] for row in counts]
