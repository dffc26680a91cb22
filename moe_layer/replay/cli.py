"""`moe-layer replay inspect | validate | splice | compare`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

from moe_layer.errors import TraceError


def add_parser(subparsers: Any) -> None:
    """Add the `replay` command."""
    parser = subparsers.add_parser("replay", help="inspect, check, join and compare recorded routing")
    commands = parser.add_subparsers(dest="replay_command", required=True, metavar="COMMAND")
    inspect = commands.add_parser("inspect", help="print what a trace holds")
    inspect.add_argument("trace", type=Path)
    inspect.set_defaults(handler=_inspect)
    validate = commands.add_parser("validate", help="check traces; exit code 2 when one is damaged")
    validate.add_argument("traces", type=Path, nargs="+", metavar="TRACE")
    validate.add_argument("--complete", action="store_true", help="forbid missing slots")
    validate.set_defaults(handler=_validate)
    splice = commands.add_parser("splice", help="append a later fragment, keeping the rows that are owned already")
    splice.add_argument("first", type=Path)
    splice.add_argument("later", type=Path)
    splice.add_argument("--start", type=int, help="own rows to keep (default: all)")
    splice.add_argument("--out", type=Path, required=True)
    splice.set_defaults(handler=_splice)
    compare = commands.add_parser("compare", help="how far two traces of the same tokens are apart; 1 when shifted")
    compare.add_argument("first", type=Path)
    compare.add_argument("second", type=Path)
    compare.set_defaults(handler=_compare)


def _inspect(args: argparse.Namespace) -> int:
    from moe_layer.replay.spec import unpack_bits
    from moe_layer.replay.trace import RoutingTrace

    trace = RoutingTrace.open(args.trace)
    spec, lengths = trace.spec, trace.lengths
    recorded = sum(int(unpack_bits(part, spec.top_k).sum()) for part in trace.valid.split(1 << 14))
    missing = 1 - recorded / max(1, trace.ids.numel()) if trace.num_tokens else 0.0
    versions = "not recorded"
    if trace.weights_version is not None:
        versions = ", ".join(str(v) for v in trace.weights_version.unique().tolist()[:8])
    rows = [
        ("tokens", f"{trace.num_tokens} in {len(lengths)} sequences of {min(lengths)} to {max(lengths)}"),
        ("experts", f"{spec.num_experts}, top-{spec.top_k}, ids as {str(spec.dtype).removeprefix('torch.')}"),
        ("layers", f"{len(spec.layers)}, {spec.layers[0]} ... {spec.layers[-1]}"),
        ("bytes a token", str(spec.bytes_per_token)),
        ("missing slots", f"{100 * missing:.2f}%"),
        ("gate weights", "recorded" if trace.weights is not None else "not recorded"),
        ("token checks", "recorded" if trace.token_check is not None else "not recorded"),
        ("weights version", versions),
        ("notes", ", ".join(f"{key}={value}" for key, value in trace.notes.items()) or "none"),
    ]
    sys.stdout.write("".join(f"{name:16s} {value}\n" for name, value in rows))
    return 0


def _validate(args: argparse.Namespace) -> int:
    from moe_layer.replay.trace import RoutingTrace

    damaged = 0
    for path in args.traces:
        try:
            RoutingTrace.open(path).validate(complete=args.complete)
            sys.stdout.write(f"{path}: ok\n")
        except TraceError as error:
            damaged += 1
            sys.stdout.write(f"{path}: DAMAGED: {error}\n")
    return 2 if damaged else 0


def _splice(args: argparse.Namespace) -> int:
    from moe_layer.replay.trace import RoutingTrace

    whole = RoutingTrace.open(args.first).splice(RoutingTrace.open(args.later), args.start)
    whole.save(args.out)
    sys.stdout.write(f"wrote {whole.num_tokens} rows to {args.out}\n")
    return 0


def _compare(args: argparse.Namespace) -> int:
    from moe_layer.replay.compare import best_shift, compare_traces
    from moe_layer.replay.trace import RoutingTrace

    first, second = RoutingTrace.open(args.first), RoutingTrace.open(args.second)
    found = compare_traces(first, second)
    sys.stdout.write(
        f"router calls compared  {found.rows}\n"
        f"sets that differ       {100 * found.mismatch:.2f}%\n"
        f"order alone differs    {100 * found.order_only:.2f}%\n"
        f"tokens with any        {100 * found.token_mismatch:.2f}%\n"
        f"mean overlap           {found.overlap:.4f}\n"
        f"no expert shared       {100 * found.zero_overlap:.2f}%\n"
    )
    shift = best_shift(first, second)
    if shift != 0:
        sys.stdout.write(f"SHIFTED: the traces agree best when the second is moved by {shift:+d} tokens\n")
    return 0 if shift == 0 else 1
