"""`moe-layer bench` finds its scripts and passes their options on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moe_layer.cli import main
from moe_layer.observe import bench, bench_plot


def test_every_named_script_exists() -> None:
    folder = Path(__file__).resolve().parents[2] / "scripts/bench"
    assert all((folder / script).is_file() for script, _ in bench.SCRIPTS.values())


def test_options_reach_the_script(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "layer-cpu", "--help"]) == 0
    assert "--peer" in capfd.readouterr().out


def test_without_a_checkout_it_says_so(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(bench, "__file__", "/nowhere/site-packages/moe_layer/observe/bench.py")
    assert main(["bench", "router"]) == 2
    assert "benchmarks live in the source checkout" in capsys.readouterr().err


def test_dispatch_runs_over_gloo_and_writes_rows(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two real ranks, tiny shapes; what a row says about itself must be arithmetically true."""
    out = tmp_path / "rows.jsonl"
    command = ["bench", "dispatch", "--device", "cpu", "--tiny", "--runs", "2", "--backends", "all_to_all,nonesuch"]
    assert main([*command, "--out", str(out)]) == 0
    assert "nonesuch expert_major: skipped, backend" in capfd.readouterr().out
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    halves = [row for row in rows if row["kind"] != "layer" and not row["case"].startswith("nccl")]
    assert {row["case"] for row in halves} == {
        f"all_to_all {case} {half}"
        for case in ("expert_major+probs", "compact+probs", "fp8 compact")
        for half in ("dispatch", "combine")
    }
    for row in halves:
        assert row["ratio"] == pytest.approx(row["peer_us"] / row["us"], rel=1e-2)
        assert row["GBps"] == pytest.approx(row["bytes"] / row["us"] * 1e-3, abs=0.06)
    sent = {row["case"]: row["bytes"] for row in halves}
    per_row = {"compact+probs dispatch": 256 * 4, "fp8 compact dispatch": 256 + 2 * 4}  # fp32 rows of 256 columns
    rows_sent = {case: sent[f"all_to_all {case}"] / size for case, size in per_row.items()}
    assert len(set(rows_sent.values())) == 1 and 0 < rows_sent["fp8 compact dispatch"] <= 64  # once per remote rank
    layers = [row for row in rows if row["kind"] == "layer"]
    assert {row["case"] for row in layers} == {"all_to_all expert_major", "all_to_all compact"}
    for row in layers:
        assert row["ratio"] == pytest.approx(row["peer_ms"] / row["ms"], rel=1e-2)
        assert row["exposed"] == pytest.approx((row["ms"] - row["copies_ms"]) / row["ms"], abs=1e-3)


def test_replay_writes_a_row(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """On the CPU: what the row says about itself must be arithmetically true; bytes are those of the format."""
    out = tmp_path / "rows.jsonl"
    assert main(["bench", "replay", "--tokens", "48", "--runs", "1", "--sha", "abc", "--output", str(out)]) == 0
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert json.loads(capfd.readouterr().out) == row
    assert (row["mode"], row["git"], row["T_D_F_E_K"]) == ("eager", "abc", [48, 256, 128, 32, 4])
    ms = row["ms"]
    assert row["record_of_step"] == pytest.approx(ms["step, record"] / ms["step"] - 1, abs=1e-2)
    assert row["replay_of_router"] == pytest.approx(ms["router, replay"] / ms["router"] - 1, abs=1e-2)
    assert (row["host_bytes_per_token"], row["format_bytes_per_token"]) == (4, 5)
    assert row["trace_bytes_per_token"] == 5 < row["file_bytes_per_token"]


def test_plot_draws_the_last_row_of_each_shape(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [
        {"shape": "a", "ms": {"gemms": 9.0, "graph": 9.0}},
        {"shape": "a", "ms": {"gemms": 2.0, "graph": 2.5, "sonic_eager": 4.0}},
        {"shape": "a", "routing": "zipf", "ms": {"gemms": 2.0, "graph": 2.6}},
        {"shape": "a", "what": "main_grad", "ms": {"bf16": 1.0}},
    ]
    file = tmp_path / "layer.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = bench_plot.latest_rows(file)
    assert list(found) == ["a", "a (zipf)"] and found["a"]["ms"]["graph"] == 2.5
    pytest.importorskip("matplotlib")
    assert main(["plot", str(file)]) == 0
    assert capsys.readouterr().out.strip() == str(tmp_path / "layer.png")
    assert (tmp_path / "layer.png").read_bytes()[:4] == b"\x89PNG"


def test_plot_of_another_file_says_what_to_give(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"shape": "a"}\n')
    assert main(["plot", str(file)]) == 2
    assert "no row of `moe-layer bench layer`" in capsys.readouterr().err
