"""MoELayer: router, dispatch, experts, combine.

T tokens, D hidden, E experts, K top-k.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from einops import rearrange
from torch import Tensor, nn

from moe_layer.config import MoEConfig, load_config
from moe_layer.dispatch import Dispatcher, make_dispatcher
from moe_layer.dispatch.exchange import ExchangeDispatcher
from moe_layer.dispatch.share import TokenShare
from moe_layer.errors import ConfigError, RoutingError
from moe_layer.experts import Experts
from moe_layer.experts.packed import pack, packed_experts
from moe_layer.experts.parameters import local_part
from moe_layer.experts.parts import Parts
from moe_layer.experts.shared import SharedExpert, start_beside
from moe_layer.losses import sequence_boundaries
from moe_layer.ops.fan_out import LateProduct, fan_out
from moe_layer.ops.kernels import note_first_cuda_use, require_kernels
from moe_layer.parallel.compat import broadcast
from moe_layer.replay.decision import as_decision
from moe_layer.router import Router
from moe_layer.types import Received, Routing, RoutingDecision

if TYPE_CHECKING:
    from moe_layer.parallel.context import ParallelContext


class MoELayer(nn.Module):
    """Mixture-of-experts feed-forward layer.

    Args:
        config: the layer's configuration (`MoEConfig`, or `load_config("qwen3-30b-a3b")`).
        device, dtype: of the parameters; `device="meta"` builds without memory. Then `to_empty` and `reset_parameters`
            or `load_state_dict`, or `load_state_dict(assign=True)` alone.

    Raises:
        ConfigError: another kind of config or dtype, or `kernels: cuda` without the compiled library.
    """

    def __init__(
        self, config: MoEConfig, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None
    ) -> None:
        super().__init__()
        if not isinstance(config, MoEConfig):
            raise ConfigError(f"config must be a MoEConfig, got {type(config).__name__}; use load_config(path)")
        if dtype not in (None, torch.bfloat16, torch.float16, torch.float32, torch.float64):
            raise ConfigError(f"dtype must be torch.bfloat16, float16, float32 or float64, got {dtype!r}")
        require_kernels(config.kernels)
        self.config = config
        where: dict[str, Any] = {"device": device, "dtype": dtype}
        self.router = Router(config, **where)
        self.experts = Experts(
            config.experts, hidden_size=config.hidden_size, num_experts=config.router.num_experts, **where
        )
        shared = config.shared_expert
        self.shared_expert = None if shared is None else SharedExpert(shared, config.hidden_size, **where)
        self.shared_expert_gate = None
        if shared is not None and shared.gate:
            self.shared_expert_gate = nn.Linear(config.hidden_size, 1, bias=False, **where)
        self.layer_index = 0
        self.dispatcher: Dispatcher
        self._share: TokenShare | None
        self.bind(None)
        self.reset_parameters()
        self.register_load_state_dict_post_hook(_join_packed)

    @classmethod
    def from_yaml(cls, path: str | Path, **overrides: Any) -> MoELayer:
        """Build from a YAML file or preset name; `router__top_k=4` overrides `router.top_k`.

        Raises:
            ConfigError: every problem of the file at once.
        """
        device, dtype = overrides.pop("device", None), overrides.pop("dtype", None)
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return cls(load_config(path, dotted, kind=MoEConfig), device=device, dtype=dtype)

    def reset_parameters(self) -> None:
        """Initialise every parameter: normal with `experts.init_std`, biases zero.

        After `parallelize` (of a model built on a meta device) this is a collective call: the first rank's generator
        decides, and every rank gets its own experts' share of what one process would draw.
        """
        if self.router.weight.is_meta:
            return
        context = self.router.context
        group = None if context is None else context.data_group
        held = local_part(self.experts.gate_up_proj).shape[0]
        self.router.reset_parameters()
        self.experts.reset_parameters(first_expert=0 if context is None else context.ep_rank * held, group=group)
        if self.shared_expert is not None:
            self.shared_expert.reset_parameters(self.config.experts.init_std)
        if self.shared_expert_gate is not None:
            nn.init.normal_(self.shared_expert_gate.weight, std=self.config.experts.init_std)
        if group is not None:
            for part in (self.router, self.shared_expert, self.shared_expert_gate):
                for parameter in () if part is None else part.parameters():
                    broadcast(parameter.detach(), group=group)

    def bind(self, context: ParallelContext | None, *, layer_index: int = 0) -> None:
        """Attach the process groups (None: one rank); `moe_layer.parallelize` calls this on every layer.

        Raises:
            ConfigError: `router.pad_to_capacity` on several ranks, or a dispatcher that does not fit the context.
        """
        cfg = self.config
        self.layer_index = layer_index
        self.router.context = context
        dispatch, one_rank = cfg.dispatch, context is None or context.ep_size == 1
        if cfg.router.pad_to_capacity and not one_rank:
            raise ConfigError("router.pad_to_capacity serves one rank; set it to false or parallel.ep to 1")
        if dispatch.rows == "auto" and dispatch.alignment == 1 and one_rank and not cfg.router.pad_to_capacity:
            dispatch = dataclasses.replace(dispatch, rows="compact")  # our experts gather x themselves
        self.dispatcher = make_dispatcher(
            dispatch,
            num_experts=cfg.router.num_experts,
            top_k=cfg.router.top_k,
            context=context,
            layer_index=layer_index,
            kernels=cfg.kernels,
        )
        self._share = None
        if dispatch.backend == "replicated" and isinstance(self.dispatcher, ExchangeDispatcher):
            self._share = TokenShare(self.dispatcher.link, reduce=dispatch.reduce)
        self._pack()

    @property
    def _packed(self) -> bool:
        return self.config.shared_expert is not None and self.config.shared_expert.mode == "packed"

    def _pack(self) -> None:
        if self._packed and self.shared_expert is not None:
            pack(self.experts, self.shared_expert)

    def _apply(self, fn: Any, recurse: bool = True) -> MoELayer:
        """`to`, `cuda`, `to_empty`, ...: each moves parameter by parameter, so what lay together is joined again."""
        super()._apply(fn, recurse)
        self._pack()
        return self

    def forward(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        replay: RoutingDecision | Tensor | None = None,
        return_routing: bool = False,
    ) -> Tensor | tuple[Tensor, Routing]:
        """y = sum over a token's experts of weight * expert(x), plus the shared expert.

        Args:
            x: `[..., D]` floating.
            valid: bool `[...]`, True for real tokens; the others are neither routed nor counted. Their x must be
                finite: weight gradients of the router and the shared expert multiply it by zero.
            cu_seqlens: int32 `[S+1]` sequence boundaries over the flattened tokens (for `losses.aux: sequence`).
            replay: `RoutingDecision`, or integer ids `[..., K]` / `[T, K]`; -1 slots are routed live.
            return_routing: also return what the router decided, detached.

        Returns:
            y `[..., D]` in x's dtype, or `(y, Routing)`. The auxiliary losses are attached to y's graph.

        Raises:
            RoutingError: shapes, dtypes or devices that do not fit. Outside autocast x has the experts' dtype.
            RuntimeError: in the backward, under create_graph=True: there are no second derivatives.
        """
        self._check_input(x, valid)
        x_TD = x if x.ndim == 2 else rearrange(x, "... d -> (...) d")
        valid_T = None if valid is None else valid.reshape(-1)
        late = LateProduct() if x.is_cuda and not torch.compiler.is_compiling() else None
        routed_TD, *others, gate_TD = fan_out(x_TD, 2 if self.shared_expert is None else 3, late)
        shared_TD = others[0] if others else routed_TD

        whole = self.config.dispatch.chunks == 1
        begun = self.dispatcher.dispatch_begin(routed_TD) if whole else None
        routing = self.router(
            gate_TD,
            late=late,
            want_logits=return_routing,
            valid_T=valid_T,
            cu_seqlens=self._boundaries(x, cu_seqlens),
            replay=as_decision(replay, x.shape[:-1], self.config.router.top_k, device=x.device),
        )
        if whole:
            received = self.dispatcher.dispatch(routed_TD, routing, begun=begun)
            rows, add_TD = self._mlp(received, shared_TD)
            y_TD = self.dispatcher.combine(rows, received, add=add_TD)
        else:
            y_TD = self._in_parts(routed_TD, shared_TD, routing)

        y = y_TD if x.ndim == 2 else y_TD.reshape(x.shape)
        return (y, routing.detach()) if return_routing else y

    def _mlp(self, received: Received, x_TD: Tensor) -> tuple[Tensor, Tensor | None]:
        """Routed rows through their experts, x through the shared one (`[T, D]`, None without it)."""
        if self._packed:
            return self._packed_mlp(received, x_TD)
        shared = self._start_shared(x_TD)
        rows = self.experts(received)
        return rows, None if shared is None else shared()

    def _in_parts(self, x_TD: Tensor, shared_TD: Tensor, routing: Routing) -> Tensor:
        """`dispatch.chunks` parts of the tokens, one after the other; backward takes the last one first.

        Each rank makes as many parts as its peers, empty ones too. A shared expert with GEMMs of its own sees all
        tokens at once: it runs beside the first part.
        """
        T, count = x_TD.shape[0], self.config.dispatch.chunks
        sizes = [T * (i + 1) // count - T * i // count for i in range(count)]
        parts, y = Parts(count), []
        shared = None if self._packed else self._start_shared(shared_TD)
        adds: Sequence[Tensor | None] = [None] * count
        # split, not slices: its backward joins the parts' gradients, where each slice's would be padded to [T, D]
        pieces = zip(x_TD.split(sizes), shared_TD.split(sizes), routing.split(sizes), strict=True)
        for i, (x_tD, shared_tD, part) in enumerate(pieces):
            received = self.dispatcher.dispatch(x_tD, part)
            if self._packed:
                rows, add_tD = self._packed_mlp(received, shared_tD, parts)
            else:
                rows = self.experts(received, parts)
                if shared is not None:
                    adds, shared = shared().split(sizes), None
                add_tD = adds[i]
            y.append(self.dispatcher.combine(rows, received, add=add_tD))
            del received, rows  # before the next part's are made
        return torch.cat(y)

    def _packed_mlp(self, received: Received, x_TD: Tensor, parts: Parts | None = None) -> tuple[Tensor, Tensor]:
        share = self._share
        assert self.shared_expert is not None
        rows, y_TD = packed_experts(
            self.experts,
            self.shared_expert,
            received,
            x_TD if share is None else share.take(x_TD),
            alignment=self.config.dispatch.alignment,
            sum_gradient=None if share is None else share.sum_gradient,
            parts=parts,
        )
        return rows, self._gated(y_TD if share is None else share.spread(y_TD, tokens=x_TD.shape[0]), x_TD)

    def _start_shared(self, x_TD: Tensor) -> Callable[[], Tensor] | None:
        """Start the shared expert beside what follows; the result waits for its output `[T, D]`."""
        if self.shared_expert is None:
            return None
        # with `reduce` every rank has all tokens and the whole result
        share = None if self._share is None or self._share.reduce else self._share
        wait = start_beside(self.shared_expert, x_TD if share is None else share.take(x_TD))

        def finish() -> Tensor:
            y_TD = wait()
            return self._gated(y_TD if share is None else share.spread(y_TD, tokens=x_TD.shape[0]), x_TD)

        return finish

    def _gated(self, y_TD: Tensor, x_TD: Tensor) -> Tensor:
        gate = self.shared_expert_gate
        return y_TD if gate is None else torch.sigmoid(gate(x_TD)) * y_TD

    def _boundaries(self, x: Tensor, cu_seqlens: Tensor | None) -> Tensor | None:
        if cu_seqlens is not None:
            _check_boundaries(cu_seqlens, math.prod(x.shape[:-1]))
        if cu_seqlens is not None or not self.router.wants_sequences:
            return cu_seqlens
        return sequence_boundaries(x)

    def _check_input(self, x: Tensor, valid: Tensor | None) -> None:
        for name, value in (("x", x), ("valid", valid)):
            if value is not None and not isinstance(value, Tensor):
                raise RoutingError(f"{name} must be a torch.Tensor, got {type(value).__name__}")
        note_first_cuda_use(self.config.kernels, x)
        hidden = self.config.hidden_size
        if x.ndim < 1 or x.shape[-1] != hidden:
            raise RoutingError(f"x must be [..., {hidden}] (hidden_size), got {tuple(x.shape)}")
        if not x.is_floating_point():
            raise RoutingError(f"x must be floating, got {x.dtype}; embed token ids first")
        weight = self.router.weight
        offloaded = weight.is_meta and hasattr(self.router, "_hf_hook")  # accelerate brings weights module by module
        if weight.is_meta and not offloaded:
            raise RoutingError('the layer is on device "meta"; call to_empty(device=...) and reset_parameters() first')
        if x.device != weight.device and not offloaded:
            raise RoutingError(f"x is on {x.device} and the layer on {weight.device}; move one of them")
        dtype = getattr(self.experts, "gate_up_proj", x).dtype  # PEFT's wrapper has none and checks inside
        if x.dtype != dtype and not torch.is_autocast_enabled(x.device.type):
            raise RoutingError(
                f"x is {x.dtype} and the experts' weights {dtype}; convert one of them with .to(), or run under "
                "torch.autocast"
            )
        if valid is not None and (valid.dtype != torch.bool or valid.shape != x.shape[:-1]):
            raise RoutingError(
                f"valid must be bool {tuple(x.shape[:-1])} (True = real token), got {valid.dtype} {tuple(valid.shape)}"
            )

    # ---- step hooks -------------------------------------------------------------------------------------------------

    def set_loss_scale(self, scale: Tensor | float) -> None:
        """Factor on the attached losses' gradients (AMP loss scale, 1 / accumulation steps); see
        `Router.set_loss_scale`."""
        self.router.set_loss_scale(scale)

    def update_bias(self) -> None:
        """Step `expert_bias` by the load since the last call (all ranks together). No-op without a bias, in eval,
        frozen."""
        self.router.update_bias()

    def collect_stats(self) -> dict[str, Tensor]:
        """Device tensors accumulated by the backward passes since the last call; see `Router.collect_stats`."""
        return self.router.collect_stats()

    def check(self) -> None:
        """Raise what device code could only report: call it before `optimizer.step()`. Synchronises.

        Raises:
            RoutingError, CapacityError, DispatchTimeout.
        """
        self.router.check()
        self.dispatcher.check()

    def warmup(self, num_tokens: int = 128) -> None:
        """Load and compile every kernel for this layer: one throw-away forward pass, and the expert GEMMs of backward
        and of other numbers of tokens, so that no later step waits for a compiler.

        Raises:
            ValueError: negative `num_tokens`.
        """
        if num_tokens < 0:
            raise ValueError(f"num_tokens must be at least 0, got {num_tokens}")
        self.experts.warmup(parts=self.config.dispatch.chunks)
        weight = self.router.weight
        with torch.no_grad():
            self(torch.zeros(num_tokens, self.config.hidden_size, dtype=weight.dtype, device=weight.device))

    # ---- copies: process groups and workspaces stay behind ----------------------------------------------------------

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name not in ("dispatcher", "_share")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.bind(None, layer_index=self.layer_index)


def _join_packed(layer: MoELayer, _: Any) -> None:
    """After `load_state_dict(assign=True)`, which takes every weight where the state dict has it."""
    layer._pack()


def _check_boundaries(cu_seqlens: Tensor, num_tokens: int) -> None:
    """Values are looked at on CPU only, where that costs no synchronisation; elsewhere the op stays inside [0, T]."""
    if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64) or cu_seqlens.ndim != 1:
        found = (
            f"{cu_seqlens.dtype} {tuple(cu_seqlens.shape)}"
            if isinstance(cu_seqlens, Tensor)
            else type(cu_seqlens).__name__
        )
        raise RoutingError(f"cu_seqlens must be an int32 tensor [S+1], got {found}")
    if cu_seqlens.device.type != "cpu" or torch.compiler.is_compiling() or not len(cu_seqlens):
        return
    if int(cu_seqlens[0]) < 0 or int(cu_seqlens[-1]) > num_tokens or bool((cu_seqlens.diff() < 0).any()):
        raise RoutingError(
            f"cu_seqlens must rise from 0 to at most {num_tokens} (the tokens of x), got {cu_seqlens.tolist()[:8]}; "
            "pass the boundaries of the sequences, 0 first"
        )
