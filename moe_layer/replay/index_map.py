"""Which row of a trace each token of a micro-batch is: int64 maps, -1 = pad. Compose them by indexing.

A trace holds its sequences one after the other without pads; `lengths` are the rows per sequence. Each map works for
token ids as for routes: `ids[index]` with pads masked is the batch itself, so one map cannot disagree with the other.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.spec import integer_tensor


def packed_index(lengths: Sequence[int], *, align: int = 1, total: int | None = None) -> Tensor:
    """`[T]`: sequences back to back, each padded to a multiple of `align`, the end padded up to `total`.

    Raises:
        TraceError: negative lengths, `align` below 1, or more tokens than `total`.
    """
    _check_lengths(lengths)
    if align < 1:
        raise TraceError(f"align must be at least 1, got {align}")
    parts, start = [], 0
    for length in lengths:
        padded = -(-length // align) * align
        parts.append(_padded(torch.arange(start, start + length), padded))
        start += length
    index = torch.cat(parts) if parts else torch.zeros(0, dtype=torch.int64)
    return index if total is None else _padded(index, total)


def mask_index(mask: Tensor) -> Tensor:
    """`[B, S]` from an attention mask `[B, S]` (left, right or inner padding): row b's True entries are sequence b.

    Raises:
        TraceError: a mask that is not `[B, S]`.
    """
    if mask.ndim != 2:
        raise TraceError(f"mask must be [batch, sequence], got {tuple(mask.shape)}")
    real = mask.detach().cpu().to(torch.bool)
    index = torch.full(real.shape, -1, dtype=torch.int64)
    index[real] = torch.arange(int(real.sum()))
    return index


def left_pad_index(lengths: Sequence[int], *, width: int | None = None) -> Tensor:
    """`[B, S]`: one sequence a row, pads on the left.

    Raises:
        TraceError: negative lengths, or one above `width`.
    """
    _check_lengths(lengths)
    width = max(lengths, default=0) if width is None else width
    if any(length > width for length in lengths):
        raise TraceError(f"a sequence of {max(lengths)} tokens does not fit into rows of {width}; raise width")
    return mask_index(torch.arange(width).unsqueeze(0) >= width - torch.tensor(list(lengths)).unsqueeze(1))


def cp_contiguous_index(lengths: Sequence[int], *, size: int, rank: int) -> Tensor:
    """`[T/size]`: each sequence, padded to a multiple of `size`, cut into `size` equal parts."""
    _check_rank(size, rank)
    return _per_sequence(lengths, size, lambda index: index.tensor_split(size)[rank])


def cp_zigzag_index(lengths: Sequence[int], *, size: int, rank: int) -> Tensor:
    """`[T/size]`: each sequence in 2*size chunks, rank r has chunks r and 2*size-1-r (Megatron, TransformerEngine)."""
    _check_rank(size, rank)

    def pick(index: Tensor) -> Tensor:
        chunks = index.tensor_split(2 * size)
        return torch.cat((chunks[rank], chunks[2 * size - 1 - rank]))

    return _per_sequence(lengths, 2 * size, pick)


def sp_index(index: Tensor, *, size: int, rank: int) -> Tensor:
    """`[T/size]`: the sequence-parallel slice of a flattened map, padded to a multiple of `size`."""
    _check_rank(size, rank)
    flat = index.reshape(-1)
    return _padded(flat, -(-flat.numel() // size) * size).tensor_split(size)[rank]


def generation_index(prompt_mask: Tensor, *, steps: int) -> Tensor:
    """Rows recorded by a left-padded, cached generation, per token: `[B, P + steps]`.

    The prefill call gives B*P rows and each of the `steps` decoding calls B; pads of the prompt map to -1. `steps` is
    the
    number of new tokens minus one: the last sampled token is never run through the model.

    Raises:
        TraceError: a mask that is not `[B, P]`, or negative `steps`.
    """
    if prompt_mask.ndim != 2 or steps < 0:
        raise TraceError(
            f"prompt_mask must be [batch, prompt] and steps from 0, got {tuple(prompt_mask.shape)}, {steps}"
        )
    batch, prompt = prompt_mask.shape
    first = torch.arange(batch * prompt).view(batch, prompt)
    first = torch.where(prompt_mask.detach().cpu().to(torch.bool), first, -1)
    later = batch * prompt + torch.arange(steps * batch).view(steps, batch).t()
    return torch.cat((first, later), dim=1)


def _per_sequence(lengths: Sequence[int], multiple: int, pick: Callable[[Tensor], Tensor]) -> Tensor:
    _check_lengths(lengths)
    parts, start = [], 0
    for length in lengths:
        parts.append(pick(_padded(torch.arange(start, start + length), -(-length // multiple) * multiple)))
        start += length
    return torch.cat([part for part in parts if part.numel()] or [torch.zeros(0, dtype=torch.int64)])


def _padded(index: Tensor, length: int) -> Tensor:
    if index.numel() > length:
        raise TraceError(f"{index.numel()} tokens do not fit into {length}; raise the total")
    return torch.nn.functional.pad(index, (0, length - index.numel()), value=-1)


def _check_lengths(lengths: Sequence[int]) -> None:
    if any(length < 0 for length in lengths):
        raise TraceError(f"lengths must be the rows of each sequence, got {list(lengths)[:8]}")


def _check_rank(size: int, rank: int) -> None:
    if size < 1 or not 0 <= rank < size:
        raise TraceError(f"rank {rank} must lie in [0, {size})")


def inverse_index(index: Tensor, *, rows: int) -> Tensor:
    """`[rows]`: place in the flattened `index` of each row it names, -1 for rows it does not: for `Recording.trace`.

    Raises:
        TraceError: `index` is no integer tensor, names a row twice, or one outside `rows`.
    """
    flat = integer_tensor(index, "index").detach().cpu().to(torch.int64).reshape(-1)
    if flat.numel() and int(flat.max()) >= rows:
        raise TraceError(f"the map names row {int(flat.max())} of {rows} rows; it was made for another recording")
    places = torch.full((rows,), -1, dtype=torch.int64)
    used = flat >= 0
    named = flat[used]
    places[named] = torch.arange(flat.numel())[used]
    if int((places >= 0).sum()) != len(named):
        twice = int(torch.bincount(named).argmax())
        raise TraceError(f"the map names row {twice} more than once; a row has one place in the recording")
    return places
