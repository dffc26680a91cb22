"""`moe-layer convert SOURCE TARGET`: MoE blocks between transformers, Megatron and our checksummed files."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

FORMATS = ("moe_layer", "transformers", "megatron", "megatron-grouped")


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = subparsers.add_parser(
        "convert",
        help="convert the MoE blocks of a checkpoint",
        description=(
            "Convert the MoE blocks of SOURCE, one at a time, bit for bit. Every tensor of a block must be there, in "
            "its shape, and none may be left over. Tensors outside MoE blocks stay where they are."
        ),
    )
    parser.add_argument("source", type=Path, help="safetensors file, or a directory of them with config.json")
    parser.add_argument("target", type=Path, help="directory to make")
    parser.add_argument("--from", dest="origin", choices=FORMATS, help="format of SOURCE (default: what it looks like)")
    parser.add_argument("--to", dest="destination", choices=FORMATS, help="default: moe_layer, or back to transformers")
    parser.add_argument("--config", help="layer configuration (YAML or preset) where SOURCE has no config.json")
    parser.add_argument("--family", help="model_type, such as mixtral, where SOURCE does not say it")
    parser.set_defaults(handler=convert)


def convert(arguments: argparse.Namespace) -> int:
    """Run the conversion and print one line about it.

    Raises:
        CheckpointError: formats that do not convert in one step, and what reading and writing raise.
    """
    from moe_layer.checkpoint.convert import MANIFEST, from_ours, to_ours
    from moe_layer.errors import CheckpointError

    looks_ours = (arguments.source / MANIFEST).is_file()
    origin = arguments.origin or ("moe_layer" if looks_ours else "transformers")
    destination = arguments.destination or ("transformers" if origin == "moe_layer" else "moe_layer")
    if (origin == "moe_layer") == (destination == "moe_layer"):
        raise CheckpointError(
            f"cannot convert from {origin} to {destination} in one step; one side must be moe_layer, so convert twice"
        )
    if origin == "moe_layer":
        report = from_ours(arguments.source, arguments.target, destination=destination, family=arguments.family)
    else:
        config = None if arguments.config is None else _load_config(arguments.config)
        report = to_ours(arguments.source, arguments.target, origin=origin, config=config, family=arguments.family)
    layers = report.layers
    shown = ", ".join(map(str, layers)) if len(layers) <= 8 else f"{layers[0]} to {layers[-1]}"
    print(
        f"{arguments.target}: {len(layers)} MoE layers ({shown}) of {report.experts} experts, "
        f"{origin} -> {destination}, {report.tensors_in} -> {report.tensors_out} tensors; "
        f"{report.left_out} other tensors left out"
    )
    return 0


def _load_config(path: str) -> Any:
    from moe_layer.config import load_config
    from moe_layer.config.model import MoEConfig

    return load_config(path, kind=MoEConfig)
