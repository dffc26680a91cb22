"""The packed shared expert on a GPU: as exact as the separate path, against fp64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig, ExpertsConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_layer.layer import MoELayer

pytestmark = pytest.mark.gpu


def make(mode: str, backend: str, rows: str, *, dtype: torch.dtype, device: str) -> MoELayer:
    config = MoEConfig(
        hidden_size=256,
        router=RouterConfig(num_experts=8, top_k=2),
        experts=ExpertsConfig(intermediate_size=128, backend=backend),
        shared_expert=SharedExpertConfig(intermediate_size=128, gate=True, mode=mode),
        dispatch=DispatchConfig(rows=rows),
    )
    layer = MoELayer(config, device=device, dtype=dtype)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in layer.parameters():
            value = torch.randn(parameter.shape, generator=generator) * 0.06
            parameter.copy_(value.bfloat16())
    return layer


def run(layer: MoELayer, ids: Tensor) -> dict[str, Tensor]:
    weight = layer.router.weight
    generator = torch.Generator().manual_seed(2)
    x, upstream = (torch.randn(300, 256, generator=generator).bfloat16().to(weight) for _ in range(2))
    x.requires_grad_()
    y = layer(x, replay=ids.to(weight.device))
    y.backward(upstream)
    found = {"y": y, "dx": x.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}
    return {name: value.detach().double().cpu() for name, value in found.items()}  # type: ignore[union-attr]


@pytest.mark.parametrize("rows", ["compact", "expert_major"])
@pytest.mark.parametrize("backend", ["auto", "grouped_mm"])
def test_error_beside_the_separate_path(backend: str, rows: str) -> None:
    """Relative error against fp64 at most 1.5 times the separate path's (both round to bf16)."""
    ids = torch.rand(300, 8, generator=torch.Generator().manual_seed(3)).topk(2).indices
    exact = run(make("overlap", "reference", rows, dtype=torch.float64, device="cpu"), ids)
    packed, separate = (
        run(make(mode, backend, rows, dtype=torch.bfloat16, device="cuda"), ids) for mode in ("packed", "overlap")
    )
    for name, want in exact.items():
        scale = float(want.norm())
        errors = [float((found[name] - want).norm()) / scale for found in (packed, separate)]
        assert errors[0] <= 1.5 * errors[1] + 1e-4, f"{name}: packed {errors[0]:.3g}, separate {errors[1]:.3g}"
