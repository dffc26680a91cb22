#!/usr/bin/env python3
"""Measure tiles for the QuACK GEMMs on this GPU; write the table that the layer reads (moe_layer/experts/tiles.json).

    python scripts/bench/tune.py                                   print the best tile of each GEMM at each shape
    python scripts/bench/tune.py --write                           and replace the table's entries of these shapes
    python scripts/bench/tune.py --shapes qwen3-30b-4k --gemms d_activation d_x --seconds 60

The best tiles of a GEMM then run in turns until the GPU is hot: at the limit of its power the order of tiles is another
than after a pause, and that is how it trains.

Each tile runs in a worker process; one that hangs, crashes or computes something else than the default tile is noted
and left out, and a new worker goes on behind it. Rows of --out: {shape, gemm, tile, us, tflops, hot_us of the best} or
{..., failed}.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable, Sequence
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
    (64, 256, 2, 1, True),
    (64, 256, 1, 1, True),
    (192, 128, 1, 1, True),
    (256, 192, 2, 1, False),
    (256, 128, 1, 1, False),
)
PLAIN = (
    (128, 256, 1, 2, False),
    (128, 256, 2, 1, False),
    (128, 256, 1, 1, False),
    (128, 192, 2, 1, True),
    (128, 192, 1, 2, True),
    (128, 192, 1, 1, True),
    (192, 128, 1, 2, True),
    (192, 128, 1, 1, True),
    (128, 208, 2, 1, True),
)
HEAVY = (  # B1 reads H and writes two outputs in its epilogue: only ping-pong tiles hide that, and larger ones spill
    (64, 256, 2, 1, True),
    (64, 256, 1, 1, True),
    (128, 128, 2, 1, True),
    (64, 192, 2, 1, True),
)
ADDING = (
    (128, 256, 2, 1, False),
    (128, 192, 2, 1, True),
    (128, 128, 2, 1, True),
    (128, 256, 1, 1, False),
    (128, 192, 1, 1, True),
    (64, 256, 1, 1, True),
)
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
ADDS = ("add_gate_up", "add_down")
HOT_SECONDS = 1.0  # how long the best tiles run in turns


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


def microseconds(calls: Sequence[Callable[[], object]], *, rounds: int, repeats: int) -> list[float]:
    """Median time of each call, taken in turns without a pause; the first half of the rounds only heats the GPU."""
    events = [[torch.cuda.Event(enable_timing=True) for _ in range(len(calls) + 1)] for _ in range(rounds)]
    for row in events:
        for call, event in zip(calls, row, strict=False):
            event.record()
            for _ in range(repeats):
                call()
        row[-1].record()
    torch.cuda.synchronize()
    return [
        statistics.median(row[i].elapsed_time(row[i + 1]) * 1e3 / repeats for row in events[rounds // 2 :])
        for i in range(len(calls))
    ]


def answer_to(problem: Problem, gemm: str, tiles: list, by_load: bool, base: list[torch.Tensor]) -> dict[str, Any]:
    """{us, tflops, error} of one tile, or {hot_us} of several that passed alone."""
    calls = [functools.partial(problem.call, gemm, Tile(*tile), by_load) for tile in tiles]
    if len(tiles) > 1:
        once = sum(microseconds(calls, rounds=4, repeats=1))
        return {"hot_us": microseconds(calls, rounds=min(200, max(8, round(HOT_SECONDS * 5e5 / once))), repeats=2)}
    error = problem.check(gemm, Tile(*tiles[0]), by_load, base)
    if not error < 1e-2:
        return {"failed": f"relative error {error:.3g} against the default tile"}
    (us,) = microseconds(calls, rounds=8, repeats=1)
    factor = 2 if gemm in ("up", "d_x", "d_gate_up", "add_gate_up") else 1
    return {"us": round(us, 1), "tflops": round(factor * problem.flops / us * 1e-6), "error": round(error, 5)}


def worker(pipe: Connection) -> None:
    """Answer (shape, gemm, tiles, by_load) as `answer_to` does, or with {failed}."""
    problem, at, expected = None, None, {}
    while True:
        name, gemm, tiles, by_load = pipe.recv()
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
            pipe.send(answer_to(problem, gemm, tiles, by_load, base))
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
    best: dict[tuple[str, str, bool], dict[str, Any]] = {}
    count = 0
    groups = [
        (name, gemm, by_load)
        for name in arguments.shapes
        for gemm in arguments.gemms
        for by_load in ((False, True) if gemm.startswith("add") else (False,))
    ]
    for name, gemm, by_load in groups:
        if time.monotonic() - began > arguments.seconds:
            print(f"stopped after {arguments.seconds:.0f} s before {gemm} of {name}", flush=True)
            break
        tried = []
        for tile in CANDIDATES[gemm]:
            row = {"shape": name, "gemm": gemm, "tile": tile, "by_load": by_load}
            row.update(workers.ask((name, gemm, [tile], by_load), seconds=arguments.tile_seconds))
            tried.append(row)
        finals = finalists(tried)
        if len(finals) > 1:
            answer = workers.ask(
                (name, gemm, [row["tile"] for row in finals], by_load), seconds=arguments.tile_seconds + HOT_SECONDS
            )
            for row, us in zip(finals, answer.get("hot_us", ()), strict=False):
                row["hot_us"] = round(us, 1)
            time.sleep(HOT_SECONDS / 2)  # or the first tiles of the next GEMM would run on a hot GPU and the others not
        for row in tried:
            print(json.dumps(row), flush=True)
            if arguments.out is not None:
                with arguments.out.open("a") as file:
                    file.write(json.dumps({**about, **row}) + "\n")
        count += len(tried)
        if finals:
            best[name, gemm, by_load] = winner_of(finals)
    workers.stop()
    entries = [entry for name in arguments.shapes if (entry := best_of(name, best, about)) is not None]
    print(f"{count} tiles in {time.monotonic() - began:.0f} s; best:")
    for entry in entries:
        print(json.dumps(entry))
    if arguments.write is not None:
        write(arguments.write, entries)


def finalists(tried: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The tiles that may be the best once the GPU is hot."""
    timed = sorted((row for row in tried if "us" in row), key=lambda row: row["us"])
    return [row for row in timed if row["us"] <= 1.12 * timed[0]["us"]][:5]


def winner_of(finals: list[dict[str, Any]]) -> dict[str, Any]:
    """The best of the finalists with its time, `best_us`: on a hot GPU if any was measured there."""
    hot = [row for row in finals if "hot_us" in row]
    row = min(hot or finals, key=lambda row: row.get("hot_us", row["us"]))
    return {**row, "best_us": row.get("hot_us", row["us"])}


def best_of(
    name: str, best: dict[tuple[str, str, bool], dict[str, Any]], about: dict[str, str]
) -> dict[str, Any] | None:
    """The table's entry for a shape; of the accumulating GEMMs, the way (`add_by_load`) whose sum is smaller."""
    tokens, hidden, width, experts, top_k = SHAPES[name]
    sums = {
        way: sum(best[name, gemm, way]["best_us"] for gemm in ADDS)
        for way in (False, True)
        if all((name, gemm, way) in best for gemm in ADDS)
    }
    by_load = min(sums, key=sums.__getitem__) if sums else None
    chosen = {
        gemm: row
        for (at, gemm, way), row in best.items()
        if at == name and (not gemm.startswith("add") or way == by_load)
    }
    if not chosen:
        return None
    tiles: dict[str, Any] = {gemm: list(row["tile"]) for gemm, row in chosen.items()}
    if by_load is not None:
        tiles["add_by_load"] = by_load
    place = {"hidden": hidden, "width": width, "rows_per_expert": tokens * top_k / experts}
    us = {gemm: row["best_us"] for gemm, row in chosen.items()}
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
