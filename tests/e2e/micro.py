"""A training configuration that runs in a second, for tests."""

from __future__ import annotations

from pathlib import Path

import yaml

from moe_layer.config import load_config
from moe_layer.config.train import TrainConfig

MICRO = {
    "name": "micro",
    "model": {"num_layers": 2, "num_heads": 2},
    "moe": {
        "hidden_size": 32,
        "router": {"num_experts": 4, "top_k": 2, "expert_bias": True, "score_function": "sigmoid"},
        "experts": {"intermediate_size": 32},
        "losses": {"aux": "batch", "aux_coeff": 0.01, "z_coeff": 1e-4},
    },
    "data": {"sequence_length": 32, "max_bytes": 200_000},
    "optimizer": {"lr": 4e-3, "min_lr": 4e-4, "warmup_steps": 2},
    "train": {
        "steps": 6,
        "global_batch": 4,
        "micro_batch": 4,
        "val_every": 4,
        "val_batches": 2,
        "checkpoint_every": 3,
        "device": "cpu",
    },
    "sample": {"tokens": 8},
}


def micro_yaml(folder: Path) -> Path:
    """Write the configuration as YAML."""
    path = folder / "micro.yaml"
    path.write_text(yaml.safe_dump(MICRO))
    return path


def micro_config(folder: Path, *overrides: str) -> TrainConfig:
    """The configuration with dotted overrides."""
    return load_config(micro_yaml(folder), overrides, kind=TrainConfig)
