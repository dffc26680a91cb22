"""`moe-layer env`: every absent part names its reason."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import moe_layer
from moe_layer.observe import env


def test_report_names_every_part() -> None:
    lines = env.report().splitlines()
    names = {line.split("  ", 1)[0].strip() for line in lines}
    expected = {"moe-layer", "git", "python", "torch", "cuda", "nvcc", "extension", "distributed", "apex"}
    assert expected | {"quack-kernels", "transformer-engine", "transformers", "megatron-core", "triton"} <= names
    assert all(line.split("  ", 1)[1].strip() for line in lines), "a part without a value or a reason"
    assert any(moe_layer.__version__ in line for line in lines)
    assert any(torch.__version__ in line for line in lines)


def test_pypi_apex_is_told_apart(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex/__init__.py").touch()
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    text = env.apex()
    assert "another project called apex" in text and "pip uninstall apex" in text
    (tmp_path / "apex/optimizers").mkdir()
    assert env.apex() == "NVIDIA apex, with apex.optimizers"


def test_no_apex(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert env.apex().startswith("not installed")


def test_git_state(tmp_path: Path) -> None:
    assert env.git_state(tmp_path) == "not a git checkout"


def test_optional_gives_the_install_line() -> None:
    assert env.optional("no-such-distribution") == "not installed (pip install no-such-distribution)"


def test_command() -> None:
    done = subprocess.run([sys.executable, "-m", "moe_layer", "env"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "extension" in done.stdout
