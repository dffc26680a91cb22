"""Replayed ids in the CUDA router: the general kernels and the lean ones, against the CPU reference."""

from __future__ import annotations

import pytest
import torch

from moe_layer.ops import _ext
from tests.gpu.router_cases import (
    ALL,
    CASES,
    LOSSES,
    TRAINED,
    bias_for,
    check,
    logits_for,
)

pytestmark = pytest.mark.gpu
COMBINATIONS = [
    *(("all", dtype) for dtype in (torch.uint8, torch.int16, torch.int32, torch.int64)),
    *(("live", dtype) for dtype in (torch.int16, torch.int64)),
    *(("effective", dtype) for dtype in (torch.uint8, torch.int32)),
]


@pytest.fixture(autouse=True, scope="module")
def _library() -> None:
    status = _ext.status()
    assert status.loaded, status.sentence()


@pytest.mark.parametrize("mode", ["live", "recorded", "straight_through"])
@pytest.mark.parametrize(("outputs", "dtype"), COMBINATIONS)
@pytest.mark.parametrize("name", ["e8-k2", "e64-k8-pre", "e128-k8", "e256-k8-deepseek", "e512-k10", "e40-k40-general"])
def test_replay(name: str, dtype: torch.dtype, mode: str, outputs: str) -> None:
    """Missing, duplicate and out-of-range ids; uint8 has no -1, so its missing slots are out of range."""
    experts, options, with_bias = CASES[name]
    top_k = options["top_k"]
    generator = torch.Generator().manual_seed(5)
    low = 0 if dtype == torch.uint8 else -experts // 3
    high = min(experts + experts // 4 + 1, 255) if dtype == torch.uint8 else experts + experts // 4 + 1
    recorded = torch.randint(low, high, (131, top_k), generator=generator).to(dtype)
    recorded[:40] = torch.stack([torch.randperm(min(experts, 255), generator=generator)[:top_k] for _ in range(40)]).to(
        dtype
    )
    inputs = {
        "replay_ids": recorded,
        "replay_weights": torch.rand(131, top_k, generator=generator),
        "valid": torch.arange(131) % 7 != 3,
    }
    logits = logits_for(experts, 131, torch.bfloat16)
    bias = bias_for(experts, with_bias)
    if outputs == "all":
        check(logits, bias, options | ALL | {"weights_mode": mode}, **inputs)
    else:
        check(logits, bias, options | LOSSES | {"weights_mode": mode, "aux_counts": outputs}, TRAINED, **inputs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("missing", [0, 1, 3])
@pytest.mark.parametrize(
    "name", ["e64-k8-pre", "e128-k8", "e128-k8-sigmoid", "e256-k8-deepseek", "e256-k16", "e512-k10"]
)
def test_replay_of_a_step(name: str, missing: int, dtype: torch.dtype) -> None:
    """What a replayed training step asks for: whole rows, and rows with a few missing slots, over many tiles."""
    experts, options, with_bias = CASES[name]
    generator = torch.Generator().manual_seed(6)
    recorded = torch.rand(1031, experts, generator=generator).argsort(dim=1)[:, : options["top_k"]].to(torch.int16)
    for row in range(0, 1031, 5):
        recorded[row, torch.randint(0, options["top_k"], (missing,), generator=generator)] = -1
    bias = bias_for(experts, with_bias)
    check(logits_for(experts, 1031, dtype), bias, options | LOSSES, TRAINED, replay_ids=recorded)
