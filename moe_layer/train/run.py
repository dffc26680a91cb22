"""One run from a configuration: folder, data, model, loop, checkpoints, and the report at the end.

runs/<name>/  resolved.yaml  metrics.jsonl  checkpoints/step_*/  sample.txt  load.png  tensorboard/
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from moe_layer.config import load_config, to_yaml
from moe_layer.config.dump import to_flat
from moe_layer.config.train import TrainConfig
from moe_layer.errors import ConfigError
from moe_layer.observe.flops import count_parameters
from moe_layer.observe.metrics import MetricsWriter, format_line, load_metrics
from moe_layer.observe.plots import plot_run
from moe_layer.parallel import parallelize
from moe_layer.train import checkpoint
from moe_layer.train.console import Console, StopRequest, stop_on_signals
from moe_layer.train.data import TextData, load_text
from moe_layer.train.loop import Trainer, Validation
from moe_layer.train.model import Decoder, torch_dtype
from moe_layer.train.optim import Optimizer
from moe_layer.train.report import load_chart
from moe_layer.train.sample import sample_text
from moe_layer.train.state import load_state, save_state
from moe_layer.train.world import World, join

_COUNT_RECORDS = 200  # expert counts are large: about this many of a run's log records carry them


@dataclass(frozen=True)
class Result:
    """How a run ended. `signum`: the signal that stopped it, 0 when it ran to the end."""

    steps: int
    signum: int
    validation: Validation | None


def run(config: TrainConfig, *, out: Path | None = None) -> Result:
    """Train; everything a user sees is printed by rank 0.

    Args:
        out: run directory (default `runs/<name>`). One that holds a run is moved aside unless `train.resume` continues
            it.

    Raises:
        ConfigError, CheckpointError, TrainingError, OSError: one sentence each.
    """
    folder = out or Path("runs") / config.name
    with join(config) as world:
        text = load_text(config.data)
        source = _resume_source(config, folder)
        facts = {"the training text": text.fingerprint, "--out": str(folder), "the checkpoint": str(source)}
        world.require_same(to_flat(config) | facts)
        model = build_model(config, world)
        optimizer = Optimizer(model, config.optimizer, device=world.device)
        trainer = Trainer(config, model=model, optimizer=optimizer, text=text, world=world)
        first, notes = 0, []
        if source is not None:
            first = load_state(trainer, source)
            notes = _resumed(config, source, first)
        _prepare_folder(folder, config, world, resume=source, first=first)
        if world.is_main:
            print("\n".join([*_opening(config, model, optimizer, text, world, folder=folder), *notes]), flush=True)
        return _run_in(folder, trainer, first=first, resumed=source is not None)


def build_model(config: TrainConfig, world: World) -> Decoder:
    """The decoder on this rank's device, its experts sharded; the same parameters at every number of ranks."""
    torch.manual_seed(config.seed)
    model = Decoder(
        config.model,
        config.moe,
        device=world.device,  # drawing a billion numbers on the host takes a minute
        dtype=torch_dtype(config.train.dtype),
        activation_checkpointing=config.train.activation_checkpointing,
    )
    if world.mesh is not None:
        parallelize(model, world.mesh)
    if config.train.compile:
        for block in model.blocks:
            block.compile()
    torch.manual_seed(config.seed + 1 + world.rank)  # from here on ranks draw their own jitter
    return model


def _run_in(folder: Path, trainer: Trainer, *, first: int, resumed: bool) -> Result:
    """Loop, then the end of the run; the folder is ready."""
    config, world = trainer.config, trainer.world
    console = Console(is_main=world.is_main, steps=config.train.steps, first=first)
    writer = _Log(folder, trainer, console, resume_step=first if resumed else None)
    try:
        with stop_on_signals() as stop:
            done = _loop(folder, trainer, writer, stop, first=first)
        if stop.signum:
            path = save_state(trainer, folder, done)
            console.close()
            if world.is_main:
                again = f"--resume {folder}"
                print(
                    f"stopped by signal {stop.signum} after step {done}; saved {path}; continue with {again}",
                    flush=True,
                )
            return Result(steps=done, signum=stop.signum, validation=None)
        validation = writer.validate(done, final=True)
        if first < done or not checkpoint.checkpoints(folder / "checkpoints"):
            save_state(trainer, folder, done)
        sample = sample_text(
            trainer.model, config.sample, context=config.data.sequence_length, seed=config.seed, world=world
        )
        console.close()
        if world.is_main:
            writer.close()
            _finish(folder, trainer, validation, sample)
        return Result(steps=done, signum=0, validation=validation)
    finally:
        console.close()
        writer.close()


def _loop(folder: Path, trainer: Trainer, writer: _Log, stop: StopRequest, *, first: int) -> int:
    """Steps `first`.. until the last or a signal; returns the steps done."""
    loop = trainer.config.train
    for step in range(first, loop.steps):
        lr = trainer.train_step(step)
        done = step + 1
        logs = done % loop.log_every == 0 or done == loop.steps
        if logs:
            writer.train(done, lr)
        last = done == loop.steps
        if loop.val_every and done % loop.val_every == 0 and not last:
            writer.validate(done, final=False)
        if loop.checkpoint_every and done % loop.checkpoint_every == 0 and not last:
            save_state(trainer, folder, done)
        # Ranks may get a signal at different steps; they agree at log steps, where they meet anyway.
        if trainer.world.size == 1 or logs:
            stop.signum = trainer.world.agree(stop.signum)
            if stop.signum:
                return done
    return max(first, loop.steps)


class _Log:
    """Console lines and metric records of one run; other ranks take part in the reductions only."""

    def __init__(self, folder: Path, trainer: Trainer, console: Console, *, resume_step: int | None) -> None:
        self._trainer, self._console = trainer, console
        self._writer = MetricsWriter(folder, resume_step=resume_step) if trainer.world.is_main else None
        if self._writer is not None and self._writer.note:
            console.line(self._writer.note)
        loop = trainer.config.train
        self._every = max(1, loop.steps // loop.log_every // _COUNT_RECORDS)
        self._records = 0
        self._clock: list[tuple[int, float]] = []

    def train(self, done: int, lr: float) -> None:
        """Log the window that ends with step `done`."""
        steps = self._trainer.config.train.steps
        values = self._trainer.collect(done)
        values["opt/lr"] = lr
        values["perf/eta_s"] = self._eta(done, steps)
        if self._writer is None:
            return
        record = dict(values)
        if self._records % self._every:
            record.pop("moe/counts")
        self._records += 1
        self._writer.write(done, "train", record)
        self._console.line(format_line(done, steps, values))
        self._console.advance(done)

    def validate(self, done: int, *, final: bool) -> Validation:
        """Validate and log; the final pass is reported by the caller."""
        result = self._trainer.validate()
        if self._writer is not None:
            values: dict[str, Any] = {
                "loss/val": result.loss,
                **load_metrics(result.counts),
                "moe/counts": result.counts,
            }
            self._writer.write(done, "val", values)
            if not final:
                dead = int(values["moe/dead_experts/sum"])
                self._console.line(f"step {done}  val_loss {result.loss:.4f}  dead experts {dead}")
        return result

    def close(self) -> None:
        if self._writer is not None:
            self._writer.__exit__()
            self._writer = None

    def _eta(self, done: int, steps: int) -> float | None:
        """From the steps after the first ten of this process, which compile and warm up."""
        self._clock.append((done, time.perf_counter()))
        if len(self._clock) > 11:
            del self._clock[1 if self._clock[0][0] >= 10 else 0]
        (first, began), (last, now) = self._clock[0], self._clock[-1]
        return None if last == first else (now - began) / (last - first) * (steps - done)


def _opening(
    config: TrainConfig,
    model: Decoder,
    optimizer: Optimizer,
    text: TextData,
    world: World,
    *,
    folder: Path,
) -> list[str]:
    """What was chosen, and why, in a few lines."""
    count = count_parameters(model, config.moe)
    origin = f"{text.files} files of " + ("the Python standard library" if not config.data.files else "data.files")
    losses = config.moe.losses
    lines = [
        f"{config.name}: {count.total:,} parameters, {count.active:,} active per token; "
        f"{config.model.num_layers} layers, {config.moe.router.num_experts} experts, top {config.moe.router.top_k}",
        f"text: {len(text.train):,} bytes to train on, {len(text.val):,} to validate, from {origin}",
        f"device: {_device_name(world)}, {config.train.dtype}, {world.size} rank(s) (dp {world.layout.dp} x ep "
        f"{world.layout.ep}), {torch.get_num_threads()} CPU thread(s)",
        f"optimizer: {optimizer.description}; aux loss {losses.aux} x {losses.aux_coeff:g}, "
        f"z loss x {losses.z_coeff:g}",
        f"output: {folder}",
    ]
    lines += [f"left out: {why}" for why in text.skipped[:5]]
    if len(text.skipped) > 5:
        lines.append(f"left out: {len(text.skipped) - 5} more unreadable files")
    return lines


def _resumed(config: TrainConfig, source: Path, first: int) -> list[str]:
    """What is continued, and what differs from the run that wrote it."""
    lines = [f"resumed from {source}, after step {first}"]
    written = source.parents[1] / "resolved.yaml"
    try:
        before = to_flat(load_config(written, kind=TrainConfig))
    except ConfigError:
        lines.append(f"{written} does not read, so what has changed since is not known")
    else:
        now = to_flat(dataclasses.replace(config, train=dataclasses.replace(config.train, resume=None)))
        names = [name for name in before | now if before.get(name) != now.get(name)]
        if names:
            lines.append("changed since: " + ", ".join(f"{n} {before.get(n)} -> {now.get(n)}" for n in names))
    if first >= config.train.steps:
        lines.append(f"nothing is left to train: train.steps is {config.train.steps}; raise it to go on")
    return lines


def _device_name(world: World) -> str:
    return torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else "CPU"


def _resume_source(config: TrainConfig, folder: Path) -> Path | None:
    """The checkpoint to continue from, or None for a new run (also for `auto` in a folder without one)."""
    resume = config.train.resume
    if resume is None:
        return None
    if resume == "auto":
        found = checkpoint.checkpoints(folder / "checkpoints")
        return found[-1] if found else None
    return checkpoint.find(Path(resume))


def _prepare_folder(folder: Path, config: TrainConfig, world: World, *, resume: Path | None, first: int) -> None:
    """Rank 0 makes the run directory and writes resolved.yaml; the others wait."""
    if world.is_main:
        if folder.exists() and not folder.is_dir():
            raise ConfigError(f"--out {folder} exists and is not a directory; give another path")
        inside = resume is not None and resume.resolve().is_relative_to(folder.resolve())
        if not inside and (folder / "resolved.yaml").is_file():
            aside = _free_name(folder)
            os.rename(folder, aside)
            print(
                f"{folder} held a run already; moved to {aside} (--resume {folder} continues one instead)", flush=True
            )
        folder.mkdir(parents=True, exist_ok=True)
        for later in checkpoint.checkpoints(folder / "checkpoints"):
            if int(later.name.split("_")[1]) > first:  # an abandoned future must not be resumed by accident
                os.rename(later, later.with_name(f"abandoned-{later.name}-{time.strftime('%Y%m%d-%H%M%S')}"))
        resolved = dataclasses.replace(config, train=dataclasses.replace(config.train, resume=None))
        (folder / "resolved.yaml").write_text(to_yaml(resolved), encoding="utf-8")
    world.barrier()


def _free_name(folder: Path) -> Path:
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return aside


def _finish(folder: Path, trainer: Trainer, validation: Validation, sample: str) -> None:
    """sample.txt, load.png and the closing report."""
    (folder / "sample.txt").write_text(sample, encoding="utf-8")
    try:
        picture = str(plot_run(folder))
    except (ImportError, ValueError) as error:  # no matplotlib, or nothing was left to train
        picture = f"none: {error}"
    layers = [i for i, block in enumerate(trainer.model.blocks) if block.is_moe]
    saved = checkpoint.checkpoints(folder / "checkpoints")
    paths: Mapping[str, object] = {
        "config": folder / "resolved.yaml",
        "metrics": folder / "metrics.jsonl",
        "checkpoint": saved[-1] if saved else "none",
        "sample": folder / "sample.txt",
        "plot": picture,
    }
    print(f"\nsample: {sample[:400]!r}" if trainer.config.sample.tokens else "")
    print(load_chart(validation.counts, layers=layers, encoding=sys.stdout.encoding))
    for name, path in paths.items():
        print(f"{name:<10} {path}")
    print(f"val_loss {validation.loss:.2f}", flush=True)
