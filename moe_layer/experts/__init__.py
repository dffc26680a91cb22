"""Expert MLPs: parameters, the two autograd doors, one file per backend, the shared expert."""

from __future__ import annotations

from moe_layer.experts.parameters import Experts
from moe_layer.experts.shared import SharedExpert

__all__ = ["Experts", "SharedExpert"]
