"""`moe-layer bench NAME ...`: run a benchmark script of the source checkout with this Python."""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

SCRIPTS = {
    "router": ("router.py", "the router op on one GPU: CUDA-graph medians of forward and backward"),
    "layer": ("layer_gpu.py", "the layer on one GPU: eager, CUDA graph, its own six GEMMs"),
    "dispatch": ("dispatch.py", "dispatch, combine and the layer over two GPUs, beside NCCL without deduplication"),
    "chunks": ("chunks.py", "the layer in 1, 2, 4 parts of the tokens: time and peak memory, one GPU"),
    "host": ("host.py", "the host's time for an eager step of the layer, by stage and by call, one GPU or several"),
    "shared": ("shared.py", "the layer with its shared expert packed and apart, one GPU"),
    "replay": ("replay.py", "recording and replaying: the layer's step and the router, eager and in CUDA graphs"),
    "tune": ("tune.py", "tiles of the Hopper GEMMs on this GPU, each try in a process with a timeout"),
    "layer-cpu": ("layer.py", "the block on CPU, interleaved with transformers'"),
}


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Register `bench`; everything after the benchmark's name goes to its script."""
    text = "\n".join(f"  {name:10} {about}" for name, (_, about) in SCRIPTS.items())
    parser = subparsers.add_parser(
        "bench",
        help="run a benchmark (source checkout)",
        epilog=f"benchmarks:\n{text}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", choices=list(SCRIPTS), metavar="NAME")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="options of the script; --help shows them")
    parser.set_defaults(handler=run)


def run(args: argparse.Namespace) -> int:
    """Exit code of the script.

    Raises:
        FileNotFoundError: the package was installed without its scripts.
    """
    folder = Path(__file__).resolve().parents[2] / "scripts/bench"
    script = folder / SCRIPTS[args.name][0]
    if not script.is_file():
        raise FileNotFoundError(f"benchmarks live in the source checkout, and {folder} is not there; clone the project")
    return subprocess.run([sys.executable, str(script), *args.arguments], check=False).returncode
