"""Parameters, FLOPs per token and peak speeds: the numbers behind `--dry-run`, TFLOP/s and MFU.

Counting rule (PaLM, appendix B): a multiply-add is 2 FLOPs, forward plus backward is 3 forwards, only active experts
count, attention counts the full S x S scores; embeddings look up and cost nothing, recompute is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from moe_layer.config.model import MoEConfig
from moe_layer.config.train import TrainConfig

# Dense bf16 peak, TFLOP/s, by a part of torch.cuda.get_device_name(); first match wins. Vendor data sheets, never
# sparse numbers.
PEAK_BF16 = (
    ("H100 PCIe", 756.0),
    ("H100", 989.0),
    ("H200", 989.0),
    ("GH200", 989.0),
    ("B200", 2250.0),
    ("A100", 312.0),
    ("L40S", 362.0),
)


@dataclass(frozen=True)
class ParameterCount:
    """Parameters of a model: all, those a token passes through, those of the routed experts."""

    total: int
    active: int
    experts: int


def peak_tflops(device_name: str) -> float | None:
    """Dense bf16 peak of a GPU by its name, or None if unknown."""
    return next((peak for part, peak in PEAK_BF16 if part in device_name), None)


def count_parameters(model: nn.Module, moe: MoEConfig) -> ParameterCount:
    """Count each parameter once (tied ones too); works on meta and on DTensors (global sizes)."""
    total = experts = 0
    for name, parameter in model.named_parameters():
        total += parameter.numel()
        experts += parameter.numel() if ".experts." in name else 0
    share = moe.router.top_k / moe.router.num_experts
    return ParameterCount(total=total, active=round(total - experts * (1 - share)), experts=experts)


def moe_flops_per_token(config: MoEConfig) -> float:
    """Forward FLOPs of one MoE layer per token: gate, K experts, shared expert."""
    hidden, width = config.hidden_size, config.experts.intermediate_size
    flops = 2.0 * hidden * config.router.num_experts + 6.0 * hidden * width * config.router.top_k
    if config.shared_expert is not None:
        flops += 6.0 * hidden * config.shared_expert.intermediate_size
        flops += 2.0 * hidden if config.shared_expert.gate else 0.0
    return flops


def train_flops_per_token(config: TrainConfig, *, vocab: int) -> float:
    """Forward + backward FLOPs of the decoder per token."""
    model, hidden = config.model, config.moe.hidden_size
    head_dim = hidden // model.num_heads
    kv_width = (model.num_kv_heads or model.num_heads) * head_dim
    attention = 2.0 * hidden * (2 * hidden + 2 * kv_width) + 4.0 * hidden * config.data.sequence_length
    forward = model.num_layers * attention + 2.0 * hidden * vocab
    forward += model.dense_layers * 6.0 * hidden * (model.dense_intermediate_size or 0)
    forward += (model.num_layers - model.dense_layers) * moe_flops_per_token(config.moe)
    return 3.0 * forward
