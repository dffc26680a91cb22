"""megatron-core's real MoELayer on a CPU: stubs for the CUDA calls it makes, one gloo rank, tiny configurations."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch._dynamo.config
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn


class _Stream:
    """A CUDA stream or event that does nothing."""

    def __init__(self, *_args: Any, **_kwargs: Any) -> None:
        pass

    def record_event(self, *_args: Any) -> _Stream:
        return self

    def wait_stream(self, *_args: Any) -> None:
        pass

    wait_event = synchronize = wait_stream


@contextlib.contextmanager
def megatron_on_cpu(folder: Path) -> Iterator[None]:
    """Everything that the layer needs; undone afterwards."""
    with pytest.MonkeyPatch.context() as patch, torch._dynamo.config.patch(disable=True):  # jit_fuser takes 15 s
        patch.setattr(torch.cuda, "Stream", _Stream)
        patch.setattr(torch.cuda, "stream", lambda _stream: contextlib.nullcontext())
        patch.setattr(torch.cuda, "current_stream", lambda *_: _Stream())
        patch.setattr(torch.cuda, "current_device", lambda: "cpu")
        patch.setattr(torch.cuda, "synchronize", lambda *_: None)
        patch.setattr(torch.Tensor, "record_stream", lambda *_: None)
        from megatron.core import parallel_state
        from megatron.core.tensor_parallel import layers
        from megatron.core.transformer.moe import moe_utils, token_dispatcher

        # the identity at tensor-parallel size 1, but a view that its own bias addition may not modify
        patch.setattr(layers, "reduce_from_tensor_model_parallel_region", lambda tensor, **_: tensor)
        patch.setattr(moe_utils, "te_general_gemm", None, raising=False)
        patch.setattr(token_dispatcher, "maybe_move_tensor_to_cpu", _to_host)
        dist.init_process_group("gloo", store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)
        parallel_state.initialize_model_parallel(1, 1)
        try:
            yield
        finally:
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()


def _to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
    """gloo's all-to-all wants lists of splits."""
    return tensor.tolist() if as_numpy and tensor is not None else tensor


def transformer_config(**changes: Any) -> Any:
    """A tiny TransformerConfig with SwiGLU experts."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    settings: dict[str, Any] = dict(
        num_layers=2,
        hidden_size=32,
        num_attention_heads=2,
        num_moe_experts=8,
        moe_router_topk=2,
        moe_ffn_hidden_size=24,
        ffn_hidden_size=24,
        moe_grouped_gemm=False,
        use_cpu_initialization=True,
        bias_activation_fusion=False,
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        moe_token_dispatcher_type="alltoall",
        moe_router_load_balancing_type="none",
        init_method_std=0.2,
    )
    return TransformerConfig(**(settings | changes))


def megatron_layer(config: Any, *, experts: Any = None) -> nn.Module:
    """Their MoELayer with SequentialMLP, or with the given experts; random weights."""
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import MLPSubmodules
    from megatron.core.transformer.moe.experts import SequentialMLP
    from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
    from megatron.core.transformer.moe.shared_experts import SharedExpertMLP
    from megatron.core.transformer.spec_utils import ModuleSpec

    mlp = MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear)
    submodules = MoESubmodules(
        experts=experts or ModuleSpec(SequentialMLP, submodules=mlp),
        shared_experts=ModuleSpec(SharedExpertMLP, submodules=mlp),
    )
    layer = MoELayer(config, submodules)
    layer.set_layer_number(1)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in state_of(layer).items():
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * (0.1 if "router" in name else 0.3))
    return layer


def state_of(layer: nn.Module) -> dict[str, torch.Tensor]:
    """The state dict's tensors, without Megatron's `_extra_state` entries."""
    return {name: tensor for name, tensor in layer.state_dict().items() if isinstance(tensor, torch.Tensor)}
