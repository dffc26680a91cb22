"""Traces from other systems, one file per source; each says which layout it reads and where that is documented."""

from __future__ import annotations

from moe_layer.replay.adapters.megatron import from_megatron, from_megatron_inference, to_megatron
from moe_layer.replay.adapters.nemo_rl import from_nemo_rl
from moe_layer.replay.adapters.prime_rl import from_prime_rl
from moe_layer.replay.adapters.rows import LayerAxis
from moe_layer.replay.adapters.sglang import from_sglang
from moe_layer.replay.adapters.transformers import record_transformers
from moe_layer.replay.adapters.vllm import from_vllm

__all__ = [
    "LayerAxis",
    "from_megatron",
    "from_megatron_inference",
    "from_nemo_rl",
    "from_prime_rl",
    "from_sglang",
    "from_vllm",
    "record_transformers",
    "to_megatron",
]
