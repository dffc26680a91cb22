"""A config as plain data, as YAML that reads back to the same config, and as a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from typing import Any

import yaml

_WORD = re.compile(r"[A-Za-z_./][A-Za-z0-9_./-]*")
_RESERVED = ("null", "true", "false", "yes", "no", "on", "off", "y", "n")


class _Dumper(yaml.SafeDumper):
    """Quotes every string that a reader could take for something else."""


def _represent_str(dumper: yaml.SafeDumper, text: str) -> yaml.Node:
    safe = _WORD.fullmatch(text) and not text.startswith(".") and text.lower() not in _RESERVED
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=None if safe else '"')


_Dumper.add_representer(str, _represent_str)


def to_dict(config: Any) -> dict[str, Any]:
    """Every value of a config as nested dicts, lists and scalars, in declaration order."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_flat(config: Any) -> dict[str, Any]:
    """Every value of a config under its dotted key, as `key=value` overrides write it."""
    flat: dict[str, Any] = {}

    def walk(values: dict[str, Any], prefix: str) -> None:
        for key, value in values.items():
            if isinstance(value, dict):
                walk(value, f"{prefix}{key}.")
            else:
                flat[prefix + key] = value

    walk(to_dict(config), "")
    return flat


def to_yaml(config: Any) -> str:
    """The complete config, defaults included; `load_config` of this text gives an equal config."""
    return yaml.dump(to_dict(config), Dumper=_Dumper, sort_keys=False, width=110, allow_unicode=False)


def config_hash(config: Any) -> str:
    """16 hexadecimal digits (64 bits) of SHA-256 over every value; equal configs have equal hashes on every machine."""
    text = json.dumps(to_dict(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
