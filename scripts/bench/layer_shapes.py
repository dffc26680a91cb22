"""Shapes of the layer benchmarks (docs/design.md section 9), for our process and the peer's. Standard library only."""

from __future__ import annotations

SHAPES = {  # T, D, F, E, K
    "qwen3-30b-16k": (16384, 2048, 768, 128, 8),
    "qwen3-30b-4k": (4096, 2048, 768, 128, 8),
    "olmoe-16k": (16384, 2048, 1024, 64, 8),
    "30b-n256-32k": (32768, 4096, 256, 256, 16),
    "deepseek-v3-ep8-share": (16384, 7168, 2048, 32, 8),
    "qwen3-next-16k": (16384, 2048, 512, 512, 10),
}

GOALS = {  # ours / SonicMoE, forward + backward
    "qwen3-30b-16k": 0.87,
    "qwen3-30b-4k": 0.55,
    "olmoe-16k": 0.88,
    "30b-n256-32k": 0.95,
    "deepseek-v3-ep8-share": 0.92,
    "qwen3-next-16k": 0.80,
}
