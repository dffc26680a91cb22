"""Log line, load statistics, bar chart, metric files."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_layer.observe.metrics import (
    MetricsWriter,
    format_line,
    layer_load,
    load_metrics,
    read_metrics,
    short_number,
    short_time,
)
from moe_layer.observe.plots import plot_run
from moe_layer.train.report import load_chart

VALUES = {
    "loss/train": 5.8121,
    "loss/aux": 0.0113,
    "loss/z": 0.0021,
    "moe/dropped": 0.0,
    "perf/tokens_per_s": 41234.0,
    "perf/eta_s": 130.0,
    **load_metrics([[2, 2, 2, 2], [4, 4, 0, 0]]),
}


def test_log_line() -> None:
    line = format_line(120, 500, VALUES)
    assert line == (
        "step 120/500  loss 5.812  aux 0.0113  z 0.0021  imb 1.50 (max L1 2.00)  drop 0.0%  tok/s 41k  eta 2m10s"
    )
    on_gpu = format_line(1, 2, {**VALUES, "perf/tflops": 388.04, "perf/mfu": 0.392, "perf/memory_gib": 41.21})
    assert "TFLOP/s 388.0  MFU 39.2%  mem 41.2 GiB" in on_gpu


def test_load_statistics() -> None:
    load = layer_load([4, 4, 0, 0])
    assert (load.imbalance, load.dead) == (2.0, 2) and load.entropy == pytest.approx(0.5)
    assert layer_load([0, 0]).imbalance == 0.0
    values = load_metrics([[1, 1], [3, 1]])
    assert values["moe/imbalance/layer_01"] == 1.5 and values["moe/imbalance/max_layer"] == 1


@pytest.mark.parametrize(("value", "text"), [(7, "7"), (1500, "1.5k"), (41234, "41k"), (2.5e6, "2.5M"), (3e12, "3.0T")])
def test_short_number(value: float, text: str) -> None:
    assert short_number(value) == text


@pytest.mark.parametrize(("value", "text"), [(9, "9s"), (130, "2m10s"), (7300, "2h01m")])
def test_short_time(value: float, text: str) -> None:
    assert short_time(value) == text


def test_bar_chart_shows_balance_death_and_numbers() -> None:
    chart = load_chart([[10, 10, 10, 10], [40, 0, 20, 20]], layers=[0, 3]).splitlines()
    assert "▄ ▄ ▄ ▄" in chart[1] and "imb 1.00" in chart[1]
    assert (
        "█ x ▄ ▄" in chart[2]
        and "L3" in chart[2]
        and "min 0.0% (e1)  max 50.0% (e0)" in chart[2]
        and "dead 1" in chart[2]
    )
    assert load_chart([[1, 1]], encoding="ascii").isascii()
    assert len(load_chart([[1] * 256]).splitlines()) == 5


def test_metrics_resume_drops_the_abandoned_future_and_torn_lines(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path) as writer:
        for step in range(1, 6):
            writer.write(step, "train", {"loss/train": float(step), "perf/mfu": None, "moe/counts": [[1]]})
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "ki')
    with MetricsWriter(tmp_path, resume_step=3) as writer:
        writer.write(4, "train", {"loss/train": 40.0})
    assert [(r["step"], r["loss/train"]) for r in read_metrics(tmp_path)] == [(1, 1.0), (2, 2.0), (3, 3.0), (4, 40.0)]
    assert "perf/mfu" not in read_metrics(tmp_path)[0]


def test_plot_from_metrics(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="load.png is optional")
    records = [{"step": s, "kind": "train", **VALUES, "moe/counts": [[1, 2, 3, 2], [4, 4, 0, 0]]} for s in (1, 2)]
    records.append({"step": 2, "kind": "val", "loss/val": 5.0, "moe/counts": [[2, 2, 2, 2], [4, 4, 0, 0]]})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    path = plot_run(tmp_path)
    assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 20_000
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(ValueError, match="no training step yet"):
        plot_run(tmp_path)
