"""`shared_expert.mode: packed`: the shared expert as group 0 of the routed experts' grouped GEMM.

One call covers T shared rows and N routed ones: routed offsets shift by T. The shared group comes first because rows
past the last offset are undefined: its place must be known on the host. Its weights are slice 0 of one `[1+L, ...]`
storage and keep their names (`shared_expert.gate_proj.weight`, ...): parameters are views of it, so that no step copies
weights. `pack` makes that storage; moving, casting or copying a layer makes it anew.

Letters: T shared rows, A shared rows with pads, N routed rows, C compact rows, D hidden, F expert width, L experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from moe_layer.experts.autograd import main_grad_of
from moe_layer.experts.compute import row_gradient, run_backward, run_forward
from moe_layer.experts.parameters import Experts, local_part
from moe_layer.experts.parts import Parts
from moe_layer.experts.shared import SharedExpert
from moe_layer.experts.spec import Layout, RowGradient, Weights
from moe_layer.ops._call import refuse_second_derivative
from moe_layer.parallel.compat import set_local
from moe_layer.types import GradientLink, Received

NAMES = (
    "experts.gate_up_proj",
    "shared_expert.gate_proj.weight",
    "shared_expert.up_proj.weight",
    "experts.down_proj",
    "shared_expert.down_proj.weight",
)


def _owners(experts: Experts, shared: SharedExpert) -> tuple[Any, ...]:
    """The parameters of `NAMES`."""
    gate, up, down = (linear.weight for linear in (shared.gate_proj, shared.up_proj, shared.down_proj))
    return experts.gate_up_proj, gate, up, experts.down_proj, down


@torch.no_grad()
def pack(experts: Experts, shared: SharedExpert) -> None:
    """Make the parameters views of joint storages, unless they are. Copies each weight once; identities stay."""
    owners = _owners(experts, shared)
    local = [local_part(owner.detach()) for owner in owners]
    if any(value.is_meta for value in local) or _joint(*local) is not None:
        return
    gate_up_1L, down_1L = _empty_joint(local[0]), _empty_joint(local[3])
    width = owners[1].shape[0]
    places = (gate_up_1L[1:], gate_up_1L[0, :width], gate_up_1L[0, width:], down_1L[1:], down_1L[0])
    for owner, value, place in zip(owners, local, places, strict=True):
        place.copy_(value)
        set_local(owner, place)


def _empty_joint(routed: Tensor) -> Tensor:
    return routed.new_empty(routed.shape[0] + 1, *routed.shape[1:])


def _joint(gate_up: Tensor, gate: Tensor, up: Tensor, down: Tensor, shared_down: Tensor) -> Weights | None:
    """The `[1+L, ...]` views behind the five tensors, None where they do not lie side by side."""
    found = []
    for routed, parts in ((gate_up, (gate, up)), (down, (shared_down,))):
        position = routed.storage_offset() - routed[:1].numel() if len(routed) else parts[0].storage_offset()
        start = position
        for part in parts:
            together = part.untyped_storage().data_ptr() == routed.untyped_storage().data_ptr()
            if not together or part.storage_offset() != position or part.dtype != routed.dtype:
                return None
            position += part.numel()
        shape = (routed.shape[0] + 1, *routed.shape[1:])
        found.append(parts[0].detach().as_strided(shape, (shape[1] * shape[2], shape[2], 1), start))
    return Weights(found[0], found[1], None, None)


def _packed_weights(tensors: tuple[Tensor, ...]) -> Weights:
    weights = _joint(*tensors)
    if weights is None:
        raise RuntimeError(
            "shared_expert.mode is packed, but the shared expert's weights no longer lie beside the routed ones in one "
            "storage (FSDP or an assignment moved one); call layer.bind(layer.router.context), keep "
            "them out of FSDP (ignored_params), or set shared_expert.mode to overlap"
        )
    return weights


@torch.compiler.disable(reason="the packed shared expert reads weights by their storage: a documented graph break")
def packed_experts(
    experts: Experts,
    shared: SharedExpert,
    received: Received,
    x_TD: Tensor,
    *,
    alignment: int = 1,
    sum_gradient: Callable[[Tensor], Tensor] | None = None,
    parts: Parts | None = None,
) -> tuple[Tensor, Tensor]:
    """`experts(received)` and `shared(x_TD)` in one grouped call.

    Args:
        experts, shared: of one layer, packed.
        received: see `Experts.forward`.
        x_TD: the shared expert's rows `[T, D]`, in the dtype of `received.rows`.
        alignment: the shared group is padded with zero rows to a multiple of this, as the others are.
        sum_gradient: applied to the shared expert's weight gradients (`replicated`: ranks share the tokens).
        parts: see `Experts.forward`.

    Returns:
        rows `[N, D]` and the shared expert's output `[T, D]`.

    Raises:
        RuntimeError: the weights do not lie in one storage. TypeError, ValueError: see `Experts.forward`.
    """
    owners = _owners(experts, shared)
    _main_grads(owners)

    def local() -> list[Tensor]:
        return [local_part(owner) for owner in owners]

    weights = local() if parts is None else parts.weights(local)
    spec = experts.spec(received, weights[0])
    ints = (received.offsets_L1, received.counts_L, received.index_N, received.row_CK, received.ids_CK)
    static = (spec, owners, received.link, sum_gradient, -x_TD.shape[0] % alignment, parts)
    rows_ND, y_TD = _PackedExperts.apply(static, ints, received.rows, received.act_probs_N, x_TD, *weights)
    if received.link is not None:
        received.link.accept(rows_ND)
    return rows_ND, y_TD


def _main_grads(owners: tuple[Any, ...]) -> list[Tensor | None]:
    return [main_grad_of(owner, name) for owner, name in zip(owners, NAMES, strict=True)]


def _layout(ints: tuple, rows: Tensor, probs_N: Tensor | None, x_TD: Tensor, pads: int) -> Layout:
    """Shared rows, their pads, then the received ones."""
    offsets, counts, index, row_CK, ids_CK = ints
    T, A = x_TD.shape[0], x_TD.shape[0] + pads
    device = rows.device
    lead_A = torch.arange(A, dtype=torch.int32, device=device)
    packed_index = None
    if index is not None and _same_memory(rows, x_TD):
        x, packed_index = rows, torch.cat((lead_A, index))
    else:
        x = torch.cat((pad(x_TD, (0, 0, 0, pads)), rows))
        packed_index = None if index is None else torch.cat((lead_A, index + A))
    K = row_CK.shape[1]
    lead_TK = pad(lead_A[:T].unsqueeze(1), (0, K - 1), value=-1)
    return Layout(
        x=x,
        index=packed_index,
        probs=None if probs_N is None else torch.cat((probs_N.new_ones(A), probs_N)),
        offsets=pad(offsets + A, (1, 0)),
        counts=pad(counts, (1, 0), value=T),
        row_CK=torch.cat((lead_TK, torch.where(row_CK >= 0, row_CK + A, -1))),
        ids_CK=torch.cat((torch.zeros_like(lead_TK), ids_CK)),
    )


def _same_memory(a: Tensor, b: Tensor) -> bool:
    return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.stride() == b.stride()


def _gradient(d_rows_ND: Tensor, d_y_TD: Tensor, link: GradientLink | None, pads: int) -> RowGradient:
    """The packed rows' gradient, still gathered from d(y) where a link brings that."""
    rows, index = row_gradient(d_rows_ND, link)
    T = d_y_TD.shape[0]
    if index is None:
        return RowGradient(torch.cat((pad(d_y_TD, (0, 0, 0, pads)), rows.to(d_y_TD.dtype))), None)
    lead_T = torch.arange(T, dtype=index.dtype, device=index.device)  # a link means alignment 1: no pads
    if _same_memory(rows, d_y_TD):
        return RowGradient(rows, torch.cat((lead_T, index)))
    return RowGradient(torch.cat((d_y_TD, rows)), torch.cat((lead_T, index + T)))


class _PackedExperts(torch.autograd.Function):
    """rows and shared output; gradients of both kinds of rows, the probabilities and the five weights."""

    @staticmethod
    def forward(ctx: Any, static: tuple, ints: tuple, rows: Tensor, probs: Tensor | None, x: Tensor, *w: Tensor) -> Any:
        spec, _, _, _, pads, _ = static
        out, h = run_forward(_layout(ints, rows, probs, x, pads), _packed_weights(w), spec)
        ctx.static, ctx.ints = static, ints
        ctx.save_for_backward(rows, probs, x, *w, h)
        T = x.shape[0]
        return out[T + pads :], out[:T]

    @staticmethod
    def backward(ctx: Any, d_rows: Tensor, d_y: Tensor) -> tuple[Any, ...]:
        refuse_second_derivative()
        spec, owners, link, sum_gradient, pads, parts = ctx.static
        rows, probs, x, *w, h = ctx.saved_tensors
        need_rows, need_probs, need_x, *need_w = ctx.needs_input_grad[2:]
        layout = _layout(ctx.ints, rows, probs, x, pads)
        needs = (need_rows or need_x, need_probs, any(need_w[:3]), any(need_w[3:]), False, False)
        gradient = _gradient(d_rows, d_y, link, pads)
        d_in, d_probs, d_gate_up, d_down, *_ = run_backward(
            gradient, h, layout, _packed_weights(tuple(w)), spec, needs, parts=parts
        )
        T = x.shape[0]
        A = T if layout.index is not None else T + pads
        d_weights = _split(d_gate_up, d_down, need_w, width=w[1].shape[0], sum_gradient=sum_gradient)
        return (
            None,
            None,
            None if d_in is None or not need_rows else d_in[A:],
            None if d_probs is None or not need_probs else d_probs[T + pads :],
            None if d_in is None or not need_x else d_in[:T],
            *_to_main_grads(owners, d_weights),
        )


def _split(
    d_gate_up: Tensor | None, d_down: Tensor | None, needs: list[bool], *, width: int, sum_gradient: Any
) -> list[Tensor | None]:
    """The five owners' gradients as views of the two joint ones."""
    parts: list[Tensor | None] = [None] * 5
    if d_gate_up is not None:
        parts[:3] = d_gate_up[1:], d_gate_up[0, :width], d_gate_up[0, width:]
    if d_down is not None:
        parts[3:] = d_down[1:], d_down[0]
    for i in (1, 2, 4) if sum_gradient is not None else ():
        part = parts[i]
        parts[i] = None if part is None else sum_gradient(part)
    return [part if need else None for part, need in zip(parts, needs, strict=True)]


def _to_main_grads(owners: tuple[Any, ...], gradients: list[Tensor | None]) -> list[Tensor | None]:
    """Gradients of owners with a `main_grad` are added there (design section 4)."""
    left = list(gradients)
    for i, (owner, main_grad) in enumerate(zip(owners, _main_grads(owners), strict=True)):
        gradient = gradients[i]
        if main_grad is not None and gradient is not None:
            main_grad.add_(gradient)
            owner.grad_added_to_main_grad = True
            left[i] = None
    return left
