"""Configuration of a training run: model, data, optimiser, loop, parallel layout."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe_layer.config import rules
from moe_layer.config.model import MoEConfig
from moe_layer.config.types import (
    Fraction,
    NonNegativeFloat,
    NonNegativeInt,
    OpenFraction,
    PositiveFloat,
    PositiveInt,
    Width,
)


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    num_layers: PositiveInt
    """Decoder blocks."""
    num_heads: PositiveInt
    """Query heads."""
    num_kv_heads: PositiveInt | None = None
    """Key/value heads (default: num_heads)."""
    dense_layers: NonNegativeInt = 0
    """Leading blocks with a dense SwiGLU MLP instead of the MoE layer."""
    dense_intermediate_size: Width | None = None
    """Width of those dense MLPs."""
    rope_theta: PositiveFloat = 10000.0
    """Base of the rotary embedding."""
    norm_eps: PositiveFloat = 1e-6
    """Epsilon of RMSNorm."""
    tie_embeddings: bool = True
    """Share input and output embeddings."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of the dense parameters' initialisation."""
    embedding_std: PositiveFloat | None = None
    """Standard deviation of the embedding's initialisation (default: init_std); needs tie_embeddings: false."""

    def __post_init__(self) -> None:
        rules.check(self, rules.model_)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    files: tuple[str, ...] = ()
    """Text files or glob patterns; empty takes the Python standard library's own sources."""
    max_bytes: PositiveInt = 16_000_000
    """Read at most this many bytes."""
    sequence_length: PositiveInt = 256
    """Tokens (bytes) per sequence."""
    val_fraction: OpenFraction = 0.05
    """Last part of each file kept for validation."""

    def __post_init__(self) -> None:
        rules.check(self, rules.data)


@dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
    name: Literal["auto", "adamw", "apex_fused_adam"] = "auto"
    """auto takes NVIDIA apex's FusedAdam on CUDA when it imports, else torch AdamW."""
    lr: PositiveFloat = 3e-3
    """Peak learning rate."""
    min_lr: NonNegativeFloat = 3e-4
    """Learning rate at the end of the cosine."""
    warmup_steps: NonNegativeInt = 20
    """Linear warm-up steps."""
    beta1: Fraction = 0.9
    """First-moment decay."""
    beta2: Fraction = 0.95
    """Second-moment decay."""
    eps: PositiveFloat = 1e-8
    """Denominator epsilon."""
    weight_decay: NonNegativeFloat = 0.1
    """Decay of matrices (norms, biases and embeddings are exempt)."""
    clip_norm: NonNegativeFloat = 1.0
    """Global gradient-norm limit; 0 turns clipping off."""
    master_weights: bool = True
    """Step fp32 copies of bf16 parameters, with fp32 moments (8 bytes a parameter more): bf16 loses small steps."""

    def __post_init__(self) -> None:
        rules.check(self, rules.optimizer)


@dataclass(frozen=True, kw_only=True)
class LoopConfig:
    steps: PositiveInt = 200
    """Optimiser steps."""
    global_batch: PositiveInt = 16
    """Sequences per optimiser step over all ranks."""
    micro_batch: PositiveInt = 16
    """Sequences per forward on one rank; the rest is gradient accumulation."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    dtype: Literal["fp32", "bf16", "fp64"] = "fp32"
    """Parameter and activation dtype; fp64 compares layouts whose fp32 roundings would route a token differently."""
    compile: bool = False
    """torch.compile the decoder blocks."""
    activation_checkpointing: Literal["none", "non_reentrant", "reentrant"] = "none"
    """Recompute each block in backward."""
    log_every: PositiveInt = 1
    """Steps between log lines."""
    val_every: NonNegativeInt = 100
    """Steps between validations (one always runs at the end); 0 runs that one only."""
    val_batches: PositiveInt = 8
    """Micro-batches per validation."""
    checkpoint_every: NonNegativeInt = 100
    """Steps between checkpoints (one is always written at the end); 0 writes the last one only."""
    keep_checkpoints: PositiveInt = 2
    """Older checkpoints are deleted."""
    resume: str | None = None
    """Run directory or checkpoint to continue; `auto` takes the newest one of --out."""

    def __post_init__(self) -> None:
        rules.check(self, rules.loop)


@dataclass(frozen=True, kw_only=True)
class ParallelConfig:
    ep: PositiveInt = 1
    """Expert-parallel ranks."""
    dp: PositiveInt | None = None
    """Data-parallel replicas of the EP group (default: world size / ep)."""

    def __post_init__(self) -> None:
        rules.check(self)


@dataclass(frozen=True, kw_only=True)
class SampleConfig:
    prompt: str = "def "
    """Text the final sample starts from."""
    tokens: NonNegativeInt = 200
    """Bytes to sample; 0 turns sampling off."""
    temperature: NonNegativeFloat = 0.8
    """Softmax temperature; 0 is greedy."""

    def __post_init__(self) -> None:
        rules.check(self)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    name: str
    """Name of the run; the default output directory is runs/<name>."""
    model: ModelConfig
    """Decoder."""
    moe: MoEConfig
    """MoE layer of each block; its hidden_size is the model's."""
    seed: NonNegativeInt = 0
    """Seed of initialisation, data order and sampling."""
    data: DataConfig = field(default_factory=DataConfig)
    """Text."""
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    """Optimiser."""
    train: LoopConfig = field(default_factory=LoopConfig)
    """Training loop."""
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    """Device layout."""
    sample: SampleConfig = field(default_factory=SampleConfig)
    """Text sampled at the end."""

    def __post_init__(self) -> None:
        rules.check(self, rules.train_)
