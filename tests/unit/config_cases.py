"""A complete small configuration, and ways to write it, shared by the config tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from moe_layer.config import MoEConfig, TrainConfig, load_config
from moe_layer.config.names import leaf_keys
from moe_layer.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

LAYER = """\
hidden_size: 32
router:
  num_experts: 8
  top_k: 2
experts:
  intermediate_size: 16
"""

RUN = """\
name: run
model:
  num_layers: 2
  num_heads: 4
moe:
  hidden_size: 32
  router:
    num_experts: 8
    top_k: 2
  experts:
    intermediate_size: 16
  shared_expert:
    intermediate_size: 16
"""


def write(directory: Path, text: str, name: str = "x.yaml") -> str:
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return str(path)


def problems(directory: Path, text: str, *overrides: str, **options: Any) -> list[str]:
    """Every problem of a text, with the file's directory cut off."""
    path = write(directory, text)
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides, **options)
    return [problem.replace(f"{directory}/", "") for problem in caught.value.problems]


def all_keys(config: type = TrainConfig) -> list[str]:
    return leaf_keys(config)


def layer(**changes: Any) -> MoEConfig:
    """The small layer with dotted changes, such as **{"router.top_k": 1}."""
    config = load_config(ROOT / "configs" / "bench" / "cpu.yaml", changes)
    assert isinstance(config, MoEConfig)
    return config
