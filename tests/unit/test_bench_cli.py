"""`moe-layer bench` finds its scripts and passes their options on."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_layer.cli import main
from moe_layer.observe import bench


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
