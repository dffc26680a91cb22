"""`moe-layer COMMAND`: each command lives in its part's own cli module and is imported only when it is called."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from importlib import import_module

from moe_layer.errors import CapacityError, DispatchTimeout, RankMismatch, TrainingError

COMMANDS = {
    "train": ("moe_layer.train.cli", "train a small MoE language model from a YAML file"),
    "config": ("moe_layer.config.cli", "show, check and document configurations"),
    "convert": ("moe_layer.checkpoint.cli", "convert the MoE blocks of a checkpoint"),
    "replay": ("moe_layer.replay.cli", "inspect, check, join and compare recorded routing"),
    "plot": ("moe_layer.observe.cli", "draw the expert load of a run"),
    "bench": ("moe_layer.observe.bench", "run a benchmark (source checkout)"),
    "env": ("moe_layer.observe.cli", "report versions, devices and the state of the native library"),
}
"""Command -> (module with `add_parser(subparsers)`, one-line help). A parser sets `handler(args) -> exit code`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        0; what the command returned; 2 after a wrong command line or a user's error (one message on stderr, no
        traceback unless MOE_LAYER_LOG=debug); 130 when interrupted.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        args = _parse(arguments)
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else 2
    try:
        code = args.handler(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # the reader (head, less) has left: give the interpreter a working stdout to flush at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print("moe-layer: interrupted", file=sys.stderr)
        return 130
    except (ValueError, OSError, CapacityError, DispatchTimeout, RankMismatch, TrainingError) as error:
        if os.environ.get("MOE_LAYER_LOG", "").lower() == "debug":
            raise
        sys.stderr.write(f"moe-layer: {_sentence(error)}\n")  # at once: other ranks write beside us
        return 2


def _sentence(error: Exception) -> str:
    """The operating system's errors without their number: "runs/x: Permission denied"."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.filename}: {error.strerror}"
    return str(error)


def _parse(arguments: list[str]) -> argparse.Namespace:
    """Options and key=value overrides may be mixed in any order, which argparse alone does not allow."""
    parser = _parser(arguments)
    args, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or "=" not in word or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def _parser(arguments: list[str]) -> argparse.ArgumentParser:
    """Parser that knows the called command in full and the others by name."""
    parser = argparse.ArgumentParser(
        prog="moe-layer", description="A mixture-of-experts layer for PyTorch: train, inspect, configure."
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    called = next((word for word in arguments if not word.startswith("-")), None)
    loaded = COMMANDS[called][0] if called in COMMANDS else None
    if loaded is not None:
        import_module(loaded).add_parser(subparsers)
    for name, (module, text) in COMMANDS.items():
        if module != loaded:
            subparsers.add_parser(name, help=text, add_help=False)
    return parser
