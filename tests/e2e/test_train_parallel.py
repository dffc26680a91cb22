"""Expert-parallel training over gloo: the losses of one rank, and checkpoints that move between EP sizes.

Dense gradients are summed in another order at another number of ranks. In fp32 that can flip a near tie of the router,
after which two runs drift apart by 1e-4; a small batch and learning rate keep 50 steps clear of it (four seeds: 2e-7).
The same comparison on tiny.yaml itself is made in fp64 (docs/acceptance.md), where it agrees to 1e-14.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from moe_layer.cli import main
from moe_layer.observe.metrics import read_metrics
from tests.e2e.micro import micro_yaml

ROOT = Path(__file__).parents[2]
OPTIONS = {
    "train.steps": 50,
    "optimizer.lr": 1e-3,
    "train.global_batch": 8,
    "train.val_every": 0,
    "train.checkpoint_every": 30,
    "train.keep_checkpoints": 9,
    "sample.tokens": 2,
}


def _arguments(folder: Path, out: Path, resume: Path | None, options: dict[str, Any]) -> list[str]:
    words = ["train", str(micro_yaml(folder)), "--out", str(out)]
    words += ["--resume", str(resume)] if resume else []
    return words + [f"{key}={value}" for key, value in (OPTIONS | options).items()]


def _one(folder: Path, out: Path, *, resume: Path | None = None, steps: int = 50) -> None:
    assert main(_arguments(folder, out, resume, {"train.micro_batch": 8, "train.steps": steps})) == 0


def _two(folder: Path, out: Path, *, resume: Path | None = None, **options: Any) -> str:
    done = _torchrun(["-m", "moe_layer"], _arguments(folder, out, resume, _TWO | options))
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


_TWO = {"train.micro_batch": 4, "parallel.ep": 2}


def _torchrun(program: list[str], arguments: list[str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *program]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *arguments], env=env, text=True, capture_output=True, timeout=110, check=False)


def _losses(out: Path, *, first: int = 1) -> Tensor:
    rows = [r["loss/train"] for r in read_metrics(out) if r["kind"] == "train" and r["step"] >= first]
    return torch.tensor(rows, dtype=torch.float64)


def _whole_tensors(checkpoint: Path) -> dict[str, Tensor]:
    """Tensors of a checkpoint with the ranks' shards of experts joined, read without the code under test."""
    parts: dict[str, list[Tensor]] = {}
    for file in sorted(checkpoint.glob("shard-*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            for key in handle.keys():  # noqa: SIM118 (a file handle has no __iter__)
                parts.setdefault(key, []).append(handle.get_tensor(key))
    return {key: torch.cat(found) for key, found in parts.items()}


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """50 steps at EP = 1 and at EP = 2, checkpoints after 30 and 50."""
    folder = tmp_path_factory.mktemp("parallel")
    _one(folder, folder / "ep1")
    printed = _two(folder, folder / "ep2")
    assert "2 rank(s) (dp 1 x ep 2)" in printed and printed.count("val_loss") == 1
    return folder / "ep1", folder / "ep2"


@pytest.mark.dist
def test_two_ranks_give_the_losses_and_counts_of_one(runs: tuple[Path, Path]) -> None:
    one, two = (_losses(out) for out in runs)
    assert len(one) == len(two) == 50
    torch.testing.assert_close(two, one, rtol=1e-5, atol=0)
    vals = [[r for r in read_metrics(out) if r["kind"] == "val"][-1] for out in runs]
    assert vals[1]["loss/val"] == pytest.approx(vals[0]["loss/val"], rel=1e-5)
    assert [sum(row) for row in vals[0]["moe/counts"]] == [sum(row) for row in vals[1]["moe/counts"]]


@pytest.mark.dist
def test_a_checkpoint_of_two_ranks_continues_on_one(runs: tuple[Path, Path], tmp_path: Path) -> None:
    middle = runs[1] / "checkpoints" / "step_00000030"
    _one(tmp_path, tmp_path / "loaded", resume=middle, steps=30)
    before, after = _whole_tensors(middle), _whole_tensors(tmp_path / "loaded" / "checkpoints" / "step_00000030")
    assert before.keys() == after.keys()
    assert not [key for key in before if not torch.equal(before[key], after[key])]
    _one(tmp_path, tmp_path / "run", resume=middle)
    torch.testing.assert_close(_losses(tmp_path / "run"), _losses(runs[1], first=31), rtol=1e-5, atol=0)


@pytest.mark.dist
def test_a_checkpoint_of_one_rank_continues_on_two(runs: tuple[Path, Path], tmp_path: Path) -> None:
    middle = runs[0] / "checkpoints" / "step_00000030"
    _two(tmp_path, tmp_path / "run", resume=middle)
    torch.testing.assert_close(_losses(tmp_path / "run"), _losses(runs[0], first=31), rtol=1e-5, atol=0)


@pytest.mark.dist
def test_resume_on_two_ranks_is_bit_exact(runs: tuple[Path, Path], tmp_path: Path) -> None:
    middle = runs[1] / "checkpoints" / "step_00000030"
    _two(tmp_path, tmp_path / "run", resume=middle)
    assert torch.equal(_losses(tmp_path / "run"), _losses(runs[1], first=31))
    before, after = (_whole_tensors(run / "checkpoints" / "step_00000050") for run in (runs[1], tmp_path / "run"))
    assert not [key for key in before if not torch.equal(before[key], after[key])]


@pytest.mark.dist
def test_nvlink_windows_give_the_same_run(runs: tuple[Path, Path], tmp_path: Path) -> None:
    """Resumed with another dispatcher (its windows in shared memory): losses and checkpoint bit for bit."""
    options = {"moe.dispatch.backend": "nvlink", "moe.dispatch.max_tokens_per_rank": 128}
    _two(tmp_path, tmp_path / "run", resume=runs[1] / "checkpoints" / "step_00000030", **options)
    assert torch.equal(_losses(tmp_path / "run"), _losses(runs[1], first=31))
    before, after = (_whole_tensors(run / "checkpoints" / "step_00000050") for run in (runs[1], tmp_path / "run"))
    assert not [key for key in before if not torch.equal(before[key], after[key])]


_ONE_DIFFERS = """
import os, sys
from moe_layer.cli import main
sys.exit(main([*sys.argv[1:], *(["seed=4", "train.log_every=2"] if os.environ["RANK"] == "1" else [])]))
"""


@pytest.mark.dist
def test_ranks_with_different_commands_say_so(tmp_path: Path) -> None:
    """Another seed would train on other data without a word, another log interval would end in a timeout."""
    program = tmp_path / "program.py"
    program.write_text(_ONE_DIFFERS)
    done = _torchrun([str(program)], _arguments(tmp_path, tmp_path / "out", None, _TWO))
    assert done.returncode != 0
    expected = (
        "moe-layer: ranks disagree about seed: 0 on rank 0, 4 on rank 1; train.log_every: 1 on rank 0, 2 on rank 1; "
        "start every rank with the same command and files"
    )
    assert expected in done.stderr.splitlines(), done.stderr[-3000:]
    assert not (tmp_path / "out").exists()
