"""Token dispatchers. Every backend gives the same rows in the same order; they differ in how the bytes move."""

from __future__ import annotations

from typing import TYPE_CHECKING

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.base import Dispatcher
from moe_layer.dispatch.local import LocalDispatcher
from moe_layer.dispatch.plan import check_divisible, make_plan
from moe_layer.errors import ConfigError

if TYPE_CHECKING:
    from moe_layer.parallel.context import ParallelContext

__all__ = ["Dispatcher", "make_dispatcher", "make_plan"]


def make_dispatcher(
    config: DispatchConfig,
    *,
    num_experts: int,
    top_k: int,
    context: ParallelContext | None,
    layer_index: int = 0,
) -> Dispatcher:
    """The backend that `config` names; `context` None means one rank.

    Raises:
        ConfigError: the experts do not split over the ranks, or the backend does not fit the number of ranks.
    """
    ranks = 1 if context is None else context.ep_size
    check_divisible(num_experts, ranks)
    backend = config.backend
    if backend == "auto":
        backend = "local" if ranks == 1 else "all_to_all"
    if backend == "local" and ranks > 1:
        raise ConfigError(f"dispatch.backend local serves one rank, parallel.ep is {ranks}; use auto or all_to_all")
    if backend == "local" or ranks == 1:
        return LocalDispatcher(config, num_experts=num_experts, top_k=top_k, layer_index=layer_index)
    raise ConfigError(f"dispatch.backend {backend} is not available yet")
