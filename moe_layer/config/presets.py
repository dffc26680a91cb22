"""Published model families by name: `configs/presets/<name>.yaml`, installed as `moe_layer/_configs/presets`."""

from __future__ import annotations

from functools import cache
from pathlib import Path


@cache
def preset_directory() -> Path:
    """Where the presets are: inside an installed package, else in the source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_configs" / "presets"
    return installed if installed.is_dir() else package.parent / "configs" / "presets"


def preset_names() -> list[str]:
    """Names that `load_config` and `base:` accept."""
    return sorted(path.stem for path in preset_directory().glob("*.yaml"))


def preset_path(name: str) -> Path:
    """File of a preset (which may not exist)."""
    return preset_directory() / f"{name}.yaml"
