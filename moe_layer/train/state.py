"""What a checkpoint holds of a trainer, and putting it back."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from moe_layer.train import checkpoint
from moe_layer.train.loop import Trainer


def save_state(trainer: Trainer, folder: Path, step: int) -> Path:
    """Checkpoint the trainer after `step` steps; all ranks call it."""
    return checkpoint.save(
        folder / "checkpoints",
        _shared(trainer, step),
        local=_local(trainer),
        step=step,
        layout=trainer.world.layout,
        data=trainer.text.fingerprint,
        keep=trainer.config.train.keep_checkpoints,
    )


def load_state(trainer: Trainer, path: Path) -> int:
    """Restore a checkpoint; returns its number of steps.

    The same layout continues bit for bit: parameters, moments, expert biases, counters and random numbers. At another
    one counters and random numbers start afresh.

    Raises:
        CheckpointError: damaged, or made for another model.
    """
    step = checkpoint.read_manifest(path).step
    manifest, local = checkpoint.load(path, _shared(trainer, step), layout=trainer.world.layout)
    if manifest.data != trainer.text.fingerprint and trainer.world.is_main:
        print(
            "note: the training text is not the one this checkpoint was trained on, so the run is not repeated exactly"
        )
    if local is not None:
        for name, tensor in _counters(trainer).items():
            tensor.copy_(local[name].reshape(tensor.shape))
        torch.set_rng_state(local["rng.cpu"])
        if "rng.cuda" in local and trainer.world.device.type == "cuda":
            torch.cuda.set_rng_state(local["rng.cuda"], trainer.world.device)
    return step


def _shared(trainer: Trainer, step: int) -> dict[str, Tensor]:
    """Parameters and saved buffers as `model.*`, moments as `optimizer.*`; a tied tensor once."""
    saved: dict[str, Tensor] = dict(trainer.model.named_parameters())
    kept = trainer.model.state_dict(keep_vars=True).keys()
    saved.update({name: buffer for name, buffer in trainer.model.named_buffers() if name in kept})
    out = {f"model.{name}": tensor.detach() for name, tensor in saved.items()}
    out.update(trainer.optimizer.state_tensors(step))
    return out


def _counters(trainer: Trainer) -> dict[str, Tensor]:
    """Buffers that belong to this rank alone: not part of the model's state_dict."""
    kept = trainer.model.state_dict(keep_vars=True).keys()
    return {f"counter.{name}": buffer for name, buffer in trainer.model.named_buffers() if name not in kept}


def _local(trainer: Trainer) -> dict[str, Tensor]:
    out = {**_counters(trainer), "rng.cpu": torch.get_rng_state()}
    if trainer.world.device.type == "cuda":
        out["rng.cuda"] = torch.cuda.get_rng_state(trainer.world.device)
    return out
