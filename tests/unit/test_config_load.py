"""The loader: places, suggestions, strict scalars, inheritance, overrides, limits."""

# ruff: noqa: E501 (sentences stay whole, so that they can be searched for)
from __future__ import annotations

from pathlib import Path

import pytest

import moe_layer.config as config_package
from moe_layer.config import MoEConfig, TrainConfig, load_config, load_with_origins
from moe_layer.config.document import MAX_BYTES
from moe_layer.errors import ConfigError
from tests.unit.config_cases import LAYER, RUN, problems, write


def test_all_problems_at_once_with_place_and_suggestion(tmp_path: Path) -> None:
    text = """\
hidden_size: big
aux_los_coef: 1
router:
  top_k: 4
  num_expert: 8
  top_k: 5
  score_function: sigmod
  renormalize: no
experts:
  intermediate_size: "4"
"""
    assert problems(tmp_path, text, "roter.x=1") == [
        "x.yaml:1:14: hidden_size: expected an integer >= 1 and <= 1048576, got 'big'",
        "x.yaml:2:1: aux_los_coef: unknown key; did you mean 'losses.aux_coeff'?",
        "x.yaml:5:3: router.num_expert: unknown key; did you mean 'num_experts'?",
        "x.yaml:6:3: top_k: set twice (first at line 4); keep one",
        "x.yaml:7:19: router.score_function: 'sigmod' is not one of softmax, sigmoid, sqrtsoftplus; did you mean 'sigmoid'?",
        "x.yaml:8:16: router.renormalize: expected true or false, got 'no'; write false",
        "x.yaml:10:22: experts.intermediate_size: expected an integer >= 1 and <= 1048576, got the quoted string '4'; remove the quotes",
        "override 'roter.x=1': roter: unknown key; did you mean 'router'?",
    ]


def test_the_error_says_how_many_problems_there_are(tmp_path: Path) -> None:
    path = write(tmp_path, "hidden_size: 0\n")
    with pytest.raises(
        ConfigError, match=r"^3 problems in the configuration:\n  .*x\.yaml:1:1: missing required key 'router'"
    ):
        load_config(path)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("losses.z_coeff", "1e-3", 1e-3),
        ("losses.z_coeff", "1", 1.0),
        ("losses.z_coeff", ".5", 0.5),
        ("losses.z_coeff", "1.", 1.0),
        ("dispatch.deadline_s", "1_000", 1000.0),
        ("router.expert_bias", "false", False),
        ("router.renormalize", "True", True),
        ("hidden_size", "1_024", 1024),
        ("router.num_groups", "null", None),
        ("router.num_groups", "~", None),
        ("router.num_groups", "", None),
        ("shared_expert", "null", None),
        ("experts.recompute", "none", "none"),
        ("experts.recompute", '"h"', "h"),
    ],
)
def test_scalars(tmp_path: Path, key: str, value: str, expected: object) -> None:
    found = load_config(write(tmp_path, LAYER), [f"{key}={value}"])
    for part in key.split("."):
        found = getattr(found, part)
    assert found == expected
    assert type(found) is type(expected)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("hidden_size", "1e3", "expected an integer >= 1 and <= 1048576, got '1e3'"),
        ("hidden_size", "010", "expected an integer >= 1 and <= 1048576, got '010'"),
        ("hidden_size", "0x10", "expected an integer >= 1 and <= 1048576, got '0x10'"),
        ("hidden_size", "1:30", "expected an integer >= 1 and <= 1048576, got '1:30'"),
        ("hidden_size", "32.0", "expected an integer >= 1 and <= 1048576, got '32.0'"),
        ("hidden_size", "true", "expected an integer >= 1 and <= 1048576, got 'true'"),
        ("hidden_size", "null", "expected an integer >= 1 and <= 1048576, got null"),
        ("hidden_size", "9" * 30, "expected an integer >= 1 and <= 1048576, got '" + "9" * 30 + "'"),
        ("losses.z_coeff", ".inf", "expected a number >= 0, got '.inf'"),
        ("losses.z_coeff", ".nan", "expected a number >= 0, got '.nan'"),
        ("losses.z_coeff", "1e999", "expected a number >= 0, got '1e999'"),
        ("router.expert_bias", "on", "expected true or false, got 'on'; write true"),
        ("router.expert_bias", "1", "expected true or false, got '1'"),
        ("router.expert_bias", '"true"', "expected true or false, got the quoted string 'true'; remove the quotes"),
        ("router.expert_bias", "[true]", "expected true or false, got a list"),
        ("experts.recompute", "no", "'no' is not one of none, h, fp8_h; did you mean 'none'?"),
        ("experts.recompute", "null", "null is not one of none, h, fp8_h"),
        ("dispatch.alignment", "7", "'7' is not one of 1, 8, 16, 128"),
        ("dispatch.alignment", '"8"', "the quoted string '8' is not one of 1, 8, 16, 128; did you mean '8'?"),
        ("router", "3", None),
        ("router", "null", None),
    ],
)
def test_wrong_scalars(tmp_path: Path, key: str, value: str, message: str | None) -> None:
    if message is None:
        keys = "a mapping with the keys num_experts, top_k, score_function,"
        [found] = problems(tmp_path, LAYER, f"{key}={value}")
        assert found.startswith(f"override '{key}={value}': {key}: expected {keys}")
        return
    assert problems(tmp_path, LAYER, f"{key}={value}") == [f"override '{key}={value}': {key}: {message}"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("a.txt", "expected a list of strings, got 'a.txt'; write [a.txt]"),
        ("[1, b]", "expected a list of strings, got a list; quote each item"),
        ("[[a]]", "expected a list of strings, got a list; quote each item"),
    ],
)
def test_lists_of_strings(tmp_path: Path, value: str, message: str) -> None:
    assert problems(tmp_path, RUN, f"data.files={value}") == [f"override 'data.files={value}': data.files: {message}"]
    config = load_config(write(tmp_path, RUN), ['data.files=[a.txt, "b c.txt"]'], kind=TrainConfig)
    assert config.data.files == ("a.txt", "b c.txt")


@pytest.mark.parametrize(("value", "shown"), [("123", "'123'"), ("true", "'true'"), ("1e3", "'1e3'")])
def test_a_string_that_looks_like_something_else_must_be_quoted(tmp_path: Path, value: str, shown: str) -> None:
    message = f"override 'name={value}': name: expected a string, got {shown}; quote it: \"{value}\""
    assert problems(tmp_path, RUN, f"name={value}") == [message]
    assert load_config(write(tmp_path, RUN), [f'name="{value}"'], kind=TrainConfig).name == value
    assert load_config(write(tmp_path, RUN), ["name=no"], kind=TrainConfig).name == "no"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\n", "x.yaml:2:1: not valid YAML: while parsing a flow sequence, expected ',' or ']', but got '<stream end>'"),
        ("a: b: c\n", "x.yaml:1:5: not valid YAML: mapping values are not allowed here"),
        ("\ta: 1\n", "x.yaml:1:1: not valid YAML: while scanning for the next token, found character '\\t' that cannot start any token"),
        ("a: \x01\n", "x.yaml: not valid YAML: unacceptable character #x0001: special characters are not allowed in \"<unicode string>\", position 3"),
        ("a: 1\n---\nb: 2\n", "x.yaml:2:1: not valid YAML: expected a single document in the stream, but found another document"),
        ("a: &x 1\n", "x.yaml:1:4: anchors and aliases are not supported; inherit from another file with base:"),
        ("a: *x\n", "x.yaml:1:4: anchors and aliases are not supported; inherit from another file with base:"),
        ("a: !!python/object:os.system x\n", "x.yaml:1:4: the tag tag:yaml.org,2002:python/object:os.system is not supported; write the plain value"),
        ("? [a]\n: 1\n" + LAYER, "x.yaml:1:3: a key must be a name, got a sequence"),
        ("[" * 40, "x.yaml:1:17: nested deeper than 16 levels; this is not a configuration"),
        ("- 1\n", "x.yaml:1:1: expected a mapping of keys at the top level, got a list"),
        ("", "x.yaml:1:1: expected a mapping of keys at the top level, got null"),
        ("# comment\n", "x.yaml:1:1: expected a mapping of keys at the top level, got null"),
    ],
)  # fmt: skip
def test_documents_that_are_refused(tmp_path: Path, text: str, message: str) -> None:
    assert problems(tmp_path, text) == [message]


def test_an_alias_bomb_is_refused_at_once(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 60))
    assert problems(tmp_path, bomb) == [
        "x.yaml:1:5: anchors and aliases are not supported; inherit from another file with base:"
    ]


def test_size_encoding_and_missing_files(tmp_path: Path) -> None:
    assert problems(tmp_path, "#" * (MAX_BYTES + 1)) == [
        "x.yaml: is larger than 262144 bytes; this is not a configuration"
    ]
    (tmp_path / "latin.yaml").write_bytes(b"name: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml: is not UTF-8 text \(byte 9\); save it as UTF-8"):
        load_config(tmp_path / "latin.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot be read \(No such file or directory\)"):
        load_config(tmp_path / "none.yaml")
    with pytest.raises(ConfigError, match=r"cannot be read \(Is a directory\)"):
        load_config(tmp_path)
    with pytest.raises(ConfigError, match=r"is not a usable path|cannot be read"):
        load_config("a/\0.yaml")
    (tmp_path / "bom.yaml").write_text("\ufeff" + LAYER, encoding="utf-8")
    assert load_config(tmp_path / "bom.yaml") == load_config(write(tmp_path, LAYER))


def test_presets_by_name(tmp_path: Path) -> None:
    assert load_config("mixtral-8x7b", kind=MoEConfig).router.num_experts == 8
    with pytest.raises(ConfigError, match=r"no preset is called 'mixtral'; did you mean 'mixtral-8x7b'\?"):
        load_config("mixtral")
    with pytest.raises(
        ConfigError, match=r"no preset is called 'zzz'; presets: deepseek-v3, gpt-oss-120b, gpt-oss-20b"
    ):
        load_config("zzz")


def test_kinds(tmp_path: Path) -> None:
    run, layer = write(tmp_path, RUN), write(tmp_path, LAYER, "layer.yaml")
    assert isinstance(load_config(run), TrainConfig)
    assert isinstance(load_config(layer), MoEConfig)
    with pytest.raises(
        ConfigError, match=r"is a training configuration, a layer configuration is needed; use load_config"
    ):
        load_config(run, kind=MoEConfig)
    with pytest.raises(
        ConfigError, match=r"describes one layer, a training configuration is needed; put its keys under moe:"
    ):
        load_config(layer, kind=TrainConfig)
    assert problems(tmp_path, RUN.replace("moe:", "model2:"))[0] == (
        "x.yaml:1:1: missing required key 'moe' (a mapping with the keys hidden_size, router, experts, shared_expert, losses, "
        "balance, dispatch, replay, kernels)"
    )


def test_base_merges_deeply_and_remembers_origins(tmp_path: Path) -> None:
    write(tmp_path, LAYER, "base.yaml")
    path = write(tmp_path, "base: ../base.yaml\nrouter:\n  top_k: 4\n", "sub/child.yaml")
    loaded = load_with_origins(path, ["losses.z_coeff=1e-3"])
    assert isinstance(loaded.config, MoEConfig)
    assert (loaded.config.router.num_experts, loaded.config.router.top_k) == (8, 4)
    origins = {key: value.replace(f"{tmp_path}/", "") for key, value in loaded.origins.items()}
    assert origins["hidden_size"] == "sub/../base.yaml:1:14"
    assert origins["router.top_k"] == "sub/child.yaml:3:10"
    assert origins["losses.z_coeff"] == "override 'losses.z_coeff=1e-3'"
    assert origins["losses.aux"] == "default"
    assert origins["shared_expert"] == "default"


def test_base_of_a_preset_and_of_moe(tmp_path: Path) -> None:
    loaded = load_with_origins(write(tmp_path, "base: gpt-oss-20b\nrouter: {top_k: 2}\n"))
    assert loaded.origins["hidden_size"] == "preset gpt-oss-20b:3:14"
    run = "name: r\nmodel: {num_layers: 1, num_heads: 16}\nmoe:\n  base: qwen3-30b-a3b\n  router: {top_k: 4}\n"
    config = load_config(write(tmp_path, run, "run.yaml"), kind=TrainConfig)
    assert (config.moe.router.num_experts, config.moe.router.top_k) == (128, 4)
    # a second moe: base: starts the layer afresh, nothing of the first family is left
    config = load_config(write(tmp_path, "base: run.yaml\nmoe: {base: olmoe-1b-7b}\n", "child.yaml"), kind=TrainConfig)
    assert config.moe == load_config("olmoe-1b-7b")
    # null removes an inherited component
    assert load_config(write(tmp_path, "base: kimi-k2\nshared_expert: null\n"), kind=MoEConfig).shared_expert is None


def test_problems_with_base(tmp_path: Path) -> None:
    write(tmp_path, RUN, "run.yaml")
    write(tmp_path, LAYER, "layer.yaml")
    write(tmp_path, "base: b.yaml\n", "a.yaml")
    write(tmp_path, "base: a.yaml\n", "b.yaml")
    cases = {
        "base: [a]\n": "x.yaml:1:7: base: expected the path of one file or a preset's name, got a list",
        "base:\n": "x.yaml:1:6: base: expected the path of one file or a preset's name, got null",
        "base: qwen3\n": "x.yaml:1:7: base: no preset is called 'qwen3'; did you mean 'qwen3-30b-a3b'? (a file's name ends in .yaml)",
        "base: no.yaml\n": "x.yaml:1:7: base: no.yaml: cannot be read (No such file or directory); give the path of a YAML file",
        "moe: {base: run.yaml}\n": "x.yaml:1:13: base: run.yaml is a training configuration; give a layer's here",
        "base: layer.yaml\nmoe: {}\n": "x.yaml:1:7: base: layer.yaml describes one layer; write it as moe: base:",
    }
    for text, message in cases.items():
        assert problems(tmp_path, text) == [message]
    [circle] = problems(tmp_path, "base: a.yaml\n")
    assert "base: goes in a circle or too deep (x.yaml -> a.yaml -> b.yaml -> a.yaml); remove one of them" in circle
    # a problem in the inherited file points into that file
    write(tmp_path, LAYER.replace("8", "eight"), "bad.yaml")
    assert problems(tmp_path, "base: bad.yaml\n") == [
        "bad.yaml:3:16: router.num_experts: expected an integer >= 1 and <= 1048576, got 'eight'"
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("top_k", "override 'top_k': expected key=value, such as router.top_k=4"),
        ("=3", "override '=3': expected key=value, such as router.top_k=4"),
        ("top_k=4", "override 'top_k=4': top_k: unknown key; did you mean 'router.top_k'?"),
        ("router.topk=4", "override 'router.topk=4': router.topk: unknown key; did you mean 'router.top_k'?"),
        ("router.num_experts_per_tok=4", "override 'router.num_experts_per_tok=4': router.num_experts_per_tok: unknown key; did you mean 'router.top_k'?"),
        ("router.top_k.x=4", "override 'router.top_k.x=4': router.top_k is a single value and has no keys below it"),
        ("router..top_k=4", "override 'router..top_k=4': router.: unknown key; the keys here are num_experts, top_k,"),
        ("router.top_k=[", "override 'router.top_k=[': not valid YAML"),
        ("base=x", "override 'base=x': base: base: belongs at the top of a file or directly under moe:, not here"),
        ("etp=2", "override 'etp=2': etp: expert tensor parallelism is not in this version"),
    ],
)  # fmt: skip
def test_problems_with_overrides(tmp_path: Path, override: str, message: str) -> None:
    [found] = problems(tmp_path, LAYER, override)
    assert found.startswith(message)


def test_overrides_as_a_mapping_and_of_whole_components(tmp_path: Path) -> None:
    path = write(tmp_path, LAYER)
    config = load_config(path, {"router.top_k": 4, "shared_expert": {"intermediate_size": 8}, "losses.z_coeff": 1e-5})
    assert isinstance(config, MoEConfig) and config.shared_expert is not None
    assert (config.router.top_k, config.shared_expert.intermediate_size, config.losses.z_coeff) == (4, 8, 1e-5)
    assert config == load_config(
        path, ["router.top_k=4", "shared_expert={intermediate_size: 8}", "losses.z_coeff=1e-5"]
    )
    assert config == load_config(path, ["router.top_k=3", "router.top_k=4", "shared_expert.intermediate_size=8", "losses.z_coeff=1e-5"])  # fmt: skip
    with pytest.raises(ConfigError, match=r"cannot write <object object at .*> in YAML; give plain data"):
        load_config(path, {"router.top_k": object()})
    with pytest.raises(ConfigError, match="overrides must be a list of key=value strings or a mapping, got the string"):
        load_config(path, "router.top_k=4")


REJECTED = [
    ("router.score_function=sinkhorn", "'sinkhorn': Sinkhorn routing is not in this version"),
    ("losses.aux=quantile", "'quantile': quantile balancing is not in this version"),
    ("dispatch.dispatch_format=nvfp4", "'nvfp4': NVFP4 and MXFP formats are not in this version"),
    ("dispatch.dispatch_format=mxfp8", "'mxfp8': NVFP4 and MXFP formats are not in this version"),
    ("moe_latent_size=64", "latent MoE is not in this version"),
    ("router.latent_size=64", "latent MoE is not in this version"),
    ("expert_tensor_parallel_size=2", "expert tensor parallelism is not in this version; shard whole experts with parallel.ep"),
    ("router.qb_margin=1", "quantile balancing is not in this version"),
]  # fmt: skip


@pytest.mark.parametrize(("override", "sentence"), REJECTED)
def test_features_rejected_by_name(tmp_path: Path, override: str, sentence: str) -> None:
    key, _, value = override.partition("=")
    assert problems(tmp_path, LAYER, override)[0].startswith(f"override '{override}': {key}: {sentence}")
    found = problems(tmp_path, _insert(LAYER, key, value))
    assert any(sentence in problem for problem in found)


def _insert(text: str, key: str, value: str) -> str:
    parent, _, name = key.rpartition(".")
    if not parent:
        return f"{text}{name}: {value}\n"
    if f"{parent}:\n" in text:
        return text.replace(f"{parent}:\n", f"{parent}:\n  {name}: {value}\n")
    return f"{text}{parent}:\n  {name}: {value}\n"


def test_names_of_other_frameworks_are_understood(tmp_path: Path) -> None:
    for foreign, ours in {
        "num_local_experts": "router.num_experts",
        "num_experts_per_tok": "router.top_k",
        "norm_topk_prob": "router.renormalize",
        "moe_intermediate_size": "experts.intermediate_size",
        "router_aux_loss_coef": "losses.aux_coeff",
        "n_group": "router.num_groups",
    }.items():
        assert problems(tmp_path, f"{LAYER}{foreign}: 1\n") == [
            f"x.yaml:7:1: {foreign}: unknown key; did you mean '{ours}'?"
        ]


def test_public_names_exist() -> None:
    for name in config_package.__all__:
        assert hasattr(config_package, name)
