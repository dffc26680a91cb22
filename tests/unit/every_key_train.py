"""Cases of the training keys, observed on a two-layer decoder and on three-step runs of it."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from moe_layer.config import TrainConfig, to_yaml
from moe_layer.train import run as run_module
from moe_layer.train.data import load_text
from moe_layer.train.model import Decoder
from moe_layer.train.optim import Optimizer
from moe_layer.train.world import Layout, World, join, pick_device, plan_layout
from tests.unit.every_key import Case


def text(config: TrainConfig) -> Any:
    found = load_text(config.data)
    return found.fingerprint, len(found.train), len(found.val), found.files


def decoder(config: TrainConfig) -> Any:
    """Names, shapes and the logits of a fixed input."""
    torch.manual_seed(1)
    model = Decoder(config.model, config.moe)
    logits = model(torch.arange(8).unsqueeze(0)).logits
    return [(name, tuple(p.shape)) for name, p in model.named_parameters()], logits.tolist()


def built(config: TrainConfig) -> Any:
    """Whether blocks are compiled, and how often the first MoE layer runs in a forward and backward pass."""
    model = run_module.build_model(config, World(rank=0, layout=Layout(), device=torch.device("cpu"), mesh=None))
    compiled = getattr(model.blocks[0], "_compiled_call_impl", None) is not None
    if compiled:
        return "compiled"
    calls: list[int] = []
    next(iter(model.moe_layers())).router.register_forward_hook(lambda *_: calls.append(1))
    model(torch.zeros(1, 8, dtype=torch.int64)).logits.sum().backward()
    return len(calls)


def device(config: TrainConfig) -> str:
    return str(pick_device(config.train.device))


def layout_of_four(config: TrainConfig) -> Any:
    """The layout torchrun's four ranks would get."""
    before = os.environ.get("WORLD_SIZE")
    os.environ["WORLD_SIZE"] = "4"
    try:
        return plan_layout(config)
    finally:
        os.environ.pop("WORLD_SIZE")
        if before is not None:
            os.environ["WORLD_SIZE"] = before


def run(config: TrainConfig) -> Any:
    """Everything a run leaves behind except times: records, files, the sample."""
    return _run(to_yaml(config), config)


@cache
def _run(_key: str, config: TrainConfig) -> Any:
    here = os.getcwd()
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()):
        os.chdir(directory)
        try:
            with _without_plots():
                run_module.run(config)
            return _left_behind(Path(directory))
        finally:
            os.chdir(here)


@contextlib.contextmanager
def _without_plots() -> Any:
    """Drawing takes longer than the run and is tested elsewhere."""
    plot = run_module.plot_run
    run_module.plot_run = lambda folder: folder / "load.png"
    try:
        yield
    finally:
        run_module.plot_run = plot


def _left_behind(directory: Path) -> Any:
    files = sorted(
        str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_dir() or path.suffix == ".txt"
    )
    files = [name for name in files if "tensorboard" not in name]
    [metrics] = directory.rglob("metrics.jsonl")
    records = []
    for line in metrics.read_text().splitlines():
        record = json.loads(line)
        timed = [key for key in record if key.startswith("perf/") or "time" in key]
        records.append({key: value for key, value in record.items() if key not in timed})
    [sample] = directory.rglob("sample.txt")
    return files, records, sample.read_text()


def resumed(config: TrainConfig) -> Any:
    """Where a run starts that another one has already finished one step of: `auto` continues, null starts anew."""
    with tempfile.TemporaryDirectory() as directory, contextlib.redirect_stdout(io.StringIO()) as out:
        folder = Path(directory) / "run"
        with _without_plots():
            run_module.run(_one_step(config), out=folder)
            run_module.run(config, out=folder)
        return "resumed from" in out.getvalue()


def _one_step(config: TrainConfig) -> TrainConfig:
    loop = dataclasses.replace(config.train, steps=1, resume=None)
    optimizer = dataclasses.replace(config.optimizer, warmup_steps=0)
    return dataclasses.replace(config, train=loop, optimizer=optimizer)


def joined(config: TrainConfig) -> Any:
    """The optimiser that a run picks."""
    with join(config) as world:
        return Optimizer(run_module.build_model(config, world), config.optimizer, device=world.device).description


DENSE = ("model.num_layers=3", "model.dense_layers=1", "model.dense_intermediate_size=64")
OFTEN = ("train.checkpoint_every=1",)

TRAIN_CASES = (
    Case("name", "other", run),
    Case("seed", "1", run),
    Case("model.num_layers", "3", decoder),
    Case("model.num_heads", "2", decoder),
    Case("model.num_kv_heads", "2", decoder),
    Case("model.dense_layers", "2", decoder, DENSE),
    Case("model.dense_intermediate_size", "32", decoder, DENSE),
    Case("model.rope_theta", "100", decoder),
    Case("model.norm_eps", "0.5", decoder),
    Case("model.tie_embeddings", "false", decoder),
    Case("model.init_std", "0.1", decoder),
    Case("model.embedding_std", "1", decoder, ("model.tie_embeddings=false",)),
    Case("data.files", f"[{Path(__file__).resolve()}]", text),
    Case("data.max_bytes", "30000", text),
    Case("data.sequence_length", "16", run),
    Case("data.val_fraction", "0.2", text),
    Case("optimizer.name", "apex_fused_adam", joined, raises="optimizer.name is apex_fused_adam, but"),
    Case("optimizer.lr", "1e-2", run),
    Case("optimizer.min_lr", "1e-3", run),
    Case("optimizer.warmup_steps", "2", run),
    Case("optimizer.beta1", "0.5", run),
    Case("optimizer.beta2", "0.5", run),
    Case("optimizer.eps", "0.1", run),
    Case("optimizer.weight_decay", "10", run),
    Case("optimizer.clip_norm", "1e-9", run, ("optimizer.eps=1e-3",)),
    Case("optimizer.master_weights", "false", run, ("train.dtype=bf16",)),
    Case("train.steps", "4", run),
    Case("train.global_batch", "8", run),
    Case("train.micro_batch", "2", run),
    Case(
        "train.device",
        "cuda",
        device,
        ("train.device=cpu",),
        raises=None if torch.cuda.is_available() else "sees no CUDA device",
    ),
    Case("train.dtype", "bf16", run),
    Case("train.compile", "true", built),
    Case("train.activation_checkpointing", "non_reentrant", built),
    Case("train.activation_checkpointing", "reentrant", built),
    Case("train.log_every", "2", run),
    Case("train.val_every", "1", run),
    Case("train.val_batches", "2", run),
    Case("train.checkpoint_every", "1", run),
    Case("train.keep_checkpoints", "1", run, OFTEN),
    Case("train.resume", "auto", resumed),
    Case("parallel.ep", "2", layout_of_four, ("train.micro_batch=1",)),
    Case("parallel.dp", "2", layout_of_four, ("train.micro_batch=1",), raises="must be the number of ranks"),
    Case("sample.prompt", "class ", run),
    Case("sample.tokens", "6", run),
    Case("sample.temperature", "0", run),
)
