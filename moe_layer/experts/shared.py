"""SharedExpert: the SwiGLU MLP that every token passes through, on a CUDA stream of its own under `mode: overlap`."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from moe_layer.config.model import SharedExpertConfig


class SharedExpert(nn.Module):
    """down_proj(silu(gate_proj(x)) * up_proj(x)), three linear maps without bias.

    Args:
        config: its width. hidden_size: D. device, dtype: of the parameters.
    """

    def __init__(
        self,
        config: SharedExpertConfig,
        hidden_size: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = config.intermediate_size
        self.gate_proj = nn.Linear(hidden_size, width, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, width, bias=False, device=device, dtype=dtype)
        self.down_proj = nn.Linear(width, hidden_size, bias=False, device=device, dtype=dtype)

    @torch.no_grad()
    def reset_parameters(self, init_std: float = 0.02) -> None:
        """Normal with `init_std`."""
        for linear in (self.gate_proj, self.up_proj, self.down_proj):
            if not linear.weight.is_meta:
                linear.weight.normal_(0, init_std)

    def forward(self, x_TD: Tensor) -> Tensor:
        """[T, D] in, [T, D] out in the same dtype (autocast's under autocast)."""
        return self.down_proj(F.silu(self.gate_proj(x_TD)) * self.up_proj(x_TD))


@functools.cache
def _side_stream(device: torch.device) -> torch.cuda.Stream:
    """One stream per device for all shared experts: their layers follow each other anyway."""
    return torch.cuda.Stream(device)


def start_beside(shared: SharedExpert, x_TD: Tensor) -> Callable[[], Tensor]:
    """Start `shared(x_TD)` beside whatever the current stream does next; call the result to wait for the output.

    Autograd runs a node's backward on the stream of its forward, so the backward overlaps too. Elsewhere than on CUDA,
    and while compiling, the call is made here and now.
    """
    if not x_TD.is_cuda or torch.compiler.is_compiling():
        y_TD = shared(x_TD)
        return lambda: y_TD
    main, side = torch.cuda.current_stream(x_TD.device), _side_stream(x_TD.device)
    side.wait_stream(main)
    with torch.cuda.stream(side):
        y_TD = shared(x_TD)
    x_TD.record_stream(side)

    def finish() -> Tensor:
        main.wait_stream(side)
        y_TD.record_stream(main)
        return y_TD

    return finish
