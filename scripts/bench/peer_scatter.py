"""ScatterMoE (github.com/shawntan/scattermoe, not on PyPI) as a peer of `layer_gpu.py`, in the same process.

Put its checkout on PYTHONPATH; measured with 0.3.0 (47b5e15). Its GLU takes the up half first and its combine wants the
routing weights in the rows' dtype.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from layer_parts import make_step
from torch import Tensor, nn


def is_installed() -> bool:
    """Whether `scattermoe` imports."""
    return importlib.util.find_spec("scattermoe") is not None


class ScatterLayer(nn.Module):
    """Softmax top-k router (weights over the chosen, as our default) in front of ScatterMoE's GLU experts."""

    def __init__(self, ours: Any) -> None:
        super().__init__()
        from scattermoe.mlp import GLUMLP

        config = ours.config
        self.top_k = config.router.top_k
        self.router = nn.Parameter(ours.router.weight.detach().clone())
        width = config.experts.intermediate_size
        with torch.device(self.router.device):
            self.mlp = GLUMLP(config.hidden_size, width, config.router.num_experts, self.top_k).to(self.router.dtype)
        with torch.no_grad():
            gate_up = ours.experts.gate_up_proj
            self.mlp.experts.weight.copy_(torch.cat((gate_up[:, width:], gate_up[:, :width]), dim=1))
            self.mlp.output_experts.weight.copy_(ours.experts.down_proj)

    def forward(self, x_TD: Tensor) -> Tensor:
        logits_TE = F.linear(x_TD, self.router).float()
        top_TK, ids_TK = logits_TE.topk(self.top_k, dim=-1)
        return self.mlp(x_TD, top_TK.softmax(dim=-1).to(x_TD.dtype), ids_TK)


def scatter_step(ours: Any, x: Tensor, upstream: Tensor) -> tuple[Callable[[], None], float]:
    """One forward + backward on our weights, and the median over tokens of |y - our y| / |our y|."""
    layer = ScatterLayer(ours)
    with torch.no_grad():
        expected = ours(x).float()
        error = (layer(x).float() - expected).norm(dim=-1) / expected.norm(dim=-1)
    return make_step(layer, x, upstream), float(error.median())
