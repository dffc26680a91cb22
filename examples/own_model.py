"""The MoE layer in somebody's own model: a tiny autoregressive byte model, trained on this file.

    python examples/own_model.py
    torchrun --nproc-per-node 2 examples/own_model.py       # each rank half of the experts and half of every batch

What the layer asks of a training loop is marked (1) to (4), and of one with several ranks (a) to (d).
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.nn import functional as F

from moe_layer import MoELayer, load_config, parallelize
from moe_layer.parallel import clip_grad_norm, parameter_groups, sync_gradients

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


def train(steps: int = 60, *, seed: int = 0, rank: int = 0, ranks: int = 1) -> list[float]:
    """Losses in nats a byte, one for each step."""
    torch.manual_seed(seed)
    text = torch.tensor(list(Path(__file__).read_bytes()))
    model = ByteModel()
    if ranks > 1:  # (a) before the optimizer, which must see the parameters that the ranks keep
        context = parallelize(model, init_device_mesh("cpu", (1, ranks), mesh_dim_names=("dp", "ep")))
    layers = [module for module in model.modules() if isinstance(module, MoELayer)]
    optimizer = torch.optim.AdamW(parameter_groups(model), lr=3e-3)
    losses = []
    for _ in range(steps):
        starts = torch.randint(len(text) - 65, (16,)).tolist()[rank::ranks]  # (b) every rank its own data
        batch_BS = torch.stack([text[start : start + 65] for start in starts])
        loss = F.cross_entropy(model(batch_BS[:, :-1]).flatten(0, 1), batch_BS[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()  # (2) the balancing losses are already in the graph
        sync_gradients(model)  # (c) mean over the ranks, experts in their own way; nothing to do on one
        clip_grad_norm(model, 1.0)  # torch's would count a rank's experts alone
        for layer in layers:
            layer.check()  # (3) before the step: raises what device code could only record
        optimizer.step()
        for layer in layers:
            layer.update_bias()  # (4) after the step: bias-based balancing
        losses.append(loss.item())
    for index, layer in enumerate(layers):
        load = layer.collect_stats()["load"].tolist()
        print(f"rank {rank}, layer {index}: slots per expert {load}")
    if ranks > 1:
        context.close()  # (d)
    return losses


def main() -> None:
    """On one rank, or on torchrun's."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    history = train(rank=rank, ranks=ranks)
    print(f"rank {rank}: loss {history[0]:.2f} -> {history[-1]:.2f} nats a byte")
    if ranks > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
