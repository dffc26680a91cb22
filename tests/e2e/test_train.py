"""Training from YAML through the command line: what it writes and prints, resume, signals, bad input."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import Tensor

from moe_layer.cli import main
from moe_layer.observe.metrics import read_metrics
from moe_layer.train import checkpoint
from tests.e2e.micro import MICRO, micro_yaml

ROOT = Path(__file__).parents[2]


def _train(folder: Path, *arguments: str) -> int:
    return main(["train", str(micro_yaml(folder)), *arguments])


def _tensors(path: Path) -> dict[str, Tensor]:
    return {f"{file.name}:{k}": v for file in sorted(path.rglob("*.safetensors")) for k, v in load_file(file).items()}


def test_a_run_writes_and_prints_what_it_promises(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert _train(tmp_path, "--out", str(out), "train.steps=30", "train.checkpoint_every=10", "train.val_every=10") == 0
    printed = capsys.readouterr().out
    names = {path.name for path in out.iterdir()}
    assert {"resolved.yaml", "metrics.jsonl", "checkpoints", "sample.txt", "load.png"} <= names
    assert [p.name for p in checkpoint.checkpoints(out / "checkpoints")] == ["step_00000020", "step_00000030"]
    steps = re.findall(
        r"^step (\d+)/30  loss [\d.]+  aux [\d.]+  z [\d.]+  imb [\d.]+ \(max L\d [\d.]+\)  drop", printed, re.M
    )
    assert [int(step) for step in steps] == list(range(1, 31))
    train = [r for r in read_metrics(out) if r["kind"] == "train"]
    val = [r for r in read_metrics(out) if r["kind"] == "val"]
    assert [r["step"] for r in val] == [10, 20, 30]
    assert train[0]["loss/train"] > 5.0 and val[-1]["loss/val"] < 4.2
    last = printed.splitlines()
    assert last[-1] == f"val_loss {val[-1]['loss/val']:.2f}"
    assert any(line.startswith("  L1 ") and "imb" in line for line in last)
    assert all(str(out / name) in printed for name in ("resolved.yaml", "metrics.jsonl", "sample.txt", "load.png"))
    # every routed slot of the window and of the validation pass is counted, once
    per_step = 4 * 32 * 2
    assert [sum(row) for row in train[-1]["moe/counts"]] == [per_step, per_step]
    assert [sum(row) for row in val[-1]["moe/counts"]] == [2 * per_step, 2 * per_step]
    assert (out / "sample.txt").read_text().startswith("def ")
    # the resolved configuration is complete and says the same
    resolved = yaml.safe_load((out / "resolved.yaml").read_text())
    assert resolved["train"]["steps"] == 30 and resolved["moe"]["experts"]["init_std"] == 0.02
    assert main(["plot", str(out), "--out", str(tmp_path / "again.png")]) == 0 and (tmp_path / "again.png").is_file()


def test_accumulation_gives_the_losses_of_one_batch(tmp_path: Path) -> None:
    losses = []
    for micro in (8, 2):
        out = tmp_path / str(micro)
        options = ["train.global_batch=8", f"train.micro_batch={micro}", "moe.losses.aux=sequence", "train.val_every=0"]
        assert _train(tmp_path, "--out", str(out), *options) == 0
        losses.append([r["loss/train"] for r in read_metrics(out) if r["kind"] == "train"])
    torch.testing.assert_close(*[torch.tensor(row, dtype=torch.float64) for row in losses], rtol=1e-5, atol=0)


@pytest.mark.parametrize("recompute", ["none", "reentrant"])
def test_resume_is_bit_exact(tmp_path: Path, recompute: str) -> None:
    # jitter draws random numbers in every step, so their state must come back too
    options = [
        "train.global_batch=8",
        "moe.router.jitter_eps=0.1",
        "train.log_every=2",
        f"train.activation_checkpointing={recompute}",
    ]
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert _train(tmp_path, "--out", str(whole), "train.keep_checkpoints=9", *options) == 0
    middle = whole / "checkpoints" / "step_00000003"
    assert _train(tmp_path, "--out", str(resumed), "--resume", str(middle), *options) == 0
    one, two = (_tensors(folder / "checkpoints" / "step_00000006") for folder in (whole, resumed))
    assert one.keys() == two.keys() and len(one) > 60
    assert (
        any("expert_bias" in key for key in one)
        and any("counter." in key for key in one)
        and any("rng" in k for k in one)
    )
    different = [key for key in one if not torch.equal(one[key], two[key])]
    assert not different
    losses = [
        [r["loss/train"] for r in read_metrics(folder) if (r["step"], r["kind"]) == (6, "train")]
        for folder in (whole, resumed)
    ]
    assert losses[0] == losses[1]


def test_resume_auto_continues_in_place_and_forgets_the_abandoned_future(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert _train(tmp_path, "--out", str(out)) == 0
    assert (
        _train(tmp_path, "--out", str(out), "--resume", str(out / "checkpoints" / "step_00000003"), "train.steps=5")
        == 0
    )
    assert [r["step"] for r in read_metrics(out) if r["kind"] == "train"] == [1, 2, 3, 4, 5]
    assert [p.name for p in checkpoint.checkpoints(out / "checkpoints")] == ["step_00000003", "step_00000005"]
    assert _train(tmp_path, "--out", str(out), "--resume", "auto", "train.steps=7") == 0
    printed = capsys.readouterr().out
    assert f"resumed from {out / 'checkpoints' / 'step_00000005'}, after step 5\n" in printed
    assert "changed since: train.steps 5 -> 7\n" in printed
    assert [r["step"] for r in read_metrics(out) if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6, 7]
    # a new run in the same place moves the old one aside
    assert _train(tmp_path, "--out", str(out), "train.steps=2") == 0
    assert "moved to" in capsys.readouterr().out
    assert (tmp_path / "run.1" / "metrics.jsonl").is_file() and len(checkpoint.checkpoints(out / "checkpoints")) == 1


def test_resume_says_what_changed_and_that_nothing_is_left(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, other = tmp_path / "run", tmp_path / "other"
    assert _train(tmp_path, "--out", str(out)) == 0
    changes = ["train.steps=6", "moe.router.top_k=1", "optimizer.lr=1e-2"]
    capsys.readouterr()
    assert _train(tmp_path, "--out", str(other), "--resume", str(out), *changes) == 0
    printed = capsys.readouterr().out
    assert "changed since: moe.router.top_k 2 -> 1, optimizer.lr 0.004 -> 0.01\n" in printed
    assert "nothing is left to train: train.steps is 6; raise it to go on\n" in printed
    (out / "resolved.yaml").unlink()
    assert _train(tmp_path, "--out", str(other), "--resume", str(out)) == 0
    assert f"{out / 'resolved.yaml'} does not read, so what has changed since is not known" in capsys.readouterr().out


def _start(folder: Path, code: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", code, "train", str(micro_yaml(folder)), *arguments]
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


_PLAIN = "import sys; from moe_layer.cli import main; sys.exit(main())"
# Dies by SIGKILL in the middle of its second checkpoint: tensors written, manifest not yet.
_KILLED = """
import os, signal, sys
from moe_layer.train import checkpoint
write = checkpoint._write_manifest
def killed(work, manifest):
    if manifest.step == 6:
        os.kill(os.getpid(), signal.SIGKILL)
    write(work, manifest)
checkpoint._write_manifest = killed
from moe_layer.cli import main
sys.exit(main())
"""


def test_sigkill_during_a_save_leaves_the_last_checkpoint_whole(tmp_path: Path) -> None:
    out = tmp_path / "run"
    process = _start(tmp_path, _KILLED, "--out", str(out), "train.steps=9")
    _, stderr = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL, stderr
    assert [p.name for p in checkpoint.checkpoints(out / "checkpoints")] == ["step_00000003"]
    assert list((out / "checkpoints").glob(".writing-*"))
    assert _train(tmp_path, "--out", str(out), "--resume", "auto", "train.steps=9") == 0
    assert [p.name for p in checkpoint.checkpoints(out / "checkpoints")] == ["step_00000006", "step_00000009"]
    assert not list((out / "checkpoints").glob(".writing-*"))


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_ends_with_its_exit_code(tmp_path: Path, signum: signal.Signals) -> None:
    out = tmp_path / "run"
    process = _start(
        tmp_path, _PLAIN, "--out", str(out), "train.steps=100000", "train.checkpoint_every=0", "train.val_every=0"
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("step 2/"):
            process.send_signal(signum)
            break
    stdout, stderr = process.communicate(timeout=100)
    assert process.returncode == 128 + signum and stderr == ""
    found = re.search(r"stopped by signal \d+ after step (\d+); saved (\S+); continue with --resume (\S+)", stdout)
    assert found is not None and Path(found[2]) == checkpoint.find(out)
    assert _train(tmp_path, "--out", str(out), "--resume", found[3], f"train.steps={int(found[1]) + 1}") == 0


BAD = [
    (["train.steps=ten"], r"train\.steps"),
    (["moe.router.top_k=9"], r"top_k \(9\) must not exceed num_experts \(4\)"),
    (["train.stepz=3"], r"stepz.*did you mean.*steps"),
    (["data.files=['/nowhere/at/all.txt']"], r"data\.files: '/nowhere/at/all\.txt' matches no file"),
    (["data.files=['/']"], r"'/' is not a regular file"),
    (["--resume", "/nowhere"], r"no checkpoint in /nowhere .*give a run directory"),
    (["train.device=cuda"], r"train\.device is cuda, but this torch sees no CUDA device"),
    (
        ["parallel.ep=2", "train.micro_batch=2"],
        r"parallel\.ep \(2\) must divide the number of ranks \(1\); start with torchrun",
    ),
    (
        ["optimizer.lr=1e38", "optimizer.clip_norm=0", "train.log_every=6"],
        r"step 6: loss is .* not finite; lower optimizer\.lr",
    ),
    (["--out", "/dev/null"], r"/dev/null exists and is not a directory"),
]


@pytest.mark.parametrize(("arguments", "message"), BAD, ids=[message[:25] for _, message in BAD])
def test_bad_input_is_one_clear_message(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    if "cuda" in message and torch.cuda.is_available():
        pytest.skip("this machine has a GPU, so asking for one is no error")
    out = [] if "--out" in arguments else ["--out", str(tmp_path / "run")]
    assert _train(tmp_path, *out, *arguments) == 2
    stderr = capsys.readouterr().err
    assert re.search(message, stderr), stderr
    assert "Traceback" not in stderr and len(stderr.strip().splitlines()) == 1


def test_a_damaged_checkpoint_is_one_clear_message(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert _train(tmp_path, "--out", str(out)) == 0
    shard = next((out / "checkpoints" / "step_00000006").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-100])
    before = read_metrics(out)
    capsys.readouterr()
    assert _train(tmp_path, "--out", str(out), "--resume", "auto") == 2
    stderr = capsys.readouterr().err
    assert re.search(
        r"is damaged: shard-\S+ \(\d+ bytes\) does not match its checksum; resume from another one: .*00003", stderr
    )
    assert read_metrics(out) == before


def test_dry_run_prints_sizes_and_makes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _train(tmp_path, "--dry-run", "--out", str(tmp_path / "run")) == 0
    printed = capsys.readouterr().out
    for word in (
        "parameters",
        "active per token",
        "FLOPs",
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "total",
    ):
        assert word in printed
    assert not (tmp_path / "run").exists()


def test_bf16_compile_and_greedy_sampling_run(tmp_path: Path) -> None:
    out = tmp_path / "run"
    options = [
        "train.dtype=bf16",
        "sample.temperature=0",
        "train.steps=2",
        "train.val_every=0",
        "train.checkpoint_every=0",
    ]
    assert _train(tmp_path, "--out", str(out), *options) == 0
    assert all(r["loss/train"] < 6 for r in read_metrics(out) if r["kind"] == "train")
    state = _tensors(checkpoint.find(out))
    kinds = {key: tensor.dtype for key, tensor in state.items()}
    assert {d for k, d in kinds.items() if k.endswith("expert_bias")} == {torch.float32}
    whole = {key.split(":", 1)[1]: tensor for key, tensor in state.items()}
    moments = {tensor.dtype for key, tensor in whole.items() if key.startswith("optimizer.")}
    assert whole["model.blocks.0.attention.q_proj.weight"].dtype == torch.bfloat16 and moments == {torch.float32}
    masters = {k.removeprefix("optimizer.master."): t for k, t in whole.items() if k.startswith("optimizer.master.")}
    assert len(masters) > 10
    for name, master in masters.items():
        assert torch.equal(master.bfloat16(), whole[f"model.{name}"]), name


def test_micro_is_a_subset_of_every_config(tmp_path: Path) -> None:
    """The shipped training configurations load and dry-run."""
    for path in sorted((ROOT / "configs" / "train").glob("*.yaml")):
        assert main(["train", str(path), "--dry-run"]) == 0
    assert MICRO["name"] == "micro"
