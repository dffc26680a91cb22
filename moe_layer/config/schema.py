"""JSON Schema (2020-12) of the YAML files, for editors and for CI; `configs/schema.json` is its checked-in copy.

Cross-field rules are the loader's; required keys are asked for only where no `base:` could supply them.
"""

from __future__ import annotations

import dataclasses
import json
from typing import Any

from moe_layer.config.describe import field_docs
from moe_layer.config.model import MoEConfig
from moe_layer.config.train import TrainConfig
from moe_layer.config.types import INT_LIMIT, Bounds, FieldType, default_of, field_types, is_required

_BASE = {"type": "string", "description": "One file (path relative to this one) or preset to inherit from."}
_TYPES = {"int": "integer", "float": "number", "bool": "boolean", "str": "string"}


def json_schema() -> dict[str, Any]:
    """One schema for layer and training files."""
    definitions: dict[str, Any] = {}
    for config in (MoEConfig, TrainConfig):
        _define(config, definitions)
    for config in (MoEConfig, TrainConfig):
        definitions[config.__name__]["properties"]["base"] = _BASE
    layer, run = (_file_schema(config) for config in (MoEConfig, TrainConfig))
    only_run = [name for name in field_types(TrainConfig) if name not in field_types(MoEConfig)]
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "moe_layer configuration",
        "type": "object",
        "if": {"anyOf": [{"required": [name]} for name in only_run]},
        "then": run,
        "else": layer,
        "$defs": definitions,
    }


def schema_text() -> str:
    """Contents of `configs/schema.json`."""
    return json.dumps(json_schema(), indent=1) + "\n"


def _define(config: type, definitions: dict[str, Any]) -> None:
    docs = field_docs(config)
    properties = {}
    for name, kind in field_types(config).items():
        if kind.config is not None:
            _define(kind.config, definitions)
        properties[name] = {**_value_schema(kind), "description": docs[name], **_default(config, name)}
    definitions[config.__name__] = {"type": "object", "additionalProperties": False, "properties": properties}


def _value_schema(kind: FieldType) -> dict[str, Any]:
    if kind.config is not None:
        reference: dict[str, Any] = {"$ref": f"#/$defs/{kind.config.__name__}"}
        return {"anyOf": [reference, {"type": "null"}]} if kind.optional else reference
    if kind.kind == "choice":
        return {"enum": [*kind.choices, *([None] if kind.optional else [])]}
    if kind.kind == "strings":
        return {"type": "array", "items": {"type": "string"}}
    name = _TYPES[kind.kind]
    limits = _limits(kind.bounds) if kind.bounds else {}
    if kind.kind == "int":
        limits = {"maximum": INT_LIMIT, **limits}
    return {"type": [name, "null"] if kind.optional else name, **limits}


def _limits(bounds: Bounds) -> dict[str, float]:
    limits: dict[str, float] = {}
    if bounds.low is not None:
        limits["exclusiveMinimum" if bounds.open_low else "minimum"] = bounds.low
    if bounds.high is not None:
        limits["exclusiveMaximum" if bounds.open_high else "maximum"] = bounds.high
    return limits


def _default(config: type, name: str) -> dict[str, Any]:
    value = default_of(config, name)
    if value is dataclasses.MISSING or dataclasses.is_dataclass(value):
        return {}
    return {"default": list(value) if isinstance(value, tuple) else value}


def _file_schema(config: type) -> dict[str, Any]:
    reference = {"$ref": f"#/$defs/{config.__name__}"}
    no_base = {"not": {"required": ["base"]}}
    return {"allOf": [reference, {"if": no_base, "then": _required(config)}]}


def _required(config: type) -> dict[str, Any]:
    """The required keys of a config and of its children; a `moe:` with its own `base:` is let off."""
    schema: dict[str, Any] = {"required": [name for name in field_types(config) if is_required(config, name)]}
    children = {}
    for name, kind in field_types(config).items():
        if kind.config is None:
            continue
        below = _required(kind.config)
        if kind.config is MoEConfig:
            below = {"if": {"not": {"required": ["base"]}}, "then": below}
        if below.get("required") or "if" in below or below.get("properties"):
            children[name] = below
    if children:
        schema["properties"] = children
    return schema
