"""docs/replay.md: its code runs as printed, in order, and its figures are those of the stored run."""

from __future__ import annotations

import importlib.util
import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/replay.md").read_text()
BLOCKS = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)
RUN = ROOT / "docs/benchmarks/rl_replay.json"


def test_code_blocks_run_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {"__name__": "replay_page"}
    assert len(BLOCKS) >= 5
    for number, block in enumerate(BLOCKS, 1):
        exec(compile(block, f"docs/replay.md block {number}", "exec"), names)


def test_figures_are_those_of_the_stored_run() -> None:
    spec = importlib.util.find_spec("rl")
    if spec is None:
        sys.path.insert(0, str(ROOT / "scripts"))
    from rl.report import MARKER, failures, markdown

    results = json.loads(RUN.read_text())
    assert PAGE.split(MARKER)[1].strip() == markdown(results).strip()
    for name, shape in results["shapes"].items():
        assert not list(failures(name, shape["scoring"], shape["grpo"]))


def test_every_policy_key_is_explained() -> None:
    import dataclasses

    from moe_layer.config import ReplayConfig

    missing = [field.name for field in dataclasses.fields(ReplayConfig) if f"| `{field.name}` |" not in PAGE]
    assert not missing
