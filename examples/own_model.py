"""The MoE layer in somebody's own model: a tiny autoregressive byte model, trained on this file.

    python examples/own_model.py

What the layer asks of a training loop is marked (1) to (4).
"""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from moe_layer import MoELayer, load_config

CONFIG = [
    "hidden_size=64",
    "router.num_experts=8",
    "router.top_k=2",
    "experts.intermediate_size=64",
    "router.expert_bias=true",
    "router.score_function=sigmoid",
    "losses.aux_coeff=1e-3",
]


class Block(nn.Module):
    """A depthwise causal convolution for context and our layer for the rest."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.mix = nn.Conv1d(width, width, kernel_size=8, padding=7, groups=width)
        self.moe = MoELayer(load_config("qwen3-30b-a3b", CONFIG))  # (1) where an MLP would be

    def forward(self, x_BSD: Tensor) -> Tensor:
        mixed_BDS = self.mix(x_BSD.transpose(1, 2))[..., : x_BSD.shape[1]]
        x_BSD = x_BSD + mixed_BDS.transpose(1, 2)
        return x_BSD + self.moe(self.norm(x_BSD))


class ByteModel(nn.Module):
    """Predicts the next byte."""

    def __init__(self, width: int = 64, depth: int = 2) -> None:
        super().__init__()
        self.embed = nn.Embedding(256, width)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(depth)))
        self.head = nn.Linear(width, 256)

    def forward(self, text_BS: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(text_BS)))


def train(steps: int = 60, *, seed: int = 0) -> list[float]:
    """Losses in nats a byte, one for each step."""
    torch.manual_seed(seed)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    model = ByteModel()
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - 65, (16,)).tolist()
        batch_BS = torch.stack([text[start : start + 65] for start in starts])
        loss = F.cross_entropy(model(batch_BS[:, :-1]).flatten(0, 1), batch_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # (2) the balancing losses are already in the graph
        for layer in layers:
            layer.check()  # (3) before the step: raises what device code could only record
        optimizer.step()
        for layer in layers:
            layer.update_bias()  # (4) after the step: bias-based balancing
        losses.append(loss.item())
    for index, layer in enumerate(layers):
        load = layer.collect_stats()["load"].tolist()
        print(f"layer {index}: slots per expert {load}")
    return losses


if __name__ == "__main__":
    history = train()
    print(f"loss {history[0]:.2f} -> {history[-1]:.2f} nats a byte")
