"""The router module: gate GEMM, top-k selection, capacity, losses.

Precision: the gate's operands and output follow `router.gate_dtype`; everything after the logits is fp32 (fp64 for fp64
inputs). `expert_bias` and all counters stay fp32/int64 whatever `.to()` says (98% of tokens change experts when a
trained bias is rounded to bf16).

T tokens, D hidden, E experts, K top-k, S sequences.
"""

from __future__ import annotations

import warnings
from typing import TYPE_CHECKING, SupportsFloat

import torch
import torch.distributed as dist
from torch import Tensor, nn

from moe_layer import losses, stats
from moe_layer.balance import update_expert_bias
from moe_layer.config.model import MoEConfig
from moe_layer.counters import CountingModule, start_of
from moe_layer.errors import RoutingError
from moe_layer.ops.attach_losses import attach_losses
from moe_layer.ops.batch_losses import SUMMARY
from moe_layer.ops.capacity import apply_capacity, expert_capacity
from moe_layer.ops.cast import cast, no_autocast
from moe_layer.ops.fan_out import LateProduct
from moe_layer.ops.gate import gate_logits
from moe_layer.ops.gate_topk import gate_topk, gate_wins
from moe_layer.ops.route_topk import NUM_EVENTS, RouteTopk, route_topk
from moe_layer.replay.tap import Routed, RoutingTap
from moe_layer.routing_options import routing_options
from moe_layer.stats import EVENT_NAMES, LOG_NAMES
from moe_layer.types import Routing, RoutingDecision

if TYPE_CHECKING:
    from moe_layer.parallel.context import ParallelContext


class Router(CountingModule):
    """Chooses K of E experts for each token.

    Parameters: `weight [E, D]`, optional `bias [E]`. Buffers: `expert_bias [E]` fp32 (selection only, saved);
    `tokens_per_expert [E]` int64, which grows in the backward of `attach_losses` only, so that it is right under every
    kind of recompute; `loss_scale` 0-d fp32, set by the trainer.
    """

    expert_bias: Tensor | None
    tokens_per_expert: Tensor
    balanced_until: Tensor
    logged_until: Tensor
    aux_history: Tensor
    loss_scale: Tensor
    log_sums: Tensor
    faults: Tensor

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        self.config = config
        self.context: ParallelContext | None = None
        self.routing_tap: RoutingTap | None = None
        num_experts = config.router.num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, config.hidden_size, device=device, dtype=dtype))
        self.bias = (
            nn.Parameter(torch.empty(num_experts, device=device, dtype=dtype)) if config.router.linear_bias else None
        )
        has_bias = config.router.expert_bias
        self.register_buffer(
            "expert_bias", torch.zeros(num_experts, device=device, dtype=torch.float32) if has_bias else None
        )
        for name in ("tokens_per_expert", "balanced_until", "logged_until", "aux_history"):
            self.register_buffer(name, torch.zeros(num_experts, device=device, dtype=torch.int64), persistent=False)
        self.register_buffer("loss_scale", torch.ones((), device=device, dtype=torch.float32), persistent=False)
        self.register_buffer(
            "log_sums", torch.zeros(len(LOG_NAMES), device=device, dtype=torch.float32), persistent=False
        )
        self.register_buffer("faults", torch.zeros(NUM_EVENTS, device=device, dtype=torch.int64), persistent=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Normal(0, experts.init_std) weights, zero biases and counters."""
        if self.weight.is_meta:
            return
        nn.init.normal_(self.weight, std=self.config.experts.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)
        for name, buffer in self.named_buffers():
            buffer.fill_(start_of(name))

    def forward(
        self,
        x_TD: Tensor,
        *,
        valid_T: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        replay: RoutingDecision | None = None,
        late: LateProduct | None = None,
        want_logits: bool = True,
    ) -> Routing:
        """Route T tokens.

        Args:
            x_TD: `[T, D]` floating.
            valid_T: bool `[T]`, True for real tokens; the others get id -1 and count nowhere.
            cu_seqlens: int32 `[S+1]` from 0 to T, boundaries of the sequences for `losses.aux: sequence`.
            replay: decision with ids `[T, K]`; missing slots are routed live.
            late: of the `fan_out` that made x_TD, see `gate_logits`.
            want_logits: keep the logits in `stats`, even where nobody needs them (`gate_topk` without gradients).

        Returns:
            Routing whose `weights_TK` carry the gradient of the auxiliary losses (while training with grad enabled).

        Raises:
            RoutingError: non-finite logits, missing or duplicate ids under a `raise` policy, ids out of range (at once
                on CPU; by `check()` on CUDA and under torch.compile).
        """
        attaches = self.training and torch.is_grad_enabled()
        if cu_seqlens is None and self.wants_sequences:
            raise RoutingError("losses.aux: sequence needs cu_seqlens [S+1]; pass the boundaries of the sequences")
        tap = self.routing_tap
        if tap is not None:
            replay = tap.before(replay, num_tokens=x_TD.shape[0], device=x_TD.device)
        logits_TE, routed = self._gate_and_route(
            x_TD,
            late,
            valid_T,
            cu_seqlens,
            replay,
            attaches=attaches,
            want_logits=want_logits or tap is not None or attaches,
        )
        if tap is not None:
            tap.after(self._routed(routed, logits_TE, valid_T))
        self._report(routed.events, replay)
        ids_TK, weights_TK, counts_E, capacity = self._capacity(routed)
        dropped = None if counts_E is routed.counts else routed.counts.sum() - counts_E.sum()
        unscaled, scaled = {}, {}
        if attaches:
            unscaled, scaled, stacked, log_values, log_events = self._attached(
                routed, x_TD.shape[0], valid_T, cu_seqlens, dropped
            )
            weights_TK = attach_losses(
                weights_TK,
                stacked,
                self.loss_scale,
                counts_E if replay is None else self._counted(logits_TE, valid_T, counts_E),
                self.tokens_per_expert,
                aux_counts=routed.aux_counts if self.config.losses.aux == "global" and "aux" in unscaled else None,
                aux_history=self.aux_history,
                log_values=log_values,
                log_events=log_events,
                log_sums=self.log_sums,
            )
        return Routing(
            ids_TK=ids_TK,
            weights_TK=weights_TK,
            counts_E=counts_E,
            losses=scaled,
            losses_unscaled=unscaled,
            stats={
                "events": routed.events,
                **({"logits": logits_TE} if logits_TE.shape[0] == x_TD.shape[0] else {}),
                **({} if dropped is None else {"dropped": dropped}),
            },
            capacity=capacity,
        )

    def _routed(self, routed: RouteTopk, logits_TE: Tensor, valid_T: Tensor | None) -> Routed:
        def live() -> Tensor:
            return self._live(logits_TE, valid_T).ids

        return Routed(routed.ids, routed.weights, logits_TE, valid_T, routed.events, live)

    def _counted(self, logits_TE: Tensor, valid_T: Tensor | None, counts_E: Tensor) -> Tensor | None:
        """What a replayed pass adds to `tokens_per_expert` (replay.bias_counts)."""
        if self.config.replay.bias_counts != "live":
            return counts_E if self.config.replay.bias_counts == "effective" else None
        return self._live(logits_TE, valid_T).counts

    @property
    def wants_sequences(self) -> bool:
        """Whether a forward pass now has to know its sequences: for `losses.aux: sequence`, where losses exist."""
        return self.config.losses.aux == "sequence" and self.training and torch.is_grad_enabled()

    def logits(self, x_TD: Tensor, late: LateProduct | None = None) -> Tensor:
        """Gate GEMM with the configured dtypes: `[T, E]`. Jitter uses torch's generator, while training only."""
        x_TD, late = self._jitter(x_TD, late)
        return gate_logits(x_TD, self.weight, self.bias, gate_dtype=self.config.router.gate_dtype, late=late)

    def _jitter(self, x_TD: Tensor, late: LateProduct | None) -> tuple[Tensor, LateProduct | None]:
        eps = self.config.router.jitter_eps
        if eps <= 0.0 or not self.training:
            return x_TD, late
        return x_TD * torch.empty_like(x_TD).uniform_(1.0 - eps, 1.0 + eps), None  # d(x) passes through the noise first

    def _gate_and_route(
        self,
        x_TD: Tensor,
        late: LateProduct | None,
        valid_T: Tensor | None,
        cu_seqlens: Tensor | None,
        replay: RoutingDecision | None,
        *,
        attaches: bool,
        want_logits: bool,
    ) -> tuple[Tensor, RouteTopk]:
        """Logits `[T, E]` (`[0, E]` where nobody wants them), routing: one op with `fused_gate` where that wins."""
        options = routing_options(
            self.config, replay, attaches=attaches, finishes=self._finishes_losses(x_TD), like=x_TD
        )
        boundaries = cu_seqlens if self.config.losses.aux == "sequence" else None
        wanted = self.config.router.fused_gate and boundaries is None
        if not wanted or not gate_wins(x_TD, self.weight, self.expert_bias, **options):
            logits_TE = self.logits(x_TD, late)
            routed = route_topk(logits_TE, self.expert_bias, valid=valid_T, cu_seqlens=boundaries, **options)
            return logits_TE, routed
        x_TD, late = self._jitter(x_TD, late)
        with no_autocast(x_TD.device.type):
            weight, given = cast(self.weight, x_TD.dtype), {"valid": valid_T, "want_logits": want_logits, "late": late}
            return gate_topk(x_TD, weight, self.bias, self.expert_bias, **given, **options)

    def _live(self, logits_TE: Tensor, valid_T: Tensor | None) -> RouteTopk:
        """As if nothing were replayed, without gradient and losses."""
        with torch.no_grad():
            options = routing_options(self.config, None, attaches=False, finishes=False, like=logits_TE)
            return route_topk(logits_TE, self.expert_bias, valid=valid_T, **options)

    def _finishes_losses(self, x_TD: Tensor) -> bool:
        """Whether `route_topk` can finish the losses: of one rank's batch, without a history, fp64 or dropped slots."""
        simple = self.config.losses.aux in ("none", "batch") and self.config.router.capacity_factor is None
        return simple and x_TD.dtype != torch.float64 and losses.is_local(self._data_group)

    def _capacity(self, routed: RouteTopk) -> tuple[Tensor, Tensor, Tensor, int | None]:
        """ids, weights and counts after the capacity factor, and the rows every expert is padded to."""
        cfg = self.config.router
        if cfg.capacity_factor is None:
            return routed.ids, routed.weights, routed.counts, None
        capacity = expert_capacity(routed.ids.shape[0], cfg.top_k, cfg.num_experts, cfg.capacity_factor)
        kept = apply_capacity(
            routed.ids, routed.weights, cfg.num_experts, capacity=capacity, policy=cfg.capacity_policy
        )
        return kept.ids, kept.weights, kept.counts, capacity if cfg.pad_to_capacity else None

    def _losses(self, routed: RouteTopk, num_valid_S: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Unscaled losses, and the same times their coefficients."""
        cfg = self.config.losses
        unscaled: dict[str, Tensor] = {}
        if routed.aux_counts.ndim == 2:  # [0] when nobody asked: no such loss, or replay.aux_map off
            unscaled["aux"] = losses.load_balancing_loss(
                routed.aux_counts,
                routed.score_sum,
                top_k=self.config.router.top_k,
                num_tokens=num_valid_S,
                per_sequence=cfg.aux == "sequence",
                history_E=self.aux_history if cfg.aux == "global" else None,
                group=self._data_group if cfg.aux_group == "data" else None,
            )
        if cfg.z_coeff > 0.0:
            unscaled["z"] = losses.z_loss(routed.z_sum, num_valid_S, group=self._data_group)
        coefficients = {"aux": cfg.aux_coeff, "z": cfg.z_coeff}
        return unscaled, {name: value * coefficients[name] for name, value in unscaled.items()}

    def _attached(
        self,
        routed: RouteTopk,
        num_tokens: int,
        valid_T: Tensor | None,
        cu_seqlens: Tensor | None,
        dropped: Tensor | None,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Tensor | None, Tensor, Tensor | None]:
        """Losses unscaled, scaled and scaled in one tensor; the head of the log and the events that follow it."""
        if self._is_quiet and valid_T is None and dropped is None and not torch.compiler.is_compiling():
            return {}, {}, None, stats.quiet_head(num_tokens, routed.events.device), routed.events
        if routed.scaled_losses.numel() > 0:  # finished by route_topk
            present = (("aux", routed.aux_counts.ndim == 2), ("z", self.config.losses.z_coeff > 0.0))
            names = [name for name, there in present if there]
            unscaled = {name: routed.losses[SUMMARY.index(name)] for name in names}
            scaled = dict(zip(names, routed.scaled_losses.unbind(), strict=True))
            return unscaled, scaled, routed.scaled_losses, *stats.with_events(routed.losses, routed.events)
        boundaries = cu_seqlens if self.config.losses.aux == "sequence" else None
        num_valid_S = losses.tokens_per_sequence(num_tokens, valid_T, boundaries, routed.events.device)
        unscaled, scaled = self._losses(routed, num_valid_S)
        stacked = torch.stack(list(scaled.values())) if scaled else None
        return unscaled, scaled, stacked, *stats.log_values(unscaled, num_valid_S, dropped, routed.events)

    @property
    def _is_quiet(self) -> bool:
        """No auxiliary loss is configured."""
        return self.config.losses.aux == "none" and self.config.losses.z_coeff == 0.0

    @property
    def _data_group(self) -> dist.ProcessGroup | None:
        return None if self.context is None else self.context.data_group

    def _report(self, events: Tensor, replay: RoutingDecision | None) -> None:
        """Raise on policy violations: at once where that costs no synchronisation, else remember them for `check`."""
        if replay is None and self.config.router.nonfinite != "raise":
            return
        self.faults.add_(events)  # all of them in one launch; `check` knows which ones are faults
        if not events.is_cuda and not torch.compiler.is_compiling():
            self.check()

    def _is_fault(self, name: str) -> bool:
        policy = self.config.replay
        return (
            name == "out_of_range"
            or (name == "slots_missing" and policy.on_missing == "raise")
            or (name == "duplicates" and policy.on_duplicate == "raise")
            or (name == "nonfinite_rows" and self.config.router.nonfinite == "raise")
        )

    def check(self) -> None:
        """Raise what the routing op counted against a `raise` policy since the last check. Synchronises on CUDA.

        Raises:
            RoutingError: names the finding, how often, and the key that tolerates it.
        """
        counts = zip(EVENT_NAMES, self.faults.tolist(), strict=False)
        found = {name: count for name, count in counts if count and self._is_fault(name)}
        self.faults.zero_()
        sentences = {
            "out_of_range": "replay ids outside [0, {experts}); ids must be expert indices, or -1 for a missing slot",
            "slots_missing": "replay slots are -1; record them, or set replay.on_missing: live",
            "duplicates": "replay slots repeat an expert of their row; repair the trace, or set "
            "replay.on_duplicate: refill",
            "nonfinite_rows": "rows have NaN or infinite router logits; find their source, or set "
            "router.nonfinite: count",
        }
        if found:
            experts = self.config.router.num_experts
            raise RoutingError("; ".join(f"{n} {sentences[name].format(experts=experts)}" for name, n in found.items()))

    def set_loss_scale(self, scale: Tensor | float) -> None:
        """Factor on the attached losses' gradients, one number; a tensor stays on its device.

        Raises:
            ValueError: no number, several, or one that is not finite.
        """
        if not isinstance(scale, Tensor):
            if not isinstance(scale, SupportsFloat):
                raise ValueError(f"scale must be a number or a tensor, got {type(scale).__name__}")
            scale = torch.tensor(float(scale))
            if not bool(torch.isfinite(scale)):
                raise ValueError(f"scale must be finite, got {float(scale)}; it multiplies the losses' gradients")
        if scale.numel() != 1:
            raise ValueError(f"scale must be one number, got a tensor of shape {tuple(scale.shape)}")
        with torch.no_grad():
            self.loss_scale.copy_(scale.reshape(()))

    @torch.no_grad()
    def update_bias(self) -> None:
        """End of an optimiser step: move `expert_bias` by the load since the last call, forget the `global` loss's
        history.

        The bias stays as it is in evaluation mode.
        """
        self.aux_history.zero_()
        if self.expert_bias is None or not self.training:
            return
        ranks = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if self.context is None and ranks > 1:
            warnings.warn(
                f"update_bias() sees the tokens of this rank alone, of {ranks}, so expert_bias will differ between "
                "ranks; call moe_layer.parallelize(model, mesh) first (with ep 1 beside DDP or FSDP)",
                stacklevel=3,
            )
        cfg = self.config.balance
        load_E = self.tokens_per_expert - self.balanced_until
        self.balanced_until.copy_(self.tokens_per_expert)
        update_expert_bias(self.expert_bias, load_E, cfg.bias_update_rate, cfg.zero_mean, self._data_group)

    @torch.no_grad()
    def collect_stats(self) -> dict[str, Tensor]:
        """Sums over this rank's backward passes since the last call, as device tensors.

        Returns:
            `load` int64 [E]; and 0-d fp32 for each of LOG_NAMES: `aux`, `z` (unscaled, divide by `micro_batches`),
            `tokens`, `dropped`, and `route_topk`'s events.
        """
        stats = dict(zip(LOG_NAMES, self.log_sums.clone().unbind(), strict=True))
        stats["load"] = self.tokens_per_expert - self.logged_until
        self.logged_until.copy_(self.tokens_per_expert)
        self.log_sums.zero_()
        return stats

    def extra_repr(self) -> str:
        cfg = self.config.router
        return f"num_experts={cfg.num_experts}, top_k={cfg.top_k}, score_function={cfg.score_function}"
