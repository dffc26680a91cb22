"""Node tree -> dataclasses. Collects every problem, sorted by place, before it raises; keeps each value's origin."""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Any

from moe_layer.config.document import Node, Place, Problems, describe
from moe_layer.config.names import rejection, suggest, suggest_key
from moe_layer.config.types import FieldType, canonical, field_types, is_required
from moe_layer.errors import ConfigError

_INT = re.compile(r"[-+]?(0|[1-9][0-9]*(_[0-9]+)*)")
_FLOAT = re.compile(r"[-+]?([0-9]+(_[0-9]+)*\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?")
_BOOLS = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_YAML11_BOOLS = ("yes", "no", "on", "off", "y", "n")
_BAD = object()


@dataclass
class _Reading:
    """What one run of the reader has found so far."""

    root: type
    problems: Problems
    places: dict[str, Place] = field(default_factory=dict)

    def add(self, place: Place, path: str, sentence: str) -> None:
        self.problems.append((place, f"{place}: {path + ': ' if path else ''}{sentence}"))


def read(node: Node, config: type, *, problems: Problems) -> tuple[Any, dict[str, str]]:
    """Build `config` from a mapping node; `problems` are those that parsing has found already.

    Returns:
        The config and the origin of each value that was written ("file:line:column" or the override's text).

    Raises:
        ConfigError: every problem found, in the order of the files.
    """
    reading = _Reading(config, list(problems))
    value = _read_config(node, config, "", reading)
    if reading.problems:
        sources: dict[str, int] = {}
        for place, _ in reading.problems:
            sources.setdefault(place.source, len(sources))
        ordered = sorted(reading.problems, key=lambda item: (sources[item[0].source], item[0].line, item[0].column))
        raise ConfigError([text for _, text in ordered])
    return value, {path: str(place) for path, place in reading.places.items()}


def _read_config(node: Node, config: type, path: str, reading: _Reading) -> Any:
    if not isinstance(node.value, dict):
        reading.add(node.place, path, f"expected {FieldType('config', config=config)}, got {describe(node)}")
        return _BAD
    kinds = field_types(config)
    suggested = _unknown_keys(node, config, path, reading)
    values: dict[str, Any] = {}
    for name, kind in kinds.items():
        here = f"{path}.{name}" if path else name
        if name in node.value:
            values[name] = _read_value(node.value[name], kind, here, reading)
        elif is_required(config, name):
            values[name] = _BAD
            if name not in suggested:
                reading.add(node.place, path, f"missing required key '{name}' ({kind})")
    if any(value is _BAD for value in values.values()):
        return _BAD
    try:
        return config(**values)
    except ConfigError as error:
        for sentence in error.problems:
            reading.add(_place_of(sentence, node, path, reading), path, sentence)
        return _BAD


def _unknown_keys(node: Node, config: type, path: str, reading: _Reading) -> set[str]:
    """Report unknown keys; returns the known names that they were taken for."""
    assert isinstance(node.value, dict)
    suggested = set()
    for key, child in node.value.items():
        if key in field_types(config):
            continue
        here = f"{path}.{key}" if path else key
        known = None
        sentence = rejection(key)
        if sentence is None:
            known = suggest_key(key, config=config, path=path, root=reading.root)
            sentence = f"unknown key; did you mean '{known}'?" if known else None
        if sentence is None:
            sentence = f"unknown key; the keys here are {', '.join(field_types(config))}"
        if known is not None:
            suggested.add(known)
        reading.add(child.key_place, here, sentence)
    return suggested


def _read_value(node: Node, kind: FieldType, path: str, reading: _Reading) -> Any:
    if kind.optional and node.is_null:
        reading.places[path] = node.place
        return None
    if kind.config is not None:
        reading.places[path] = node.place
        return _read_config(node, kind.config, path, reading)
    try:
        value = canonical(kind, _python_value(node, kind))
    except TypeError:
        reading.add(node.place, path, _wrong_value(node, kind))
        return _BAD
    reading.places[path] = node.place
    return value


def _python_value(node: Node, kind: FieldType) -> Any:
    """The scalar or list as the field's type wants to see it; anything unsuitable comes back unconverted."""
    if isinstance(node.value, tuple):
        if kind.kind != "strings":
            raise TypeError
        return tuple(_python_value(item, FieldType("str")) for item in node.value)
    if isinstance(node.value, dict):
        raise TypeError
    text = node.value
    if kind.kind == "str" or (kind.kind == "choice" and not _int_choices(kind)):
        if node.plain and (node.is_null or text in _BOOLS or _INT.fullmatch(text) or _FLOAT.fullmatch(text)):
            raise TypeError
        return text
    if not node.plain or len(text) > 40:
        raise TypeError
    if kind.kind == "bool":
        return _BOOLS.get(text, text)
    if kind.kind == "float" and _FLOAT.fullmatch(text):
        return float(text)
    if kind.kind in ("int", "choice") and _INT.fullmatch(text):
        return int(text)
    return text


def _int_choices(kind: FieldType) -> bool:
    return any(isinstance(choice, int) for choice in kind.choices)


def _wrong_value(node: Node, kind: FieldType) -> str:
    if kind.kind == "choice" and isinstance(node.value, str):
        rejected = rejection(node.value)
        if rejected is not None:
            return f"{describe(node)}: {rejected}"
        known = suggest(node.value, [str(choice) for choice in kind.choices])
        hint = f"; did you mean '{known}'?" if known else ""
        return f"{describe(node)} is not {kind}{hint}"
    return f"expected {kind}, got {describe(node)}{_remedy(node, kind)}"


def _remedy(node: Node, kind: FieldType) -> str:
    if isinstance(node.value, (dict, tuple)):
        return "; quote each item" if kind.kind == "strings" and isinstance(node.value, tuple) else ""
    if kind.kind == "bool" and node.value.lower() in _YAML11_BOOLS:
        return f"; write {'true' if node.value.lower() in ('yes', 'on', 'y') else 'false'}"
    if kind.kind in ("int", "float", "bool") and not node.plain:
        return "; remove the quotes"
    if kind.kind == "str" and not node.is_null:
        return f'; quote it: "{node.value}"'
    if kind.kind == "strings" and not node.is_null:
        return f"; write [{node.value}]"
    return ""


def _place_of(sentence: str, node: Node, path: str, reading: _Reading) -> Place:
    """A check's sentence begins with the key it is about: that key's place, else its nearest ancestor's."""
    name = re.match(r"[a-z_0-9.]*", sentence)
    key = name.group().rstrip(".") if name else ""
    while key:
        place = reading.places.get(f"{path}.{key}" if path else key)
        if place is not None:
            return place
        key = key.rpartition(".")[0]
    return node.place


def plain_data(node: Node) -> Any:
    """The tree as plain Python values by the YAML 1.2 core rules, for the JSON schema's validator."""
    if isinstance(node.value, dict):
        return {key: plain_data(child) for key, child in node.value.items()}
    if isinstance(node.value, tuple):
        return [plain_data(child) for child in node.value]
    if not node.plain:
        return node.value
    if node.is_null:
        return None
    if node.value in _BOOLS:
        return _BOOLS[node.value]
    if _INT.fullmatch(node.value):
        return int(node.value)
    return float(node.value) if _FLOAT.fullmatch(node.value) else node.value


def origins_of(config: Any, written: dict[str, str]) -> dict[str, str]:
    """Origin of every leaf value of a config: where it was written, or "default"."""
    origins: dict[str, str] = {}

    def walk(value: Any, path: str) -> None:
        for item in dataclasses.fields(value):
            here = f"{path}.{item.name}" if path else item.name
            child = getattr(value, item.name)
            if dataclasses.is_dataclass(child):
                walk(child, here)
            else:
                origins[here] = written.get(here, "default")

    walk(config, "")
    return origins
