"""The layer's configuration: one frozen dataclass per component; each field's doc is the string below it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from moe_layer.config import rules
from moe_layer.config.types import ExpertCount, Fraction, NonNegativeFloat, PositiveFloat, PositiveInt, Width


@dataclass(frozen=True, kw_only=True)
class RouterConfig:
    num_experts: ExpertCount
    """Number of routed experts, E."""
    top_k: PositiveInt
    """Experts per token, K."""
    score_function: Literal["softmax", "sigmoid", "sqrtsoftplus"] = "softmax"
    """How a logit becomes a score."""
    softmax_order: Literal["pre", "post"] = "post"
    """Softmax over all experts before the top-k (pre), or over the chosen ones after it (post)."""
    renormalize: bool = True
    """Divide the chosen scores by their sum (post normalises by itself; sigmoid with top_k 1 is never renormalised)."""
    scaling_factor: PositiveFloat = 1.0
    """Multiplies the final weights."""
    num_groups: PositiveInt | None = None
    """Number of expert groups for group-limited routing."""
    group_topk: PositiveInt | None = None
    """Groups a token may use."""
    group_rule: Literal["sum_top2", "sum_topk_per_group"] = "sum_top2"
    """Group score: sum of its two best keys (DeepSeek-V3), or of its top_k/group_topk best (Megatron)."""
    expert_bias: bool = False
    """Keep an fp32 `expert_bias [E]` buffer that is added to the scores for selection only."""
    linear_bias: bool = False
    """Add a learned `router.bias [E]` to the logits (gpt-oss)."""
    gate_dtype: Literal["fp32_out", "fp32", "input"] = "fp32_out"
    """Gate GEMM: input-dtype operands with fp32 accumulation and output, all fp32, or all in the input's dtype."""
    fused_gate: bool = False
    """On Hopper, gate GEMM and routing in one kernel where that measured faster (ops/gate_topk.py). It sums over
    hidden_size in another order, so an id may differ where the deciding keys are that close."""
    jitter_eps: Fraction = 0.0
    """While training, multiply the router's input by uniform noise in [1-eps, 1+eps]."""
    capacity_factor: PositiveFloat | None = None
    """Per-expert, per-rank capacity ceil(T*K/E*factor); overflowing slots get id -1. null is dropless."""
    capacity_policy: Literal["probs", "position"] = "probs"
    """Which slots survive: the highest weights, or the lowest token indices."""
    pad_to_capacity: bool = False
    """Report capacity as every expert's row count, so that shapes do not depend on the routing."""
    force_uniform: bool = False
    """Benchmark aid: ids are a balanced function of the token index, whatever the logits say."""
    nonfinite: Literal["count", "raise"] = "count"
    """NaN or infinite logits: count them in the statistics, or raise."""

    def __post_init__(self) -> None:
        rules.check(self, rules.router)


@dataclass(frozen=True, kw_only=True)
class ExpertsConfig:
    intermediate_size: Width
    """Width F of each expert."""
    activation: Literal["swiglu", "swiglu_clamped", "geglu"] = "swiglu"
    """silu(g)*u; gpt-oss: clamp(g)*sigmoid(alpha*clamp(g))*(clamp(u)+1); gelu_tanh(g)*u."""
    clamp_limit: PositiveFloat = 7.0
    """swiglu_clamped: g is cut above the limit, u to [-limit, limit]."""
    clamp_alpha: PositiveFloat = 1.702
    """swiglu_clamped: slope inside the sigmoid."""
    bias: bool = False
    """Expert biases on both projections; the second is multiplied by the routing probability."""
    backend: Literal["auto", "reference", "grouped_mm", "quack", "transformer_engine"] = "auto"
    """Implementation of the grouped MLP; auto never takes transformer_engine."""
    fp8_recipe: Literal["none", "delayed", "current", "blockwise"] = "none"
    """transformer_engine: the GEMMs' FP8 scaling; per tensor from past steps, per tensor now, or per 1x128 block."""
    recompute: Literal["none", "h", "fp8_h"] = "none"
    """What is kept of the gate/up projection for backward: all of it; `h`: nothing, it is computed again; `fp8_h`: one
    byte an element, whose rounding reaches the gradients."""
    weight_format: Literal["input", "int8", "fp8_1x128"] = "input"
    """Rollout and evaluation only (a backward raises): quantise weights and activations, see experts/quantized.py."""
    init_std: NonNegativeFloat = 0.02
    """Standard deviation of the normal initialisation."""

    def __post_init__(self) -> None:
        rules.check(self, rules.experts)


@dataclass(frozen=True, kw_only=True)
class SharedExpertConfig:
    intermediate_size: Width
    """Width of the expert that every token passes through."""
    gate: bool = False
    """Multiply its output by sigmoid(x @ shared_expert_gate.weight) (Qwen3-Next)."""
    mode: Literal["overlap", "packed"] = "overlap"
    """Its own GEMMs beside the routed ones, or one more group of their grouped GEMM (equal widths, swiglu)."""

    def __post_init__(self) -> None:
        rules.check(self)


@dataclass(frozen=True, kw_only=True)
class LossesConfig:
    aux: Literal["none", "batch", "sequence", "global"] = "none"
    """Load-balancing loss over the batch, each sequence, or all micro-batches since the last step."""
    aux_coeff: NonNegativeFloat = 0.0
    """Its coefficient."""
    z_coeff: NonNegativeFloat = 0.0
    """Coefficient of mean(logsumexp(logits)^2)."""
    counts: Literal["live", "effective"] = "live"
    """f_e counts the unbiased, ungrouped live top-k (as Megatron), or the ids really used."""
    aux_group: Literal["data", "local"] = "data"
    """f_e is all-reduced over all data ranks, or kept local."""

    def __post_init__(self) -> None:
        rules.check(self, rules.losses)


@dataclass(frozen=True, kw_only=True)
class BalanceConfig:
    bias_update_rate: NonNegativeFloat = 1e-3
    """`update_bias()` adds rate * sign(mean load - load) to `expert_bias`."""
    zero_mean: bool = False
    """Remove the mean of `expert_bias` after each update."""

    def __post_init__(self) -> None:
        rules.check(self)


@dataclass(frozen=True, kw_only=True)
class DispatchConfig:
    backend: Literal["auto", "local", "replicated", "all_gather", "all_to_all", "nvlink", "nccl_ep", "deep_ep"] = "auto"
    """Token dispatcher; auto: local at one rank, else all_to_all; nvlink: our kernels; nccl_ep, deep_ep: libraries."""
    rows: Literal["auto", "expert_major", "compact"] = "auto"
    """Layout of received rows; auto: compact (x is not copied) in a layer on one rank, unaligned; else expert_major."""
    alignment: Literal[1, 8, 16, 128] = 1
    """Pad each expert's rows with zeros to a multiple of this (compact: 1)."""
    apply_probs: Literal["activation", "combine", "source"] = "activation"
    """Where routing weights multiply: in the expert activation, on the expert rank after it, or at home."""
    dispatch_format: Literal["input", "fp8_1x128"] = "input"
    """Wire format of dispatched rows and of their backward dual, d(sum); local rows too, see dispatch/formats.py."""
    combine_format: Literal["input", "bf16", "fp32"] = "input"
    """Wire format of returning partial sums, applied to local rows too."""
    capacity: Literal["dropless", "static"] = "dropless"
    """Row buffers sized by the routing, or fixed at ceil(static_factor*T*K)."""
    static_factor: PositiveFloat = 1.0
    """Rows per (T*K) under static capacity."""
    overflow: Literal["error", "drop"] = "error"
    """Static overflow: raise CapacityError, or drop (token, rank) pairs from the highest token index down."""
    reduce: bool = True
    """replicated: combine returns the group's sum instead of this rank's partial sum."""
    max_tokens_per_rank: PositiveInt | None = None
    """Most tokens a rank may send; sizes static buffers (default: this rank's T, then equal on all) and nvlink's."""
    ring_depth: PositiveInt = 2
    """nvlink: dispatches (and combines) that may be between their send and their recv."""
    push: Literal["auto", "slots", "dense"] = "slots"
    """nvlink: rows by need, or all to all ranks by copy engine before the routing is known; auto: by R and top_k."""
    sm_budget: PositiveInt | None = None
    """nvlink: multiprocessors that a send may occupy beside the computation (default: 32 out, 128 home)."""
    deadline_s: PositiveFloat = 60.0
    """Seconds a rank waits for its peers before it raises DispatchTimeout."""
    chunks: PositiveInt = 1
    """A layer routes all tokens once, then dispatches, computes and combines them in this many parts, one after the
    other, so that the experts' temporary rows exist for one part at a time; buffers are sized for a part."""
    p2p_world_size: PositiveInt | None = None
    """all_to_all: consecutive ranks that reach each other directly; a token crosses once per remote domain of these."""

    def __post_init__(self) -> None:
        rules.check(self, rules.dispatch)

    @property
    def max_tokens_per_part(self) -> int | None:
        """Most tokens of one dispatch: `max_tokens_per_rank / chunks`, rounded up."""
        return None if self.max_tokens_per_rank is None else -(-self.max_tokens_per_rank // self.chunks)


@dataclass(frozen=True, kw_only=True)
class ReplayConfig:
    weights: Literal["live", "recorded", "straight_through"] = "live"
    """Gate weights of replayed slots: from current logits, as recorded, or recorded in value and live in gradient."""
    on_missing: Literal["live", "raise"] = "live"
    """Slots without a recorded id: filled by the best live experts not already taken, or an error."""
    on_duplicate: Literal["refill", "raise"] = "refill"
    """Repeated ids in a row: the first stays and the others are refilled, or an error."""
    aux_map: Literal["losses", "live", "effective", "off"] = "losses"
    """What f_e counts in a replayed pass: as losses.counts says, live ids (Megatron), replayed ids, or no loss."""
    bias_counts: Literal["effective", "live", "off"] = "effective"
    """What `tokens_per_expert` counts in a replayed pass: replayed ids, live ids (a second selection), or nothing."""
    renormalize: Literal["router", "always", "never"] = "router"
    """Divide the gate weights of a replayed pass by their sum: as router.renormalize says, or regardless of it."""
    allow_capacity: bool = False
    """Replay although router.capacity_factor may drop replayed slots; without it such a replay is refused."""

    def __post_init__(self) -> None:
        rules.check(self)


@dataclass(frozen=True, kw_only=True)
class MoEConfig:
    hidden_size: Width
    """Model width D."""
    router: RouterConfig
    """Routing."""
    experts: ExpertsConfig
    """Routed experts."""
    shared_expert: SharedExpertConfig | None = None
    """Optional always-on expert."""
    losses: LossesConfig = field(default_factory=LossesConfig)
    """Auxiliary losses."""
    balance: BalanceConfig = field(default_factory=BalanceConfig)
    """Bias-based balancing."""
    dispatch: DispatchConfig = field(default_factory=DispatchConfig)
    """Token dispatch."""
    replay: ReplayConfig = field(default_factory=ReplayConfig)
    """Router replay."""
    kernels: Literal["auto", "reference", "cuda"] = "auto"
    """auto uses the compiled CUDA library when it is there; cuda insists on it; reference never uses it."""

    def __post_init__(self) -> None:
        rules.check(self, rules.moe)
