"""`moe-layer convert`: whole models there and back, and one clear sentence on bad input."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_layer.checkpoint import load_block, transformers_mapping
from moe_layer.cli import main
from tests.unit.hf_blocks import FAMILIES, hf_block, hf_model

pytest.importorskip("transformers", reason="transformers writes the checkpoints that are converted")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A saved two-layer model of each family."""
    root = tmp_path_factory.mktemp("models")
    for family in FAMILIES:
        hf_model(family).save_pretrained(root / family, max_shard_size="40KB")
    return {family: root / family for family in FAMILIES}


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for file in sorted(directory.glob("*.safetensors")):
        found |= load_file(file)
    return found


@pytest.mark.parametrize("family", FAMILIES)
def test_there_and_back_is_bitwise(family: str, checkpoints: dict[str, Path], tmp_path: Path, capsys) -> None:
    ours, back = tmp_path / "ours", tmp_path / "back"
    assert main(["convert", str(checkpoints[family]), str(ours)]) == 0
    line = capsys.readouterr().out
    assert "2 MoE layers (0, 1) of" in line
    assert "transformers -> moe_layer" in line
    assert main(["convert", str(ours), str(back)]) == 0
    original = tensors_of(checkpoints[family])
    result = tensors_of(back)
    blocks = {name for name in original if ".mlp." in name or ".block_sparse_moe." in name}
    assert set(result) == blocks
    for name in blocks:
        assert torch.equal(result[name], original[name]), name
        assert result[name].dtype == original[name].dtype
    index = json.loads((back / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == blocks


@pytest.mark.parametrize("layout", ["megatron", "megatron-grouped"])
def test_megatron_and_back(layout: str, checkpoints: dict[str, Path], tmp_path: Path) -> None:
    ours, theirs, again = tmp_path / "ours", tmp_path / "megatron", tmp_path / "again"
    (tmp_path / "layer.yaml").write_text(
        "hidden_size: 32\n"
        "router: {num_experts: 8, top_k: 3, softmax_order: pre, renormalize: true, gate_dtype: input}\n"
        "experts: {intermediate_size: 24}\n"
    )
    assert main(["convert", str(checkpoints["qwen3_moe"]), str(ours)]) == 0
    assert main(["convert", str(ours), str(theirs), "--to", layout]) == 0
    name = "local_experts.5.linear_fc1.weight" if layout == "megatron" else "linear_fc1.weight5"
    assert f"decoder.layers.1.mlp.experts.{name}" in tensors_of(theirs)
    config = str(tmp_path / "layer.yaml")
    assert main(["convert", str(theirs), str(again), "--from", layout, "--config", config]) == 0
    for layer in (0, 1):
        first, _ = load_block(ours / f"layer_{layer:05d}.safetensors")
        second, _ = load_block(again / f"layer_{layer:05d}.safetensors")
        assert all(torch.equal(first[key], second[key]) for key in first)


def test_a_bare_block_in_memory_names(tmp_path: Path) -> None:
    block = hf_block("gpt_oss")
    save_file(block.module.state_dict(), tmp_path / "block.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(block.config.to_dict()))
    assert main(["convert", str(tmp_path / "block.safetensors"), str(tmp_path / "ours")]) == 0
    tensors, config = load_block(tmp_path / "ours" / "layer_00000.safetensors")
    theirs = transformers_mapping(config, "gpt_oss", stored=False).from_ours(tensors)
    assert all(torch.equal(theirs[name], tensor) for name, tensor in block.module.state_dict().items())


def edit(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-9])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-5] ^= 4
    path.write_bytes(data)


EXPERT = "model.layers.0.mlp.experts.1.up_proj.weight"
BAD_SOURCES = {
    "missing expert": (
        lambda d: edit(d / "m.safetensors", lambda t: t.pop(EXPERT)),
        "1 missing: experts.1.up_proj.weight",
    ),
    "extra tensor": (
        lambda d: edit(d / "m.safetensors", lambda t: t.update({EXPERT + "_scale_inv": torch.ones(1)})),
        "1 unexpected: experts.1.up_proj.weight_scale_inv",
    ),
    "transposed": (
        lambda d: edit(d / "m.safetensors", lambda t: t.update({EXPERT: t[EXPERT].t().contiguous()})),
        "experts.1.up_proj.weight is [32, 24], must be [24, 32]",
    ),
    "truncated": (lambda d: truncate(d / "m.safetensors"), "is not a readable safetensors file"),
    "no routers": (
        lambda d: edit(d / "m.safetensors", lambda t: [t.pop(n) for n in list(t) if "mlp" in n]),
        "is the router of a MoE block",
    ),
    "no config": (lambda d: (d / "config.json").unlink(), "give --config and --family"),
    "broken config": (lambda d: (d / "config.json").write_text("{"), "config.json is not readable JSON"),
    "a list as config": (lambda d: (d / "config.json").write_text("[]"), "must hold a JSON object, found list"),
    "wrong family": (
        lambda d: (d / "config.json").write_text('{"model_type": "llama"}'),
        "model_type 'llama' is not known here",
    ),
    "no safetensors": (lambda d: (d / "m.safetensors").rename(d / "m.bin"), "holds no *.safetensors file"),
    "twice": (lambda d: shutil.copy(d / "m.safetensors", d / "n.safetensors"), "is both in"),
    "incomplete download": (
        lambda d: (d / "model.safetensors.index.json").write_text('{"weight_map": {"a": "b.safetensors"}}'),
        "the first is a in b.safetensors; the download is not complete",
    ),
    "broken index": (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "is not a readable index"),
}


@pytest.mark.parametrize("case", BAD_SOURCES)
def test_bad_sources_end_with_one_sentence(case: str, checkpoints: dict[str, Path], tmp_path: Path, capsys) -> None:
    source = tmp_path / "model"
    source.mkdir()
    save_file(tensors_of(checkpoints["qwen3_moe"]), source / "m.safetensors", metadata={"format": "pt"})
    shutil.copy(checkpoints["qwen3_moe"] / "config.json", source)
    damage, message = BAD_SOURCES[case]
    damage(source)
    assert main(["convert", str(source), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "out" / "moe_layer.json").exists()


def rewrite_manifest(directory: Path, **changes) -> None:
    path = directory / "moe_layer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


BAD_OURS = {
    "bit flip": (lambda d: flip(d / "layer_00001.safetensors"), "does not match its sha256"),
    "truncated": (lambda d: truncate(d / "layer_00001.safetensors"), "is not a whole safetensors file"),
    "missing layer": (lambda d: (d / "layer_00001.safetensors").unlink(), "differing: layer_00001.safetensors"),
    "extra layer": (
        lambda d: shutil.copy(d / "layer_00001.safetensors", d / "layer_00007.safetensors"),
        "differing: layer_00007.safetensors",
    ),
    "broken manifest": (lambda d: (d / "moe_layer.json").write_text("{"), "moe_layer.json is damaged"),
    "newer": (lambda d: rewrite_manifest(d, version=2), "version 2, this moe_layer reads version 1"),
    "no family": (lambda d: rewrite_manifest(d, model_type=None), "give --family"),
}


@pytest.mark.parametrize("case", BAD_OURS)
def test_damaged_files_of_ours(case: str, checkpoints: dict[str, Path], tmp_path: Path, capsys) -> None:
    ours = tmp_path / "ours"
    assert main(["convert", str(checkpoints["mixtral"]), str(ours)]) == 0
    damage, message = BAD_OURS[case]
    damage(ours)
    capsys.readouterr()
    assert main(["convert", str(ours), str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_wrong_arguments(checkpoints: dict[str, Path], tmp_path: Path, capsys) -> None:
    source = str(checkpoints["mixtral"])
    for arguments, message in (
        ([str(tmp_path / "absent"), "x"], "absent does not exist"),
        ([source, str(checkpoints["olmoe"])], "exists and is not an empty directory"),
        ([source, str(tmp_path / "o"), "--to", "megatron"], "from transformers to megatron in one step"),
        ([source, str(tmp_path / "o"), "--from", "moe_layer"], "has no moe_layer.json"),
        ([source, str(tmp_path / "o"), "--config", "no-such-preset"], "no-such-preset"),
    ):
        assert main(["convert", *arguments]) == 2
        assert message in capsys.readouterr().err
