"""Injected faults over gloo, sixteen, and over nvlink's windows in shared memory, one of each kind: every survivor says
who failed, where, in time (rules: scripts/faults.py)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.dist
@pytest.mark.slow
@pytest.mark.parametrize(("backend", "n"), [("all_to_all", 16), ("nvlink", 8), ("nvlink:dense", 8)])
def test_every_survivor_reports(backend: str, n: int) -> None:
    command = [sys.executable, "scripts/faults.py", "--n", str(n), "--deadline", "1", "--seed", "1", "--slack", "6"]
    command += ["--backend", backend, "--jobs", "4"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=110)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"faults: {n}/{n} injections reported by every survivor" in done.stdout


def test_bad_arguments() -> None:
    done = subprocess.run(
        [sys.executable, "scripts/faults.py", "--kinds", "kill,flood"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 2 and "flood" in done.stderr and "Traceback" not in done.stderr
