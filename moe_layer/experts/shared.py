"""SharedExpert: the SwiGLU MLP that every token passes through."""

from __future__ import annotations

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
