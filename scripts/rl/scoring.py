"""One pretrained policy, several pairs of precisions: how far the trainer's probabilities are from the rollout's."""

from __future__ import annotations

from dataclasses import asdict
from statistics import fmean
from typing import Any

import torch
from torch import nn

from moe_layer import RoutingSession, TraceError
from rl.rollout import Rollout, discrepancy, generate, logprobs_of, make_engine, make_trainer
from rl.settings import Settings, dtype_of, split_precision
from rl.task import Grammar

VARIANTS = ("live", "R3", "R3_straight_through", "shifted")


def score_all(settings: Settings, model: nn.Module, grammar: Grammar, *, seed: int, log: Any) -> list[dict[str, Any]]:
    """A record per precision pair and rollout seed."""
    records = []
    for precision in settings.scoring.precisions:
        rollout_format, trainer_dtype = split_precision(precision)
        engine = make_engine(model, rollout_format)
        trainer = make_trainer(model, dtype_of(trainer_dtype)).eval()
        through = make_trainer(model, dtype_of(trainer_dtype), weights="straight_through").eval()
        for number in range(settings.scoring.seeds):
            at = seed * 1000 + number
            prompts = grammar.sample(settings.scoring.sequences, settings.prompt, torch.Generator().manual_seed(at))
            prompts = prompts.to(next(model.parameters()).device)
            rollout = generate(engine, prompts, response=settings.response, seed=at)
            record = {"precision": precision, "seed": at, **score(trainer, through, rollout)}
            records.append(record)
        log(_line(precision, records[-settings.scoring.seeds :]))
    return records


@torch.no_grad()
def score(trainer: nn.Module, through: nn.Module, rollout: Rollout) -> dict[str, Any]:
    """All variants on one rollout, with the facts that the report asserts."""
    device = rollout.tokens.device
    session, second = RoutingSession(trainer), RoutingSession(through)
    plan = rollout.trace.plan(rollout.index(), layers=session.layers, device=device, tokens=rollout.tokens[:, :-1])
    shifted = rollout.trace.plan(rollout.index(shift=1), layers=session.layers, device=device)
    found: dict[str, Any] = {}
    with session.compare(plan):
        found["live"] = discrepancy(logprobs_of(trainer, rollout.tokens, prompt=rollout.prompt), rollout.logprobs)
    metrics = session.metrics()
    with session.replay(plan), session.record() as effective:
        found["R3"] = discrepancy(logprobs_of(trainer, rollout.tokens, prompt=rollout.prompt), rollout.logprobs)
    with second.replay(plan):
        found["R3_straight_through"] = discrepancy(
            logprobs_of(through, rollout.tokens, prompt=rollout.prompt), rollout.logprobs
        )
    with session.replay(shifted, measure=True):
        found["shifted"] = discrepancy(logprobs_of(trainer, rollout.tokens, prompt=rollout.prompt), rollout.logprobs)
    alarm = session.metrics()
    session.close()
    second.close()
    layers = {f"layer_{i}": rate for i, rate in enumerate(metrics.mismatch_by_layer.values())}
    return {
        "variants": found,
        "metrics": {k: v for k, v in asdict(metrics).items() if not isinstance(v, dict)},
        "mismatch_by_layer": layers,
        "effective_equals_recorded": torch.equal(effective.trace().ids, rollout.trace.ids),
        "aligned_alarm": _fires(metrics),
        "shifted_alarm": _fires(alarm),
        "shifted_zero_overlap": alarm.zero_overlap,
        "shifted_tokens_refused": _refused(rollout, session.layers),
    }


def _fires(metrics: Any) -> bool:
    try:
        metrics.check_alignment()
    except TraceError:
        return True
    return False


def _refused(rollout: Rollout, layers: tuple[str, ...]) -> bool:
    try:
        rollout.trace.plan(rollout.index(shift=1), layers=layers, tokens=rollout.tokens[:, :-1])
    except TraceError:
        return True
    return False


def mean(records: list[dict[str, Any]], variant: str, key: str) -> float:
    return fmean(record["variants"][variant][key] for record in records)


def factor_range(records: list[dict[str, Any]]) -> tuple[float, float]:
    """Smallest and largest KL live / KL R3 over the seeds."""
    factors = [r["variants"]["live"]["kl"] / max(r["variants"]["R3"]["kl"], 1e-30) for r in records]
    return min(factors), max(factors)


def _line(precision: str, records: list[dict[str, Any]]) -> str:
    low, high = factor_range(records)
    routers = fmean(r["metrics"]["mismatch"] for r in records)
    tokens = fmean(r["metrics"]["token_mismatch"] for r in records)
    kl = "  ".join(f"{variant} {mean(records, variant, 'kl'):.2e}" for variant in VARIANTS)
    ratio = f"{mean(records, 'live', 'max_ratio'):.2f} -> {mean(records, 'R3', 'max_ratio'):.2f}"
    return (
        f"  {precision:17s} routers {100 * routers:5.2f}%  tokens {100 * tokens:5.1f}%  KL {kl}  "
        f"live/R3 [{low:.1f}, {high:.1f}]  max ratio {ratio}"
    )
