"""Weighted sum of a token's rows by one tree that is fixed by the expert index.

Precision: rows and weights are widened to fp32 (fp64 stays), each product is rounded once, then added; no FMA
contraction, so CPU and CUDA give the same bits. A result is never -0.0, which makes "skip" and "add zero" one thing.

Order: the experts are cut into `blocks` equal blocks. Inside a block: ascending expert, then slot, left to right.
Blocks are joined pairwise (0+1, 2+3, then those, ...); absent slots and blocks are skipped. A rank that owns whole
aligned blocks computes a subtree, which is why 1, 2, 4 and 8 ranks give the same bits.

Shape letters: M tokens to sum for, K slots each, N rows, D hidden, B blocks.
"""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from moe_layer.ops._call import call_plain
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.kernels import kernels_loaded, load_kernels

_WORKSPACE = 1 << 24  # elements of [M, B, D] partial sums held at once on the general path


def reduction_blocks(num_experts: int) -> int:
    """Number of equal expert blocks of the sum tree: the largest of 8, 4, 2, 1 that divides `num_experts`."""
    return next(blocks for blocks in (8, 4, 2, 1) if num_experts % blocks == 0)


def tree_reduce(
    rows_ND: Tensor,
    row_MK: Tensor,
    *,
    ids_MK: Tensor,
    weights_MK: Tensor | None = None,
    src_N: Tensor | None = None,
    num_experts: int,
    blocks: int,
    add_MD: Tensor | None = None,
    round_to_rows: bool = False,
    like_rows: bool = False,
) -> Tensor:
    """Sum the rows of each token in the fixed tree order.

    Args:
        rows_ND: floating `[N, D]`.
        row_MK: int32 `[M, K]`, the row of each slot, -1 = absent. A row belongs to at most one slot.
        ids_MK: int32 `[M, K]`, the expert that fixes the slot's place in the tree (ignored where absent).
        weights_MK: optional fp32 `[M, K]` factors.
        src_N: optional int32 `[N]`, the m of each row (-1: none); spares the backward an inversion of `row_MK`.
        num_experts: range of the ids.
        blocks: number of equal blocks of experts.
        add_MD: optional floating `[M, D]`, joined after the tree (a shared expert's output).
        round_to_rows: round the tree's sum to the rows' dtype before `add_MD` is joined, as a wire of that dtype would.
        like_rows: return the rows' dtype.

    Returns:
        `[M, D]` fp32 (fp64 for fp64 rows) unless `like_rows`; zeros for a token without slots.

    Raises:
        TypeError: fp64 rows on CUDA, where the kernel has no fp64 (the reference has).
    """
    if add_MD is not None:
        add_MD = add_MD.to(rows_ND.dtype if like_rows else _accumulation_dtype(rows_ND.dtype))
    load_kernels(rows_ND)
    if rows_ND.dtype == torch.float64 and rows_ND.is_cuda and kernels_loaded():
        raise TypeError(
            "rows are float64, which the CUDA kernels do not sum; convert them to float32, or start the process with "
            "MOE_LAYER_CUDA=0 to use the PyTorch reference"
        )
    op = torch.ops.moe_layer.tree_reduce
    arguments = (rows_ND, row_MK, ids_MK, weights_MK, src_N, num_experts, blocks, add_MD, round_to_rows, like_rows)
    return op(*arguments) if torch.is_grad_enabled() else call_plain(op, *arguments)


@torch.library.custom_op("moe_layer::tree_reduce", mutates_args=())
def _tree_reduce(
    rows: Tensor,
    row_index: Tensor,
    ids: Tensor,
    weights: Tensor | None,
    src: Tensor | None,
    num_experts: int,
    blocks: int,
    add: Tensor | None = None,
    round_to_rows: bool = False,
    like_rows: bool = False,
) -> Tensor:
    out = _tree_sum(rows, row_index, ids, weights, num_experts=num_experts, blocks=blocks)
    if round_to_rows:
        out = out.to(rows.dtype).to(out.dtype)
    if add is not None:
        out = out + add.to(out.dtype)
    return out.to(rows.dtype) if like_rows else out


def _tree_sum(
    rows: Tensor, row_index: Tensor, ids: Tensor, weights: Tensor | None, *, num_experts: int, blocks: int
) -> Tensor:
    M, D = row_index.shape[0], rows.shape[1]
    wide = rows.to(_accumulation_dtype(rows.dtype)).contiguous()
    if M == 0 or rows.shape[0] == 0:
        return wide.new_zeros(M, D)
    if weights is not None:
        wide, row_index = _scaled(wide, row_index, weights)
    row_MK, block_MK = _in_tree_order(row_index, ids, num_experts=num_experts, blocks=blocks)
    if row_MK.shape[1] <= 4:
        return _sum_two_chains(wide, row_MK, block_MK=block_MK, blocks=blocks)
    step = max(1, _WORKSPACE // (blocks * max(D, 1)))
    parts = [
        _sum_blocks(wide, row_MK[i : i + step], block_MK=block_MK[i : i + step], blocks=blocks)
        for i in range(0, M, step)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts)


@_tree_reduce.register_fake
def _(rows, row_index, ids, weights, src, num_experts, blocks, add=None, round_to_rows=False, like_rows=False):  # type: ignore[no-untyped-def]
    dtype = rows.dtype if like_rows else _accumulation_dtype(rows.dtype)
    return rows.new_empty(row_index.shape[0], rows.shape[1], dtype=dtype)


def _accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def _scaled(rows_ND: Tensor, row_MK: Tensor, weights_MK: Tensor) -> tuple[Tensor, Tensor]:
    """Products of rows and weights, one per slot, and the slots' rows among them."""
    flat = row_MK.flatten()
    product_PD = rows_ND.index_select(0, flat.clamp_min(0)) * weights_MK.to(rows_ND.dtype).reshape(-1, 1)
    slot_MK = torch.arange(flat.numel(), dtype=torch.int32, device=flat.device).view_as(row_MK)
    return product_PD, torch.where(row_MK >= 0, slot_MK, -1)


def _in_tree_order(row_MK: Tensor, ids_MK: Tensor, *, num_experts: int, blocks: int) -> tuple[Tensor, Tensor]:
    """Rows by ascending (expert, slot) with the absent last, and the block of each (`blocks` or above when absent)."""
    end = num_experts * _next_power_of_two(blocks) // blocks  # so that an absent slot gets a block outside the tree
    key_MK, order_MK = torch.where(row_MK >= 0, ids_MK, end).sort(dim=1, stable=True)
    return row_MK.gather(1, order_MK), key_MK * blocks // num_experts


def _next_power_of_two(value: int) -> int:
    return 1 << (value - 1).bit_length()


def _sum_two_chains(rows_ND: Tensor, row_MK: Tensor, *, block_MK: Tensor, blocks: int) -> Tensor:
    """K <= 4: addition commutes, so every tree is one chain ((a+b)+c)+d or the join of two, (a+b)+(c+d)."""
    M, K = row_MK.shape
    if K > 1:
        order_CK, split_C = _chain_table(K, _next_power_of_two(blocks).bit_length() + 1, str(row_MK.device))
        code_M = _heights_code(block_MK, base=_next_power_of_two(blocks).bit_length() + 1)
        row_MK = row_MK.gather(1, order_CK.index_select(0, code_M))
        first_M = split_C.index_select(0, code_M)
    else:
        first_M = torch.ones(M, dtype=torch.int64, device=row_MK.device)
    if K < 4:
        return _sum_bags(rows_ND, row_MK.flatten(), length_Q=None, per_bag=K)
    length_M2 = torch.stack((first_M, K - first_M), dim=1)
    chains_M2D = _sum_bags(rows_ND, row_MK.flatten(), length_Q=length_M2.flatten(), per_bag=K).view(M, 2, -1)
    return chains_M2D[:, 0] + chains_M2D[:, 1]


def _heights_code(block_MK: Tensor, *, base: int) -> Tensor:
    """The tree's shape as one number: digits are the levels at which neighbouring slots meet."""
    differ = block_MK[:, 1:] ^ block_MK[:, :-1]
    height = torch.zeros_like(differ)
    for bit in range(base - 1):
        height += differ >= (1 << bit)
    code_M = height[:, 0].long()
    for i in range(1, height.shape[1]):
        code_M += height[:, i] * base**i
    return code_M


@lru_cache(maxsize=64)
def _chain_table(slots: int, base: int, device: str) -> tuple[Tensor, Tensor]:
    """For each tree shape: the order in which its leaves are added, and how many belong to the first chain."""

    def chain(lo: int, hi: int, heights: list[int]) -> tuple[list[int], int]:
        if hi - lo == 1:
            return [lo], 1
        root = max(range(lo, hi - 1), key=lambda i: (heights[i], i))
        (left, _), (right, _) = chain(lo, root + 1, heights), chain(root + 1, hi, heights)
        if len(right) == 1:
            return left + right, hi - lo
        if len(left) == 1:
            return right + left, hi - lo
        return left + right, len(left)

    shapes = [[code // base**i % base for i in range(slots - 1)] for code in range(base ** (slots - 1))]
    chains = [chain(0, slots, heights) for heights in shapes]
    order = torch.tensor([order for order, _ in chains], device=device)
    return order, torch.tensor([split for _, split in chains], device=device)


def _sum_blocks(rows_ND: Tensor, row_MK: Tensor, *, block_MK: Tensor, blocks: int) -> Tensor:
    """Any K: one partial sum per block, then blocks pairwise (an odd one is carried up)."""
    M = row_MK.shape[0]
    every_B = torch.arange(blocks, dtype=block_MK.dtype, device=block_MK.device)
    length_MB = (block_MK.unsqueeze(2) == every_B).sum(1)
    sums = _sum_present(rows_ND, row_MK.flatten(), length_MB.flatten()).view(M, blocks, -1)
    while sums.shape[1] > 1:
        pairs = sums.shape[1] // 2
        joined = sums[:, 0 : 2 * pairs : 2] + sums[:, 1 : 2 * pairs : 2]
        sums = joined if sums.shape[1] % 2 == 0 else torch.cat((joined, sums[:, -1:]), dim=1)
    return sums[:, 0]


def _sum_bags(rows_ND: Tensor, row_P: Tensor, *, length_Q: Tensor | None, per_bag: int) -> Tensor:
    """Left-to-right sums of consecutive runs; the lengths count absent entries too. None: runs of `per_bag`."""
    if length_Q is None:
        bags = row_P.numel() // per_bag
        length_Q = torch.full((bags,), per_bag, dtype=torch.int64, device=row_P.device)
    present_P = row_P >= 0
    if not row_P.is_cuda and bool(present_P.all()):
        return _embedding_sum(rows_ND, row_P, length_Q)
    before_P1 = torch.nn.functional.pad(present_P.cumsum(0), (1, 0))
    end_Q = length_Q.cumsum(0)
    real_Q = before_P1.index_select(0, end_Q) - before_P1.index_select(0, end_Q - length_Q)
    return _sum_present(rows_ND, row_P, real_Q)


def _sum_present(rows_ND: Tensor, row_P: Tensor, length_Q: Tensor) -> Tensor:
    """As above; the lengths count present entries only."""
    present_P = row_P >= 0
    target_P = torch.where(present_P, present_P.cumsum(0) - 1, row_P.numel())
    packed = row_P.new_zeros(row_P.numel() + 1).scatter_(0, target_P, row_P)
    return _embedding_sum(rows_ND, packed[:-1], length_Q)


def _embedding_sum(rows_ND: Tensor, row_P: Tensor, length_Q: Tensor) -> Tensor:
    # embedding_bag adds a bag's rows one after the other from zero, without temporaries: 5x faster on a CPU than
    # gather and add. Entries past the last offset (absent ones) fall into one bag more, which is cut off: with
    # include_last_offset the fp64 and CUDA kernels would add them to the last token.
    offset_Q1 = torch.nn.functional.pad(length_Q.cumsum(0), (1, 0)).to(row_P.dtype)
    return torch.embedding_bag(rows_ND, row_P, offset_Q1, False, 0, False, None, False)[0][:-1]


@torch.library.custom_op("moe_layer::tree_reduce_bwd", mutates_args=())
def _tree_reduce_bwd(
    d_out: Tensor, rows: Tensor | None, row_index: Tensor, weights: Tensor | None, src: Tensor | None, num_rows: int
) -> tuple[Tensor, Tensor]:
    """Gradients in `d_out`'s dtype: d_rows `[N, D]` (zeros for rows of no token) and d_weights `[M, K]` (or `[0]`)."""
    d_out = d_out.contiguous()
    M, K = row_index.shape
    if src is None:
        slot_MK = torch.arange(M * K, device=row_index.device).view(M, K)
        target = torch.where(row_index >= 0, row_index, num_rows).flatten().long()
        slot_N = torch.full((num_rows + 1,), -1, device=row_index.device).scatter_(0, target, slot_MK.flatten())[:-1]
        src = torch.where(slot_N >= 0, slot_N // max(K, 1), -1)
    d_rows = gather_rows(d_out, src)
    if weights is None:
        return d_rows, d_out.new_zeros(0)
    assert rows is not None
    flat = torch.where(row_index >= 0, row_index, num_rows).flatten().long()
    weight_N = weights.to(d_out.dtype).new_zeros(num_rows + 1).scatter_(0, flat, weights.to(d_out.dtype).flatten())[:-1]
    dot_N = torch.nn.functional.pad((rows.to(d_out.dtype) * d_rows).sum(1), (0, 1))
    return d_rows * weight_N.unsqueeze(1), dot_N.index_select(0, flat).view(M, K)


@_tree_reduce_bwd.register_fake
def _(d_out, rows, row_index, weights, src, num_rows):  # type: ignore[no-untyped-def]
    d_weights = d_out.new_empty(0) if weights is None else d_out.new_empty(row_index.shape)
    return d_out.new_empty(num_rows, d_out.shape[1]), d_weights


def _setup_context(ctx, inputs, output):  # type: ignore[no-untyped-def]
    rows, row_index, _ids, weights, src, _num_experts, _blocks, add, _round, _like = inputs
    ctx.set_materialize_grads(False)
    ctx.num_rows, ctx.rows_dtype = rows.shape[0], rows.dtype
    ctx.weights_dtype = None if weights is None else weights.dtype
    ctx.add_dtype = None if add is None else add.dtype
    ctx.save_for_backward(None if weights is None else rows, row_index, weights, src)


def _backward(ctx, d_out):  # type: ignore[no-untyped-def]
    if d_out is None:
        return (None,) * 10
    rows, row_index, weights, src = ctx.saved_tensors
    d_add = None if ctx.add_dtype is None else d_out.to(ctx.add_dtype)
    d_out = d_out.to(_accumulation_dtype(d_out.dtype))
    d_rows, d_weights = torch.ops.moe_layer.tree_reduce_bwd(d_out, rows, row_index, weights, src, ctx.num_rows)
    d_weights = None if weights is None else d_weights.to(ctx.weights_dtype)
    return d_rows.to(ctx.rows_dtype), None, None, d_weights, None, None, None, d_add, None, None


_tree_reduce.register_autograd(_backward, setup_context=_setup_context)
