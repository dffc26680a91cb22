"""GRPO with off-policy mini-batches under each replay mode, every mode from the same pretrained policy.

B sequences of a step, G sampled tokens. Old log probabilities come from the trainer, as in verl and slime.
"""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, ExitStack, nullcontext
from statistics import fmean
from typing import Any

import torch
from torch import Tensor, nn

from moe_layer import RoutingSession, RoutingTrace, TraceError
from rl.rollout import Rollout, discrepancy, generate, logprobs_of, make_engine, make_trainer, sync
from rl.settings import Settings, check_mode, dtype_of
from rl.task import Grammar, reward


class Learner:
    """The trainer copy, its session and its optimizer."""

    def __init__(self, settings: Settings, model: nn.Module, mode: str) -> None:
        check_mode(mode)
        self.settings, self.mode = settings, mode
        through = "straight_through" if mode == "R3_straight_through" else "live"
        self.model = make_trainer(model, dtype_of(settings.grpo.trainer), weights=through)
        self.reference = copy.deepcopy(model).eval().requires_grad_(False)
        self.session = RoutingSession(self.model)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=settings.grpo.lr, weight_decay=0.0)

    def step(self, rollout: Rollout) -> dict[str, float]:
        """Old log probabilities, then one pass of mini-batches; returns the step's metrics."""
        settings = self.settings.grpo
        with torch.no_grad():
            old, found, trainer_trace = self._old(rollout)
            ref = logprobs_of(self.reference, rollout.tokens, prompt=rollout.prompt)
        advantages = self._advantages(rollout)
        parts = torch.randperm(rollout.tokens.shape[0]).chunk(settings.mini_batches)
        updates = [self._update(part, rollout, old, ref, advantages, trainer_trace) for part in parts]
        for key in updates[0]:
            found[key] = (max if key == "staleness_max_ratio" else fmean)(update[key] for update in updates)
        return found

    def _old(self, rollout: Rollout) -> tuple[Tensor, dict[str, float], RoutingTrace | None]:
        """Trainer log probabilities under the rollout policy; R2 records here, R3 replays here."""
        self.model.eval()
        plan = self._plan(rollout, None, rollout.trace)
        with ExitStack() as stack:
            recording = None
            if self.mode in ("off", "R2"):
                stack.enter_context(self.session.compare(plan))
                recording = stack.enter_context(self.session.record()) if self.mode == "R2" else None
            else:
                stack.enter_context(self.session.replay(plan, measure=True))
            old = logprobs_of(self.model, rollout.tokens, prompt=rollout.prompt)
        metrics = self.session.metrics()
        found = discrepancy(old, rollout.logprobs)
        found |= {"mismatch": metrics.mismatch, "token_mismatch": metrics.token_mismatch}
        found |= {"zero_overlap": metrics.zero_overlap, "alarm": float(_alarm(metrics))}
        return old, found, None if recording is None else recording.trace()

    def _plan(self, rollout: Rollout, sequences: Tensor | None, trace: RoutingTrace) -> Any:
        index = rollout.index(sequences, shift=1 if self.mode == "shifted" else 0)
        return trace.plan(index, layers=self.session.layers, device=rollout.tokens.device)

    def _replays(
        self, rollout: Rollout, part: Tensor, trainer_trace: RoutingTrace | None
    ) -> AbstractContextManager[None]:
        if self.mode == "off":
            return nullcontext()
        trace = rollout.trace if trainer_trace is None else trainer_trace
        return self.session.replay(self._plan(rollout, part, trace))

    def _advantages(self, rollout: Rollout) -> Tensor:
        """Rewards, centred and scaled inside each group."""
        scores = reward(rollout.tokens, prompt=rollout.prompt, vocab=self.settings.vocab)
        groups = scores.view(-1, self.settings.grpo.group)
        return ((groups - groups.mean(1, keepdim=True)) / (groups.std(1, keepdim=True) + 1e-4)).flatten()

    def _update(
        self,
        part: Tensor,
        rollout: Rollout,
        old: Tensor,
        ref: Tensor,
        advantages: Tensor,
        trainer_trace: RoutingTrace | None,
    ) -> dict[str, float]:
        settings = self.settings.grpo
        self.model.train()
        with self._replays(rollout, part, trainer_trace):
            new = logprobs_of(self.model, rollout.tokens[part], prompt=rollout.prompt)
        ratio = (new - old[part]).exp()
        gain = advantages[part].unsqueeze(1)
        clipped = ratio.clamp(1 - settings.clip, 1 + settings.clip)
        penalty = (ref[part] - new).exp() - 1 - (ref[part] - new)
        loss = (-torch.minimum(ratio * gain, clipped * gain) + settings.kl_coeff * penalty).mean()
        self.optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        beyond = torch.maximum(ratio, 1 / ratio).detach()
        return {
            "clip_fraction": (ratio * gain > clipped * gain).float().mean().item(),
            "staleness_max_ratio": beyond.max().item(),
            "kl_to_reference": penalty.mean().item(),
            "grad_norm": float(norm),
        }


def train(settings: Settings, model: nn.Module, grammar: Grammar, *, mode: str, seed: int) -> list[dict[str, Any]]:
    """A record per step."""
    torch.manual_seed(seed)
    learner, engine = Learner(settings, model, mode), make_engine(model, settings.grpo.rollout)
    device = next(model.parameters()).device
    records = []
    for step in range(settings.grpo.steps):
        generator = torch.Generator().manual_seed(seed * 1000 + step)
        prompts = grammar.sample(settings.grpo.prompts, settings.prompt, generator)
        prompts = prompts.repeat_interleave(settings.grpo.group, 0).to(device)
        rollout = generate(engine, prompts, response=settings.response, seed=seed * 1000 + step, version=step)
        score = reward(rollout.tokens, prompt=rollout.prompt, vocab=settings.vocab).mean().item()
        records.append({"mode": mode, "step": step, "reward": score, **learner.step(rollout)})
        sync(engine, learner.model)
    learner.session.close()
    return records


def _alarm(metrics: Any) -> bool:
    try:
        metrics.check_alignment()
    except TraceError:
        return True
    return False
