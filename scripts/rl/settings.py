"""configs/rl/*.yaml as frozen dataclasses; unknown keys, impossible modes and precisions are errors."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import yaml

from moe_layer.errors import ConfigError

MODES = ("off", "R2", "R3", "R3_straight_through", "shifted")
FORMATS = ("fp32", "bf16", "int8", "fp8_1x128")
"""Rollout engines: transformers' own blocks in fp32 or bf16; our blocks in bf16 with quantised experts."""
Part = TypeVar("Part")


@dataclass(frozen=True)
class Shape:
    layers: int
    top_k: int
    ffn: int
    steps: int


@dataclass(frozen=True)
class Pretrain:
    batch: int
    sequence: int
    lr: float


@dataclass(frozen=True)
class Scoring:
    sequences: int
    seeds: int
    precisions: tuple[str, ...]


@dataclass(frozen=True)
class Grpo:
    steps: int
    prompts: int
    group: int
    mini_batches: int
    lr: float
    clip: float
    kl_coeff: float
    rollout: str
    trainer: str
    modes: tuple[str, ...]


@dataclass(frozen=True)
class Settings:
    vocab: int
    hidden: int
    experts: int
    prompt: int
    response: int
    shapes: dict[str, Shape]
    pretrain: Pretrain
    scoring: Scoring
    grpo: Grpo


def load_settings(path: Path, *, quick: bool, cuda: bool = False, overrides: Sequence[str] = ()) -> Settings:
    """
    Args:
        quick, cuda: apply the file's sections of that name, in this order.
        overrides: `grpo.rollout=fp8_1x128`, applied last.

    Raises:
        ConfigError: unknown or missing keys, R2 and R3 in one mode, precisions nobody knows.
    """
    document = yaml.safe_load(path.read_text())
    for name, wanted in (("quick", quick), ("cuda", cuda)):
        changes = document.pop(name, {})
        for key, part in changes.items() if wanted else ():
            document[key] = part if key == "shapes" or not isinstance(part, dict) else {**document[key], **part}
    for override in overrides:
        key, _, value = override.partition("=")
        *parents, leaf = key.split(".")
        part = document
        for parent in parents:
            part = part.get(parent, {})
        if leaf not in part:
            raise ConfigError(f"override {override!r}: there is no key {key}")
        part[leaf] = yaml.safe_load(value)
    shapes = {name: _part(Shape, part, f"shapes.{name}") for name, part in document.pop("shapes").items()}
    parts: dict[str, Any] = {
        "pretrain": _part(Pretrain, document.pop("pretrain"), "pretrain"),
        "scoring": _part(Scoring, document.pop("scoring"), "scoring"),
        "grpo": _part(Grpo, document.pop("grpo"), "grpo"),
    }
    settings = _part(Settings, {**document, "shapes": shapes, **parts}, "the file")
    for mode in settings.grpo.modes:
        check_mode(mode)
    for precision in settings.scoring.precisions:
        split_precision(precision)
    split_precision(f"{settings.grpo.rollout}->{settings.grpo.trainer}")
    if (settings.grpo.prompts * settings.grpo.group) % settings.grpo.mini_batches:
        raise ConfigError("grpo.mini_batches must divide prompts * group; choose another number")
    return settings


def check_mode(mode: str) -> None:
    """
    Raises:
        ConfigError: an unknown mode; R2 with R3.
    """
    if "R2" in mode and "R3" in mode:
        raise ConfigError(
            f"mode {mode!r}: R2 replays the trainer's routing and R3 the rollout's, an update can honour only "
            "one; choose one"
        )
    if mode not in MODES:
        raise ConfigError(f"mode {mode!r} must be one of {', '.join(MODES)}")


def split_precision(text: str) -> tuple[str, str]:
    """`bf16->fp32` -> rollout format, trainer dtype."""
    rollout, arrow, trainer = text.partition("->")
    if not arrow or rollout not in FORMATS or trainer not in ("fp32", "bf16"):
        raise ConfigError(f"precision {text!r} must be ROLLOUT->TRAINER with {', '.join(FORMATS)} and fp32 or bf16")
    return rollout, trainer


def dtype_of(name: str) -> torch.dtype:
    """fp32, else bf16 (quantised experts run in a bf16 model)."""
    return torch.float32 if name == "fp32" else torch.bfloat16


def _part(kind: type[Part], values: dict[str, Any], where: str) -> Part:
    names = {field.name for field in dataclasses.fields(kind)}  # type: ignore[arg-type]
    unknown, missing = sorted(set(values) - names), sorted(names - set(values))
    if unknown or missing:
        raise ConfigError(f"{where} has unknown keys {unknown} and lacks {missing}")
    return kind(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})
