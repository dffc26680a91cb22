"""The programs in examples/ do what they print."""

from __future__ import annotations

import os
import re
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


@pytest.mark.dist
def test_own_model_on_two_ranks_is_that_on_one() -> None:
    """The ranks' losses are of half a batch each; their mean is one rank's."""
    one = runpy.run_path(str(ROOT / "examples/own_model.py"))["train"]()
    done = torchrun("examples/own_model.py")
    assert done.returncode == 0, done.stderr
    found = re.findall(r"rank \d: loss (\S+) -> (\S+) nats", done.stdout)
    assert len(found) == 2
    first, last = (sum(float(rank[i]) for rank in found) / 2 for i in range(2))
    assert first == pytest.approx(one[0], abs=0.011) and last == pytest.approx(one[-1], abs=0.03)


def test_dispatcher_only_on_one_rank() -> None:
    y, expected = runpy.run_path(str(ROOT / "examples/dispatcher_only.py"))["run"]()
    torch.testing.assert_close(y, expected)


@pytest.mark.dist
def test_dispatcher_only_on_two_ranks() -> None:
    done = torchrun("examples/dispatcher_only.py")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("y is right") == 2


def torchrun(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", program]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=100, env=env)
