"""Our experts, or the whole layer, inside megatron-core (tested with 0.16.1; written for the protocols of 0.19 too).

    MoELayer(config, submodules=megatron_submodules())           # our experts, Megatron's router and dispatcher
    ModuleSpec(module=MegatronMoELayer)                          # the whole layer, expert parallel size 1

Megatron's padding mask is True for padding (its docstrings say the opposite of its code). megatron-core is imported
inside the functions only.

S sequence, B batch, D hidden, N rows, L local experts, F expert width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moe_layer.compat.megatron_config import experts_config, moe_config, recomputes_layer
from moe_layer.compat.mlp import grouped_mlp
from moe_layer.errors import ConfigError
from moe_layer.experts.spec import Layout, Weights
from moe_layer.layer import MoELayer
from moe_layer.ops.kernels import require_kernels
from moe_layer.router import Router
from moe_layer.types import Routing


def megatron_submodules(*, shared_experts: Any = None, **others: Any) -> Any:
    """`MoESubmodules` with our experts; `shared_experts` and further fields (`router`) are passed on.

    Raises:
        ImportError: megatron-core is missing.
    """
    try:
        from megatron.core.transformer.moe.moe_layer import MoESubmodules
    except ImportError as error:
        raise ImportError("megatron-core is not installed; pip install 'megatron-core>=0.16.1'") from error
    return MoESubmodules(experts=MegatronExperts, shared_experts=shared_experts, **others)


class MegatronExperts(nn.Module):
    """The experts of one rank under Megatron's protocol: `(rows, tokens_per_expert, probs) -> (rows, None)`.

    Parameters: `gate_up_proj [L, 2F, D]` (gate rows first, as Megatron's linear_fc1), `down_proj [L, D, F]`, and biases
    with `add_bias_linear`, which are multiplied by the probabilities.

    Args:
        num_local_experts: L. config: TransformerConfig.
        pg_collection: process groups; expert tensor parallelism must be off. name: the module's, in newer versions.

    Raises:
        ConfigError: a field that cannot be honoured, by name.
    """

    def __init__(
        self, num_local_experts: int, config: Any, *, pg_collection: Any = None, name: str | None = None
    ) -> None:
        super().__init__()
        require_kernels("auto")
        self.config = config
        self.num_local_experts = num_local_experts
        self.ep_group = getattr(pg_collection, "ep", None)
        self.dp_group = getattr(pg_collection, "expt_dp", None)
        self.experts_config = experts_config(config)
        width, hidden = self.experts_config.intermediate_size, config.hidden_size
        self.gate_up_proj = self._parameter(2 * width, hidden)
        self.down_proj = self._parameter(hidden, width)
        bias = self.experts_config.bias
        self.gate_up_proj_bias = self._parameter(2 * width) if bias else None
        self.down_proj_bias = self._parameter(hidden) if bias else None
        if getattr(config, "perform_initialization", True):
            self.reset_parameters()

    def _parameter(self, *shape: int) -> nn.Parameter:
        config = self.config
        shape = (self.num_local_experts, *shape)
        parameter = nn.Parameter(torch.empty(shape, dtype=config.params_dtype, device=_device(config)))
        # Megatron's DDP keeps gradients of such parameters inside the expert-data-parallel group
        parameter.allreduce = not getattr(config, "expert_model_parallel_size", 1) > 1  # type: ignore[attr-defined]
        return parameter

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Megatron's initialisers, expert by expert; biases zero."""
        for expert in range(self.num_local_experts):
            self.config.init_method(self.gate_up_proj[expert])
            self.config.output_layer_init_method(self.down_proj[expert])
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                bias.zero_()

    def forward(
        self, permuted_local_hidden_states: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor
    ) -> tuple[Tensor, None]:
        """Rows `[N, D]` sorted by local expert, counts `[L]`, probabilities `[N]`; biases are in the output already."""
        rows_ND = permuted_local_hidden_states
        device = rows_ND.device
        counts_L = torch.as_tensor(tokens_per_expert, device=device).to(torch.int32)
        offsets_L1 = torch.cat((counts_L.new_zeros(1), counts_L.cumsum(0, dtype=torch.int32)))
        none_CK = torch.empty(0, 0, dtype=torch.int32, device=device)
        wide = torch.promote_types(rows_ND.dtype, torch.float32)
        layout = Layout(rows_ND, None, permuted_probs.to(wide), offsets_L1, counts_L, none_CK, none_CK)
        parameters = (self.gate_up_proj, self.down_proj, self.gate_up_proj_bias, self.down_proj_bias)
        ours = self.experts_config
        out_ND = grouped_mlp(
            layout,
            Weights(*parameters),
            activation=ours.activation,
            limit=ours.clamp_limit,
            alpha=ours.clamp_alpha,
            num_experts=self.num_local_experts,
            parameters=parameters,
        )
        return out_ND, None

    def backward_dw(self) -> None:
        """Nothing is delayed: weight gradients are computed in backward (`delay_wgrad_compute` is refused)."""

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> dict[str, Any]:
        """Per-expert shards under the global keys of SequentialMLP and TEGroupedMLP, for any expert-parallel size."""
        from moe_layer.compat.megatron_sharding import sharded_experts

        return sharded_experts(self, prefix, sharded_offsets)


def _device(config: Any) -> torch.device:
    return torch.device("cpu") if config.use_cpu_initialization else torch.device("cuda", torch.cuda.current_device())


def _data_ranks() -> int:
    from megatron.core import parallel_state

    ready = parallel_state.is_initialized()
    return parallel_state.get_data_parallel_world_size(with_context_parallel=True) if ready else 1


class _MegatronRouter(Router):
    """Our router with the names that Megatron looks for at the end of a step: it updates biases and forgets counts."""

    @property
    def local_tokens_per_expert(self) -> Tensor:
        return self.tokens_per_expert

    def reset_global_aux_loss_tracker(self) -> None:
        """The `global` loss looks back as far as the step's first micro-batch."""
        self.aux_history.zero_()


class MegatronMoELayer(nn.Module):
    """Our whole layer with the constructor and forward of Megatron's MoELayer, at expert parallel size 1.

    The losses are scaled by Megatron's `MoEAuxLossAutoScaler` and reported to its tracker. `recompute_modules` may name
    `moe`.

    Args:
        config: TransformerConfig. layer_number: 1-based, for the loss tracker. submodules, pg_collection: not needed.

    Raises:
        ConfigError: every field that cannot be honoured; with expert parallelism use `megatron_submodules`.
    """

    def __init__(
        self,
        config: Any,
        submodules: Any = None,
        layer_number: int | None = None,
        pg_collection: Any = None,
        **_others: Any,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_number = layer_number
        ours = moe_config(config)
        if ours.losses.aux == "global" and _data_ranks() > 1:
            raise ConfigError(
                f"moe_router_load_balancing_type: 'global_aux_loss' counts tokens over {_data_ranks()} data-parallel "
                "ranks, and MegatronMoELayer knows its own; use 'aux_loss', or megatron_submodules()"
            )
        device = _device(config)
        self.layer = MoELayer(ours, device=device, dtype=config.params_dtype)
        self.layer.router = _MegatronRouter(ours, device=device, dtype=config.params_dtype)

    def set_layer_number(self, layer_number: int) -> None:
        """1-based number under which losses are reported."""
        self.layer_number = layer_number

    def forward(
        self, hidden_states: Tensor, intermediate_tensors: Any = None, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, None]:
        """`[S, B, D] -> ([S, B, D], None)`; `padding_mask [B, S]` is True for padding, which is not routed here.

        Raises:
            ValueError: intermediate tensors (partial CUDA graphs) are given.
        """
        from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler

        if intermediate_tensors is not None:
            raise ValueError(
                "MegatronMoELayer has no intermediate_tensors; take moe parts out of cuda_graph_scope, or use "
                "megatron_submodules() in Megatron's own MoELayer"
            )
        scale = MoEAuxLossAutoScaler.main_loss_backward_scale
        if scale is not None:
            self.layer.set_loss_scale(scale)
        valid = None if padding_mask is None else ~padding_mask.bool()
        arguments: dict[str, Any] = {"valid": valid, "return_routing": True}
        if self.training and recomputes_layer(self.config):
            y_BSD, routing = checkpoint(self.layer, hidden_states.transpose(0, 1), use_reentrant=False, **arguments)
        else:
            y_BSD, routing = self.layer(hidden_states.transpose(0, 1), **arguments)
        self._report(routing)
        return y_BSD.transpose(0, 1), None

    def _report(self, routing: Routing) -> None:
        from megatron.core.transformer.moe.moe_utils import save_to_aux_losses_tracker

        aux = {
            "batch": "load_balancing_loss",
            "sequence": "seq_load_balancing_loss",
            "global": "global_load_balancing_loss",
        }
        if self.layer_number is None:
            return
        names = {"aux": aux.get(self.layer.config.losses.aux, "aux"), "z": "z_loss"}
        for name, loss in routing.losses_unscaled.items():
            save_to_aux_losses_tracker(names[name], loss, self.layer_number, self.config.num_layers)
