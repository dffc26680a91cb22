"""Frozen values that travel between the four calls of the layer.

Shape letters: T tokens on this rank, D hidden, E experts (global), L experts on this rank, K top-k, N rows, N_c compact
rows (one per received token), R ranks of the EP group, S sequences.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class RoutingDecision:
    """Expert ids to be honoured by the router (replay).

    Attributes:
        ids: integer `[..., K]`; -1 marks a slot that live routing fills.
        weights: optional fp32, shape of `ids`; used by `weights: recorded | straight_through`.
        valid: optional bool `[...]`; rows where it is False are routed live.
    """

    ids: Tensor
    weights: Tensor | None = None
    valid: Tensor | None = None


@dataclass(frozen=True)
class Routing:
    """What the router decided for T tokens.

    Attributes:
        ids_TK: int32, global expert ids, -1 = slot not routed.
        weights_TK: fp32 (fp64 for fp64 logits) combine weights, 0 where the id is -1; carries the losses' gradient.
        counts_E: int32, routed slots per expert over valid tokens, after capacity.
        losses: name -> 0-d fp32, already multiplied by their coefficients (what was attached to `weights_TK`).
        losses_unscaled: name -> 0-d fp32 before coefficients (1.0 = balanced for the aux loss).
        stats: name -> tensor for logs (`events`, `logits`, `dropped`, ...).
        capacity: rows that every expert is padded to (`router.pad_to_capacity`), else None.
    """

    ids_TK: Tensor
    weights_TK: Tensor
    counts_E: Tensor
    losses: Mapping[str, Tensor] = field(default_factory=dict)
    losses_unscaled: Mapping[str, Tensor] = field(default_factory=dict)
    stats: Mapping[str, Tensor] = field(default_factory=dict)
    capacity: int | None = None

    @classmethod
    def from_ids(cls, ids: Tensor, weights: Tensor, *, num_experts: int) -> Routing:
        """Routing for users who bring their own router and want the dispatcher alone.

        Args:
            ids: integer `[T, K]`, -1 = slot not routed, else in `[0, num_experts)` (checked on CPU).
            weights: floating `[T, K]`.
            num_experts: global number of experts E.

        Raises:
            RoutingError: shapes differ, dtypes are wrong or an id is out of range.
        """
        from moe_layer.errors import RoutingError

        if not isinstance(ids, Tensor) or not isinstance(weights, Tensor):
            raise RoutingError(
                f"ids and weights must be tensors [T, K], got {type(ids).__name__} and {type(weights).__name__}"
            )
        if ids.ndim != 2 or ids.shape != weights.shape:
            raise RoutingError(
                f"ids and weights must both be [T, K], got {tuple(ids.shape)} and {tuple(weights.shape)}"
            )
        if ids.is_floating_point() or ids.dtype == torch.bool or not weights.is_floating_point():
            raise RoutingError(
                f"ids must be an integer tensor and weights a floating one, got {ids.dtype} and {weights.dtype}"
            )
        if ids.device != weights.device:
            raise RoutingError(f"ids are on {ids.device} and weights on {weights.device}; move one of them")
        if ids.dtype in (torch.uint16, torch.uint32, torch.uint64):
            ids = ids.to(torch.int64)  # torch compares none of these
        if not ids.is_cuda and ids.numel():
            low, high = int(ids.min()), int(ids.max())
            if low < -1 or high >= num_experts:
                raise RoutingError(
                    f"ids must lie in [-1, {num_experts}), got {low}..{high}; -1 marks a slot that is not routed"
                )
        ids_TK = ids.to(torch.int32)
        routed_TK = ids_TK >= 0
        counts_E = torch.zeros(num_experts, dtype=torch.int32, device=ids.device)
        flat = torch.where(routed_TK, ids_TK, 0).flatten().long()
        counts_E.index_add_(0, flat, routed_TK.flatten().to(torch.int32))
        weights_TK = torch.where(routed_TK, weights.float(), weights.new_zeros((), dtype=torch.float32))
        return cls(ids_TK=ids_TK, weights_TK=weights_TK, counts_E=counts_E)

    def split(self, sizes: Sequence[int]) -> list[Routing]:
        """Ids and weights of consecutive runs of tokens; the rest stays what it is for all tokens together."""
        parts = zip(self.ids_TK.split(sizes), self.weights_TK.split(sizes), strict=True)
        return [replace(self, ids_TK=ids, weights_TK=weights) for ids, weights in parts]

    def detach(self) -> Routing:
        """The same values without autograd history, for logs."""

        def cut(values: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: value.detach() for name, value in values.items()}

        return Routing(
            ids_TK=self.ids_TK,
            weights_TK=self.weights_TK.detach(),
            counts_E=self.counts_E,
            losses=cut(self.losses),
            losses_unscaled=cut(self.losses_unscaled),
            stats=cut(self.stats),
            capacity=self.capacity,
        )


@dataclass(frozen=True)
class DispatchPlan:
    """What this rank's ids determine, without communication. Made by `moe_layer.dispatch.plan.make_plan`.

    Everything but the ids is computed when it is first asked for: one rank needs none of it.

    Attributes:
        ids_TK: int32 ids the plan was made from.
        num_experts, num_ranks: E and R; rank r owns experts `[r*E/R, (r+1)*E/R)`.
        make: returns the four tensors below.
        counts_E: int32, routed slots of this rank per global expert.
        send_tokens: int32 [sum(send_counts_R)], token indices grouped by destination rank, ascending inside a group;
            a token appears once per destination rank.
        send_counts_R: int32, tokens sent to each rank.
        position_TR: int32, index of the token's row inside `send_tokens`, -1 when not sent to that rank.
    """

    ids_TK: Tensor
    num_experts: int
    num_ranks: int
    make: Callable[[], tuple[Tensor, Tensor, Tensor, Tensor]] = field(repr=False)

    @cached_property
    def _parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.make()

    @property
    def counts_E(self) -> Tensor:
        return self._parts[0]

    @property
    def send_tokens(self) -> Tensor:
        return self._parts[1]

    @property
    def send_counts_R(self) -> Tensor:
        return self._parts[2]

    @property
    def position_TR(self) -> Tensor:
        return self._parts[3]


class GradientLink:
    """Hands d(y) [T, D] from combine's backward to the experts' backward, so that d(rows) [N, D] is never written.

    A dispatcher offers a link (`Received.link`); an expert backend that can gather d(y) itself accepts it for the very
    tensor that it returned; combine uses it only for that tensor. In place of d(rows) autograd then carries zeros
    without memory: whatever else flows into d(rows) is added to them, and the experts' backward adds d(y) on top, so
    the sum is right with or without other consumers of the rows.
    """

    def __init__(self, index_N: Tensor, offsets_L1: Tensor) -> None:
        self.index_N = index_N
        self._offsets = offsets_L1  # begins with a zero, which serves as the element of the zeros
        self._rows: weakref.ref[Tensor] | None = None
        self._d_y: Tensor | None = None
        self._zeros: Tensor | None = None

    def accept(self, rows: Tensor) -> None:
        """Called by the experts with their output."""
        self._rows = weakref.ref(rows)

    def accepted(self, rows: Tensor) -> bool:
        """Whether `rows` is the tensor that was accepted, unchanged."""
        return self._rows is not None and self._rows() is rows

    def put(self, d_y_TD: Tensor) -> Tensor:
        """Keep d(y) for `take`; returns the zeros [N, D] that stand for d(rows)."""
        shape = (self.index_N.shape[0], d_y_TD.shape[1])
        if d_y_TD.element_size() <= 4:
            zeros = self._offsets.view(d_y_TD.dtype).as_strided(shape, (0, 0))  # no launch
        else:
            zeros = torch.zeros(1, dtype=d_y_TD.dtype, device=d_y_TD.device).expand(shape)
        self._d_y, self._zeros = d_y_TD, zeros
        return self._zeros

    def take(self, d_rows_ND: Tensor) -> tuple[Tensor, Tensor | None]:
        """(d(y) [T, D], None), or (d(rows) [N, D], d(y)) when others contributed to d(rows), or (d(rows), None)."""
        d_y, zeros = self._d_y, self._zeros
        self._d_y = self._zeros = None
        if d_y is None or zeros is None:
            return d_rows_ND, None
        alone = d_rows_ND.data_ptr() == zeros.data_ptr() and d_rows_ND.stride() == zeros.stride()
        return (d_y, None) if alone else (d_rows_ND, d_y)


@dataclass(frozen=True)
class Received:
    """Rows for the local experts, and everything needed to send results home.

    Rows are ordered by (expert, source rank, token). With alignment > 1 each expert's rows are padded with zero rows.

    Attributes:
        rows: `[N, D]` expert-major, or `[N_c, D]` compact in (source, token) order together with `index_N`.
        index_N: None, or int32: compact row of each expert-major row (0 for pads, whose probability is 0).
        probs_N: fp32 routing probability of each expert-major row, 0 for pads.
        act_probs_N: what the expert activation multiplies by: `probs_N` under `apply_probs: activation`, else None.
        offsets_L1: int32 [L+1], row boundaries per local expert, pads included. Rows past `offsets_L1[-1]` are
            undefined.
        counts_L: int32, real rows per local expert.
        split: `counts_LR`, or a function that makes it: int32 [L, R], the same split by source rank.
        first_expert: global id of the first local expert; expert_ids_L: int32, the ids of all of them.
        src: `src_N3`, or a function that makes it: int32 [N, 3], source rank, token, slot of each row, -1 for pads.
        row_CK: int32 [N_c, K]: for each compact row and slot, its expert-major row, -1 when the slot is not local.
        ids_CK: int32 [N_c, K]: global expert ids of the compact rows' slots, -1 when the slot is not local.
        plan: the source plan. state: private to the dispatcher backend that made this value.
        link: see `GradientLink`; None where gradients take the ordinary way.
        scales: of rows that the caller quantised (`x_scale`), one row of them a row of `rows`, else None.
    """

    rows: Tensor
    index_N: Tensor | None
    probs_N: Tensor
    act_probs_N: Tensor | None
    offsets_L1: Tensor
    counts_L: Tensor
    split: Tensor | Callable[[], Tensor]
    first_expert: int
    src: Tensor | Callable[[], Tensor]
    row_CK: Tensor
    ids_CK: Tensor
    plan: DispatchPlan
    state: Any = None
    link: GradientLink | None = None
    scales: Tensor | None = None

    @property
    def expert_ids_L(self) -> Tensor:
        first, device = self.first_expert, self.counts_L.device
        return torch.arange(first, first + self.counts_L.shape[0], dtype=torch.int32, device=device)

    @cached_property
    def src_N3(self) -> Tensor:
        return self.src if isinstance(self.src, Tensor) else self.src()

    @cached_property
    def counts_LR(self) -> Tensor:
        return self.split if isinstance(self.split, Tensor) else self.split()
