"""Small models and traces for the replay tests. N rows, L layers, K top-k, E experts."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moe_layer import MoELayer, RoutingDecision, RoutingSession, RoutingTrace
from moe_layer.config import ExpertsConfig, LossesConfig, MoEConfig, ReplayConfig, RouterConfig

E, K, D, T = 8, 2, 16, 12
LAYERS = ("blocks.0.moe", "blocks.1.moe")


class Block(nn.Module):
    def __init__(self, config: MoEConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_size)
        self.moe = MoELayer(config)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.moe(self.norm(x))


class Model(nn.Module):
    """Two blocks; `run` replaces the plain call of a block (checkpointing)."""

    def __init__(self, config: MoEConfig, blocks: int = 2) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(config) for _ in range(blocks))

    def forward(self, x: Tensor, run: Any = None) -> Tensor:
        for block in self.blocks:
            x = block(x) if run is None else run(block, x)
        return x


def config(
    *,
    experts: int = E,
    top_k: int = K,
    hidden: int = D,
    width: int = 8,
    aux: bool = True,
    replay: ReplayConfig | None = None,
    backend: Any = "auto",
    weight_format: Any = "input",
    **router: Any,
) -> MoEConfig:
    losses = LossesConfig(aux="batch", aux_coeff=0.1, z_coeff=0.01) if aux else LossesConfig()
    return MoEConfig(
        hidden_size=hidden,
        router=RouterConfig(num_experts=experts, top_k=top_k, **router),
        experts=ExpertsConfig(intermediate_size=width, init_std=0.3, backend=backend, weight_format=weight_format),
        losses=losses,
        replay=replay or ReplayConfig(),
    )


def make_model(seed: int = 0, **settings: Any) -> Model:
    torch.manual_seed(seed)
    return Model(config(**settings))


def random_ids(n: int = T, layers: int = 2, *, experts: int = E, top_k: int = K, seed: int = 0) -> Tensor:
    """int64 `[N, L, K]`, distinct in a row."""
    g = torch.Generator().manual_seed(seed)
    return torch.rand(n, layers, experts, generator=g).argsort(-1)[..., :top_k]


def make_trace(n: int = T, *, seed: int = 0, **settings: Any) -> RoutingTrace:
    g = torch.Generator().manual_seed(seed + 1)
    ids = random_ids(n, seed=seed)
    weights = torch.rand(ids.shape, generator=g)
    tokens = torch.randint(0, 50, (n,), generator=g)
    settings = {"weights": weights, "token_ids": tokens, "weights_version": 3} | settings
    return RoutingTrace.from_ids(ids, num_experts=E, layers=LAYERS, **settings)


def grads(model: nn.Module) -> dict[str, Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_same(a: dict[str, Tensor], b: dict[str, Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


ROUTERS: dict[str, dict[str, Any]] = {
    "softmax post": {},
    "softmax pre": {"softmax_order": "pre", "renormalize": False},
    "sigmoid bias": {"score_function": "sigmoid", "expert_bias": True},
    "groups": {"score_function": "sigmoid", "num_groups": 4, "group_topk": 2},
    "sqrtsoftplus": {"score_function": "sqrtsoftplus", "scaling_factor": 2.0},
}


def batch(seed: int = 0) -> Tensor:
    return torch.randn(2, T // 2, D, generator=torch.Generator().manual_seed(seed + 100))


def loss_of(y: Tensor) -> Tensor:
    return (y * torch.linspace(-1, 1, y.numel(), device=y.device, dtype=y.dtype).view(y.shape)).sum()


def record(model: Model, x: Tensor, **options: Any) -> RoutingTrace:
    session = RoutingSession(model)
    with torch.no_grad(), session.record(**options) as recording:
        model(x)
    session.close()
    return recording.trace()


def explicit(model: Model, x: Tensor, trace: RoutingTrace) -> Tensor:
    """Forward with the trace's ids passed as arguments: no session involved."""
    for layer, block in enumerate(model.blocks):
        x = x + block.moe(block.norm(x), replay=RoutingDecision(trace.wide_ids()[:, layer]))
    return x
