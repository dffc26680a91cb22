"""The block that `replace_moe_blocks` puts into Qwen3-MoE and Mixtral models.

It has the names of the original (`gate.weight`, `experts.gate_up_proj`, `experts.down_proj`) and the calls of MoELayer.

B batch, S sequence, T tokens, D hidden, E experts, K top-k.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from moe_layer.checkpoint.families import moe_config_from_transformers
from moe_layer.config.model import MoEConfig
from moe_layer.dispatch import Dispatcher, make_dispatcher
from moe_layer.errors import ConfigError
from moe_layer.experts import Experts
from moe_layer.losses import sequence_boundaries
from moe_layer.ops.fan_out import fan_out
from moe_layer.ops.kernels import require_kernels
from moe_layer.replay.decision import as_decision
from moe_layer.router import Router
from moe_layer.types import Routing, RoutingDecision

REPLACEABLE = ("Qwen3MoeSparseMoeBlock", "MixtralSparseMoeBlock")
_HOOKS = (
    "_forward_hooks",
    "_forward_hooks_with_kwargs",
    "_forward_hooks_always_called",
    "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs",
    "_backward_hooks",
    "_backward_pre_hooks",
)


class TransformersMoEBlock(nn.Module):
    """A sparse block with the original's parameters, names and return value.

    Args:
        config: of the layer.
        parts: `gate` (what `make_gate` returns) and `experts` (holding the original's parameters), in the original's
            order: optimizers number their state by the order of the parameters.
    """

    gate: Router
    experts: Experts

    def __init__(self, config: MoEConfig, parts: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.config = config
        for name, part in parts.items():
            self.add_module(name, part)
        self.bind()

    def bind(self) -> None:
        """Make the dispatcher (one rank)."""
        router = self.config.router
        self.dispatcher: Dispatcher = make_dispatcher(
            self.config.dispatch, num_experts=router.num_experts, top_k=router.top_k, context=None
        )

    def forward(
        self,
        hidden_states: Tensor,
        *,
        valid: Tensor | None = None,
        replay: RoutingDecision | Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """y for `hidden_states [B, S, D]`; the other arguments are those of `MoELayer.forward`.

        Raises:
            RoutingError: a replay decision or mask that does not fit.
        """
        x_TD = rearrange(hidden_states, "... d -> (...) d")
        routed_TD, gate_TD = fan_out(x_TD, 2)
        decision = as_decision(replay, hidden_states.shape[:-1], self.config.router.top_k, device=x_TD.device)
        valid_T = None if valid is None else valid.reshape(-1)
        sequences = sequence_boundaries(hidden_states) if self.gate.wants_sequences else None
        *_, routing = self.gate(gate_TD, valid_T=valid_T, cu_seqlens=sequences, replay=decision)
        received = self.dispatcher.dispatch(routed_TD, routing)
        rows = self.experts(received)
        y = self.dispatcher.combine(rows, received).reshape(hidden_states.shape)
        return (y, routing.detach()) if return_routing else y

    # ---- the step hooks of MoELayer, for what `configure` switches on ------------------------------------------------

    def set_loss_scale(self, scale: Tensor | float) -> None:
        """See `MoELayer.set_loss_scale`."""
        self.gate.set_loss_scale(scale)

    def update_bias(self) -> None:
        """See `MoELayer.update_bias`."""
        self.gate.update_bias()

    def collect_stats(self) -> dict[str, Tensor]:
        """See `MoELayer.collect_stats`."""
        return self.gate.collect_stats()

    def check(self) -> None:
        """See `MoELayer.check`."""
        self.gate.check()
        self.dispatcher.check()

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "dispatcher"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.bind()


def blocks_of(model: nn.Module) -> tuple[str, ...]:
    """Paths of the blocks that can be replaced."""
    return tuple(path for path, module in model.named_modules() if type(module).__name__ in REPLACEABLE)


def swap(block: Any, configure: Callable[[MoEConfig], MoEConfig] | None) -> TransformersMoEBlock:
    """Our block around the parameters of a transformers block.

    Raises:
        ConfigError: a configuration that cannot be honoured, or that was changed in its shapes.
        ValueError: hooks on the experts, or accelerate's.
    """
    gate, experts = block.gate, block.experts
    if experts._forward_hooks or experts._forward_pre_hooks:
        raise ValueError(
            f"{type(experts).__name__} has forward hooks, which would see other arguments after the replacement; "
            "remove them, or call replace_moe_blocks before whatever installs them"
        )
    if any(hasattr(part, "_hf_hook") for part in (block, gate, experts)):
        raise ValueError(
            f"{type(block).__name__} was dispatched by accelerate (device_map, offload), whose hooks would be lost; "
            "load without device_map, call replace_moe_blocks, then accelerate.dispatch_model"
        )
    derived = moe_config_from_transformers(experts.config)
    config = derived if configure is None else configure(derived)
    if _shape(config) != _shape(derived):
        raise ConfigError(f"configure changed the block's shapes from {_shape(derived)} to {_shape(config)}; keep them")
    if config.dispatch.chunks != 1:
        raise ConfigError(f"dispatch.chunks ({config.dispatch.chunks}) is MoELayer's; replaced blocks need 1")
    require_kernels(config.kernels)
    made = {"gate": make_gate(config, gate), "experts": _adopt_experts(config, experts)}
    ours = TransformersMoEBlock(config, {name: made[name] for name, _ in block.named_children()})
    _copy_hooks(block, ours)
    return ours.train(block.training)


def make_gate(config: MoEConfig, source: Any) -> Router:
    """A Router that is also an instance of `source`'s class and owns its weight.

    It returns `(router_logits [T, E], weights [T, K], ids [T, K], Routing)`: transformers' recorder takes the first.
    """
    gate = _gate_class(type(source))(config, source)
    _copy_hooks(source, gate)
    return gate.train(source.training)


@functools.cache
def _gate_class(base: Any) -> Callable[[MoEConfig, Any], Router]:
    """Made on demand because transformers' recorder finds routers by isinstance, and transformers is optional.

    `base` comes first so that Router's constructor reaches nn.Module's and not the base's, which wants another config.
    """

    class Gate(base, Router):
        def __init__(self, config: MoEConfig, source: Any) -> None:
            weight = source.weight
            Router.__init__(self, config, device=weight.device, dtype=weight.dtype)
            self.weight = weight
            for name, value in vars(source).items():
                if not name.startswith("_") and name not in ("training", "config"):
                    setattr(self, name, value)

        def forward(self, hidden_states: Tensor, **arguments: Any) -> tuple[Tensor, Tensor, Tensor, Routing]:
            x_TD = hidden_states.reshape(-1, hidden_states.shape[-1])
            routing = Router.forward(self, x_TD, **arguments)
            return routing.stats["logits"], routing.weights_TK, routing.ids_TK, routing

        def __reduce__(self) -> tuple[Any, ...]:
            return _blank_gate, (base,), dict(self.__dict__)

    Gate.__name__ = Gate.__qualname__ = f"MoELayer{base.__name__}"
    return Gate


def _blank_gate(base: type[nn.Module]) -> Router:
    cls: Any = _gate_class(base)
    return cls.__new__(cls)


def _adopt_experts(config: MoEConfig, source: Any) -> Experts:
    router = config.router
    experts = Experts(config.experts, hidden_size=config.hidden_size, num_experts=router.num_experts, device="meta")
    experts.gate_up_proj = source.gate_up_proj
    experts.down_proj = source.down_proj
    return experts.train(source.training)


def _copy_hooks(source: nn.Module, target: nn.Module) -> None:
    """Hooks that were installed already, such as transformers' recorder, move along."""
    for name in _HOOKS:
        getattr(target, name).update(getattr(source, name))


def _shape(config: MoEConfig) -> dict[str, Any]:
    return {
        "hidden_size": config.hidden_size,
        "num_experts": config.router.num_experts,
        "intermediate_size": config.experts.intermediate_size,
        "shared_expert": config.shared_expert,
        "router bias": config.router.linear_bias,
        "experts bias": config.experts.bias,
    }
