"""What a session does while a `with` block is open: record, replay or compare. One frame per block and thread.

A frame knows how far each layer has come in its plan. Activation checkpointing runs a forward again later, on whatever
thread and in whatever order: `Frame.again` starts at the positions the region had when it first ran.

T tokens, K top-k, L layers.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from moe_layer.errors import RoutingError, TraceError
from moe_layer.replay.metrics import BlockTally
from moe_layer.replay.plan import RoutingPlan
from moe_layer.replay.tap import Routed
from moe_layer.types import RoutingDecision

if TYPE_CHECKING:
    from moe_layer.replay.recording import Recording


class Run(Protocol):
    """One `with` block. `done` holds the tokens that each layer has consumed of the block's plan."""

    def decide(self, layer: int, done: dict[int, int], num_tokens: int) -> RoutingDecision | None: ...

    def observe(self, layer: int, done: dict[int, int], routed: Routed) -> None: ...

    def finish(self, done: dict[int, int]) -> None: ...


@dataclass(frozen=True)
class Frame:
    """The blocks that are open at one place of the stack: `record` inside `replay` is both.

    Attributes:
        parts: run and its `done` of each block, outermost first; none routes live.
        protected: entered through `context_fn` or `bind`, so a recompute will find its way back.
        recompute: this is that way back: decisions are repeated, nothing is observed again.
    """

    parts: tuple[tuple[Run, dict[int, int]], ...] = ()
    protected: bool = False
    recompute: bool = False

    def within(self, run: Run) -> Frame:
        """This frame with one more block."""
        for open_run, _ in self.parts:
            if isinstance(run, (Replayed, Compared)) and isinstance(open_run, (Replayed, Compared)):
                raise RoutingError(
                    f"{open_run.name} is open already, so {run.name} would not see live routing; a micro-batch has one "
                    "plan: close the other block first, or measure with replay(plan, measure=True)"
                )
        return replace(self, parts=(*self.parts, (run, {})))

    def protect(self) -> Frame:
        """The same blocks at the same positions (shared), known to a checkpoint."""
        return replace(self, protected=True)

    def positions(self) -> list[dict[int, int]]:
        return [dict(done) for _, done in self.parts]

    def again(self, positions: list[dict[int, int]]) -> Frame:
        """A recompute from these positions."""
        parts = tuple((run, dict(done)) for (run, _), done in zip(self.parts, positions, strict=True))
        return Frame(parts, protected=True, recompute=True)

    @property
    def replays(self) -> bool:
        return any(isinstance(run, Replayed) for run, _ in self.parts)


def advance(plan: RoutingPlan, layer: int, done: dict[int, int], num_tokens: int) -> slice:
    """The plan's rows of this call of the layer.

    Raises:
        TraceError: the plan has fewer rows left.
    """
    start = done.get(layer, 0)
    if start + num_tokens > plan.num_tokens:
        raise TraceError(
            f"layer {plan.spec.layers[layer]!r} runs {num_tokens} tokens but its plan of {plan.num_tokens} rows has "
            f"{plan.num_tokens - start} left: exhausted; make one plan per micro-batch and enter replay once for each"
        )
    done[layer] = start + num_tokens
    return slice(start, start + num_tokens)


def check_consumed(plan: RoutingPlan, done: dict[int, int], what: str) -> None:
    """Every layer has run over every row, or nothing was replayed where everybody thinks it was."""
    short = [name for i, name in enumerate(plan.spec.layers) if done.get(i, 0) != plan.num_tokens]
    if short:
        got = done.get(plan.spec.layers.index(short[0]), 0)
        raise TraceError(
            f"{what} ended after {got} of the plan's {plan.num_tokens} rows in layer {short[0]!r} (and "
            f"{len(short) - 1} "
            "other layers); run the whole micro-batch inside the block, or exclude layers that do not run"
        )


@dataclass
class Recorded:
    """Run of `record`."""

    recording: Recording

    def decide(self, layer: int, done: dict[int, int], num_tokens: int) -> None:
        return None

    def observe(self, layer: int, done: dict[int, int], routed: Routed) -> None:
        self.recording.add(layer, routed)

    def finish(self, done: dict[int, int]) -> None:
        self.recording.finish()


@dataclass
class Replayed:
    """Run of `replay`; `measure` also asks every router what it would have chosen."""

    name: ClassVar[str] = "replay"
    plan: RoutingPlan
    tally: BlockTally
    measure: bool

    def decide(self, layer: int, done: dict[int, int], num_tokens: int) -> RoutingDecision:
        rows = advance(self.plan, layer, done, num_tokens)
        return self.plan.decision(layer, rows.start, rows.stop)

    def observe(self, layer: int, done: dict[int, int], routed: Routed) -> None:
        self.tally.add_events(layer, routed.events)
        if self.measure:
            self.tally.add_comparison(layer, routed.ids_TK, routed.live(), routed, first=done[layer])

    def finish(self, done: dict[int, int]) -> None:
        check_consumed(self.plan, done, self.name)
        self.tally.finish()


@dataclass
class Compared:
    """Run of `compare`: live routing, measured against a plan."""

    name: ClassVar[str] = "compare"
    plan: RoutingPlan
    tally: BlockTally

    def decide(self, layer: int, done: dict[int, int], num_tokens: int) -> None:
        advance(self.plan, layer, done, num_tokens)
        return None

    def observe(self, layer: int, done: dict[int, int], routed: Routed) -> None:
        stop = done[layer]
        planned = self.plan.decision(layer, stop - routed.ids_TK.shape[0], stop).ids
        self.tally.add_comparison(layer, planned, routed.ids_TK, routed, first=stop)

    def finish(self, done: dict[int, int]) -> None:
        check_consumed(self.plan, done, self.name)
        self.tally.finish()


class UnboundGuard:
    """Notices a layer that replayed, is recomputed, and finds no frame: its gradients would be those of other experts.

    With grad enabled the replayed forward leaves a token in its graph: while that graph lives, an unbound recompute is
    an error. Reentrant checkpointing runs its first forward without grad, and a frozen router whose input needs no
    gradient has no graph either, whatever its experts have: there one such forward is enough, until the session is
    closed, for recomputes in the same mode (log probabilities are often taken in `eval()`, with nothing to recompute).
    """

    def __init__(self) -> None:
        self._without_grad: set[bool] = set()
        self._alive = 0

    def note(self, weights_TK: Tensor, *, training: bool) -> None:
        """After a replayed forward that no checkpoint knows. Compiled graphs recompute from their own inputs."""
        if torch.compiler.is_compiling():
            return
        if weights_TK.grad_fn is not None:
            self._alive += 1
            node: Any = weights_TK.grad_fn
            node.metadata["moe_layer.replay"] = _Token(self)
        elif not torch.is_inference_mode_enabled():
            self._without_grad.add(training)

    def check(self, name: str, *, training: bool) -> None:
        """Before an unbound forward inside a backward pass.

        Raises:
            RoutingError: this layer has replayed forwards in flight that nobody bound.
        """
        if self._alive > 0 or training in self._without_grad:
            raise RoutingError(
                f"layer {name!r} recomputes without replay binding, so its gradient would belong to other "
                "experts than its "
                "forward; pass session.context_fn to checkpoint(use_reentrant=False), or checkpoint "
                "session.bind(function)"
            )

    def release(self) -> None:
        self._alive -= 1


class _Token:
    """Lives as long as the graph node that holds it."""

    def __init__(self, guard: UnboundGuard) -> None:
        self._guard = guard

    def __del__(self) -> None:
        self._guard.release()
