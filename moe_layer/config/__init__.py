"""Configuration: frozen dataclasses, a strict YAML loader, presets, JSON schema. Imports no torch."""

from __future__ import annotations

from moe_layer.config.dump import config_hash, to_dict, to_yaml
from moe_layer.config.load import LoadedConfig, load_config, load_with_origins
from moe_layer.config.model import (
    BalanceConfig,
    DispatchConfig,
    ExpertsConfig,
    LossesConfig,
    MoEConfig,
    ReplayConfig,
    RouterConfig,
    SharedExpertConfig,
)
from moe_layer.config.presets import preset_names
from moe_layer.config.train import (
    DataConfig,
    LoopConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    SampleConfig,
    TrainConfig,
)

__all__ = [
    "BalanceConfig",
    "DataConfig",
    "DispatchConfig",
    "ExpertsConfig",
    "LoadedConfig",
    "LoopConfig",
    "LossesConfig",
    "MoEConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "ReplayConfig",
    "RouterConfig",
    "SampleConfig",
    "SharedExpertConfig",
    "TrainConfig",
    "config_hash",
    "load_config",
    "load_with_origins",
    "preset_names",
    "to_dict",
    "to_yaml",
]
