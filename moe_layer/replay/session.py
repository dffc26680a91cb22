"""RoutingSession: record, replay and compare the routing of a model, bound by module path.

    session = RoutingSession(model)
    with session.record() as recording:
        model(batch)
    trace = recording.trace(token_ids=...)

    plan = trace.plan(token_index, layers=session.layers, device="cuda")      # one plan per micro-batch
    with session.replay(plan):
        loss = model(batch)

The state of an open block is a stack per thread inside the session; routers only hold a reference to it. Recompute
finds
its block through `context_fn` (non-reentrant checkpointing) or `bind` (any), in any order of forwards and backwards.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from fnmatch import fnmatchcase
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import nn

from moe_layer.errors import RoutingError, TraceError
from moe_layer.replay.metrics import ReplayMetrics, Tally
from moe_layer.replay.plan import RoutingPlan
from moe_layer.replay.recording import PinnedMemory, Recording, StaticRecording
from moe_layer.replay.runs import Compared, Frame, Recorded, Replayed, Run, UnboundGuard
from moe_layer.replay.spec import TraceSpec
from moe_layer.replay.tap import NotCopied, Routed, is_recomputing
from moe_layer.replay.trace import RoutingTrace
from moe_layer.types import RoutingDecision

Result = TypeVar("Result")
WRAPPERS = ("module", "_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module")
"""Path components that DDP, FSDP, torch.compile and checkpoint wrappers add; they are not part of a layer's name."""


class RoutingSession:
    """Taps on the MoE layers of one model.

    Args:
        model: any module with our routers in it (MoELayer, replaced transformers blocks).
        exclude: patterns of module paths (`"mtp.*"`) whose layers always route live and are never recorded.

    Attributes:
        layers: module path of each bound MoE block, in module order; "." when the model is the block itself.

    Raises:
        RoutingError: no layers left, layers of different E or K, or another session is attached.
    """

    def __init__(self, model: nn.Module, *, exclude: Sequence[str] = ()) -> None:
        if isinstance(exclude, str):
            raise RoutingError(f"exclude must be a list of patterns, got the string {exclude!r}; put it into a list")
        routers = find_routers(model)
        used = {name: r for name, r in routers.items() if not any(fnmatchcase(name, p) for p in exclude)}
        if not used:
            raise RoutingError(
                f"{type(model).__name__} has {len(routers)} MoE layers of ours and {len(used)} after exclude "
                f"{list(exclude)}; replace its blocks first, or exclude less"
            )
        sizes = {(r.config.router.num_experts, r.config.router.top_k) for r in used.values()}
        if len(sizes) > 1:
            raise RoutingError(f"the layers have different (num_experts, top_k): {sorted(sizes)}; one session per kind")
        (experts, top_k) = sizes.pop()
        self.spec = TraceSpec(experts, top_k, tuple(used))
        self._routers = list(used.values())
        self._local = threading.local()
        self._host = PinnedMemory()
        self._tally = Tally(self.spec, self.device)  # now: a graph capture would zero it at every launch
        taken = [n for n, r in used.items() if r.routing_tap is not None and r.routing_tap.alive]
        if taken:
            raise RoutingError(
                f"another session is attached to this model (layer {taken[0]!r}, {len(taken)} in all); close() it first"
            )
        self._taps = [_Tap(self, index, router) for index, router in enumerate(self._routers)]
        for router, tap in zip(self._routers, self._taps, strict=True):
            router.routing_tap = tap

    @property
    def layers(self) -> tuple[str, ...]:
        return self.spec.layers

    @property
    def device(self) -> torch.device:
        return self._routers[0].weight.device

    def close(self) -> None:
        """Detach from the model."""
        for router, tap in zip(self._routers, self._taps, strict=True):
            if router.routing_tap is tap:
                router.routing_tap = None

    def __enter__(self) -> RoutingSession:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # ---- blocks -----------------------------------------------------------------------------------------------------

    @contextmanager
    def record(self, *, weights: bool = False, max_tokens: int | None = None) -> Iterator[Any]:
        """Record every router call of the block; yields a `Recording` whose `trace()` is called afterwards.

        Args:
            weights: keep gate weights too. max_tokens: fixed device buffers for CUDA graphs; yields a
                `StaticRecording`,
                whose `commit(num_tokens)` is called after each launch.

        Raises:
            TraceError: at the end, layers that did not run over the same tokens.
        """
        recording: Recording = Recording(self.spec, weights=weights, host=self._host)
        if max_tokens is not None:
            if isinstance(max_tokens, bool) or not isinstance(max_tokens, int) or max_tokens < 0:
                raise RoutingError(
                    f"max_tokens must be an integer from 0, got {max_tokens!r}; the most tokens of a launch"
                )
            if weights:
                raise RoutingError(
                    "record(max_tokens=...) keeps no weights; record without max_tokens, or without weights"
                )
            recording = StaticRecording(self.spec, max_tokens=max_tokens, device=self.device, host=self._host)
        with self._open(Recorded(recording)):
            yield recording

    @contextmanager
    def replay(self, plan: RoutingPlan | RoutingTrace, *, measure: bool = False) -> Iterator[None]:
        """Every bound layer honours the plan's ids inside the block. One plan per micro-batch.

        Args:
            plan: of these layers and this device; a trace is taken whole, in order.
            measure: also select live and count how far it is from the plan (costs a second selection).

        Raises:
            TraceError: another E, K, device or other layers; more or fewer tokens than the plan has.
            RoutingError: a replay or compare is open already.
        """
        plan = self._fit(plan)
        with self._open(Replayed(plan, self._sums().block(), measure)):
            yield

    @contextmanager
    def compare(self, plan: RoutingPlan | RoutingTrace) -> Iterator[None]:
        """Route live and count how far it is from the plan; read it with `metrics()`. Raises as `replay`."""
        plan = self._fit(plan)
        with self._open(Compared(plan, self._sums().block())):
            yield

    @contextmanager
    def live(self) -> Iterator[None]:
        """Route live whatever block is open outside: the reference policy, a critic."""
        with self._pushed(Frame()):
            yield

    def metrics(self) -> ReplayMetrics:
        """Sums over the blocks that ended since the last call; one host synchronisation."""
        return self._sums().read()

    # ---- recompute --------------------------------------------------------------------------------------------------

    def context_fn(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For `checkpoint(..., use_reentrant=False, context_fn=session.context_fn)`: recompute honours what forward
        did.
        """
        frame = self._top() or Frame()
        region = _Region(self, frame)
        return _Scope(region.first), _Scope(region.again)

    def composed(
        self, other: Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]
    ) -> Callable[[], tuple[AbstractContextManager[None], AbstractContextManager[None]]]:
        """`context_fn` around another one, such as selective checkpointing's."""

        def context_fn() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
            (forward, again), (inner_forward, inner_again) = self.context_fn(), other()
            return _Both(forward, inner_forward), _Both(again, inner_again)

        return context_fn

    def bind(self, function: Callable[..., Result]) -> Callable[..., Result]:
        """`function`, bound to the open block, for reentrant checkpointing: `checkpoint(session.bind(f), x, ...)`.

        Bind anew for each call: the first call is the forward, later ones are its recomputes.

        Raises:
            RoutingError: the bound function is called for a second forward.
        """
        region = _Region(self, self._top() or Frame())
        ran = False

        def bound(*args: Any, **kwargs: Any) -> Result:
            nonlocal ran
            if ran and not is_recomputing():
                raise RoutingError(
                    "a bound function was called for a second forward; call session.bind for each forward"
                )
            scope = region.again() if ran else region.first()
            ran = True
            with scope:
                return function(*args, **kwargs)

        return bound

    # ---- inside -----------------------------------------------------------------------------------------------------

    def _fit(self, plan: RoutingPlan | RoutingTrace) -> RoutingPlan:
        if isinstance(plan, RoutingTrace):
            plan = plan.plan(layers=self.layers, device=self.device)
        if not isinstance(plan, RoutingPlan):
            raise TraceError(f"replay needs a RoutingPlan or a RoutingTrace, got {type(plan).__name__}")
        theirs = plan.spec
        if (theirs.num_experts, theirs.top_k) != (self.spec.num_experts, self.spec.top_k):
            raise TraceError(
                f"the plan is for num_experts {theirs.num_experts} and top_k {theirs.top_k}, the model has "
                f"{self.spec.num_experts} and {self.spec.top_k}; it was recorded on another model"
            )
        if theirs.layers != self.layers:
            missing = [name for name in self.layers if name not in theirs.layers]
            extra = [name for name in theirs.layers if name not in self.layers]
            raise TraceError(
                f"the plan and the model differ in layers: missing {missing[:4]}, extra {extra[:4]} (or their "
                "order); use "
                "trace.plan(layers=session.layers), or exclude layers from the session"
            )
        if plan.device != self.device:
            raise TraceError(f"the plan is on {plan.device} and the model on {self.device}; use trace.plan(device=...)")
        return plan

    def _sums(self) -> Tally:
        if self._tally.device != self.device:  # the model has moved
            self._tally = Tally(self.spec, self.device)
        return self._tally

    @contextmanager
    def _open(self, run: Run) -> Iterator[None]:
        if any(router.routing_tap is not tap for router, tap in zip(self._routers, self._taps, strict=True)):
            raise RoutingError(
                "this session was closed, or the model has another one; make a new RoutingSession(model)"
            )
        frame = (self._top() or Frame()).within(run)
        with self._pushed(frame):
            yield
        run.finish(frame.parts[-1][1])  # not reached when the block raised: that error is the one to see

    @contextmanager
    def _pushed(self, frame: Frame) -> Iterator[None]:
        stack = self._stack()
        stack.append(frame)
        try:
            yield
        finally:
            at = next(i for i, other in enumerate(stack) if other is frame)
            del stack[at]
            if at < len(stack):
                raise RoutingError(
                    "a block of this session was closed while one that was opened later is open: tasks of one thread "
                    "share its blocks; open them around calls that do not give way to other tasks"
                )

    def _stack(self) -> list[Frame]:
        if not hasattr(self._local, "stack"):
            self._local.stack = []
        return self._local.stack

    def _top(self) -> Frame | None:
        stack = self._stack()
        return stack[-1] if stack else None


class _Tap(NotCopied):
    """One layer's end of a session. Weak, so that a forgotten session lets go of the model."""

    def __init__(self, session: RoutingSession, index: int, router: nn.Module) -> None:
        self._session = weakref.ref(session)
        self._index = index
        self._router = weakref.ref(router)
        self._guard = UnboundGuard()
        self._frames = threading.local()

    @property
    def alive(self) -> bool:
        return self._session() is not None

    def before(
        self, replay: RoutingDecision | None, *, num_tokens: int, device: torch.device
    ) -> RoutingDecision | None:
        frame = self._frame()
        self._frames.current = frame
        for run, done in frame.parts:
            decision = run.decide(self._index, done, num_tokens)
            if decision is not None and replay is not None:
                raise RoutingError("the layer got replay=... inside session.replay; use one of them")
            replay = replay if decision is None else decision
        return replay

    def after(self, routed: Routed) -> None:
        frame, self._frames.current = self._frames.current, None
        if frame.recompute:
            return
        for run, done in frame.parts:
            run.observe(self._index, done, routed)
        if frame.replays and not frame.protected:
            self._guard.note(routed.weights_TK, training=self._training)

    @property
    def _training(self) -> bool:
        router = self._router()
        return router is not None and router.training

    def _frame(self) -> Frame:
        """The open blocks, unless this is a recompute that nobody bound to them."""
        session = self._session()
        if session is None:
            return Frame()
        frame = session._top() or Frame()
        if is_recomputing() and not frame.recompute:
            self._guard.check(session.layers[self._index], training=self._training)
            return Frame(recompute=True)
        return frame


class _Region:
    """A checkpointed region: its first run, and any number of recomputes from the same positions."""

    def __init__(self, session: RoutingSession, frame: Frame) -> None:
        self._session = session
        self._frame = frame
        self._positions: list[dict[int, int]] = []

    def first(self) -> AbstractContextManager[None]:
        self._positions = self._frame.positions()
        return self._session._pushed(self._frame.protect())

    def again(self) -> AbstractContextManager[None]:
        return self._session._pushed(self._frame.again(self._positions))


class _Scope:
    """A context manager that can be entered again: torch enters the recompute context once per backward."""

    def __init__(self, make: Callable[[], AbstractContextManager[Any]]) -> None:
        self._make = make
        self._open: list[AbstractContextManager[Any]] = []

    def __enter__(self) -> None:
        scope = self._make()
        scope.__enter__()
        self._open.append(scope)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        return self._open.pop().__exit__(kind, error, trace)


class _Both:
    """Two context managers, the second inside the first; may be entered again."""

    def __init__(self, outer: AbstractContextManager[Any], inner: AbstractContextManager[Any]) -> None:
        self._outer, self._inner = outer, inner

    def __enter__(self) -> None:
        self._outer.__enter__()
        self._inner.__enter__()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> bool | None:
        self._inner.__exit__(kind, error, trace)
        return self._outer.__exit__(kind, error, trace)


def find_routers(model: nn.Module) -> dict[str, Any]:
    """Module path of each MoE block -> its router.

    Raises:
        RoutingError: two paths that differ only in wrappers.
    """
    found: dict[str, Any] = {}
    for path, module in model.named_modules():
        if hasattr(module, "routing_tap"):
            parts = [part for part in path.split(".")[:-1] if part not in WRAPPERS]
            name = ".".join(parts) or "."
            if name in found:
                raise RoutingError(
                    f"two MoE layers are named {name!r} without their wrappers {WRAPPERS}; rename one of them"
                )
            found[name] = module
    return found
