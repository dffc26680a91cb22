"""What a configuration field accepts, parsed once from its annotation for loader, checks, schema and docs."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import cache
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

INT_LIMIT = 2**63 - 1


def _number(value: float) -> str:
    return str(int(value)) if float(value).is_integer() else repr(value)


@dataclass(frozen=True)
class Bounds:
    """Interval of a number; `open_low` and `open_high` exclude the ends."""

    low: float | None = None
    high: float | None = None
    open_low: bool = False
    open_high: bool = False

    def contains(self, value: float) -> bool:
        """Whether `value` lies inside."""
        if self.low is not None and (value < self.low or (self.open_low and value == self.low)):
            return False
        return self.high is None or value < self.high or (not self.open_high and value == self.high)

    def __str__(self) -> str:
        parts = []
        if self.low is not None:
            parts.append(f"{'>' if self.open_low else '>='} {_number(self.low)}")
        if self.high is not None:
            parts.append(f"{'<' if self.open_high else '<='} {_number(self.high)}")
        return " and ".join(parts)


ExpertCount = Annotated[int, Bounds(low=1, high=2**20)]
"""The reference router packs the expert id into 20 bits of its selection key."""
PositiveInt = Annotated[int, Bounds(low=1)]
Width = Annotated[int, Bounds(low=1, high=2**20)]
"""Far above any model, and low enough that no product of two overflows."""
NonNegativeInt = Annotated[int, Bounds(low=0)]
PositiveFloat = Annotated[float, Bounds(low=0, open_low=True)]
NonNegativeFloat = Annotated[float, Bounds(low=0)]
Fraction = Annotated[float, Bounds(low=0, high=1, open_high=True)]
OpenFraction = Annotated[float, Bounds(low=0, high=1, open_low=True, open_high=True)]


@dataclass(frozen=True)
class FieldType:
    """`kind` is int, float, bool, str, choice, strings or config; `choices` and `config` serve the last two."""

    kind: str
    optional: bool = False
    bounds: Bounds | None = None
    choices: tuple[str | int, ...] = ()
    config: type | None = None

    def __str__(self) -> str:
        if self.kind == "choice":
            text = "one of " + ", ".join(str(choice) for choice in self.choices)
        elif self.config is not None:
            text = "a mapping with the keys " + ", ".join(field_types(self.config))
        else:
            text = _NOUNS[self.kind] + (f" {self.bounds}" if self.bounds else "")
        return f"{text}, or null" if self.optional else text


_NOUNS = {
    "int": "an integer",
    "float": "a number",
    "bool": "true or false",
    "str": "a string",
    "strings": "a list of strings",
}


def _parse(annotation: Any) -> FieldType:
    if get_origin(annotation) in (Union, UnionType):
        inner = [arm for arm in get_args(annotation) if arm is not type(None)]
        assert len(inner) == 1, f"unsupported config annotation {annotation}"
        return dataclasses.replace(_parse(inner[0]), optional=True)
    if get_origin(annotation) is Annotated:
        base, bounds = get_args(annotation)
        return dataclasses.replace(_parse(base), bounds=bounds)
    if get_origin(annotation) is Literal:
        return FieldType("choice", choices=get_args(annotation))
    if annotation == tuple[str, ...]:
        return FieldType("strings")
    if dataclasses.is_dataclass(annotation):
        assert isinstance(annotation, type)
        return FieldType("config", config=annotation)
    assert annotation in (int, float, bool, str), f"unsupported config annotation {annotation}"
    return FieldType(annotation.__name__)


@cache
def field_types(config: type) -> dict[str, FieldType]:
    """Field name -> what it accepts, in declaration order."""
    hints = get_type_hints(config, include_extras=True)
    return {field.name: _parse(hints[field.name]) for field in dataclasses.fields(config)}


def default_of(config: type, name: str) -> Any:
    """Default value of a field; `dataclasses.MISSING` for a required one."""
    field = next(field for field in dataclasses.fields(config) if field.name == name)
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default


def is_required(config: type, name: str) -> bool:
    """Whether the field has no default."""
    return default_of(config, name) is dataclasses.MISSING


def canonical(kind: FieldType, value: Any) -> Any:
    """`value` in the field's own type (2 -> 2.0 for a number, list -> tuple).

    Raises:
        TypeError: the field does not accept the value; the message is what it accepts.
    """
    if value is None and kind.optional:
        return None
    if kind.kind == "float" and isinstance(value, int) and not isinstance(value, bool) and abs(value) <= INT_LIMIT:
        value = float(value)
    if kind.kind == "strings" and isinstance(value, list):
        value = tuple(value)
    if not _accepts(kind, value):
        raise TypeError(str(kind))
    return value


def _accepts(kind: FieldType, value: Any) -> bool:
    if kind.kind == "choice":
        return type(value) in (str, int) and value in kind.choices
    if kind.config is not None:
        return isinstance(value, kind.config)
    if kind.kind == "strings":
        return isinstance(value, tuple) and all(isinstance(item, str) for item in value)
    if type(value).__name__ != kind.kind:
        return False
    if kind.kind == "int" and abs(value) > INT_LIMIT:
        return False
    if kind.kind == "float" and not math.isfinite(value):
        return False
    return kind.bounds is None or kind.bounds.contains(value)
