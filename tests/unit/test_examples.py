"""The programs in examples/ do what they print."""

from __future__ import annotations

import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


def test_own_model_learns() -> None:
    losses = runpy.run_path(str(ROOT / "examples/own_model.py"))["train"](steps=40)
    assert losses[0] > 5.0
    assert losses[-1] < 3.2


def test_dispatcher_only_on_one_rank() -> None:
    y, expected = runpy.run_path(str(ROOT / "examples/dispatcher_only.py"))["run"]()
    torch.testing.assert_close(y, expected)


@pytest.mark.dist
def test_dispatcher_only_on_two_ranks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, "examples/dispatcher_only.py"], capture_output=True, text=True, cwd=ROOT, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("y is right") == 2
