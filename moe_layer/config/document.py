"""YAML text -> a tree of nodes that remember their place. Values stay text here: only the reader knows a field's type.

Refused, because each has silently changed somebody's run: duplicate keys, tags, anchors and aliases (also the classical
expansion bomb), several documents, files over 256 KiB, nesting deeper than 16.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import yaml

from moe_layer.errors import ConfigError

MAX_BYTES = 256 * 1024
MAX_DEPTH = 16


@dataclass(frozen=True)
class Place:
    """Where a value was written; line 0 means the whole source (an override on the command line)."""

    source: str
    line: int = 0
    column: int = 0

    def __str__(self) -> str:
        return f"{self.source}:{self.line}:{self.column}" if self.line else self.source


@dataclass(frozen=True)
class Node:
    """A scalar (str), a sequence (tuple) or a mapping (dict), with the place of the value and of its key.

    `plain` is False for quoted scalars, which are always strings. A `fresh` mapping replaces an
    inherited one as a whole.
    """

    value: str | tuple[Node, ...] | dict[str, Node]
    place: Place
    key_place: Place
    plain: bool = True
    fresh: bool = False

    @property
    def is_null(self) -> bool:
        """Whether it is a plain `null`, `~` or nothing at all."""
        return self.plain and self.value in ("", "~", "null", "Null", "NULL")


Problems = list[tuple[Place, str]]
"""Findings that do not stop the reading: the place, and the sentence with the place in front."""


def read_file(path: Path, shown: str, *, problems: Problems) -> Node:
    """Parse one file; `shown` is its name in messages. Duplicate and impossible keys are added to `problems`.

    Raises:
        ConfigError: unreadable, too large, not UTF-8, or not one plain YAML mapping.
    """
    try:
        with path.open("rb") as stream:
            raw = stream.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{shown}: cannot be read ({reason}); give the path of a YAML file") from None
    if len(raw) > MAX_BYTES:
        raise ConfigError(f"{shown}: is larger than {MAX_BYTES} bytes; this is not a configuration")
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{shown}: is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    node = parse(text, Place(shown, 1, 1), problems=problems)
    if not isinstance(node.value, dict):
        raise ConfigError(f"{node.place}: expected a mapping of keys at the top level, got {describe(node)}")
    return node


def parse(text: str, origin: Place, *, problems: Problems) -> Node:
    """Parse YAML text. With `origin.line` 0 every node gets `origin` as its place.

    Raises:
        ConfigError: syntax errors, or anything of the refused list.
    """
    try:
        _check_events(text, origin)
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        place = _place(error.problem_mark or error.context_mark, origin)
        words = ", ".join(part for part in (error.context, error.problem) if part)
        raise ConfigError(f"{place}: not valid YAML: {words}") from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise ConfigError(f"{origin.source}: not valid YAML: {reason}") from None
    if root is None:
        return Node("", origin, origin)
    return _convert(root, origin, None, problems)


def _check_events(text: str, origin: Place) -> None:
    depth = 0
    for event in yaml.parse(text, Loader=yaml.SafeLoader):
        place = _place(event.start_mark, origin)
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise ConfigError(f"{place}: anchors and aliases are not supported; inherit from another file with base:")
        if getattr(event, "tag", None):
            raise ConfigError(f"{place}: the tag {event.tag} is not supported; write the plain value")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
        if depth > MAX_DEPTH:
            raise ConfigError(f"{place}: nested deeper than {MAX_DEPTH} levels; this is not a configuration")


def _place(mark: yaml.Mark | None, origin: Place) -> Place:
    if mark is None or not origin.line:
        return origin
    return Place(origin.source, mark.line + 1, mark.column + 1)


def _convert(node: yaml.Node, origin: Place, key_place: Place | None, problems: Problems) -> Node:
    place = _place(node.start_mark, origin)
    key_place = key_place or place
    if isinstance(node, yaml.ScalarNode):
        return Node(node.value, place, key_place, plain=node.style is None)
    if isinstance(node, yaml.SequenceNode):
        return Node(tuple(_convert(item, origin, None, problems) for item in node.value), place, key_place)
    assert isinstance(node, yaml.MappingNode)
    entries: dict[str, Node] = {}
    for key, value in node.value:
        here = _place(key.start_mark, origin)
        if not isinstance(key, yaml.ScalarNode):
            problems.append((here, f"{here}: a key must be a name, got a {key.id}"))
        elif key.value in entries:
            first = entries[key.value].key_place
            problems.append((here, f"{here}: {key.value}: set twice (first at line {first.line}); keep one"))
        else:
            entries[key.value] = _convert(value, origin, here, problems)
    return Node(entries, place, key_place)


def merge(below: Node, above: Node) -> Node:
    """Deep merge of two mappings: `above` wins; anything that is not a mapping on both sides is replaced."""
    if above.fresh or not isinstance(above.value, dict) or not isinstance(below.value, dict):
        return above
    entries = dict(below.value)
    for key, node in above.value.items():
        entries[key] = merge(entries[key], node) if key in entries else node
    # an override has no line of its own to point at
    placed = above if above.place.line else below
    return replace(placed, value=entries, fresh=below.fresh)


def describe(node: Node) -> str:
    """The value as a message shows it."""
    if isinstance(node.value, dict):
        return "a mapping"
    if isinstance(node.value, tuple):
        return "a list"
    if node.is_null:
        return "null"
    text = node.value if len(node.value) <= 60 else node.value[:57] + "..."
    return repr(text) if node.plain else f"the quoted string {text!r}"
