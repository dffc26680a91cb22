"""What `moe-layer bench tune` concludes from its measurements; the measurements themselves need a Hopper GPU."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "scripts/bench"
ABOUT = {"gpu": "a GPU", "date": "2026-11-22"}
SHAPE = "qwen3-30b-4k"
A, B, C = (128, 256, 2, 1, False), (128, 192, 2, 1, True), (64, 256, 2, 1, True)


@pytest.fixture(scope="module")
def tune():
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location("tune", FOLDER / "tune.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


def test_finalists_are_the_near_ones_and_never_a_failed_one(tune):
    failed = {"tile": C, "failed": "no answer"}
    tried = [{"tile": A, "us": 112.1}, {"tile": B, "us": 100.0}, failed, {"tile": C, "us": 111.9}]
    assert [row["us"] for row in tune.finalists(tried)] == [100.0, 111.9]
    assert tune.finalists([failed]) == []


def test_the_time_on_a_hot_gpu_decides(tune):
    finals = [{"tile": A, "us": 100.0, "hot_us": 120.0}, {"tile": B, "us": 101.0, "hot_us": 119.0}]
    assert tune.winner_of(finals)["tile"] == B and tune.winner_of(finals)["best_us"] == 119.0
    assert tune.winner_of([*finals[:1], {"tile": C, "us": 90.0}])["tile"] == A  # C's turns failed
    assert tune.winner_of([{"tile": C, "us": 90.0}])["best_us"] == 90.0


def test_both_accumulating_gemms_take_the_way_with_the_smaller_sum(tune):
    best = {
        (SHAPE, "up", False): {"tile": A, "best_us": 5.0},
        (SHAPE, "add_gate_up", False): {"tile": A, "best_us": 10.0},
        (SHAPE, "add_down", False): {"tile": A, "best_us": 10.0},
        (SHAPE, "add_gate_up", True): {"tile": B, "best_us": 11.0},
        (SHAPE, "add_down", True): {"tile": C, "best_us": 8.0},
        ("olmoe-16k", "up", False): {"tile": C, "best_us": 1.0},
    }
    entry = tune.best_of(SHAPE, best, ABOUT)
    assert entry["tiles"] == {"up": list(A), "add_gate_up": list(B), "add_down": list(C), "add_by_load": True}
    assert entry["us"] == {"up": 5.0, "add_gate_up": 11.0, "add_down": 8.0} and entry["rows_per_expert"] == 256
    del best[SHAPE, "add_down", True], best[SHAPE, "add_down", False]
    assert tune.best_of(SHAPE, best, ABOUT)["tiles"] == {"up": list(A)}
    assert tune.best_of("qwen3-next-16k", best, ABOUT) is None


def test_writing_keeps_what_was_not_tried(tune, tmp_path):
    path, place = tmp_path / "tiles.json", {"hidden": 8, "width": 4, "rows_per_expert": 16.0}
    tune.write(path, [{**place, "tiles": {"up": list(A), "down": list(A)}, "us": {"up": 2.0, "down": 1.0}}])
    tune.read_table.cache_clear()
    tune.write(path, [{**place, "tiles": {"up": list(C)}, "us": {"up": 1.5}}])
    (entry,) = json.loads(path.read_text())["entries"]
    assert entry["tiles"] == {"up": list(C), "down": list(A)} and entry["us"] == {"up": 1.5, "down": 1.0}
    tune.read_table.cache_clear()
