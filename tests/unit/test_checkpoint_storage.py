"""Checksummed files: whole or refused. Every damaged byte is found, an EP rank verifies what it reads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from moe_layer.checkpoint import block_shapes, load_block, save_block
from moe_layer.checkpoint.storage import load_tensors, read_header, save_tensors
from moe_layer.config.model import ExpertsConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_layer.errors import CheckpointError


def small_config() -> MoEConfig:
    return MoEConfig(
        hidden_size=4,
        router=RouterConfig(num_experts=4, top_k=2, expert_bias=True, score_function="sigmoid"),
        experts=ExpertsConfig(intermediate_size=2),
        shared_expert=SharedExpertConfig(intermediate_size=2, gate=True),
    )


def small_block(config: MoEConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in block_shapes(config).items()}


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "block.safetensors"
    save_block(path, small_block(small_config()), small_config())
    return path


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_a_block_and_its_config_come_back_bitwise(tmp_path: Path, dtype: torch.dtype) -> None:
    tensors = small_block(small_config(), dtype)
    save_block(tmp_path / "b.safetensors", tensors, small_config())
    loaded, config = load_block(tmp_path / "b.safetensors")
    assert config == small_config()
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == dtype
        assert torch.equal(loaded[name], tensor), name


@pytest.mark.parametrize("size", [1, 2, 4])
def test_every_ep_size_reads_its_share(saved: Path, size: int) -> None:
    whole = small_block(small_config())
    parts = [load_block(saved, ep_rank=rank, ep_size=size)[0] for rank in range(size)]
    for name, tensor in whole.items():
        if name.startswith("experts."):
            assert torch.equal(torch.cat([part[name] for part in parts]), tensor), name
        else:
            assert all(torch.equal(part[name], tensor) for part in parts), name


def test_an_ep_rank_verifies_its_own_experts_only(saved: Path) -> None:
    data = bytearray(saved.read_bytes())
    target = small_block(small_config())["experts.down_proj"][3].numpy().tobytes()
    data[data.index(target) + 5] ^= 1
    saved.write_bytes(data)
    load_block(saved, ep_rank=0, ep_size=2)
    with pytest.raises(CheckpointError, match=r"experts\.down_proj, experts \[3\] does not match its sha256"):
        load_block(saved, ep_rank=1, ep_size=2)


def test_flipped_bits_are_found_everywhere(tmp_path: Path) -> None:
    config = MoEConfig(
        hidden_size=2, router=RouterConfig(num_experts=2, top_k=1, renormalize=False, softmax_order="pre"),
        experts=ExpertsConfig(intermediate_size=1),
    )  # fmt: skip
    saved = tmp_path / "block.safetensors"
    save_block(saved, small_block(config), config)
    good = saved.read_bytes()
    undetected = []
    for position in range(0, len(good), 3):
        data = bytearray(good)
        data[position] ^= 1 << (position % 8)
        saved.write_bytes(data)
        try:
            load_block(saved)
        except CheckpointError:
            continue
        undetected.append(position)
    assert not undetected, f"{len(undetected)} flips in {len(good)} bytes were not detected: {undetected[:10]}"


def test_every_truncation_is_found(saved: Path) -> None:
    good = saved.read_bytes()
    for length in range(0, len(good), max(1, len(good) // 64)):
        saved.write_bytes(good[:length])
        with pytest.raises(CheckpointError, match=r"block\.safetensors"):
            load_block(saved)
    saved.write_bytes(good + b"\0")
    with pytest.raises(CheckpointError):
        load_block(saved)


def test_other_files_and_versions_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    foreign = tmp_path / "foreign.safetensors"
    save_file({"a": torch.zeros(1)}, foreign)
    with pytest.raises(CheckpointError, match="was not written by moe_layer"):
        load_block(foreign)
    newer = tmp_path / "newer.safetensors"
    save_file({"a": torch.zeros(1)}, newer, metadata={"format": "moe_layer.block", "version": "9"})
    with pytest.raises(CheckpointError, match="format version '9', this moe_layer reads 1"):
        load_block(newer)
    with pytest.raises(CheckpointError, match=r"absent\.safetensors"):
        load_block(tmp_path / "absent.safetensors")


def test_a_block_that_does_not_fit_its_config_is_not_saved(tmp_path: Path) -> None:
    tensors = small_block(small_config())
    del tensors["router.expert_bias"]
    with pytest.raises(CheckpointError, match=r"1 missing: router\.expert_bias \[4\]"):
        save_block(tmp_path / "b.safetensors", tensors, small_config())
    assert list(tmp_path.iterdir()) == []


def test_a_stored_config_that_lies_is_found(tmp_path: Path) -> None:
    path = tmp_path / "b.safetensors"
    tensors = small_block(small_config())
    save_tensors(path, tensors, header={"config": {"hidden_size": 4, "routr": {}}})
    with pytest.raises(CheckpointError, match="routr"):
        load_block(path)
    save_tensors(path, tensors, header={})
    with pytest.raises(CheckpointError, match="stored config does not fit"):
        load_block(path)


def test_an_interrupted_save_leaves_the_previous_file(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = saved.read_bytes()

    def killed(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str]) -> None:
        Path(path).write_bytes(b"half a file")
        raise KeyboardInterrupt

    monkeypatch.setattr("moe_layer.checkpoint.storage.save_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_block(saved, small_block(small_config()), small_config())
    assert saved.read_bytes() == before
    assert [path.name for path in saved.parent.iterdir()] == [saved.name]


def test_views_and_shared_storage_are_saved_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    save_tensors(tmp_path / "v.safetensors", {"a": base.t(), "b": base[1], "c": base[1:]}, header={"x": [1, "é"]})
    tensors, header = load_tensors(tmp_path / "v.safetensors")
    assert header == read_header(tmp_path / "v.safetensors") == {"x": [1, "é"]}
    assert torch.equal(tensors["a"], base.t())
    assert torch.equal(tensors["b"], base[1])
    assert torch.equal(tensors["c"], base[1:])
