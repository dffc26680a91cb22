"""`load_config`: file or preset, `base:` inheritance, dotted overrides, one strict reader for all of them."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar, overload

from moe_layer.config.document import Node, Place, Problems, describe, merge, parse, read_file
from moe_layer.config.model import MoEConfig
from moe_layer.config.names import rejection, suggest, suggest_key
from moe_layer.config.presets import preset_names, preset_path
from moe_layer.config.read import origins_of, read
from moe_layer.config.train import TrainConfig
from moe_layer.config.types import field_types
from moe_layer.errors import ConfigError

Overrides = Iterable[str] | Mapping[str, Any]
_Config = TypeVar("_Config", MoEConfig, TrainConfig)
_TRAIN_KEYS = ("moe", "model", "train")
_MAX_BASES = 16


@dataclass(frozen=True)
class LoadedConfig:
    """A config, and for each leaf value "default", "file:line:column", "preset name:line:column" or an override."""

    config: MoEConfig | TrainConfig
    origins: Mapping[str, str]


@overload
def load_config(path: str | os.PathLike[str], overrides: Overrides = ..., *, kind: type[_Config]) -> _Config: ...
@overload
def load_config(
    path: str | os.PathLike[str], overrides: Overrides = ..., *, kind: None = None
) -> MoEConfig | TrainConfig: ...
def load_config(
    path: str | os.PathLike[str],
    overrides: Overrides = (),
    *,
    kind: type[MoEConfig] | type[TrainConfig] | None = None,
) -> MoEConfig | TrainConfig:
    """Read a YAML file, or a preset by its bare name.

    Args:
        path: a file, or a preset such as "mixtral-8x7b".
        overrides: "router.top_k=4" strings as on the command line, or a mapping of dotted keys to values.
        kind: what the caller needs; None takes a TrainConfig for a file with a `moe:` key, else a MoEConfig.

    Raises:
        ConfigError: `problems` lists everything found, each with file:line:column.
    """
    return load_with_origins(path, overrides, kind=kind).config


def load_with_origins(
    path: str | os.PathLike[str],
    overrides: Overrides = (),
    *,
    kind: type[MoEConfig] | type[TrainConfig] | None = None,
) -> LoadedConfig:
    """`load_config`, and where each value came from."""
    if not isinstance(path, (str, bytes, os.PathLike)):
        raise ConfigError(
            f"path must be a YAML file's path or a preset's name, got {type(path).__name__}; give values as overrides "
            "of one, or make a MoEConfig of them"
        )
    problems: Problems = []
    root = _load_tree(os.fsdecode(path), relative_to=None, chain=(), problems=problems)
    found = kind_of(root)
    if kind is not None and kind is not found:
        raise ConfigError(_wrong_kind(os.fsdecode(path), kind))
    root = _apply_overrides(root, overrides, found, problems)
    config, written = read(root, found, problems=problems)
    return LoadedConfig(config, origins_of(config, written))


def kind_of(root: Node) -> type[MoEConfig] | type[TrainConfig]:
    """Training configurations have a `moe:` (or, when that was forgotten, a `model:` or `train:`) key."""
    assert isinstance(root.value, dict)
    return TrainConfig if any(key in root.value for key in _TRAIN_KEYS) else MoEConfig


def _wrong_kind(path: str, kind: type) -> str:
    if kind is MoEConfig:
        return f"{path}: is a training configuration, a layer configuration is needed; use load_config(path).moe"
    return f"{path}: describes one layer, a training configuration is needed; put its keys under moe: (or moe: base:)"


def _load_tree(name: str, *, relative_to: Path | None, chain: tuple[Path, ...], problems: Problems) -> Node:
    """One file with its bases merged in. `chain` are the files on the way here."""
    path, shown = _locate(name, relative_to)
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError) as error:
        raise ConfigError(f"{shown}: is not a usable path ({error})") from None
    if real in chain or len(chain) >= _MAX_BASES:
        names = " -> ".join(link.name for link in (*chain, real))
        raise ConfigError(f"{shown}: base: goes in a circle or too deep ({names}); remove one of them")
    root = read_file(path, shown, problems=problems)
    entries = dict(root.value) if isinstance(root.value, dict) else {}
    moe = entries.get("moe")
    if moe is not None and isinstance(moe.value, dict) and "base" in moe.value:
        entries["moe"] = dataclasses.replace(
            _with_base(moe, path, (*chain, real), layer=True, problems=problems), fresh=True
        )
    return _with_base(dataclasses.replace(root, value=entries), path, (*chain, real), layer=False, problems=problems)


def _with_base(node: Node, path: Path, chain: tuple[Path, ...], *, layer: bool, problems: Problems) -> Node:
    """Merge a mapping over the tree that its `base` key names; `layer` asks for a layer configuration."""
    assert isinstance(node.value, dict)
    entries = dict(node.value)
    base = entries.pop("base", None)
    above = dataclasses.replace(node, value=entries)
    if base is None:
        return above
    if not isinstance(base.value, str) or base.is_null:
        raise ConfigError(f"{base.place}: base: expected the path of one file or a preset's name, got {describe(base)}")
    try:
        below = _load_tree(base.value, relative_to=path.parent, chain=chain, problems=problems)
    except ConfigError as error:
        raise ConfigError([_from_base(problem, base) for problem in error.problems]) from None
    if layer and kind_of(below) is TrainConfig:
        raise ConfigError(f"{base.place}: base: {base.value} is a training configuration; give a layer's here")
    if not layer and kind_of(above) is TrainConfig and kind_of(below) is MoEConfig and below.value:
        raise ConfigError(f"{base.place}: base: {base.value} describes one layer; write it as moe: base:")
    return merge(below, above)


def _from_base(problem: str, base: Node) -> str:
    return problem if f"{base.place.source}:" in problem else f"{base.place}: base: {problem}"


def _locate(name: str, relative_to: Path | None) -> tuple[Path, str]:
    """Path and shown name of a file or preset."""
    is_path = "/" in name or os.sep in name or name.endswith((".yaml", ".yml"))
    if not is_path and name in preset_names():
        return preset_path(name), f"preset {name}"
    if is_path or (relative_to is None and Path(name).is_file()):
        path = (relative_to or Path()) / name
        return path, str(path)
    near = suggest(name, preset_names())
    hint = f"did you mean '{near}'?" if near else f"presets: {', '.join(preset_names())}"
    raise ConfigError(f"no preset is called {name!r}; {hint} (a file's name ends in .yaml)")


def _apply_overrides(root: Node, overrides: Overrides, kind: type, problems: Problems) -> Node:
    if isinstance(overrides, str):
        raise ConfigError(f"overrides must be a list of key=value strings or a mapping, got the string {overrides!r}")
    for item in overrides.items() if isinstance(overrides, Mapping) else overrides:
        try:
            if not isinstance(item, str | tuple):
                raise ConfigError(f"expected a string such as 'router.top_k=4', got {item!r}")
            key, text = _split(item) if isinstance(item, str) else _as_yaml(*item)
            root = merge(root, _override(key, text, kind, problems))
        except ConfigError as error:
            problems += [(Place("overrides"), problem) for problem in error.problems]
    return root


def _split(text: str) -> tuple[str, str]:
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ConfigError(f"override {text!r}: expected key=value, such as router.top_k=4")
    return key.strip(), value


def _as_yaml(key: str, value: Any) -> tuple[str, str]:
    try:
        return key, json.dumps(value, allow_nan=False, ensure_ascii=False)
    except (TypeError, ValueError):
        raise ConfigError(f"override {key}: cannot write {value!r} in YAML; give plain data") from None


def _override(key: str, text: str, kind: type, problems: Problems) -> Node:
    """The override as a tree of its own, to be merged over the file's."""
    place = Place(f"override '{key}={text if len(text) <= 60 else text[:57] + '...'}'")
    parts = key.split(".")
    _check_key(parts, kind, place)
    value = parse(text, place, problems=problems)
    for part in reversed(parts):
        value = Node({part: value}, place, place)
    return value


def _check_key(parts: list[str], kind: type, place: Place) -> None:
    config = kind
    for depth, part in enumerate(parts):
        kinds = field_types(config)
        if part not in kinds:
            path = ".".join(parts[:depth])
            rejected = rejection(part)
            if rejected is not None:
                raise ConfigError(f"{place}: {'.'.join(parts[: depth + 1])}: {rejected}")
            known = suggest_key(part, config=config, path=path, root=kind)
            near = known if known is None or known not in kinds else ".".join([*parts[:depth], known])
            hint = f"did you mean '{near}'?" if near else f"the keys here are {', '.join(kinds)}"
            raise ConfigError(f"{place}: {'.'.join(parts[: depth + 1])}: unknown key; {hint}")
        if kinds[part].config is None and depth + 1 < len(parts):
            raise ConfigError(f"{place}: {'.'.join(parts[: depth + 1])} is a single value and has no keys below it")
        config = kinds[part].config or config
