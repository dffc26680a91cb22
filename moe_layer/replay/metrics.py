"""What replay did and how far two routings are apart: sums on the device, read once per step.

L layers, T tokens, K top-k. A router call is one token in one layer.
"""

from __future__ import annotations

import threading
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.ops.route_topk import NUM_EVENTS
from moe_layer.replay.spec import TraceSpec
from moe_layer.replay.tap import Routed, is_capturing

EVENTS = ("rows_replayed", "slots_replayed", "slots_filled", "duplicates", "out_of_range")
"""The first entries of `route_topk`'s events."""
Counts = list[tuple[int, Tensor]]
"""Layer and counts of router calls."""
COMPARED = ("rows", "mismatched", "zero_overlap", "overlap", "margin", "margin_mismatched")


@dataclass(frozen=True)
class ReplayMetrics:
    """Counts over the router calls since the last reading; rates are fractions of the compared calls.

    Attributes:
        rows_replayed, slots_replayed, slots_filled, duplicates, out_of_range: what the routers honoured and repaired.
        rows_compared: router calls that were compared (`compare`, or `replay(measure=True)`) and complete.
        mismatch: calls whose set of experts differs. token_mismatch: tokens with at least one such layer.
        overlap: mean |A & B| / K. zero_overlap: calls that share no expert, the alignment alarm.
        margin: mean gap of the live K-th to the (K+1)-th logit; margin_mismatched: the same where the sets differ.
            Near ties
            flip in any engine; a mismatch across a wide margin has another cause.
        mismatch_by_layer: layer -> mismatch.
    """

    rows_replayed: int
    slots_replayed: int
    slots_filled: int
    duplicates: int
    out_of_range: int
    rows_compared: int
    mismatch: float
    token_mismatch: float
    overlap: float
    zero_overlap: float
    margin: float
    margin_mismatched: float
    mismatch_by_layer: dict[str, float]

    def scalars(self) -> dict[str, float]:
        """`replay/...` for a logger."""
        return {f"replay/{k}": float(v) for k, v in asdict(self).items() if not isinstance(v, dict)}

    def check_alignment(self, *, limit: float = 0.01) -> None:
        """Raise when too many router calls share no expert with the trace: the sign of a trace that is shifted.

        Measured on trained models: 0.0% when aligned, 56-76% when shifted by one token. For K = 1 any mismatch has no
        overlap, so give a limit above the usual mismatch there.

        Raises:
            TraceError: names both numbers; or nothing was compared although a trace was replayed.
        """
        if self.rows_replayed > 0 and self.rows_compared == 0:
            raise TraceError(
                f"{self.rows_replayed} router calls were replayed and none was compared, so nothing is known about "
                "the alignment; use replay(plan, measure=True), or compare(plan)"
            )
        if self.zero_overlap > limit:
            raise TraceError(
                f"{100 * self.zero_overlap:.1f}% of {self.rows_compared} router calls share no expert with the "
                "trace, the limit "
                f"is {100 * limit:.1f}%: the trace is shifted or belongs to other tokens; compare token ids "
                "(plan(tokens=...))"
            )


class Tally:
    """Device-side sums of one session. No host synchronisation before `read`."""

    def __init__(self, spec: TraceSpec, device: torch.device) -> None:
        self.spec, self.device = spec, device
        layers = len(spec.layers)
        self._lock = threading.Lock()  # blocks of several threads may end at a time
        with torch.inference_mode(False):  # added to in any mode later
            self._events = torch.zeros(layers, NUM_EVENTS, dtype=torch.int64, device=device)
            self._compared = torch.zeros(layers, len(COMPARED), dtype=torch.float64, device=device)
            self._tokens = torch.zeros(2, dtype=torch.int64, device=device)

    def block(self) -> BlockTally:
        """Counts of one `with` block, which join the sums when it ends."""
        return BlockTally(self)

    def add(self, events: Counts, compared: Counts, tokens: list[Tensor]) -> None:
        """Router calls by layer; pairs of tokens that differ and that were compared."""
        with self._lock:
            _add_by_layer(self._events, events)
            _add_by_layer(self._compared, compared)
            for pair in tokens:
                self._tokens += pair.sum(1)

    def read(self) -> ReplayMetrics:
        """One copy to the host; starts the next interval. Blocks that are open, or that raised, are not in it."""
        sums = (self._events, self._compared, self._tokens)
        with self._lock:
            packed = torch.cat([tensor.double().flatten() for tensor in sums]).cpu()
            for tensor in sums:
                tensor.zero_()
        layers = len(self.spec.layers)
        events, compared, tokens = packed.split([layers * NUM_EVENTS, layers * len(COMPARED), 2])
        by_layer = compared.view(layers, len(COMPARED))
        counts = dict(zip(EVENTS, events.view(layers, -1).sum(0).long().tolist(), strict=False))
        total = dict(zip(COMPARED, by_layer.sum(0).tolist(), strict=True))
        rows = max(1.0, total["rows"])
        return ReplayMetrics(
            **counts,
            rows_compared=int(total["rows"]),
            mismatch=total["mismatched"] / rows,
            token_mismatch=float(tokens[0] / tokens[1].clamp(min=1)),
            overlap=total["overlap"] / rows,
            zero_overlap=total["zero_overlap"] / rows,
            margin=total["margin"] / rows,
            margin_mismatched=total["margin_mismatched"] / max(1.0, total["mismatched"]),
            mismatch_by_layer={
                name: row[1] / max(1.0, row[0]) for name, row in zip(self.spec.layers, by_layer.tolist(), strict=True)
            },
        )


class BlockTally:
    """What one block saw, kept until it ends: a block that raises leaves nothing behind, threads do not mix.

    A CUDA graph adds to the session's sums at each launch; its capture may be over before the block is.
    """

    def __init__(self, tally: Tally) -> None:
        self._tally = tally
        self._events: Counts = []
        self._compared: Counts = []
        self._differs: dict[int, Tensor] = {}

    def add_events(self, layer: int, events: Tensor) -> None:
        """Of one router call; summed at the end of the block, in one launch for all layers."""
        if is_capturing(events):
            self._tally.add([(layer, events)], [], [])
        else:
            self._events.append((layer, events))

    @torch.no_grad()
    def add_comparison(self, layer: int, a_TK: Tensor, b_TK: Tensor, routed: Routed, *, first: int) -> None:
        """Compare two choices where both are complete; `first` identifies the tokens across layers."""
        top_k = a_TK.shape[1]
        complete_T = (a_TK >= 0).all(1) & (b_TK >= 0).all(1)
        shared_T = (a_TK.unsqueeze(2) == b_TK.unsqueeze(1)).any(2).sum(1)
        differs_T = complete_T & (shared_T < top_k)
        gap_T = _margin(routed.logits_TE, top_k)
        counts = (complete_T, differs_T, complete_T & (shared_T == 0))
        sums = [count.sum() for count in counts]
        sums += [(shared_T * complete_T).sum() / top_k, (gap_T * complete_T).sum(), (gap_T * differs_T).sum()]
        compared = (layer, torch.stack([value.to(torch.float64) for value in sums]))
        known = self._differs.get(first)
        pair = torch.stack((differs_T, complete_T))
        self._differs[first] = pair if known is None else known | pair
        if is_capturing(pair):
            last = layer == len(self._tally.spec.layers) - 1
            self._tally.add([], [compared], [self._differs.pop(first)] if last else [])
        else:
            self._compared.append(compared)

    @torch.no_grad()
    def finish(self) -> None:
        """End of the block: its router calls, and tokens that differ in any layer."""
        self._tally.add(self._events, self._compared, list(self._differs.values()))


def _add_by_layer(sums_LC: Tensor, counts: Counts) -> None:
    """One launch where every layer ran once, in order."""
    layers = [layer for layer, _ in counts]
    if len(layers) > 1 and layers == list(range(len(sums_LC))):
        sums_LC.add_(torch.stack([count for _, count in counts]))
    else:  # one layer, or several calls of each
        for layer, count in counts:
            sums_LC[layer].add_(count)


def _margin(logits_TE: Tensor, top_k: int) -> Tensor:
    """K-th minus (K+1)-th logit, 0 when all experts are chosen."""
    if top_k == logits_TE.shape[1]:
        return logits_TE.new_zeros(logits_TE.shape[0], dtype=torch.float32)
    best = logits_TE.detach().float().topk(top_k + 1, dim=1).values
    return best[:, -2] - best[:, -1]
