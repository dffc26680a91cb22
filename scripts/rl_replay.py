"""What router replay buys: a GRPO loop with a real rollout engine, replay off, R2, R3, straight-through, and a broken
control.

    python scripts/rl_replay.py configs/rl/tiny.yaml --seed 0 --out runs/rl_replay [--quick] [--device cuda]
    [grpo.rollout=fp8_1x128 ...]

A transformers Qwen3-MoE model is trained from scratch on a synthetic grammar, then generates with a KV cache and
records its routing; the trainer is a copy with our blocks. First one policy is scored under several pairs of
precisions, then GRPO runs in each mode. Writes results.json (after each shape) and replay.png; exits with 1 when a
promise does not hold. Both model shapes are shown, because the benefit depends on the model and the precision.
`--device cuda` applies the file's `cuda` section: a bf16 trainer with fp8 rollouts.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # runs without installation, too

import torch
import transformers
from rl.grpo import train
from rl.report import MARKER, failures, grpo_table, markdown, plot, rounded
from rl.scoring import score_all
from rl.settings import Settings, load_settings
from rl.task import Grammar, pretrain

from moe_layer.errors import ConfigError


def log(text: str) -> None:
    sys.stdout.write(text + "\n")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="more are slower for such small matrices")
    parser.add_argument("--doc", type=Path, help="page whose figures are replaced, such as docs/replay.md")
    parser.add_argument("--shapes", default="", help="comma-separated names, default all")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="such as grpo.rollout=fp8_1x128 grpo.trainer=bf16"
    )
    args = parser.parse_args()
    try:
        on_gpu = torch.device(args.device).type == "cuda"
        settings = load_settings(args.config, quick=args.quick, cuda=on_gpu, overrides=args.overrides)
    except (ConfigError, OSError) as error:
        sys.stderr.write(f"rl_replay: {error}\n")
        return 2
    torch.set_num_threads(args.threads)
    transformers.utils.logging.set_verbosity_error()
    args.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    chosen = [name for name in settings.shapes if not args.shapes or name in args.shapes.split(",")]
    results: dict[str, Any] = {"environment": _environment(args), "settings": asdict(settings), "shapes": {}}
    broken: list[str] = []
    for name in chosen:
        results["shapes"][name] = run_shape(settings, name, seed=args.seed, device=torch.device(args.device))
        broken += failures(name, results["shapes"][name]["scoring"], results["shapes"][name]["grpo"])
        results |= {"failures": broken, "seconds": time.perf_counter() - start, "cpu_seconds": time.process_time()}
        (args.out / "results.json").write_text(json.dumps(rounded(results)) + "\n")
    results = rounded(results)
    if args.doc is not None:
        args.doc.write_text(args.doc.read_text().split(MARKER)[0] + MARKER + "\n\n" + markdown(results))
        (args.doc.parent / "benchmarks/rl_replay.json").write_text(json.dumps(results) + "\n")
    note = plot(results, args.out / "replay.png")
    log(note or f"wrote {args.out / 'results.json'} and {args.out / 'replay.png'}")
    log(f"{results['seconds']:.0f} s, {results['cpu_seconds']:.0f} s of CPU time")
    for sentence in broken:
        log(f"FAILED: {sentence}")
    return 1 if broken else 0


def run_shape(settings: Settings, name: str, *, seed: int, device: torch.device) -> dict[str, Any]:
    """Pretrain, score, learn."""
    shape = settings.shapes[name]
    grammar = Grammar(settings.vocab, seed=seed)
    log(f"shape {name}: {shape.layers} layers, top-{shape.top_k} of {settings.experts}, ffn {shape.ffn}")
    model, cost = pretrain(settings, shape, grammar, seed=seed, device=device)
    log(
        f"  pretrained {shape.steps} steps in {cost['seconds']:.0f} s, loss {cost['loss_first']:.3f} -> "
        f"{cost['loss_last']:.3f}"
    )
    start = time.perf_counter()
    scoring = score_all(settings, model, grammar, seed=seed, log=log)
    scored = time.perf_counter() - start
    grpo: list[dict[str, Any]] = []
    for mode in settings.grpo.modes:
        grpo += train(settings, model, grammar, mode=mode, seed=seed)
    seconds = {"pretrain": cost["seconds"], "scoring": scored, "grpo": time.perf_counter() - start - scored}
    log(f"  GRPO, {settings.grpo.rollout} rollouts, {settings.grpo.trainer} trainer, {settings.grpo.steps} steps each:")
    log(grpo_table(grpo))
    log("  seconds: " + ", ".join(f"{part} {value:.0f}" for part, value in seconds.items()))
    return {"pretrain": cost, "scoring": scoring, "grpo": grpo, "seconds": seconds}


def _environment(args: argparse.Namespace) -> dict[str, Any]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": args.device if args.device == "cpu" else torch.cuda.get_device_name(args.device),
        "seed": args.seed,
        "quick": args.quick,
    }


if __name__ == "__main__":
    sys.exit(main())
