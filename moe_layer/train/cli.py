"""`moe-layer train CONFIG [key=value ...] [--out DIR] [--dry-run] [--resume X]`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the command to argparse's subparsers."""
    parser = subparsers.add_parser(
        "train",
        help="train a small decoder from a YAML file",
        description="Train from a YAML file. With torchrun: torchrun --nproc-per-node N -m moe_layer train CONFIG ...",
    )
    parser.add_argument("config", help="YAML file, such as configs/train/tiny.yaml")
    parser.add_argument(
        "overrides", nargs="*", default=[], metavar="key=value", help="such as train.steps=50 optimizer.lr=1e-3"
    )
    parser.add_argument("--out", type=Path, help="run directory (default runs/<name>)")
    parser.add_argument("--resume", metavar="X", help="run directory or checkpoint to continue; auto: newest of --out")
    parser.add_argument("--dry-run", action="store_true", help="print parameters, FLOPs and memory; train nothing")
    parser.set_defaults(handler=_train)


def _train(arguments: argparse.Namespace) -> int:
    from moe_layer.config import load_config
    from moe_layer.config.train import TrainConfig

    overrides = list(arguments.overrides)
    if arguments.resume is not None:
        overrides.append(f"train.resume={json.dumps(arguments.resume)}")  # quoted: a path may look like a number
    config = load_config(arguments.config, overrides, kind=TrainConfig)
    if arguments.dry_run:
        from moe_layer.train.dryrun import describe, estimate

        print(describe(config, estimate(config)))
        return 0
    from moe_layer.train.run import run

    result = run(config, out=arguments.out)
    return 128 + result.signum if result.signum else 0
