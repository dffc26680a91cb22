"""What travels between the two doors, the shared computation and the backends of the expert MLP.

Letters: N rows, N_c compact rows, D hidden, F expert width, L local experts, K top-k.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


@dataclass(frozen=True)
class ExpertsSpec:
    """Static facts of one call.

    Attributes:
        backend: `reference`, `grouped_mm`, `quack` or `transformer_engine`, resolved.
        activation, limit, alpha: see `moe_layer.ops.glu`.
        keep_h: what of the gate/up projection is kept for backward: `input` all of it, `fp8` one byte an element
            (`moe_layer.ops.stash`), `none` nothing: it is computed again.
        compute_dtype: dtype of the GEMM operands.
        num_experts: global number of experts, which fixes the tree of the compact backward.
    """

    backend: str
    activation: str
    limit: float
    alpha: float
    keep_h: str
    compute_dtype: torch.dtype
    num_experts: int

    @property
    def save_h(self) -> bool:
        """Whether a backend's forward returns H, rather than its backward computing it again."""
        return self.keep_h != "none"

    def as_arguments(self) -> tuple:
        """The op schema's arguments, in order."""
        return (
            self.backend,
            self.activation,
            self.limit,
            self.alpha,
            self.keep_h,
            self.compute_dtype,
            self.num_experts,
        )


class Layout(NamedTuple):
    """The rows and where they lie: fields of `moe_layer.types.Received`; x is its `rows`, index its `index_N`."""

    x: Tensor
    index: Tensor | None
    probs: Tensor | None
    offsets: Tensor
    counts: Tensor
    row_CK: Tensor
    ids_CK: Tensor

    @property
    def num_rows(self) -> int:
        return self.x.shape[0] if self.index is None else self.index.shape[0]


class Weights(NamedTuple):
    """gate_up [L, 2F, D] (gate rows first), down [L, D, F], biases [L, 2F] and [L, D] or None."""

    gate_up: Tensor
    down: Tensor
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


class WeightTargets(NamedTuple):
    """Where each weight gradient goes: a tensor of the weight's shape, or None for a weight that needs no gradient.

    A backend overwrites the target, or adds to it where `accumulate` holds True (main_grad).
    """

    gate_up: Tensor | None
    down: Tensor | None
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    accumulate: tuple[bool, ...]


class RowGradient(NamedTuple):
    """d(rows): as [N, D] expert-major rows, or as [T, D] source rows with `index` [N] int32, the source of each row."""

    rows: Tensor
    index: Tensor | None
