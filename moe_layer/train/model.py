"""A small decoder around the MoE layer: RMSNorm, rotary embedding, causal SDPA, our layer as the MLP.

Shape letters: B sequences, S positions, D hidden, H heads, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from moe_layer.config.model import MoEConfig
from moe_layer.config.train import ModelConfig
from moe_layer.layer import MoELayer
from moe_layer.train.data import VOCAB
from moe_layer.types import Routing


def torch_dtype(name: str) -> torch.dtype:
    """The dtype that `train.dtype` names."""
    return {"fp32": torch.float32, "bf16": torch.bfloat16, "fp64": torch.float64}[name]


@dataclass(frozen=True)
class DecoderOutput:
    """`logits` [B, S, V] in the model's dtype; `routings`: one detached `Routing` per MoE layer if asked for, else
    empty."""

    logits: Tensor
    routings: tuple[Routing, ...]


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions."""

    def __init__(
        self, config: ModelConfig, hidden_size: int, *, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        kv_heads = config.num_kv_heads or config.num_heads
        self.head_dim = hidden_size // config.num_heads
        self.grouped = kv_heads != config.num_heads
        options = {"bias": False, "device": device, "dtype": dtype}
        self.q_proj = nn.Linear(hidden_size, config.num_heads * self.head_dim, **options)
        self.k_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, **options)
        self.v_proj = nn.Linear(hidden_size, kv_heads * self.head_dim, **options)
        self.o_proj = nn.Linear(config.num_heads * self.head_dim, hidden_size, **options)

    def forward(self, x_BSD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

        q, k, v = heads(self.q_proj(x_BSD)), heads(self.k_proj(x_BSD)), heads(self.v_proj(x_BSD))
        q, k = _rotate(q, cos, sin), _rotate(k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=self.grouped)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class DenseMLP(nn.Module):
    """SwiGLU MLP of the leading dense blocks."""

    def __init__(self, hidden_size: int, width: int, *, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.gate_up_proj = nn.Linear(hidden_size, 2 * width, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(width, hidden_size, bias=False, device=device, dtype=dtype)

    def forward(self, x_BSD: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x_BSD).chunk(2, dim=-1)
        return self.down_proj(F.silu(gate) * up)


class Block(nn.Module):
    """Pre-norm attention and MLP; returns the new residual stream and, if asked for, the routing (None if dense)."""

    def __init__(
        self, config: ModelConfig, moe: MoEConfig, *, index: int, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        width = moe.hidden_size
        self.attention_norm = nn.RMSNorm(width, eps=config.norm_eps, device=device, dtype=dtype)
        self.attention = Attention(config, width, device=device, dtype=dtype)
        self.mlp_norm = nn.RMSNorm(width, eps=config.norm_eps, device=device, dtype=dtype)
        self.is_moe = index >= config.dense_layers
        if self.is_moe:
            self.mlp: nn.Module = MoELayer(moe, device=device, dtype=dtype)
        else:
            assert config.dense_intermediate_size is not None  # rules.model insists
            self.mlp = DenseMLP(width, config.dense_intermediate_size, device=device, dtype=dtype)

    def forward(
        self, x_BSD: Tensor, cos: Tensor, sin: Tensor, return_routing: bool = False
    ) -> tuple[Tensor, Routing | None]:
        x_BSD = x_BSD + self.attention(self.attention_norm(x_BSD), cos, sin)
        h_BSD = self.mlp_norm(x_BSD)
        if not (self.is_moe and return_routing):
            return x_BSD + self.mlp(h_BSD), None
        y_BSD, routing = self.mlp(h_BSD, return_routing=True)
        return x_BSD + y_BSD, routing


class Decoder(nn.Module):
    """Byte-level language model; `TrainConfig` has checked that the sizes fit."""

    def __init__(
        self,
        config: ModelConfig,
        moe: MoEConfig,
        *,
        device: torch.device | None = None,
        dtype: torch.dtype = torch.float32,
        activation_checkpointing: str = "none",
    ) -> None:
        super().__init__()
        self.config = config
        self.recompute = activation_checkpointing
        self.embedding = nn.Embedding(VOCAB, moe.hidden_size, device=device, dtype=dtype)
        self.blocks = nn.ModuleList(
            Block(config, moe, index=i, device=device, dtype=dtype) for i in range(config.num_layers)
        )
        self.norm = nn.RMSNorm(moe.hidden_size, eps=config.norm_eps, device=device, dtype=dtype)
        self.lm_head = nn.Linear(moe.hidden_size, VOCAB, bias=False, device=device, dtype=dtype)
        if config.tie_embeddings:
            self.lm_head.weight = self.embedding.weight
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal initialisation from torch's generator; dense output projections are divided by sqrt(2 * layers).

        The experts' are not: at 4 layers that cost 0.4 nats after 340 steps (configs/train/tiny.yaml).
        """
        std = self.config.init_std
        for name, parameter in self.named_parameters():
            if ".mlp." in name and isinstance(self.blocks[int(name.split(".")[1])].mlp, MoELayer):
                continue
            if parameter.ndim == 1:
                parameter.fill_(1.0)
            else:
                scale = (
                    math.sqrt(2 * self.config.num_layers) if name.endswith(("o_proj.weight", "down_proj.weight")) else 1
                )
                parameter.normal_(0.0, std / scale)
        if self.config.embedding_std is not None:
            self.embedding.weight.normal_(0.0, self.config.embedding_std)
        for layer in self.moe_layers():
            layer.reset_parameters()

    def moe_layers(self) -> Iterator[MoELayer]:
        """The MoE layers, first block first."""
        return (block.mlp for block in self.blocks if block.is_moe)  # type: ignore[misc]

    def forward(self, tokens_BS: Tensor, *, return_routing: bool = False) -> DecoderOutput:
        """Logits of the next byte.

        Args:
            tokens_BS: integer [B, S] below 256.
            return_routing: also return each MoE layer's routing (validation counts tokens from it).
        """
        x_BSD = self.embedding(tokens_BS)
        cos, sin = _rotary(tokens_BS.shape[1], self, dtype=x_BSD.dtype)
        routings = []
        for block in self.blocks:
            if self.recompute != "none" and torch.is_grad_enabled():
                reentrant = self.recompute == "reentrant"
                x_BSD, routing = checkpoint(block, x_BSD, cos, sin, return_routing, use_reentrant=reentrant)
            else:
                x_BSD, routing = block(x_BSD, cos, sin, return_routing)
            if routing is not None:
                routings.append(routing)
        return DecoderOutput(self.lm_head(self.norm(x_BSD)), tuple(routings))


def token_losses(logits_BSV: Tensor, targets_BS: Tensor) -> Tensor:
    """Cross-entropy of each byte, nats: [B*S] in fp32 (fp64 for fp64 logits)."""
    wide = torch.promote_types(logits_BSV.dtype, torch.float32)
    return F.cross_entropy(logits_BSV.flatten(0, 1).to(wide), targets_BS.flatten().long(), reduction="none")


def _rotary(length: int, model: Decoder, *, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """cos and sin [S, head_dim/2]; angles in fp64 whatever the model's dtype (bf16 ones lose positions above 256)."""
    first = model.blocks[0]
    assert isinstance(first, Block)
    head_dim = first.attention.head_dim
    device = model.embedding.weight.device
    rates = torch.arange(0, head_dim, 2, device=device, dtype=torch.float64) / -head_dim
    angles = torch.outer(torch.arange(length, device=device, dtype=torch.float64), model.config.rope_theta**rates)
    return angles.cos().to(dtype), angles.sin().to(dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the head dimension against each other."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1)
