"""The caller's buffers of `moe_layer.compat.perplexity`: checks, payload bytes, and where each row lies.

A token travels as bytes, x then scales then (on request) its K weights: values are moved, never read.

Shape letters: T tokens, K slots, H hidden, L local experts, N expert-major rows, C rows a padded buffer holds per
expert, B bytes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moe_layer.errors import CapacityError
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.types import Received

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.uint16, torch.uint32, torch.uint64)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int, ...],
    *,
    dtypes: tuple[torch.dtype, ...] = (),
    device: torch.device | None = None,
    contiguous: bool = False,
) -> None:
    """Raise ValueError naming `name` unless the tensor fits; -1 in `shape` is any size."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    fits = tensor.ndim == len(shape) and all(want in (-1, have) for want, have in zip(shape, tensor.shape, strict=True))
    if not fits:
        wanted = ", ".join("any" if size < 0 else str(size) for size in shape)
        raise ValueError(f"{name} must be [{wanted}], got {list(tensor.shape)}")
    if dtypes and tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(str, dtypes))}, got {tensor.dtype}")
    if device is not None and tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}, the tokens are on {device}; put all of them on one device")
    if contiguous and not tensor.is_contiguous():
        raise ValueError(f"{name} must be contiguous, got strides {tensor.stride()}; pass a whole buffer")


def check_slots(indices: Tensor, weights: Tensor, *, shape: tuple[int, int], device: torch.device) -> Tensor:
    """`indices` as int32, where 0xFFFFFFFF as uint32 is -1; raises ValueError for a wrong shape, dtype or device.

    Raises:
        ValueError: ids that are neither -1 nor an expert.
    """
    check_tensor("indices", indices, shape, dtypes=(torch.uint32, torch.int32, torch.int64), device=device)
    check_tensor("weights", weights, shape, dtypes=(torch.float32,), device=device)
    if indices.dtype == torch.uint32:
        return indices.contiguous().view(torch.int32)
    if not indices.is_cuda and indices.numel() and not -1 <= int(indices.min()) <= int(indices.max()) < 2**31:
        raise ValueError(f"indices must be -1 or an expert, got {int(indices.min())}..{int(indices.max())}")
    return indices.to(torch.int32)


def check_halves(do_send: bool, do_recv: bool) -> None:
    if not (do_send or do_recv):
        raise ValueError("do_send and do_recv are both False; at least one half must run")


def check_no_grad(**tensors: Tensor) -> None:
    tracked = [name for name, tensor in tensors.items() if isinstance(tensor, Tensor) and tensor.requires_grad]
    if tracked and torch.is_grad_enabled():
        raise ValueError(
            f"{', '.join(tracked)} require grad, but autograd does not follow the caller's buffers; call under "
            "torch.no_grad(), or train with moe_layer.dispatch.make_dispatcher"
        )


def real_tokens(bound_m: Tensor | None, *, tokens: int, device: torch.device) -> Tensor | None:
    """Bool `[T]`: rows below `bound_m`; None without a bound. No synchronisation on CUDA.

    Raises:
        ValueError: not one integer, or (on CPU) outside [0, T].
    """
    if bound_m is None:
        return None
    if not isinstance(bound_m, Tensor):
        raise ValueError(f"bound_m must be a tensor of one integer, got {bound_m!r}")
    if bound_m.numel() != 1 or bound_m.dtype not in _INTEGERS:
        raise ValueError(f"bound_m must be one integer, got {bound_m.dtype} {list(bound_m.shape)}")
    if not bound_m.is_cuda and not 0 <= int(bound_m) <= tokens:
        raise ValueError(f"bound_m is {int(bound_m)}, it must lie in [0, {tokens}] for {tokens} tokens")
    return torch.arange(tokens, device=device) < bound_m.reshape(()).to(device=device, dtype=torch.int64)


def as_bytes(values: Tensor) -> Tensor:
    """`[..., X]` contiguous as uint8 `[rows, bytes]`, sharing memory."""
    width = values.shape[-1] * values.element_size()
    if values.numel() == 0:
        return torch.empty(values.shape[:-1].numel(), width, dtype=torch.uint8, device=values.device)
    return values.view(-1, values.shape[-1]).view(torch.uint8)


def merge_bytes(dp_x: Tensor, scale: Tensor | None, weights: Tensor | None) -> Tensor:
    """uint8 `[T, B]`: x, scales, weights; x itself where it travels alone."""
    parts = [as_bytes(part.contiguous()) for part in (dp_x, scale, weights) if part is not None]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


def gather_slot(values_NK: Tensor, slot_N: Tensor) -> Tensor:
    """Value of each row's slot, 0 where the slot is -1."""
    if values_NK.shape[0] == 0:
        return values_NK.new_zeros(slot_N.shape[0])
    value_N = values_NK.gather(1, slot_N.clamp_min(0).long().unsqueeze(1)).squeeze(1)
    return torch.where(slot_N >= 0, value_N, value_N.new_zeros(()))


def own_weights(weights_TK: Tensor, src_N3: Tensor) -> Tensor:
    """Weight of each row of this rank's own tokens, 0 for pads."""
    _, token_N, slot_N = src_N3.unbind(1)
    rows_NK = weights_TK.index_select(0, token_N.clamp_min(0)) if weights_TK.shape[0] else weights_TK.new_zeros(0, 1)
    return gather_slot(rows_NK, slot_N)


@dataclass(frozen=True)
class RowTarget:
    """The four `out_` buffers of a dispatch."""

    count_L: Tensor
    x: Tensor
    prob: Tensor | None
    scale: Tensor | None

    def check(self, *, local: int, hidden: int, dtype: torch.dtype) -> None:
        """Raise ValueError unless all of them have one layout, L experts, H columns and the right dtypes."""
        x, prob, scale = self.x, self.prob, self.scale
        if not isinstance(x, Tensor):
            raise ValueError(f"out_expert_x must be a tensor, got {type(x).__name__}")
        check_tensor("out_expert_num_tokens", self.count_L, (local,), dtypes=(torch.int32,))
        layout = (local, -1) if x.ndim == 3 else (-1,)
        check_tensor("out_expert_x", x, (*layout, hidden), dtypes=(dtype,), contiguous=True)
        layout = tuple(x.shape[:-1])
        if prob is not None:
            check_tensor("out_expert_prob", prob, layout, dtypes=(torch.float32,), device=x.device, contiguous=True)
        if scale is not None:
            check_tensor("out_expert_x_scale", scale, (*layout, -1), device=x.device, contiguous=True)


def check_scales(dp_x: Tensor, scale: Tensor | None, target: RowTarget) -> int:
    """Bytes of a token's scales; raises ValueError unless both ends have them alike."""
    check_tensor("out_expert_x", target.x, tuple(target.x.shape), device=dp_x.device)
    if (scale is None) != (target.scale is None):
        raise ValueError("dp_x_scale and out_expert_x_scale must be given together")
    if scale is None or target.scale is None:
        return 0
    check_tensor("dp_x_scale", scale, (dp_x.shape[0], target.scale.shape[-1]), device=dp_x.device)
    check_tensor("out_expert_x_scale", target.scale, tuple(target.scale.shape), dtypes=(scale.dtype,))
    return scale.shape[1] * scale.element_size()


@dataclass(frozen=True)
class Rows:
    """Where the rows of a dispatch lie.

    Attributes:
        num_rows: N of the dispatcher; used: rows up to the last offset, pads included; most: rows of the fullest
            expert; real: rows without pads.
        counts_L, offsets_L1: on the device.
    """

    num_rows: int
    used: int
    most: int
    real: int
    counts_L: Tensor
    offsets_L1: Tensor

    @classmethod
    def of(cls, received: Received) -> Rows:
        """Reads counts and offsets on the host, once."""
        L = received.counts_L.shape[0]
        host = torch.cat((received.counts_L, received.offsets_L1)).tolist()
        return cls(
            num_rows=received.probs_N.shape[0],
            used=host[-1],
            most=max(host[:L], default=0),
            real=sum(host[:L]),
            counts_L=received.counts_L,
            offsets_L1=received.offsets_L1,
        )

    def check_room(self, target: RowTarget) -> None:
        """Raise CapacityError, with the size it takes, unless the buffers hold the rows."""
        have = target.x.shape[-2]
        need, what = (self.most, "rows per expert") if target.x.ndim == 3 else (self.used, "rows")
        if need > have:
            raise CapacityError(
                f"out_expert_x holds {have} {what}, {need} arrived; give the out_ buffers room for {need} and repeat "
                "the receiving half (do_send=False)"
            )

    def check_expert_y(self, expert_y: Tensor) -> None:
        """Raise ValueError unless `expert_y` has all rows of the dispatch."""
        have, need = expert_y.shape[-2], self.most if expert_y.ndim == 3 else self.used
        if have < need:
            raise ValueError(f"expert_y has {have} rows, the dispatch delivered {need} in this layout")

    def padded(self, capacity: int) -> tuple[Tensor, Tensor]:
        """int64 `[real]` each: expert-major row, and its place in a `[L * C]` buffer."""
        device, L = self.counts_L.device, self.counts_L.shape[0]
        counts_L = self.counts_L.long()
        expert = torch.arange(L, device=device).repeat_interleave(counts_L, output_size=self.real)
        rank = torch.arange(self.real, device=device) - (counts_L.cumsum(0) - counts_L)[expert]
        return self.offsets_L1.long()[expert] + rank, expert * capacity + rank

    def write(self, target: RowTarget, received: Received, widths: tuple[int, int, int]) -> None:
        """Fill the caller's buffers. `widths`: bytes a row of x, scales, weights in `received.rows`."""
        x_NB, scale_NB, weights_NB = received.rows.split(widths, dim=1)
        pairs = [(as_bytes(target.x), x_NB)]
        if target.scale is not None:
            pairs.append((as_bytes(target.scale), scale_NB))
        if target.prob is not None:
            # a clone: one row is contiguous already, but may begin at a byte that no fp32 can begin at
            weights_NK = weights_NB.clone(memory_format=torch.contiguous_format).view(torch.float32)
            prob_N1 = gather_slot(weights_NK, received.src_N3[:, 2]).unsqueeze(1)
            pairs.append((target.prob.view(-1, 1), prob_N1))
        if target.x.ndim == 3:
            row, place = self.padded(target.x.shape[1])
            for out, values in pairs:
                out.index_copy_(0, place, values.index_select(0, row))
        else:
            for out, values in pairs:
                out[: self.used].copy_(values[: self.used])
        target.count_L.copy_(self.counts_L)

    def back_from(self, expert_y: Tensor) -> Tensor:
        """The caller's `[L, C, H]` or `[N, H]` as the dispatcher's `[num_rows, H]`; rows it does not read are zeros."""
        H = expert_y.shape[-1]
        if expert_y.ndim == 2 and expert_y.shape[0] >= self.num_rows:
            return expert_y[: self.num_rows]
        place_N = torch.full((self.num_rows,), -1, dtype=torch.int64, device=expert_y.device)
        if expert_y.ndim == 3:
            row, place = self.padded(expert_y.shape[1])
            place_N.index_copy_(0, row, place)
        else:
            place_N[: self.used] = torch.arange(self.used, device=expert_y.device)
        return gather_rows(expert_y.reshape(-1, H), place_N)
