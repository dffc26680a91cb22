"""What a trace is about: which experts, how many per token, which layers; and how ids and validity are stored.

N rows (tokens), L layers, K top-k, E experts, B = ceil(K/8) bytes of validity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from moe_layer.errors import TraceError

WIDE_UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)
"""Dtypes that torch can store and convert, but hardly compute with."""


@dataclass(frozen=True)
class TraceSpec:
    """Facts that must be equal in the trace and in the model.

    Attributes:
        num_experts: E, routed experts only, logical ids. top_k: K.
        layers: module path of each recorded MoE block, in the order of the trace's layer axis.

    Raises:
        TraceError: sizes out of range, or layer names that are missing, repeated or not strings.
    """

    num_experts: int
    top_k: int
    layers: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in ("num_experts", "top_k"):
            size = getattr(self, name)
            if isinstance(size, bool) or not isinstance(size, int):
                raise TraceError(f"{name} must be an integer, got {size!r}; take it from the model's configuration")
        if self.num_experts < 1 or not 1 <= self.top_k <= self.num_experts:
            raise TraceError(
                f"a trace needs num_experts >= 1 and 1 <= top_k <= num_experts, got num_experts {self.num_experts} and "
                f"top_k {self.top_k}; take both from the model's configuration"
            )
        bad = [name for name in self.layers if not isinstance(name, str) or not name]
        if bad or not self.layers:
            raise TraceError(f"layers must be module paths, got {list(self.layers)}; give every layer its name")
        if len(set(self.layers)) != len(self.layers):
            repeated = sorted({name for name in self.layers if self.layers.count(name) > 1})
            raise TraceError(f"layers {repeated} occur more than once; every layer has one place in a trace")

    @property
    def dtype(self) -> torch.dtype:
        """Storage dtype of ids: a function of E alone, so that two traces of one model always fit together."""
        return id_dtype(self.num_experts)

    @property
    def validity_bytes(self) -> int:
        return -(-self.top_k // 8)

    @property
    def bytes_per_token(self) -> int:
        """Ids and validity of one token over all layers."""
        return len(self.layers) * (self.top_k * self.dtype.itemsize + self.validity_bytes)

    def positions(self, layers: Sequence[str]) -> list[int]:
        """Index of each named layer.

        Raises:
            TraceError: a layer that this trace does not have; names the nearest differences.
        """
        unknown = [name for name in layers if name not in self.layers]
        if unknown:
            raise TraceError(
                f"the trace has no layers {unknown[:4]} ({len(unknown)} of {len(layers)} are unknown); it has "
                f"{list(self.layers[:4])}{' ...' if len(self.layers) > 4 else ''}; record this model, exclude "
                f"them from the session, or pass plan(layers=...) a mapping from the session's names to the trace's"
            )
        return [self.layers.index(name) for name in layers]


def layer_names(layers: Iterable[str]) -> tuple[str, ...]:
    """Of a list of module paths; one string would be taken for a list of letters."""
    if isinstance(layers, str):
        raise TraceError(f"layers must be a list of module paths, got the string {layers!r}; put it into a list")
    return tuple(layers)


def integer_tensor(value: object, name: str) -> Tensor:
    """`value`, which must be a tensor of integers: anything else would be truncated or fail later.

    Raises:
        TraceError: it is not.
    """
    if not isinstance(value, Tensor):
        raise TraceError(f"{name} must be a tensor of integers, got {type(value).__name__}; pass torch.as_tensor(...)")
    if value.is_floating_point() or value.is_complex() or value.dtype == torch.bool:
        raise TraceError(f"{name} must be integers, got {value.dtype}; convert it where it is made")
    return value


def id_dtype(num_experts: int) -> torch.dtype:
    """uint8 up to 256 experts, int16 up to 32768, else int32."""
    if num_experts <= 256:
        return torch.uint8
    return torch.int16 if num_experts <= 32768 else torch.int32


def pack_bits(mask: Tensor) -> Tensor:
    """bool `[..., K]` -> uint8 `[..., ceil(K/8)]`, slot k at bit k%8 of byte k//8."""
    top_k = mask.shape[-1]
    width = -(-top_k // 8)
    padded = torch.nn.functional.pad(mask.to(torch.uint8), (0, width * 8 - top_k))
    weights = 1 << torch.arange(8, device=mask.device, dtype=torch.uint8)
    return (padded.view(*mask.shape[:-1], width, 8) * weights).sum(-1, dtype=torch.uint8)


def unpack_bits(bits: Tensor, top_k: int) -> Tensor:
    """uint8 `[..., B]` -> bool `[..., K]`; no host synchronisation."""
    shifts = torch.arange(8, device=bits.device, dtype=torch.uint8)
    spread = (bits.unsqueeze(-1) >> shifts) & 1
    return spread.flatten(-2)[..., :top_k].to(torch.bool)


def token_checks(token_ids: Tensor, positions: Tensor) -> Tensor:
    """int32 check of (token id, position in its sequence) per row: any two rows differ with probability 1 - 2^-32.

    The mixing is splitmix64's finaliser (Steele et al., OOPSLA 2014), truncated.
    """
    with np.errstate(over="ignore"):
        x = token_ids.to(torch.int64).cpu().numpy().astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x = x + (positions.to(torch.int64).cpu().numpy().astype(np.uint64) + np.uint64(1)) * np.uint64(
            0xD1B54A32D192ED03
        )
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x = x ^ (x >> np.uint64(31))
    return torch.from_numpy(x.astype(np.uint32).view(np.int32).copy()).reshape(token_ids.shape)
