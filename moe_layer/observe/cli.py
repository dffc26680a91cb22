"""`moe-layer plot RUN|FILE` and `moe-layer env`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(subparsers: Any) -> None:
    """Add the two commands to argparse's subparsers."""
    plot = subparsers.add_parser("plot", help="draw a run's load, imbalance and losses, or a benchmark's rows")
    plot.add_argument("run", type=Path, help="run directory (holds metrics.jsonl), or a file of `bench layer --out`")
    plot.add_argument("--out", type=Path, help="PNG to write (default RUN/load.png, or beside the file)")
    plot.set_defaults(handler=_plot)
    env = subparsers.add_parser("env", help="report versions, devices and which optional parts work, and why not")
    env.set_defaults(handler=_env)


def _plot(arguments: argparse.Namespace) -> int:
    from moe_layer.observe.bench_plot import plot_bench
    from moe_layer.observe.plots import plot_run

    if arguments.run.is_file():
        try:
            print(plot_bench(arguments.run, out=arguments.out))
        except ImportError as error:
            raise OSError(str(error)) from error
        return 0
    if not (arguments.run / "metrics.jsonl").is_file():
        raise OSError(f"{arguments.run} has no metrics.jsonl; give the folder of a run (moe-layer train --out)")
    try:
        print(plot_run(arguments.run, out=arguments.out))
    except ImportError as error:
        raise OSError(str(error)) from error
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from moe_layer.observe.env import report

    print(report())
    return 0
