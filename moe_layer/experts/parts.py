"""What the calls of the experts for the parts of one pass share (`dispatch.chunks`).

Each part has a gradient of every weight. Autograd would hold two of them at once and write their sum out of place; here
the backward of each part adds to one tensor, inside the GEMM where the backend can, and the part that runs last returns
it. Precision: every part rounds a sum in bf16 again; sums in fp32 and in a `main_grad` are not rounded.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from moe_layer.experts.spec import WeightTargets

Local = TypeVar("Local")


class Parts:
    """State of one forward pass and its backward.

    Args:
        count: parts that the tokens are cut into; each of them passes through the experts, empty or not.
    """

    def __init__(self, count: int) -> None:
        self.count = count
        self._weights: Any = None
        self._targets: WeightTargets | None = None
        self._done = 0

    def weights(self, make: Callable[[], Local]) -> Local:
        """The local weights, made by the first part: of a DTensor's only one view then has a gradient."""
        if self._weights is None:
            self._weights = make()
        return self._weights

    def targets(self, make: Callable[[], WeightTargets]) -> tuple[WeightTargets, bool]:
        """Where the next backward puts its weight gradients, and whether it is the last one.

        Args:
            make: called by the first, which overwrites the targets; the others add to them.
        """
        if self._targets is None:
            self._targets = targets = make()
        else:
            targets = self._targets._replace(accumulate=(True,) * len(self._targets.accumulate))
        self._done += 1
        last = self._done == self.count
        if last:  # a second backward through the same graph begins anew
            self._targets, self._done = None, 0
        return targets, last
