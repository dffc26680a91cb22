"""Convert the MoE blocks of a checkpoint, one block in memory at a time.

Ours on disk: a directory with `moe_layer.json` (format version, model family, layers) and one checksummed
`layer_00000.safetensors` for each MoE layer, each with its config. Theirs: safetensors files, with or without an index,
of a whole model (names like `model.layers.3.mlp.gate.weight`) or of one bare block (`gate.weight`), and `config.json`.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from moe_layer.checkpoint.block import load_block, save_block
from moe_layer.checkpoint.families import moe_config_from_transformers
from moe_layer.checkpoint.layouts import family_named, megatron_mapping, transformers_mapping
from moe_layer.checkpoint.mapping import BlockMapping
from moe_layer.checkpoint.source import INDEX_NAME, FileSource, open_files
from moe_layer.config.model import MoEConfig
from moe_layer.errors import CheckpointError

MANIFEST = "moe_layer.json"
MANIFEST_FORMAT = "moe_layer.checkpoint"
MANIFEST_VERSION = 1
MEGATRON = {"megatron": "sequential", "megatron-grouped": "grouped"}
MEGATRON_PREFIX = "decoder.layers.{layer}.mlp."
_LAYER = re.compile(r"(?:.*\.)?layers\.(\d+)\.(?:mlp|block_sparse_moe)\.")


@dataclass(frozen=True)
class Report:
    """What a conversion did.

    Attributes:
        layers: layer numbers. experts: per layer. tensors_in, tensors_out: over all layers.
        left_out: tensors of the source that belong to no MoE block.
    """

    layers: tuple[int, ...]
    experts: int
    tensors_in: int
    tensors_out: int
    left_out: int


def to_ours(
    source: Path,
    target: Path,
    *,
    origin: str = "transformers",
    config: MoEConfig | None = None,
    family: str | None = None,
) -> Report:
    """Convert another program's MoE blocks into our directory.

    Args:
        source: safetensors file or directory. target: directory, made here; must be absent or empty.
        origin: `transformers`, `megatron` (SequentialMLP names) or `megatron-grouped` (TEGroupedMLP names).
        config: of the layer; needed when there is no config.json. family: `model_type`, likewise.

    Raises:
        CheckpointError: nothing to convert, a tensor missing, extra, misshapen or unreadable, or target in use.
    """
    files = open_files(source)
    hf_config = _hf_config(source) if origin == "transformers" else None
    family = family or (None if hf_config is None else hf_config.get("model_type"))
    config = config or (None if hf_config is None else moe_config_from_transformers(hf_config))
    if config is None or (family is None and origin == "transformers"):
        raise CheckpointError(f"{source} has no config.json beside its tensors; give --config and --family")
    blocks = _find_blocks(files, "router" if family is None else family_named(family).router)
    if not blocks:
        raise CheckpointError(f"{source}: none of its {len(files.files)} tensors is the router of a MoE block")
    _prepare(target)
    tensors_in = tensors_out = 0
    for layer, prefix in blocks.items():
        block = files.select(prefix)
        ours = _their_mapping(config, origin, family, block).to_ours(block)
        save_block(target / layer_file(layer), ours, config)
        tensors_in, tensors_out = tensors_in + len(block.table), tensors_out + len(ours)
    _write_manifest(target, {"model_type": family, "layers": list(blocks), "tensors": tensors_out})
    return Report(tuple(blocks), config.router.num_experts, tensors_in, tensors_out, len(files.files) - tensors_in)


def from_ours(source: Path, target: Path, *, destination: str = "transformers", family: str | None = None) -> Report:
    """Convert our directory into another program's names, one safetensors file a layer and an index.

    Args:
        destination: as `origin` of `to_ours`. family: overrides the manifest's `model_type`.

    Raises:
        CheckpointError: source is damaged or incomplete, the family has no names for it, or target is in use.
    """
    manifest = read_manifest(source)
    family = family or manifest["model_type"]
    if destination == "transformers" and family is None:
        raise CheckpointError(f"{source} does not say which transformers family it belongs to; give --family")
    prefix = MEGATRON_PREFIX if destination in MEGATRON else family_named(family).stored_prefix
    _prepare(target)
    weight_map: dict[str, str] = {}
    tensors_in = experts = 0
    for layer in manifest["layers"]:
        tensors, config = load_block(source / layer_file(layer))
        mapping = _our_mapping(config, destination, family)
        theirs = {prefix.format(layer=layer) + name: value for name, value in mapping.from_ours(tensors).items()}
        name = f"model-moe-{layer:05d}.safetensors"
        _save_plain(target / name, theirs)
        weight_map |= dict.fromkeys(theirs, name)
        tensors_in, experts = tensors_in + len(tensors), config.router.num_experts
    index = {"metadata": {"moe_blocks_only": True}, "weight_map": weight_map}
    _write_text(target / INDEX_NAME, json.dumps(index, indent=1))
    return Report(tuple(manifest["layers"]), experts, tensors_in, len(weight_map), 0)


def layer_file(layer: int) -> str:
    """Name of one layer's file in our directory."""
    return f"layer_{layer:05d}.safetensors"


def read_manifest(source: Path) -> dict[str, Any]:
    """`moe_layer.json`, with every file it lists present.

    Raises:
        CheckpointError: absent, damaged, of another version, or files are missing or too many.
    """
    path = source / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
        found, version, layers = manifest["format"], manifest["version"], [int(n) for n in manifest["layers"]]
    except FileNotFoundError as error:
        raise CheckpointError(f"{source} has no {MANIFEST}; it is not a directory of moe-layer convert") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); convert the model again") from error
    if (found, version) != (MANIFEST_FORMAT, MANIFEST_VERSION):
        raise CheckpointError(
            f"{path} is {found!r} version {version!r}, this moe_layer reads version {MANIFEST_VERSION}"
        )
    listed, there = {layer_file(n) for n in layers}, {file.name for file in source.glob("layer_*.safetensors")}
    if listed != there:
        raise CheckpointError(
            f"{path} lists {len(listed)} layers and {len(there)} files are there; differing: "
            f"{', '.join(sorted(listed ^ there)[:4])}"
        )
    return {"model_type": manifest.get("model_type"), "layers": layers}


def _their_mapping(config: MoEConfig, origin: str, family: str | None, block: FileSource) -> BlockMapping:
    if origin in MEGATRON:
        return _our_mapping(config, origin, family)
    assert family is not None
    return transformers_mapping(config, family, stored="experts.gate_up_proj" not in block.table)


def _our_mapping(config: MoEConfig, destination: str, family: str | None) -> BlockMapping:
    if destination in MEGATRON:
        return megatron_mapping(config, MEGATRON[destination])  # type: ignore[arg-type]
    assert family is not None
    return transformers_mapping(config, family, stored=True)


def _find_blocks(files: FileSource, router: str) -> dict[int, str]:
    """Layer number -> prefix of each MoE block, recognised by its router; a bare block is layer 0."""
    ending = f"{router}.weight"
    return dict(sorted(_blocks(files.files, ending)))


def _blocks(names: Mapping[str, Path], ending: str) -> Iterator[tuple[int, str]]:
    for name in names:
        prefix = name.removesuffix(ending)
        if name == ending:
            yield 0, ""
        elif name.endswith(ending) and (match := _LAYER.fullmatch(prefix)):
            yield int(match[1]), prefix


def _hf_config(source: Path) -> dict[str, Any] | None:
    path = (source if source.is_dir() else source.parent) / "config.json"
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} must hold a JSON object, found {type(config).__name__}")
    return config


def _prepare(target: Path) -> None:
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists and is not an empty directory; choose another or remove it")
    target.mkdir(parents=True, exist_ok=True)


def _save_plain(path: Path, tensors: dict[str, Tensor]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, metadata={"format": "pt"})
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def _write_manifest(target: Path, values: dict[str, Any]) -> None:
    """Written last: a directory with a manifest is complete."""
    content = {"format": MANIFEST_FORMAT, "version": MANIFEST_VERSION, **values}
    _write_text(target / MANIFEST, json.dumps(content, indent=1))


def _write_text(path: Path, text: str) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text + "\n", encoding="utf-8")
    os.replace(partial, path)
