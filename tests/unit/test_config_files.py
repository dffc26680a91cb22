"""The checked-in files: presets against published facts, every YAML against loader and schema, generated files current."""

# ruff: noqa: E501 (sentences stay whole, so that they can be searched for)
from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from moe_layer.config import MoEConfig, TrainConfig, config_hash, load_config, preset_names, to_dict, to_yaml
from moe_layer.config.describe import reference
from moe_layer.config.document import read_file
from moe_layer.config.read import plain_data
from moe_layer.config.schema import json_schema, schema_text
from tests.unit.config_cases import LAYER, ROOT, RUN, write

jsonschema = pytest.importorskip("jsonschema", reason="the schema is checked with jsonschema: requirements/test.txt")

# configs/rl is read by scripts/rl_replay.py, whose settings tests/e2e/test_rl_quick.py checks.
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.yaml") if path.parent.name != "rl")
IDS = [str(path.relative_to(ROOT / "configs")) for path in CONFIGS]

# hidden, F, E, K, score, renormalised, scale, groups, group_topk, bias, shared, aux, coefficient
PUBLISHED: dict[str, tuple[Any, ...]] = {
    "mixtral-8x7b": (4096, 14336, 8, 2, "softmax", True, 1.0, None, None, False, None, "batch", 0.02),
    "deepseek-v3": (7168, 2048, 256, 8, "sigmoid", True, 2.5, 8, 4, True, 2048, "sequence", 1e-3),
    "qwen3-30b-a3b": (2048, 768, 128, 8, "softmax", True, 1.0, None, None, False, None, "batch", 1e-3),
    "qwen3-next-80b-a3b": (2048, 512, 512, 10, "softmax", True, 1.0, None, None, False, 512, "batch", 1e-3),
    "olmoe-1b-7b": (2048, 1024, 64, 8, "softmax", False, 1.0, None, None, False, None, "batch", 0.01),
    "gpt-oss-20b": (2880, 2880, 32, 4, "softmax", True, 1.0, None, None, False, None, "none", 0.0),
    "gpt-oss-120b": (2880, 2880, 128, 4, "softmax", True, 1.0, None, None, False, None, "none", 0.0),
    "kimi-k2": (7168, 2048, 384, 8, "sigmoid", True, 2.827, None, None, True, 2048, "sequence", 1e-3),
}


def test_presets_are_the_published_ones() -> None:
    assert sorted(PUBLISHED) == preset_names()


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_preset_facts(name: str) -> None:
    c = load_config(name, kind=MoEConfig)
    shared = None if c.shared_expert is None else c.shared_expert.intermediate_size
    router, losses = c.router, c.losses
    assert PUBLISHED[name] == (
        c.hidden_size, c.experts.intermediate_size, router.num_experts, router.top_k, router.score_function, router.renormalize,
        router.scaling_factor, router.num_groups, router.group_topk, router.expert_bias, shared, losses.aux, losses.aux_coeff,
    )  # fmt: skip
    oss = name.startswith("gpt-oss")
    assert (c.experts.bias, router.linear_bias) == (oss, oss)
    assert c.experts.activation == ("swiglu_clamped" if oss else "swiglu")
    assert (c.shared_expert is not None and c.shared_expert.gate) == (name == "qwen3-next-80b-a3b")
    # transformers computes DeepSeek's gate in fp32 and the others' in the model's dtype
    assert router.gate_dtype == ("fp32" if router.expert_bias else "input")


# The classes whose defaults are the published model; Mixtral's, Qwen3-MoE's and OLMoE's differ from it in the listed facts.
TRANSFORMERS = {
    "mixtral-8x7b": ("MixtralConfig", {"num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size": 14336}),
    "deepseek-v3": ("DeepseekV3Config", {"n_routed_experts": 256, "n_group": 8, "topk_group": 4, "moe_intermediate_size": 2048}),
    "qwen3-30b-a3b": ("Qwen3MoeConfig", {"moe_intermediate_size": 768, "num_experts_per_tok": 8}),
    "qwen3-next-80b-a3b": ("Qwen3NextConfig", {"shared_expert_intermediate_size": 512, "num_experts": 512, "norm_topk_prob": True}),
    "olmoe-1b-7b": ("OlmoeConfig", {"num_experts": 64, "router_aux_loss_coef": 0.01, "norm_topk_prob": False}),
    "gpt-oss-120b": ("GptOssConfig", {"num_local_experts": 128, "intermediate_size": 2880, "num_experts_per_tok": 4}),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TRANSFORMERS))
def test_preset_agrees_with_transformers(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    class_name, facts = TRANSFORMERS[name]
    theirs, ours = getattr(transformers, class_name)(), load_config(name, kind=MoEConfig)
    assert {key: getattr(theirs, key) for key in facts} == facts
    assert ours.hidden_size == theirs.hidden_size
    assert ours.router.top_k == theirs.num_experts_per_tok
    experts = getattr(theirs, "num_local_experts", None) or theirs.num_experts
    assert ours.router.num_experts == experts
    assert ours.router.scaling_factor == getattr(theirs, "routed_scaling_factor", 1.0)
    assert ours.router.num_groups == getattr(theirs, "n_group", None)
    assert ours.router.group_topk == getattr(theirs, "topk_group", None)


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_every_file_loads_names_its_schema_and_fits_it(path: Path) -> None:
    load_config(path)
    first = path.read_text(encoding="utf-8").splitlines()[0]
    assert first == "# yaml-language-server: $schema=../schema.json"
    assert (path.parent / "../schema.json").is_file()
    jsonschema.validate(_data(path), json_schema(), cls=jsonschema.Draft202012Validator)


def _data(path: Path) -> Any:
    return plain_data(read_file(path, str(path), problems=[]))


@pytest.mark.parametrize(
    "text",
    [
        LAYER.replace("hidden_size: 32\n", ""),
        LAYER.replace("  top_k: 2\n", ""),
        LAYER.replace("top_k: 2", "top_k: 0"),
        LAYER + "losses: {aux: sinkhorn}\n",
        LAYER + "dispatch: {alignment: 7}\n",
        LAYER + "dispatch: {deadline_s: 0}\n",
        LAYER + "shared_expert: {}\n",
        LAYER + "extra: 1\n",
        RUN.replace("name: run\n", ""),
        RUN.replace("  hidden_size: 32\n", ""),
        RUN + "data: {files: a.txt}\n",
        "base: qwen3-30b-a3b\nrouter: {top_k: x}\n",
        "name: x\nmodel: {num_layers: 1, num_heads: 1}\n",
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ValueError):
        load_config(path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(_data(Path(path)), json_schema(), cls=jsonschema.Draft202012Validator)


@pytest.mark.parametrize(
    "text",
    [
        LAYER,
        RUN,
        "base: kimi-k2\nshared_expert: null\nlosses: {z_coeff: 1e-3}\n",
        "name: x\nmodel: {num_layers: 1, num_heads: 16}\nmoe: {base: kimi-k2, router: {top_k: 2}}\n",
    ],
)
def test_the_schema_accepts_what_the_loader_accepts(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, text)
    load_config(path)
    jsonschema.validate(_data(Path(path)), json_schema(), cls=jsonschema.Draft202012Validator)


def test_generated_files_are_current() -> None:
    jsonschema.Draft202012Validator.check_schema(json_schema())
    schema, page = ROOT / "configs/schema.json", ROOT / "docs/config.md"
    assert json.loads(schema.read_text(encoding="utf-8")) == json_schema()
    assert schema.read_text(encoding="utf-8") == schema_text(), "run: moe-layer config schema > configs/schema.json"
    assert page.read_text(encoding="utf-8") == reference(), "run: moe-layer config reference > docs/config.md"


@pytest.mark.parametrize("path", CONFIGS, ids=IDS)
def test_resolved_yaml_reads_back_equal(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = load_config(write(tmp_path, to_yaml(config)))
    assert again == config
    assert config_hash(again) == config_hash(config)
    jsonschema.validate(to_dict(config), json_schema(), cls=jsonschema.Draft202012Validator)


def test_the_hash_sees_every_value_and_nothing_else(tmp_path: Path) -> None:
    base = load_config("mixtral-8x7b")
    assert config_hash(base) == config_hash(load_config("mixtral-8x7b", ["router.top_k=2"]))
    changed = {config_hash(load_config("mixtral-8x7b", [text])) for text in ("router.top_k=3", "kernels=reference", "losses.z_coeff=1e-9")}  # fmt: skip
    assert len(changed) == 3 and config_hash(base) not in changed
    # numbers written differently are the same numbers
    spelled = load_config(write(tmp_path, LAYER + "losses: {z_coeff: 1e-3}\ndispatch: {deadline_s: 60}\n"))
    assert config_hash(spelled) == config_hash(load_config(write(tmp_path, LAYER + "losses: {z_coeff: 0.001}\n")))
    assert len(config_hash(base)) == 16 and int(config_hash(base), 16) >= 0


def test_reading_a_configuration_imports_no_torch() -> None:
    code = "import sys; from moe_layer import load_config; load_config('kimi-k2'); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_awkward_strings_survive(tmp_path: Path) -> None:
    for text in ("no", "1e-3", "12", "null", "", " a: b # c", 'q"uo\\te', "tab\tnew\nline", "naïve 😀", "~", "'x'", "-", "%d", "\x7f\x85\u2028"):  # fmt: skip
        config = load_config(write(tmp_path, RUN), {"sample.prompt": "x"}, kind=TrainConfig)
        config = dataclasses.replace(config, sample=dataclasses.replace(config.sample, prompt=text))
        assert load_config(write(tmp_path, to_yaml(config), "again.yaml")) == config
