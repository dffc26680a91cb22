"""The grouped MLP on somebody else's parameters.

N rows, D hidden, F expert width, L local experts.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moe_layer.experts.autograd import experts_mlp
from moe_layer.experts.backend import resolve
from moe_layer.experts.spec import ExpertsSpec, Layout, Weights
from moe_layer.ops.kernels import note_first_cuda_use

Parameters = tuple[Any, Any, Any, Any]
NO_PARAMETERS: Parameters = (None, None, None, None)


def grouped_mlp(
    layout: Layout,
    weights: Weights,
    *,
    activation: str,
    limit: float,
    alpha: float,
    num_experts: int,
    parameters: Parameters = NO_PARAMETERS,
    backend: str = "auto",
) -> Tensor:
    """Output rows `[N, D]` in the rows' dtype; under autocast the GEMMs use its dtype.

    Args:
        layout: rows and where they lie. weights: in our layout.
        activation, limit, alpha: see `moe_layer.ops.glu`.
        num_experts: global number of experts.
        parameters: owners of the weights, for `main_grad`; None where a weight is a rearranged copy.
    """
    note_first_cuda_use("auto", layout.x)
    device = layout.x.device
    autocast = torch.is_autocast_enabled(device.type)
    dtype = torch.get_autocast_dtype(device.type) if autocast else layout.x.dtype
    _, hidden, width = weights.down.shape
    spec = ExpertsSpec(
        backend=resolve(
            backend,
            device,
            dtype,
            hidden_size=hidden,
            width=width,
            activation=activation,
            bias=weights.gate_up_bias is not None,
        ),
        activation=activation,
        limit=limit,
        alpha=alpha,
        keep_h="input",
        compute_dtype=dtype,
        num_experts=num_experts,
    )
    return experts_mlp(layout, weights, spec, parameters=parameters)
