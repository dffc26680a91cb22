"""Experts: the parameters of the local experts and the call into the grouped MLP.

N rows, N_c compact rows, D hidden, F expert width, L local experts.
"""

from __future__ import annotations

from typing import Any, overload

import torch
from torch import Tensor, nn

from moe_layer.config.model import ExpertsConfig
from moe_layer.experts import quack, quantized, transformer_engine
from moe_layer.experts.autograd import experts_mlp
from moe_layer.experts.backend import resolve
from moe_layer.experts.parts import Parts
from moe_layer.experts.spec import ExpertsSpec, Layout, Weights
from moe_layer.parallel import compat
from moe_layer.parallel.compat import broadcast
from moe_layer.types import Received


@overload
def local_part(parameter: Tensor) -> Tensor: ...
@overload
def local_part(parameter: None) -> None: ...
@overload
def local_part(parameter: Tensor | None) -> Tensor | None: ...
def local_part(parameter: Tensor | None) -> Tensor | None:
    """This rank's slice of a DTensor parameter (differentiable), anything else unchanged."""
    return parameter if parameter is None or not hasattr(parameter, "to_local") else compat.local_part(parameter)


class Experts(nn.Module):
    """Gated MLPs of `num_experts` local experts, applied to rows grouped by expert.

    Parameters: `gate_up_proj [L, 2F, D]` (gate rows first, then up rows), `down_proj [L, D, F]` and, with
    `config.bias`, `gate_up_proj_bias [L, 2F]`, `down_proj_bias [L, D]`. Each may be a DTensor sharded on dimension 0.

    Args:
        config: see `ExpertsConfig`.
        hidden_size: D. num_experts: L, experts on this rank.
        device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: ExpertsConfig,
        *,
        hidden_size: int,
        num_experts: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self._quantized = quantized.QuantizedWeights()
        self._grouped_linears = transformer_engine.GroupedLinears()
        width = config.intermediate_size

        def parameter(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(num_experts, *shape, device=device, dtype=dtype))

        self.gate_up_proj = parameter(2 * width, hidden_size)
        self.down_proj = parameter(hidden_size, width)
        self.gate_up_proj_bias = parameter(2 * width) if config.bias else None
        self.down_proj_bias = parameter(hidden_size) if config.bias else None
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, *, first_expert: int = 0, group: Any = None) -> None:
        """Normal with `config.init_std`, biases zero.

        One number is drawn from torch's default generator (with `group`: the one of the group's first rank, a
        collective call); each expert then has its own stream, keyed by its global index, so that a rank that holds
        experts `first_expert ...` gets what a single process would give them.
        """
        gate_up, down = local_part(self.gate_up_proj), local_part(self.down_proj)
        if gate_up.is_meta:
            return
        drawn = torch.randint(2**48, ())
        if group is not None:
            drawn = drawn.to(gate_up.device)
            broadcast(drawn, group=group)
        seed = int(drawn)
        for local in range(gate_up.shape[0]):
            generator = torch.Generator(gate_up.device).manual_seed(seed + first_expert + local)
            gate_up[local].normal_(0, self.config.init_std, generator=generator)
            down[local].normal_(0, self.config.init_std, generator=generator)
        for bias in (self.gate_up_proj_bias, self.down_proj_bias):
            if bias is not None:
                local_part(bias).zero_()

    def forward(self, received: Received, parts: Parts | None = None) -> Tensor:
        """The MLP's output for each expert-major row.

        Args:
            received: what a dispatcher delivered. `act_probs_N` (fp32, or None) multiplies the activation before the
                down projection, and the down bias. Rows past the last offset are never read.
            parts: where this is one of several calls whose weight gradients are to be added up.

        Returns:
            rows [N, D], expert-major, in the dtype of `received.rows`; pads and the tail are undefined.

        Raises:
            TypeError: rows and parameters differ in dtype outside autocast.
            ValueError: shapes that do not fit, a backend that cannot run this, a main_grad that cannot be honoured.
        """
        parameters = (self.gate_up_proj, self.down_proj, self.gate_up_proj_bias, self.down_proj_bias)

        def local() -> Weights:
            return Weights(
                gate_up=local_part(self.gate_up_proj),
                down=local_part(self.down_proj),
                gate_up_bias=local_part(self.gate_up_proj_bias),
                down_bias=local_part(self.down_proj_bias),
            )

        weights = local() if parts is None else parts.weights(local)
        spec = self.spec(received, weights.gate_up)
        layout = Layout(
            x=received.rows,
            index=received.index_N,
            probs=received.act_probs_N,
            offsets=received.offsets_L1,
            counts=received.counts_L,
            row_CK=received.row_CK,
            ids_CK=received.ids_CK,
        )
        config = self.config
        if config.weight_format != "input":
            return quantized.forward(
                layout,
                weights,
                weight_format=config.weight_format,
                activation=config.activation,
                limit=float(config.clamp_limit),
                alpha=float(config.clamp_alpha),
                cache=self._quantized,
            )
        if spec.backend == "transformer_engine":
            return transformer_engine.forward(
                layout,
                weights,
                spec,
                parameters=parameters,
                fp8_recipe=config.fp8_recipe,
                modules=self._grouped_linears,
            )
        return experts_mlp(layout, weights, spec, parameters=parameters, link=received.link, parts=parts)

    def spec(self, received: Received, gate_up: Tensor) -> ExpertsSpec:
        """The static facts of a call on these rows, with the backend that will run it; `gate_up` is this rank's.

        Raises:
            TypeError, ValueError: see `forward`.
        """
        config, dtype = self.config, self._check(received, gate_up)
        return ExpertsSpec(
            backend=self._backend(received.rows.device, dtype),
            activation=config.activation,
            limit=float(config.clamp_limit),
            alpha=float(config.clamp_alpha),
            keep_h={"none": "input", "fp8_h": "fp8", "h": "none"}[config.recompute],
            compute_dtype=dtype,
            num_experts=received.plan.num_experts,
        )

    def warmup(self, dtype: torch.dtype | None = None, *, parts: int = 1) -> None:
        """Compile what the backend compiles at first use, for every number of rows (quack; nothing for the others).

        Args:
            dtype: of the GEMMs (default: autocast's where it is on, else the parameters').
            parts: calls of a pass, whose weight gradients are added up where there are several.

        Raises:
            ValueError: the configured backend cannot run here.
        """
        gate_up, down = local_part(self.gate_up_proj).detach(), local_part(self.down_proj).detach()
        if dtype is None:
            kind = gate_up.device.type
            dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else gate_up.dtype
        if gate_up.is_meta or self._backend(gate_up.device, dtype) != "quack":
            return
        sums = {gate_up.dtype} if parts > 1 else set()
        if any(getattr(p, "main_grad", None) is not None for p in (self.gate_up_proj, self.down_proj)):
            sums.add(torch.float32)
        quack.warmup(Weights(gate_up[:1].to(dtype), down[:1].to(dtype), None, None), sums=sums)

    def _backend(self, device: torch.device, dtype: torch.dtype) -> str:
        config = self.config
        return resolve(
            config.backend,
            device,
            dtype,
            activation=config.activation,
            bias=config.bias,
            fp8_recipe=config.fp8_recipe,
            hidden_size=self.hidden_size,
            width=config.intermediate_size,
        )

    def _check(self, received: Received, matrix: Tensor) -> torch.dtype:
        """The GEMMs' dtype, after the checks of `forward`."""
        rows = received.rows
        num_local = received.offsets_L1.shape[0] - 1
        if rows.ndim != 2 or rows.shape[1] != self.hidden_size or num_local != matrix.shape[0]:
            raise ValueError(
                f"received.rows is {tuple(rows.shape)} for {num_local} experts, but this module has {matrix.shape[0]} "
                f"experts of hidden_size {self.hidden_size}; build dispatcher and experts from one config, and bind a "
                "copy of a parallelized layer: copy.bind(layer.router.context)"
            )
        if torch.is_autocast_enabled(rows.device.type):
            return torch.get_autocast_dtype(rows.device.type)
        if rows.dtype != matrix.dtype:
            raise TypeError(
                f"received.rows is {rows.dtype} and experts.gate_up_proj {matrix.dtype}; "
                "convert one of them with .to(), or run under torch.autocast"
            )
        return rows.dtype

    def extra_repr(self) -> str:
        config = self.config
        return (
            f"num_experts={self.gate_up_proj.shape[0]}, hidden_size={self.hidden_size}, "
            f"intermediate_size={config.intermediate_size}, activation={config.activation}, backend={config.backend}"
        )
