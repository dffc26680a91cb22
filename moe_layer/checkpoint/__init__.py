"""Checkpoints: transformers and Megatron layouts, resharding over EP, checksummed files."""

from moe_layer.checkpoint.block import (
    assign,
    expert_range,
    export_block,
    import_block,
    load_block,
    load_layer,
    save_block,
    save_layer,
)
from moe_layer.checkpoint.families import moe_config_from_transformers
from moe_layer.checkpoint.layouts import (
    block_shapes,
    family_named,
    family_names,
    megatron_mapping,
    transformers_mapping,
)
from moe_layer.checkpoint.mapping import BlockMapping, Piece, Region
from moe_layer.checkpoint.source import open_files

__all__ = [
    "BlockMapping",
    "Piece",
    "Region",
    "assign",
    "block_shapes",
    "expert_range",
    "export_block",
    "family_named",
    "family_names",
    "import_block",
    "load_block",
    "load_layer",
    "megatron_mapping",
    "moe_config_from_transformers",
    "open_files",
    "save_block",
    "save_layer",
    "transformers_mapping",
]
