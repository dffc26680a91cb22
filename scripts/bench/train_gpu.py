#!/usr/bin/env python3
"""Train h200_1gpu.yaml on one GPU with several expert backends, same data, seed and schedule, and compare the losses.

    python scripts/bench/train_gpu.py --out runs/h200_1gpu --steps 300 [key=value]

    fast        the configuration as it is (QuACK where it is installed)
    grouped_mm  torch's grouped GEMM
    nudged      `fast` with one weight of the first layer moved to the next number of its dtype: how far apart they come
                is how far the trajectory itself carries a rounding
    reference   the per-expert loop

The first run trains `--steps` steps, the others `--compare`. OUT gets RUN.jsonl (loss, gradient norm and learning rate
of every step) and result-FIRST.json: MFU and tokens/s (median of the last 100 steps), and for each pair of runs the
largest difference of the losses, the first step above 0.02, and the largest relative difference of the first three
gradient norms. Runs of an earlier call with the same OUT are compared too (two calls on two GPUs share the work).

`--gradients N` also compares every parameter's gradient on N sequences, before training and after the first run: each
backend's relative distance from the same model in fp32. A backend with a defect is farther than the others; rounding
gives all of them the same distance.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import itertools
import json
import statistics
import sys
import time
from collections import defaultdict
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from moe_layer.config import load_config  # noqa: E402
from moe_layer.config.train import TrainConfig  # noqa: E402
from moe_layer.observe.metrics import format_line  # noqa: E402
from moe_layer.train.data import Sampler, TextData, load_text  # noqa: E402
from moe_layer.train.loop import Trainer  # noqa: E402
from moe_layer.train.model import Decoder, token_losses  # noqa: E402
from moe_layer.train.optim import Optimizer  # noqa: E402
from moe_layer.train.run import build_model  # noqa: E402
from moe_layer.train.world import World, join  # noqa: E402

LIMIT = 0.02
RUNS = {"fast": "auto", "grouped_mm": "grouped_mm", "nudged": "auto", "reference": "reference"}
Records = list[dict[str, Any]]


def with_backend(config: TrainConfig, backend: str) -> TrainConfig:
    experts = dataclasses.replace(config.moe.experts, backend=backend)
    return dataclasses.replace(config, moe=dataclasses.replace(config.moe, experts=experts))


def set_backend(model: Decoder, backend: str) -> None:
    for layer in model.moe_layers():
        layer.experts.config = dataclasses.replace(layer.experts.config, backend=backend)


@torch.no_grad()
def nudge(model: Decoder) -> None:
    """The first weight of the first layer's first expert, one unit in the last place farther from zero."""
    weight = next(model.moe_layers()).experts.down_proj
    bits = {2: torch.int16, 4: torch.int32}[weight.element_size()]
    weight.view(-1)[:1].view(bits).add_(1)


def train(
    name: str, config: TrainConfig, *, steps: int, text: TextData, world: World, out: Path
) -> tuple[Records, Decoder]:
    """Records of `steps` steps, also written to OUT/NAME.jsonl one by one, and the trained model."""
    began = time.perf_counter()
    model = build_model(with_backend(config, RUNS[name]), world)
    if name == "nudged":
        nudge(model)
    optimizer = Optimizer(model, config.optimizer, device=world.device)
    trainer = Trainer(config, model=model, optimizer=optimizer, text=text, world=world)
    records: Records = []
    with (out / f"{name}.jsonl").open("w") as file:
        for step in range(steps):
            lr = trainer.train_step(step)
            values = trainer.collect(step + 1)
            if step % 10 == 0 or step + 1 == steps:
                print(name, format_line(step + 1, steps, values), flush=True)
            values.pop("moe/counts")
            records.append({"step": step + 1, "opt/lr": lr, **values})
            file.write(json.dumps(records[-1]) + "\n")
            file.flush()
    print(f"{name}: {steps} steps in {time.perf_counter() - began:.1f} s with its start", flush=True)
    return records, model


def compare(a: Records, b: Records) -> dict[str, Any]:
    """Where two runs part."""
    found = [abs(x["loss/train"] - y["loss/train"]) for x, y in zip(a, b, strict=False)]
    norms = [abs(x["opt/grad_norm"] / y["opt/grad_norm"] - 1) for x, y in zip(a, b, strict=False)]
    return {
        "steps": len(found),
        "largest": round(max(found), 5),
        "at_step": found.index(max(found)) + 1,
        "first_above_0.02": next((i + 1 for i, value in enumerate(found) if value > LIMIT), None),
        "steps_1_to_3": [round(value, 6) for value in found[:3]],
        "rms": round(statistics.fmean(value * value for value in found) ** 0.5, 5),
        "norms_1_to_3": round(max(norms[:3]), 5),
    }


def gradients(model: Decoder, rows_BS: Tensor) -> dict[str, Tensor]:
    """Every parameter's gradient of the mean loss over the rows, one sequence at a time added in fp32."""
    total: dict[str, Tensor] = {}
    for row in rows_BS:
        model.zero_grad(set_to_none=True)
        tokens = row.to(model.embedding.weight.device).long().unsqueeze(0)
        token_losses(model(tokens[:, :-1]).logits, tokens[:, 1:]).mean().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                total[name] = parameter.grad.float() + total.get(name, 0)
    model.zero_grad(set_to_none=True)
    return total


def gradient_distances(model: Decoder, config: TrainConfig, rows_BS: Tensor) -> dict[str, dict[str, float]]:
    """Per kind of parameter and backend: |g - g_fp32| / |g_fp32| over all layers, all with the weights of `model`."""
    wide = Decoder(config.model, config.moe, device=rows_BS.device, dtype=torch.float32)
    wide.load_state_dict(model.state_dict())
    set_backend(wide, "reference")
    truth = gradients(wide, rows_BS)
    del wide
    out: dict[str, dict[str, float]] = defaultdict(dict)
    for layer in model.moe_layers():
        layer.set_loss_scale(1.0)  # a trainer's is 1 / micro-batches
    for backend in ("auto", "grouped_mm", "reference"):
        set_backend(model, backend)
        squares: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
        for name, gradient in gradients(model, rows_BS).items():
            kind = ".".join(part for part in name.split(".") if not part.isdigit())
            squares[kind][0] += float((gradient - truth[name]).square().sum())
            squares[kind][1] += float(truth[name].square().sum())
        for kind, (error, norm) in squares.items():
            out[kind][backend] = round((error / max(norm, 1e-30)) ** 0.5, 5)
    return dict(out)


def print_distances(title: str, found: dict[str, dict[str, float]]) -> None:
    print(f"gradients, relative distance from fp32, {title}:")
    for kind, row in found.items():
        print(f"  {kind:<36}", "  ".join(f"{backend} {value:.4f}" for backend, value in row.items()), flush=True)


def release() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/train/h200_1gpu.yaml")
    parser.add_argument("--out", type=Path, default=Path("runs/h200_1gpu"))
    parser.add_argument("--steps", type=int, default=300, help="steps of the first run; the schedule's length")
    parser.add_argument("--compare", type=int, default=50, help="steps of the other runs")
    parser.add_argument("--runs", default=",".join(RUNS), help="separated by commas; the first trains --steps steps")
    parser.add_argument("--gradients", type=int, default=0, metavar="N", help="compare gradients on N sequences")
    parser.add_argument("--compare-only", action="store_true", help="train nothing, compare what lies in OUT")
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    arguments = parser.parse_intermixed_args()
    runs = arguments.runs.split(",")
    if unknown := sorted(set(runs) - set(RUNS)):
        parser.error(f"--runs: {unknown} are none of {', '.join(RUNS)}")
    overrides = ["data.max_bytes=32000000", f"train.steps={arguments.steps}", *arguments.overrides]
    config = load_config(ROOT / arguments.config, overrides, kind=TrainConfig)
    out = arguments.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    result: dict[str, Any] = {"steps": arguments.steps, "overrides": arguments.overrides}
    result["tokens_per_step"] = config.train.global_batch * config.data.sequence_length
    if not arguments.compare_only:
        with join(config) as world:
            result.update(train_all(config, runs, arguments, world=world, out=out))
    result["pairs"] = compare_all(out, arguments.compare)
    (out / f"result-{'compared' if arguments.compare_only else runs[0]}.json").write_text(json.dumps(result) + "\n")
    print(json.dumps(result))


def train_all(
    config: TrainConfig, runs: list[str], arguments: argparse.Namespace, *, world: World, out: Path
) -> dict[str, Any]:
    """Train all runs; numbers of the first one."""
    text = load_text(config.data)
    rows = Sampler(text.train, sequence_length=config.data.sequence_length, global_batch=8, seed=config.seed)
    rows_BS = rows.batch(10_000)[: arguments.gradients].to(world.device)
    result: dict[str, Any] = {}
    if arguments.gradients:
        model = build_model(config, world)
        result["gradients_first"] = gradient_distances(model, config, rows_BS)
        print_distances("before training", result["gradients_first"])
        del model
        release()
    for name in runs:
        first = name == runs[0]
        steps = arguments.steps if first else min(arguments.compare, arguments.steps)
        records, model = train(name, config, steps=steps, text=text, world=world, out=out)
        if first:
            result.update(summary(records))
            if arguments.gradients:
                result["gradients_last"] = gradient_distances(model, config, rows_BS)
                print_distances(f"after {steps} steps", result["gradients_last"])
        del model
        release()
    return result


def summary(records: Records) -> dict[str, Any]:
    result = {"first_loss": round(records[0]["loss/train"], 4)}
    result["last_loss"] = round(statistics.mean(record["loss/train"] for record in records[-10:]), 4)
    tail = [record for record in records if record.get("perf/mfu") is not None][-100:]
    if tail:
        result["tokens_per_s"] = round(statistics.median(record["perf/tokens_per_s"] for record in tail))
        result["mfu"] = round(statistics.median(record["perf/mfu"] for record in tail), 4)
    return result


def compare_all(out: Path, steps: int) -> dict[str, Any]:
    """Every pair of runs whose records lie in OUT."""
    found: dict[str, Records] = {}
    for name in RUNS:
        path = out / f"{name}.jsonl"
        if path.is_file():
            found[name] = [json.loads(line) for line in path.read_text().splitlines()[:steps]]
    pairs = {}
    for a, b in itertools.combinations(found, 2):
        pairs[f"{a} / {b}"] = compare(found[a], found[b])
        print(f"{a} / {b}: {json.dumps(pairs[f'{a} / {b}'])}")
    return pairs


if __name__ == "__main__":
    main()
