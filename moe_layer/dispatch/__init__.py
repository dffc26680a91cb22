"""Token dispatchers. Every backend gives the same rows in the same order; they differ in how the bytes move."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.agreement import agree, facts_hash, static_facts
from moe_layer.dispatch.all_gather import AllGatherRoute
from moe_layer.dispatch.all_to_all import AllToAllRoute
from moe_layer.dispatch.base import Dispatcher
from moe_layer.dispatch.exchange import ExchangeDispatcher
from moe_layer.dispatch.formats import TokenFormat, check_format, describe_format
from moe_layer.dispatch.hierarchical import HierarchicalRoute
from moe_layer.dispatch.library import LibraryRoute, transport_opener
from moe_layer.dispatch.local import LocalDispatcher
from moe_layer.dispatch.nvlink import NvlinkDispatcher
from moe_layer.dispatch.plan import check_divisible, check_sizes, make_plan
from moe_layer.dispatch.replicated import ReplicatedRoute
from moe_layer.dispatch.route import Route
from moe_layer.dispatch.wire import Link
from moe_layer.errors import ConfigError
from moe_layer.ops.kernels import require_kernels
from moe_layer.types import DispatchPlan

if TYPE_CHECKING:
    from moe_layer.parallel.context import ParallelContext

__all__ = ["Dispatcher", "TokenFormat", "make_dispatcher", "make_plan"]


def make_dispatcher(
    config: DispatchConfig,
    *,
    num_experts: int,
    top_k: int,
    context: ParallelContext | None,
    layer_index: int = 0,
    kernels: str = "auto",
    token_format: TokenFormat | None = None,
) -> Dispatcher:
    """The backend that `config` names; `context` None means one rank.

    At more than one rank this is a collective call: the ranks compare their static facts. `kernels` as in `MoEConfig`:
    a dispatcher without a layer loads the compiled library too. `token_format` stands in for `dispatch_format: input`.

    Raises:
        ConfigError: no experts, or fewer than `top_k`; they do not split over the ranks, or the backend does not fit
            the number of ranks, or the token format does not fit the configuration.
        RankMismatch: ranks were given different configurations.
    """
    if not torch.compiler.is_compiling():  # loading is not for a graph
        require_kernels(kernels)
    ranks = 1 if context is None else context.ep_size
    check_sizes(num_experts, top_k)
    check_divisible(num_experts, ranks)
    check_format(config, token_format)
    backend = config.backend
    if backend == "auto":
        backend = "local" if ranks == 1 else "all_to_all"
    if backend == "local" and ranks > 1:
        raise ConfigError(f"dispatch.backend local serves one rank, parallel.ep is {ranks}; use auto or all_to_all")
    if context is None or ranks == 1:
        return LocalDispatcher(
            config, num_experts=num_experts, top_k=top_k, layer_index=layer_index, token_format=token_format
        )

    domain = config.p2p_world_size or ranks
    if domain < ranks and ranks % domain:
        raise ConfigError(
            f"dispatch.p2p_world_size ({domain}) must divide parallel.ep ({ranks}): domains have equal sizes; set it "
            "to the ranks of one host"
        )

    def open_route(link: Link, plan: DispatchPlan) -> Route:
        if backend == "replicated":
            return ReplicatedRoute(link, plan, reduce=config.reduce)
        if backend == "all_gather":
            return AllGatherRoute(link, plan)
        if open_transport is not None:
            return LibraryRoute(link, plan, open_transport=open_transport, max_tokens=config.max_tokens_per_part or 0)
        if domain < ranks:
            return HierarchicalRoute(link, plan, domain=domain)
        return AllToAllRoute(link, plan)

    facts = static_facts(config, num_experts=num_experts, top_k=top_k, layer_index=layer_index, ranks=ranks)
    facts["token_format"] = describe_format(token_format)
    link = Link(context, layer=layer_index, config_hash=facts_hash(facts), deadline_s=config.deadline_s)
    open_transport = None
    if backend in ("deep_ep", "nccl_ep"):
        if token_format is not None:
            raise ConfigError(f"dispatch.backend {backend} moves rows as they are; make it without token_format")
        open_transport = transport_opener(backend, link)
    agree(link, facts)
    if backend == "nvlink":
        return NvlinkDispatcher(config, num_experts=num_experts, top_k=top_k, link=link, token_format=token_format)
    return ExchangeDispatcher(
        config,
        num_experts=num_experts,
        top_k=top_k,
        link=link,
        open_route=open_route,
        probs_at_home=config.apply_probs == "source" and backend != "replicated",
        token_format=token_format,
    )
