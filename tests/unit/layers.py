"""Layers with random parameters and their inputs, the same in every test."""

from __future__ import annotations

import torch
from torch import Tensor

from moe_layer.config import MoEConfig
from moe_layer.layer import MoELayer


def random_layer(config: MoEConfig, dtype: torch.dtype) -> MoELayer:
    torch.manual_seed(3)
    layer = MoELayer(config, dtype=dtype)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.randn(parameter.shape, dtype=dtype) * 0.1)
    return layer


def inputs(layer: MoELayer, tokens: int) -> tuple[Tensor, Tensor]:
    """x and the upstream gradient."""
    generator = torch.Generator().manual_seed(8)
    hidden, dtype = layer.config.hidden_size, layer.router.weight.dtype
    x, upstream = (torch.randn(tokens, hidden, generator=generator).to(dtype) for _ in range(2))
    return x.requires_grad_(), upstream
