#!/usr/bin/env python3
"""Measure tiles for the QuACK GEMMs on this GPU; write the table that the layer reads (moe_layer/experts/tiles.json).

    python scripts/bench/tune.py                                   print the best tile of each GEMM at each shape
    python scripts/bench/tune.py --write                           and replace the table's entries of these shapes
    python scripts/bench/tune.py --shapes qwen3-30b-4k --gemms d_activation d_x --seconds 60

Each tile runs in a worker process; one that hangs, crashes or computes something else than the default tile is noted
and left out, and a new worker goes on behind it. Rows of --out: {shape, gemm, tile, us, tflops} or {..., failed}.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import statistics
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from layer_shapes import SHAPES  # noqa: E402

from moe_layer.experts import quack_plans as plans  # noqa: E402
from moe_layer.experts.tiles import TABLE, Tile, Tiles, default_tiles, read_table  # noqa: E402

# (m, n, cluster_m, cluster_n, ping-pong). A gathered operand needs cluster_n 1.
GATHERED = (
    (128, 192, 2, 1, True),
    (128, 256, 2, 1, False),
    (128, 256, 1, 1, False),
    (128, 192, 1, 1, True),
    (256, 128, 2, 1, False),
    (256, 128, 1, 1, False),
    (256, 192, 2, 1, False),
    (192, 128, 2, 1, True),
    (128, 128, 2, 1, True),
)
PLAIN = (
    (128, 256, 1, 2, False),
    (128, 256, 2, 1, False),
    (128, 256, 1, 1, False),
    (128, 192, 2, 1, True),
    (128, 192, 1, 2, True),
    (256, 128, 2, 1, False),
    (256, 128, 1, 2, False),
    (256, 192, 1, 2, False),
    (192, 128, 1, 2, True),
)
HEAVY = (  # the epilogue of B1 moves six bytes for each two of a plain GEMM: narrow tiles hide it better
    (128, 128, 2, 1, True),
    (128, 128, 1, 1, True),
    (192, 128, 2, 1, True),
    (192, 128, 1, 1, True),
    (128, 96, 2, 1, True),
    (128, 96, 1, 1, True),
    (128, 160, 2, 1, True),
    (64, 192, 2, 1, True),
    (64, 256, 2, 1, True),
    (256, 128, 2, 1, False),
    (256, 128, 1, 1, False),
    (128, 192, 2, 1, False),
    (256, 96, 1, 1, False),
    (128, 64, 2, 1, True),
)
ADDING = ((128, 256, 2, 1, False), (128, 192, 2, 1, True), (128, 128, 2, 1, True), (256, 128, 2, 1, False))
CANDIDATES: dict[str, tuple] = {
    "d_activation": HEAVY,
    "d_x": PLAIN,
    "up": GATHERED,
    "down": PLAIN,
    "d_gate_up": GATHERED,
    "d_down": GATHERED,
    "add_gate_up": ADDING,
    "add_down": ADDING,
}


class Problem:
    """Tensors of one shape, with random routing, and one call per GEMM."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        tokens, hidden, width, experts, top_k = shape
        torch.manual_seed(0)
        ids_TK = torch.rand(tokens, experts, device="cuda").topk(top_k).indices
        order = ids_TK.flatten().argsort(stable=True)
        self.index = (order // top_k).to(torch.int32)
        counts = torch.bincount(ids_TK.flatten(), minlength=experts)
        self.offsets = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        rows = tokens * top_k

        def random(*size: int) -> torch.Tensor:
            return torch.randn(size, device="cuda", dtype=torch.bfloat16)

        self.x, self.d_y = random(tokens, hidden), random(tokens, hidden)
        self.gate_up, self.down = random(experts, 2 * width, hidden) * 0.02, random(experts, hidden, width) * 0.02
        self.h, self.a, self.probs = random(rows, 2 * width), random(rows, width), torch.rand(rows, device="cuda")
        self.wide = torch.empty(rows, hidden, device="cuda", dtype=torch.bfloat16)
        self.d_gate_up, self.d_down = torch.empty_like(self.gate_up), torch.empty_like(self.down)
        self.flops = 2 * rows * hidden * width

    def call(self, gemm: str, tile: Tile, by_load: bool) -> tuple[torch.Tensor, ...]:
        """Run one GEMM and return what it wrote."""
        ends, index = self.offsets, self.index
        add = gemm.startswith("add")
        if gemm == "up":
            return plans.gate_up(self.x, self.gate_up, self.probs, offsets=ends, index=index, tile=tile)
        if gemm == "d_activation":
            found = plans.d_activation(self.d_y, self.down, self.h, self.probs, offsets=ends, index=index, tile=tile)
            return tuple(t for t in found if t is not None)
        if gemm == "down":
            plans.matmul(gemm, self.a, self.down, self.wide, tile=tile, rows=ends)
            return (self.wide,)
        if gemm == "d_x":
            plans.matmul(gemm, self.h, self.gate_up.mT, self.wide, tile=tile, rows=ends, concat=("B",))
            return (self.wide,)
        if gemm.endswith("gate_up"):
            out, left, right, concat = self.target("d_gate_up", add), self.x, self.h, ("out",)
            written = out.mT
        else:
            out, left, right, concat = self.target("d_down", add), self.d_y, self.a, None
            written = out
        plans.matmul(
            gemm.replace("add", "d"),
            left.mT,
            right.mT,
            written,
            tile=tile,
            depth=ends,
            index=index,
            concat=concat,
            accumulate=add,
            by_load=by_load,
        )
        return (out,)

    def target(self, name: str, add: bool) -> torch.Tensor:
        if not add:
            return getattr(self, name)
        if not hasattr(self, f"{name}_fp32"):
            setattr(self, f"{name}_fp32", torch.zeros(getattr(self, name).shape, device="cuda"))
        return getattr(self, f"{name}_fp32")

    def check(self, gemm: str, tile: Tile, by_load: bool, expected: list[torch.Tensor]) -> float:
        """Largest relative error against what the default tile wrote; an accumulating GEMM starts from zeros."""
        if gemm.startswith("add"):
            self.target("d_gate_up" if gemm.endswith("gate_up") else "d_down", True).zero_()
        found = [t.detach().clone() for t in self.call(gemm, tile, by_load)]
        torch.cuda.synchronize()
        if not expected:
            expected.extend(found)
        return max(
            float((a.float() - b.float()).norm() / b.float().norm()) for a, b in zip(found, expected, strict=True)
        )


def worker(pipe: Connection) -> None:
    """Answer (shape, gemm, tile, by_load) with {us, error} or {failed}."""
    problem, at, expected = None, None, {}
    while True:
        name, gemm, tile, by_load = pipe.recv()
        try:
            if name != at:
                problem = None
                torch.cuda.empty_cache()
                problem, at, expected = Problem(SHAPES[name]), name, {}
            assert problem is not None
            base = expected.setdefault(gemm, [])
            if not base:
                tokens, _, width, experts, top_k = SHAPES[name]
                default = default_tiles(rows_per_expert=tokens * top_k / experts, width=width)
                problem.check(gemm, getattr(default, gemm), False, base)
            error = problem.check(gemm, Tile(*tile), by_load, base)
            times = []
            for _ in range(9):
                start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record()
                problem.call(gemm, Tile(*tile), by_load)
                end.record()
                end.synchronize()
                times.append(start.elapsed_time(end) * 1e3)
            factor = 2 if gemm in ("up", "d_x", "d_gate_up", "add_gate_up") else 1
            us = statistics.median(times[2:])
            answer = {"us": round(us, 1), "tflops": round(factor * problem.flops / us * 1e-6), "error": round(error, 5)}
            pipe.send(answer if error < 1e-2 else {"failed": f"relative error {error:.3g} against the default tile"})
        except Exception as error:
            pipe.send({"failed": f"{type(error).__name__}: {str(error)[:200]}"})
            if "CUDA" in str(error):
                return  # the context is lost


class Workers:
    """One worker at a time, replaced when it hangs or dies."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("spawn")
        self.process: Any = None

    def ask(self, request: tuple, *, seconds: float) -> dict[str, Any]:
        fresh = self.process is None or not self.process.is_alive()
        if fresh:
            self.pipe, theirs = self.context.Pipe()
            self.process = self.context.Process(target=worker, args=(theirs,), daemon=True)
            self.process.start()
            theirs.close()
        try:
            self.pipe.send(request)
            if self.pipe.poll(seconds + (40 if fresh else 0)):
                return self.pipe.recv()
            reason = f"no answer within {seconds:.0f} s"
        except (EOFError, BrokenPipeError, ConnectionResetError):
            reason = "the worker died"
        self.stop()
        return {"failed": reason}

    def stop(self) -> None:
        if self.process is not None and self.process.is_alive():
            self.process.kill()
            self.process.join()
        self.process = None


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=list(SHAPES), default=["qwen3-30b-16k", "qwen3-30b-4k"])
    parser.add_argument("--gemms", nargs="+", choices=list(CANDIDATES), default=list(CANDIDATES))
    parser.add_argument("--seconds", type=float, default=170, help="stop after this long, with what was found")
    parser.add_argument("--tile-seconds", type=float, default=15, help="limit of one tile")
    parser.add_argument("--out", type=Path, default=None, help="JSONL file of every try")
    parser.add_argument("--write", nargs="?", type=Path, const=TABLE, default=None, help="table to update")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    workers, began = Workers(), time.monotonic()
    about = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
    rows: list[dict[str, Any]] = []
    jobs = [
        (name, gemm, tile, by_load)
        for name in arguments.shapes
        for gemm in arguments.gemms
        for by_load in ((False, True) if gemm.startswith("add") else (False,))
        for tile in CANDIDATES[gemm]
    ]
    for job in jobs:
        if time.monotonic() - began > arguments.seconds:
            print(f"stopped after {arguments.seconds:.0f} s with {len(rows)} of {len(jobs)} tiles tried", flush=True)
            break
        name, gemm, tile, by_load = job
        row = {"shape": name, "gemm": gemm, "tile": tile, "by_load": by_load}
        row.update(workers.ask(job, seconds=arguments.tile_seconds))
        rows.append(row)
        print(json.dumps(row), flush=True)
        if arguments.out is not None:
            with arguments.out.open("a") as file:
                file.write(json.dumps({**about, **row}) + "\n")
    workers.stop()
    entries = [entry for name in arguments.shapes if (entry := best_of(name, rows, about)) is not None]
    print(f"{len(rows)} tiles in {time.monotonic() - began:.0f} s; best:")
    for entry in entries:
        print(json.dumps(entry))
    if arguments.write is not None:
        write(arguments.write, entries)


def best_of(name: str, rows: list[dict[str, Any]], about: dict[str, str]) -> dict[str, Any] | None:
    """The table's entry for a shape; of the accumulating GEMMs, the way (`add_by_load`) whose sum is smaller."""
    tokens, hidden, width, experts, top_k = SHAPES[name]
    tiles: dict[str, Any] = {}
    sums = {False: 0.0, True: 0.0}
    choice: dict[tuple[str, bool], dict[str, Any]] = {}
    for row in rows:
        if row["shape"] == name and "us" in row:
            key = (row["gemm"], row["by_load"])
            if key not in choice or row["us"] < choice[key]["us"]:
                choice[key] = row
    for way in sums:
        found = [row["us"] for (gemm, by_load), row in choice.items() if gemm.startswith("add") and by_load == way]
        sums[way] = sum(found) if len(found) == 2 else float("inf")
    by_load = sums[True] < sums[False]
    for (gemm, way), row in choice.items():
        if not gemm.startswith("add") or (way == by_load and sums[way] < float("inf")):
            tiles[gemm] = list(row["tile"])
    if not tiles:
        return None
    if "add_gate_up" in tiles:
        tiles["add_by_load"] = by_load
    us = {gemm: row["us"] for (gemm, way), row in choice.items() if way == (by_load and gemm.startswith("add"))}
    place = {"hidden": hidden, "width": width, "rows_per_expert": tokens * top_k / experts}
    return {**place, "gpu": about["gpu"], "date": about["date"], "tiles": tiles, "us": us}


def write(path: Path, entries: list[dict[str, Any]]) -> None:
    """Replace the entries of the same place; GEMMs that were not tried now keep their tile."""

    def place(entry: dict[str, Any]) -> tuple:
        return entry["hidden"], entry["width"], entry["rows_per_expert"]

    old = {place(entry): entry for entry in read_table(path)}
    for entry in entries:
        before = old.get(place(entry), {"tiles": {}, "us": {}})
        entry["tiles"] = {**before["tiles"], **entry["tiles"]}
        entry["us"] = {**before["us"], **entry["us"]}
        old[place(entry)] = entry
    unknown = {gemm for entry in old.values() for gemm in entry["tiles"]} - set(Tiles._fields)
    assert not unknown, unknown
    lines = ",\n".join("  " + json.dumps(old[key]) for key in sorted(old))
    path.write_text('{"format": 1, "entries": [\n' + lines + "\n]}\n")
    print(f"wrote {path}")


if __name__ == "__main__":
    main()
