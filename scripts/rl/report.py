"""Console table, plot, JSON, and what must hold."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from statistics import fmean
from typing import Any

from rl.scoring import VARIANTS, factor_range, mean

CURVES = (("reward", "reward"), ("kl", "KL rollout, trainer"), ("max_ratio", "max ratio"), ("clip_fraction", "clipped"))


def by_precision(records: list[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["precision"], []).append(record)
    return found


def failures(shape: str, scoring: list[dict[str, Any]], grpo: list[dict[str, Any]]) -> Iterator[str]:
    """One sentence for each promise that this run broke."""
    for precision, records in by_precision(scoring).items():
        where = f"{shape} {precision}"
        live, r3, shifted = (mean(records, v, "kl") for v in ("live", "R3", "shifted"))
        if any(r["metrics"]["mismatch"] > 0 for r in records) and not r3 < live:
            yield f"{where}: mean KL with R3 {r3:.3e} is not below live {live:.3e}"
        if not shifted > 100 * live:
            yield f"{where}: the shifted control's KL {shifted:.3e} is not over 100 times live {live:.3e}"
        if not all(r["effective_equals_recorded"] for r in records):
            yield f"{where}: R3 did not use the recorded experts"
        if not all(r["shifted_alarm"] and r["shifted_tokens_refused"] for r in records):
            yield f"{where}: a shifted trace raised no alarm"
        if precision in ("fp32->fp32", "bf16->bf16", "bf16->fp32") and any(r["aligned_alarm"] for r in records):
            yield f"{where}: an aligned trace raised the alarm"
    modes = _by_mode(grpo)
    for mode, records in modes.items():
        if not all(abs(value) < float("inf") for r in records for value in r.values() if isinstance(value, float)):
            yield f"{shape} GRPO {mode}: a metric is not finite"
    # The trainer's first step has seen no update: only precision differs, and with it the routing.
    if {"off", "R3", "shifted"} <= modes.keys():
        off, r3, shifted = (fmean(r["kl"] for r in modes[m]) for m in ("off", "R3", "shifted"))
        if not r3 < off:
            yield f"{shape} GRPO: mean KL with R3 {r3:.3e} is not below live {off:.3e}"
        if not modes["shifted"][0]["kl"] > 100 * modes["off"][0]["kl"]:
            yield f"{shape} GRPO: the shifted control's first KL {shifted:.3e} is not over 100 times live"
        if not all(r["alarm"] for r in modes["shifted"]) or any(r["alarm"] for r in modes["R3"][:1]):
            yield f"{shape} GRPO: the alarm did not tell the shifted trace from the aligned one"


def _by_mode(records: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        found.setdefault(record["mode"], []).append(record)
    return found


def grpo_table(records: list[dict[str, Any]]) -> str:
    """Means over the steps, and the reward of the first and the last."""
    lines = ["  mode                 KL        max ratio  clipped  routers  tokens   reward"]
    for mode, rows in _by_mode(records).items():
        average = {
            key: fmean(row[key] for row in rows) for key in ("kl", "clip_fraction", "mismatch", "token_mismatch")
        }
        lines.append(
            f"  {mode:20s} {average['kl']:.2e}  {max(r['max_ratio'] for r in rows):8.2f}  "
            f"{100 * average['clip_fraction']:6.2f}%  {100 * average['mismatch']:5.2f}%  "
            f"{100 * average['token_mismatch']:5.1f}%  "
            f"{rows[0]['reward']:.3f} -> {rows[-1]['reward']:.3f}"
        )
    return "\n".join(lines)


MARKER = "<!-- figures: written by scripts/rl_replay.py --doc -->"


def rounded(value: Any) -> Any:
    """Six significant digits everywhere, so that the stored run and the page agree."""
    if isinstance(value, dict):
        return {key: rounded(item) for key, item in value.items()}
    if isinstance(value, list):
        return [rounded(item) for item in value]
    return float(f"{value:.6g}") if isinstance(value, float) else value


def markdown(results: dict[str, Any]) -> str:
    """The figures of a run, for docs/replay.md."""
    environment = results["environment"]
    parts = [
        f"Last run: torch {environment['torch']}, transformers {environment['transformers']}, {environment['device']}, "
        f"{environment['threads']} thread, seed {environment['seed']}, {results['seconds'] / 60:.0f} minutes."
    ]
    for name, shape in results["shapes"].items():
        model = results["settings"]["shapes"][name]
        parts += [
            f"**{name}**: {model['layers']} layers, top-{model['top_k']} of {results['settings']['experts']}, "
            f"ffn {model['ffn']}, "
            f"{model['steps']} steps.",
            _scoring_rows(shape["scoring"]),
            _grpo_rows(shape["grpo"]),
        ]
    return "\n\n".join(parts) + "\n"


def _scoring_rows(scoring: list[dict[str, Any]]) -> str:
    lines = [
        "| rollout -> trainer | routers differ | tokens touched | KL live | KL R3 | live / R3 [seeds] | KL "
        "straight-through | "
        "KL shifted | max ratio live -> R3 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for precision, records in by_precision(scoring).items():
        routers, tokens = (fmean(r["metrics"][key] for r in records) for key in ("mismatch", "token_mismatch"))
        kl = {variant: f"{mean(records, variant, 'kl'):.1e}" for variant in VARIANTS}
        low, high = factor_range(records)
        factor = f"{low:.1f} to {high:.1f}" if routers > 0 else "no mismatch"
        ratios = [max(r["variants"][variant]["max_ratio"] for r in records) for variant in ("live", "R3")]
        lines.append(
            f"| {precision} | {100 * routers:.2f}% | {100 * tokens:.1f}% | {kl['live']} | {kl['R3']} | {factor} | "
            f"{kl['R3_straight_through']} | {kl['shifted']} | {ratios[0]:.2f} -> {ratios[1]:.2f} |"
        )
    return "\n".join(lines)


def _grpo_rows(grpo: list[dict[str, Any]]) -> str:
    lines = [
        "| GRPO mode | KL | max ratio | clipped | routers differ | tokens touched | reward first -> last |",
        "|---|---|---|---|---|---|---|",
    ]
    for mode, rows in _by_mode(grpo).items():
        average = {
            key: fmean(row[key] for row in rows) for key in ("kl", "clip_fraction", "mismatch", "token_mismatch")
        }
        lines.append(
            f"| {mode} | {average['kl']:.1e} | {max(r['max_ratio'] for r in rows):.2f} | "
            f"{100 * average['clip_fraction']:.2f}% | "
            f"{100 * average['mismatch']:.2f}% | {100 * average['token_mismatch']:.1f}% | "
            f"{rows[0]['reward']:.3f} -> {rows[-1]['reward']:.3f} |"
        )
    return "\n".join(lines)


def plot(results: dict[str, Any], path: Path) -> str | None:
    """Draw KL per precision and the GRPO curves; None, or why there is no picture."""
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        return "matplotlib is not installed, no plot (pip install matplotlib)"
    shapes = results["shapes"]
    figure, axes = pyplot.subplots(len(shapes), 5, figsize=(22, 3.8 * len(shapes)), squeeze=False)
    for row, (name, shape) in zip(axes, shapes.items(), strict=True):
        groups = by_precision(shape["scoring"])
        for offset, variant in enumerate(VARIANTS):
            values = [max(mean(records, variant, "kl"), 1e-12) for records in groups.values()]
            row[0].bar([i + 0.2 * offset for i in range(len(values))], values, width=0.2, label=variant)
        row[0].set(yscale="log", title=f"{name}: KL by rollout -> trainer precision")
        row[0].set_xticks([i + 0.3 for i in range(len(groups))], groups, rotation=30, ha="right", fontsize=7)
        row[0].legend(fontsize=7, loc="center left")
        for axis, (key, title) in zip(row[1:], CURVES, strict=True):
            for mode, records in _by_mode(shape["grpo"]).items():
                axis.plot([r["step"] for r in records], [r[key] for r in records], label=mode)
            axis.set(title=f"{name}: {title}", xlabel="step", yscale="log" if key in ("kl", "max_ratio") else "linear")
        row[1].legend(fontsize=7, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=90)
    pyplot.close(figure)
    return None
