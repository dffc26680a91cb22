"""Our layer inside a transformers model, at two depths.

`enable()` registers an experts function: every model family whose experts transformers can switch uses our dispatch,
grouped MLP and combine; its own router stays.

    from moe_layer.compat import transformers as ours
    ours.enable()
    model = AutoModelForCausalLM.from_pretrained(path, experts_implementation="moe_layer")

`replace_moe_blocks(model)` swaps whole Qwen3-MoE and Mixtral blocks, router included, which adds router replay.

Precision: the combine sums in fp32 in a fixed order and rounds once; routing weights are used in fp32. Requires
transformers >= 5.7 (`ExpertsInterface.register`); it is imported inside the functions only.

T tokens, D hidden, E local experts, F expert width, K top-k.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from moe_layer.compat.mlp import NO_PARAMETERS, Parameters, grouped_mlp
from moe_layer.config.model import DispatchConfig, MoEConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import RoutingError
from moe_layer.experts.parameters import local_part
from moe_layer.experts.spec import Layout, Weights
from moe_layer.ops.kernels import require_kernels
from moe_layer.types import Received, Routing

MINIMUM = (5, 7)
ONE_RANK = DispatchConfig(backend="local")  # made once: checking it in every call costs time and breaks compilation


def enable(name: str = "moe_layer") -> str:
    """Register our experts function with transformers under `name`; returns the name.

    Then `from_pretrained(path, experts_implementation=name)` or `model.set_experts_implementation(name)`.

    Raises:
        ImportError: transformers is missing or older than 5.7.
    """
    require_transformers()
    require_kernels("auto")
    from transformers.integrations.moe import ExpertsInterface

    ExpertsInterface.register(name, experts_forward)
    return name


def replace_moe_blocks(
    model: nn.Module, *, configure: Callable[[MoEConfig], MoEConfig] | None = None
) -> tuple[str, ...]:
    """Swap every Qwen3-MoE and Mixtral block of `model`, in place, for ours; returns their module paths.

    Parameters are the same objects under the same names, so optimizers, save_pretrained, load_state_dict and PEFT go on
    working; `gate` stays an instance of the model's TopKRouter class, so `output_router_logits` records as before.

    Args:
        model: a transformers model (any head).
        configure: changes the configuration of each block (replay policy, backends); shapes must stay.

    Raises:
        ImportError: transformers is missing or older than 5.7.
        ConfigError: the model's configuration cannot be honoured.
        ValueError: no such block, or one with hooks on its experts, or dispatched by accelerate (device_map, offload).
    """
    require_transformers()
    from moe_layer.compat.transformers_block import blocks_of, swap

    found = blocks_of(model)
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no Qwen3MoeSparseMoeBlock or MixtralSparseMoeBlock left to replace; "
            "for other families call enable() and set_experts_implementation('moe_layer')"
        )
    blocks = {path: swap(model.get_submodule(path), configure) for path in found}  # all or none
    for path, block in blocks.items():
        model.set_submodule(path, block)
    return found


def require_transformers() -> None:
    """
    Raises:
        ImportError: transformers is missing or older than 5.7.
    """
    try:
        import transformers
    except ImportError as error:
        raise ImportError("transformers is not installed; pip install 'transformers>=5.7'") from error
    found = tuple(int(part) for part in re.findall(r"\d+", transformers.__version__)[:2])
    if found < MINIMUM:
        raise ImportError(
            f"transformers {transformers.__version__} cannot register experts functions, 5.7 is the first that can; "
            "pip install -U 'transformers>=5.7'"
        )


def experts_forward(self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """The experts function: sum over a token's experts of weight * expert(x).

    Args:
        self: a transformers experts module (its layout flags are honoured; transposed or interleaved weights, as in
            gpt-oss, are rearranged in every call, which costs one copy of them).
        hidden_states: `[T, D]`. top_k_index: integer `[T, K]`; ids >= `self.num_experts` are expert-parallel sentinels:
            their slots are skipped and their weights get no gradient. top_k_weights: floating `[T, K]`.

    Returns:
        `[T, D]` in hidden_states' dtype.

    Raises:
        RoutingError: a negative id (CPU only: it would cost a synchronisation elsewhere), or shapes that do not fit.
        ValueError: a kind of expert that is not implemented here.
    """
    num_experts = int(self.num_experts)
    _check(top_k_index, top_k_weights, hidden_states)
    ids_TK = torch.where(top_k_index < num_experts, top_k_index, -1).to(torch.int32)
    wide = torch.promote_types(hidden_states.dtype, torch.float32)
    weights_TK = torch.where(ids_TK >= 0, top_k_weights.to(wide), 0)
    counts_E = torch.zeros(0, dtype=torch.int32, device=ids_TK.device)
    routing = Routing(ids_TK=ids_TK, weights_TK=weights_TK, counts_E=counts_E)
    dispatcher = make_dispatcher(ONE_RANK, num_experts=num_experts, top_k=ids_TK.shape[1], context=None)
    received = dispatcher.dispatch(hidden_states, routing)
    return dispatcher.combine(_mlp(self, received), received)


def _check(ids: Tensor, weights: Tensor, x: Tensor) -> None:
    if x.ndim != 2 or ids.ndim != 2 or ids.shape != weights.shape or ids.shape[0] != x.shape[0]:
        raise RoutingError(
            f"experts need hidden_states [T, D], top_k_index and top_k_weights [T, K]; got {tuple(x.shape)}, "
            f"{tuple(ids.shape)} and {tuple(weights.shape)}"
        )
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling() and int(ids.min()) < 0:
        raise RoutingError(f"top_k_index must be >= 0, got {int(ids.min())}; a slot to skip has an id >= num_experts")


def _mlp(module: Any, received: Received) -> Tensor:
    """The grouped MLP with the parameters of a transformers experts module."""
    parameters = _parameters(module)
    weights = _weights(module, parameters)
    activation, limit, alpha = _activation(module)
    layout = Layout(
        x=received.rows,
        index=received.index_N,
        probs=received.act_probs_N,
        offsets=received.offsets_L1,
        counts=received.counts_L,
        row_CK=received.row_CK,
        ids_CK=received.ids_CK,
    )
    as_they_are = all(a is b for a, b in zip(parameters, weights, strict=True))
    return grouped_mlp(
        layout,
        weights,
        activation=activation,
        limit=limit,
        alpha=alpha,
        num_experts=received.plan.num_experts,
        parameters=parameters if as_they_are else NO_PARAMETERS,
    )


def _parameters(module: nn.Module) -> Parameters:
    if not getattr(module, "has_gate", True) or getattr(module, "has_post_expert_norm", False):
        raise ValueError(
            f"{type(module).__name__} has no gate projection or a norm after its experts, which moe_layer does not "
            "compute; use experts_implementation='eager' for this model"
        )
    biased = getattr(module, "has_bias", False)
    return (
        module.gate_up_proj,
        module.down_proj,
        module.gate_up_proj_bias if biased else None,
        module.down_proj_bias if biased else None,
    )


def _weights(module: nn.Module, parameters: Parameters) -> Weights:
    """Our layout: `[E, out, in]`, gate rows before up rows; differentiable."""
    gate_up, down, gate_up_bias, down_bias = (local_part(parameter) for parameter in parameters)
    if getattr(module, "is_transposed", False):
        gate_up, down = gate_up.transpose(1, 2), down.transpose(1, 2)
    if not getattr(module, "is_concatenated", True):
        gate_up = torch.cat((gate_up[:, ::2], gate_up[:, 1::2]), dim=1)
        if gate_up_bias is not None:
            gate_up_bias = torch.cat((gate_up_bias[:, ::2], gate_up_bias[:, 1::2]), dim=1)
    return Weights(gate_up, down, gate_up_bias, down_bias)


def _activation(module: Any) -> tuple[str, float, float]:
    """Our name of the module's gate function, and the clamped one's limit and alpha."""
    kind = _gate_kind(type(module))
    if kind == "default":
        name = type(getattr(module, "act_fn", None)).__name__
        known = {"SiLU": "swiglu", "SiLUActivation": "swiglu", "GELUTanh": "geglu", "PytorchGELUTanh": "geglu"}
        if name in known:
            return known[name], 0.0, 1.0
        raise ValueError(
            f"{type(module).__name__}.act_fn is {name}, moe_layer computes {', '.join(known)}; "
            "use experts_implementation='eager' for this model"
        )
    if kind == "GptOssExperts._apply_gate":
        return "swiglu_clamped", float(module.limit), float(module.alpha)
    raise ValueError(f"{kind} is a gate function that moe_layer does not know; use experts_implementation='eager'")


@torch.compiler.assume_constant_result
def _gate_kind(experts_class: Any) -> str:
    """`default` for transformers' activation(gate) * up, else the qualified name; not traced by torch.compile."""
    gate = experts_class._apply_gate
    return "default" if gate.__module__ == "transformers.integrations.moe" else gate.__qualname__
