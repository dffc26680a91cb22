"""Every key's own error text, in config_errors.golden: a wrong type, and a value just outside its range.

After a deliberate change: `python -m tests.unit.test_config_fields > tests/unit/config_errors.golden`, then read the diff.
"""

# ruff: noqa: E501 (sentences stay whole, so that they can be searched for)
from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pytest

from moe_layer.config import MoEConfig, TrainConfig, load_config
from moe_layer.config.describe import field_docs
from moe_layer.config.types import FieldType, default_of, field_types, is_required
from moe_layer.errors import ConfigError
from tests.unit.config_cases import RUN, all_keys, write

GOLDEN = Path(__file__).with_name("config_errors.golden")


def field_of(key: str) -> tuple[type, str, FieldType]:
    """Class, name and type of a dotted key of TrainConfig."""
    config: type = TrainConfig
    *parents, name = key.split(".")
    for parent in parents:
        below = field_types(config)[parent].config
        assert below is not None
        config = below
    return config, name, field_types(config)[name]


def bad_values(key: str) -> list[str]:
    """YAML values that the key must refuse."""
    kind = field_of(key)[2]
    values = ["[1]" if kind.kind == "str" else "wrong!"]
    if kind.bounds is not None:
        for limit, is_open, step in (
            (kind.bounds.low, kind.bounds.open_low, -1),
            (kind.bounds.high, kind.bounds.open_high, 1),
        ):
            if limit is not None:
                outside = limit if is_open else limit + step
                values.append(str(int(outside)) if float(outside).is_integer() else str(outside))
    if not kind.optional:
        values.append("null")
    return values


def messages(key: str, directory: Path) -> list[str]:
    path = write(directory, RUN)
    found = []
    for value in bad_values(key):
        try:
            load_config(path, [f"{key}={value}"])
        except ConfigError as error:
            found += error.problems
        else:
            found.append(f"{key}={value} was accepted")
    return found


def golden_text(directory: Path) -> str:
    lines = []
    for key in all_keys():
        lines += [f"[{key}]", *messages(key, directory), ""]
    return "\n".join(lines)


def _sections() -> dict[str, list[str]]:
    sections: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in GOLDEN.read_text(encoding="utf-8").splitlines():
        if line.startswith("["):
            lines = sections.setdefault(line[1:-1], [])
        elif line:
            lines.append(line)
    return sections


@pytest.mark.parametrize("key", all_keys())
def test_error_text(key: str, tmp_path: Path) -> None:
    found = messages(key, tmp_path)
    assert found == _sections()[key]
    for message in found:
        assert key in message and ("expected" in message or "is not one of" in message)


def test_the_golden_file_has_no_other_keys() -> None:
    assert list(_sections()) == all_keys()


@pytest.mark.parametrize("key", all_keys())
def test_missing_keys(key: str, tmp_path: Path) -> None:
    """A required key that is not there is named; one with a default is not needed."""
    config, name, _ = field_of(key)
    lines = [line for line in RUN.splitlines() if not line.strip().startswith(f"{name}:")]
    text = "\n".join(lines) + "\n"
    if not is_required(config, name):
        load_config(write(tmp_path, RUN))
        return
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert any(
        f"missing required key '{name}'" in problem or "expected a mapping" in problem
        for problem in caught.value.problems
    )


@pytest.mark.parametrize("config", [MoEConfig, TrainConfig], ids=lambda config: config.__name__)
def test_every_field_has_a_doc_and_a_valid_default(config: type) -> None:
    pending = [config]
    while pending:
        current = pending.pop()
        kinds, docs = field_types(current), field_docs(current)
        assert list(docs) == list(kinds)
        for name, kind in kinds.items():
            assert docs[name].endswith("."), f"{current.__name__}.{name}: its doc is not a sentence"
            default_of(current, name)
            if kind.config is not None:
                pending.append(kind.config)


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        sys.stdout.write(golden_text(Path(scratch)))
