"""`moe-layer config ...`: output, exit codes, one message instead of a traceback."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from moe_layer.cli import COMMANDS, main
from moe_layer.config import load_config
from tests.unit.config_cases import LAYER, ROOT, write


def test_show_prints_every_value_with_its_origin(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = write(tmp_path, "base: gpt-oss-20b\nexperts:\n  recompute: h\n")
    assert main(["config", "show", path, "router.top_k=2"]) == 0
    rows = {line.split()[0]: line.split(maxsplit=2)[1:] for line in capsys.readouterr().out.splitlines()[1:]}
    assert rows["router.top_k"] == ["2", "override 'router.top_k=2'"]
    assert rows["experts.recompute"] == ["'h'", f"{path}:3:14"]
    assert rows["hidden_size"] == ["2880", "preset gpt-oss-20b:3:14"]
    assert rows["router.expert_bias"] == ["false", "default"]
    assert rows["shared_expert"] == ["null", "default"]


def test_show_yaml_is_a_complete_config(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "show", "--yaml", "kimi-k2", "router.top_k=2"]) == 0
    text = capsys.readouterr().out
    assert load_config(write(tmp_path, text)) == load_config("kimi-k2", ["router.top_k=2"])


def test_check_reports_all_files(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good, bad = write(tmp_path, LAYER), write(tmp_path, LAYER.replace("2", "x"), "bad.yaml")
    assert main(["config", "check", good, "mixtral-8x7b"]) == 0
    assert capsys.readouterr().out == f"ok  {good} (MoEConfig)\nok  mixtral-8x7b (MoEConfig)\n"
    assert main(["config", "check", good, bad, str(tmp_path / "none.yaml")]) == 2
    captured = capsys.readouterr()
    assert captured.out == f"ok  {good} (MoEConfig)\n"
    assert captured.err == (
        f"moe-layer: 3 problems in the configuration:\n"
        f"  {bad}:1:14: hidden_size: expected an integer >= 1 and <= 1048576, got '3x'\n"
        f"  {bad}:4:10: router.top_k: expected an integer >= 1, got 'x'\n"
        f"  {tmp_path}/none.yaml: cannot be read (No such file or directory); give the path of a YAML file\n"
    )


def test_schema_and_reference(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["config", "schema"]) == 0
    assert capsys.readouterr().out == (ROOT / "configs/schema.json").read_text(encoding="utf-8")
    assert main(["config", "reference"]) == 0
    assert capsys.readouterr().out == (ROOT / "docs/config.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("arguments", [[], ["nonsense"], ["config"], ["config", "show"], ["--nonsense"]])
def test_wrong_command_lines(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("usage: moe-layer") and "Traceback" not in captured.err


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"]) == 0
    out = capsys.readouterr().out
    for name, (_, text) in COMMANDS.items():
        assert name in out and text.split()[0] in out


def test_a_users_error_gives_exit_code_2_and_one_line() -> None:
    """As a process: no traceback; MOE_LAYER_LOG=debug shows it."""
    command = [sys.executable, "-m", "moe_layer", "config", "show", "mixtral-8x7b", "router.top_k=9"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr == (
        "moe-layer: override 'router.top_k=9': router: top_k (9) must not exceed num_experts (8); "
        "lower top_k or add experts\n"
    )
    debug = {**os.environ, "MOE_LAYER_LOG": "debug"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, env=debug)
    assert result.returncode == 1 and "Traceback" in result.stderr


def test_the_reader_of_a_pipe_may_leave() -> None:
    command = f"{sys.executable} -m moe_layer config reference | head -1"
    result = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {command}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0 and result.stderr == "" and result.stdout == "# Configuration\n"
