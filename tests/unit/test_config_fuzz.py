"""Whatever the bytes: a config or a ConfigError with at least one sentence, never another exception, never a hang."""

from __future__ import annotations

import tempfile
from contextlib import suppress
from pathlib import Path

import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from moe_layer.config import MoEConfig, TrainConfig, load_config, to_yaml
from moe_layer.errors import ConfigError
from tests.unit.config_cases import LAYER, RUN, all_keys

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=12),
    st.sampled_from(
        ["softmax", "sigmoid", "pre", "none", "h", "auto", "1e-3", "no", "&a", "*a", "!!str", "<<", "{", "[", "batch"]
    ),
)
KEYS = st.one_of(
    st.sampled_from(sorted({part for key in all_keys() for part in key.split(".")} | {"base"})), st.text(max_size=6)
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(KEYS, inner, max_size=5)),
    max_leaves=12,
)


def load(raw: bytes, overrides: list[str]) -> MoEConfig | TrainConfig | None:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "x.yaml"
        path.write_bytes(raw)
        try:
            config = load_config(path, overrides)
        except ConfigError as error:
            assert error.problems and all(isinstance(problem, str) and problem for problem in error.problems)
            return None
        path.write_text(to_yaml(config), encoding="utf-8")
        assert load_config(path) == config
        return config


@settings(max_examples=300)
@given(st.binary(max_size=200))
def test_any_bytes(raw: bytes) -> None:
    load(raw, [])


@settings(max_examples=400)
@given(st.text(alphabet="ab:-[]{},&*!|>'\"%@`#?~ \n\t0.1e", max_size=60))
def test_any_yaml_punctuation(text: str) -> None:
    load(text.encode(), [])


@settings(max_examples=400)
@given(st.sampled_from([LAYER, RUN]), st.dictionaries(KEYS, TREES, max_size=4))
def test_any_extra_tree(text: str, extra: dict[str, object]) -> None:
    load((text + yaml.safe_dump(extra)).encode("utf-8", "surrogatepass"), [])


@settings(max_examples=600)
@given(
    st.sampled_from([LAYER, RUN]),
    st.lists(st.tuples(st.sampled_from(all_keys()), SCALARS, st.booleans()), min_size=1, max_size=4),
)
def test_any_override(text: str, items: list[tuple[str, object, bool]]) -> None:
    overrides = []
    for key, value, raw in items:
        key = key if text is RUN else key.removeprefix("moe.")
        overrides.append(f"{key}={value}" if raw else f"{key}={yaml.safe_dump(value, default_flow_style=True)}")
    load(text.encode(), overrides)


@settings(max_examples=400)
@given(st.sampled_from([LAYER, RUN]), st.data())
def test_any_damaged_byte(text: str, data: st.DataObject) -> None:
    raw = bytearray(text.encode())
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    load(bytes(raw), [])


@settings(max_examples=300)
@given(st.text(max_size=40))
def test_any_override_text(override: str) -> None:
    load(LAYER.encode(), [override])


@settings(max_examples=200)
@given(st.text(max_size=30))
def test_any_path(name: str) -> None:
    with suppress(ConfigError):
        load_config(name)
