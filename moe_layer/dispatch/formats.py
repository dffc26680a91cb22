"""Token formats: how dispatched rows look on the wire, and their backward dual, the d(sum) rows of combine's backward.

| format | payload of a row | msg_bytes |
|---|---|---|
| input | the row itself | D * element size |
| fp8_1x128 | e4m3 values, one fp32 scale per 128 columns (the last block may be shorter) | D + 4 * ceil(D / 128) |

A row is encoded once at its source and decoded where it arrives, also when it need not travel (`round_rows`,
`round_gradient`): numerics must not depend on R. The gradient passes straight through the rounding of rows: d(x) is
that of the rounded x (a straight-through estimator). The d(sum) rows are rounded themselves, as they travel.

Precision of fp8_1x128: scale = largest finite magnitude of the block / 448 (at least 2^-126, so that a block of zeros
stays zeros); values are divided by it and rounded to nearest even: the error is at most 2^-4 of an element or 2^-10 of
the scale. Decoding multiplies in fp32 and rounds to the rows' dtype. NaN and infinities arrive as NaN in their place
and do not disturb the block: e4m3 has no infinity, and torch versions differ in what a cast makes of one.

Shape letters: T tokens, C compact rows, D hidden, B blocks of 128 columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch.wire import row_bytes
from moe_layer.errors import ConfigError, RoutingError
from moe_layer.ops.cast import cast
from moe_layer.ops.fp8_rows import BLOCK, fp8_decode, fp8_encode


class TokenFormat(Protocol):
    """A wire format for rows; every rank uses the same one. Pass your own to `make_dispatcher(token_format=...)`.

    Each row is encoded by itself: which rows travel together differs between backends and numbers of ranks.
    """

    @property
    def hidden(self) -> int:
        """Columns D of a row."""
        ...

    @property
    def msg_bytes(self) -> int:
        """Bytes of one row's payload; checked against what `encode` returns."""
        ...

    @property
    def row_alignment(self) -> int:
        """`dispatch.alignment` must be a multiple of this: rows per expert that readers of the payload ask for."""
        ...

    def encode(self, x_TD: Tensor) -> Sequence[Tensor]:
        """Payload: contiguous tensors `[T, ...]` of dtypes that can be indexed (float8 viewed as uint8). Without
        autograd."""
        ...

    def decode(self, payload: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
        """Rows `[C, D]` in `dtype` of any payload rows; zero bytes (padding) must not become errors."""
        ...


@dataclass(frozen=True)
class InputFormat:
    """Rows as they are."""

    hidden: int
    dtype: torch.dtype
    row_alignment: int = 1

    @property
    def msg_bytes(self) -> int:
        return self.hidden * self.dtype.itemsize

    def encode(self, x_TD: Tensor) -> list[Tensor]:
        return [x_TD]

    def decode(self, payload: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
        return cast(payload[0], dtype)


@dataclass(frozen=True)
class Fp8BlockFormat:
    """fp8_1x128: see the head of this file. Rows are decoded before the experts see them, so any alignment will do."""

    hidden: int
    row_alignment: int = 1

    @property
    def num_blocks(self) -> int:
        return -(-self.hidden // BLOCK)

    @property
    def msg_bytes(self) -> int:
        return self.hidden + 4 * self.num_blocks

    def encode(self, x_TD: Tensor) -> list[Tensor]:
        """uint8 `[T, D]` (e4m3fn bits) and fp32 scales `[T, B]`."""
        return fp8_encode(x_TD)

    def decode(self, payload: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
        values_CD, scale_CB = payload
        return fp8_decode(values_CD, scale_CB, dtype=dtype)


def check_format(config: DispatchConfig, token_format: TokenFormat | None) -> None:
    """Raise ConfigError unless `make_dispatcher`'s `token_format` fits the configuration."""
    if token_format is None:
        return
    numbers = [name for name in ("hidden", "msg_bytes", "row_alignment") if not hasattr(token_format, name)]
    calls = [name for name in ("encode", "decode") if not callable(getattr(token_format, name, None))]
    if numbers or calls:
        raise ConfigError(
            f"token_format is {type(token_format).__name__} and lacks {', '.join(numbers + calls)}; give it the "
            "members of moe_layer.dispatch.TokenFormat"
        )
    if config.dispatch_format != "input":
        raise ConfigError(
            f"dispatch.dispatch_format ({config.dispatch_format}) contradicts the token_format that was passed; leave "
            "the key at input or pass none"
        )
    if config.alignment % token_format.row_alignment:
        raise ConfigError(
            f"dispatch.alignment ({config.alignment}) must be a multiple of the token format's row_alignment "
            f"({token_format.row_alignment}); raise dispatch.alignment"
        )


def describe_format(token_format: TokenFormat | None) -> str | None:
    """What ranks compare at bind about a format that the configuration does not name."""
    if token_format is None:
        return None
    return f"{type(token_format).__name__} of {token_format.hidden} columns in {token_format.msg_bytes} bytes"


def format_for(
    config: DispatchConfig, token_format: TokenFormat | None, *, hidden: int, dtype: torch.dtype
) -> TokenFormat:
    """The format of rows `[T, hidden]`: the caller's, or the one that the configuration names.

    Rows of one byte per element (quantised by the caller) travel as they are under any `dispatch_format`.

    Raises:
        RoutingError: the caller's format is for another width.
    """
    if token_format is None:
        rounds = config.dispatch_format == "fp8_1x128" and dtype.itemsize > 1
        return Fp8BlockFormat(hidden) if rounds else InputFormat(hidden, dtype)
    if token_format.hidden != hidden:
        raise RoutingError(
            f"rows have {hidden} columns but the token format is for {token_format.hidden}; make one of their width"
        )
    return token_format


def encode_rows(token_format: TokenFormat, x_TD: Tensor) -> list[Tensor]:
    """The payload of rows that travel.

    Raises:
        ConfigError: the format's `msg_bytes` is not what it sends, or it does not send a row for each row.
    """
    payload = list(token_format.encode(x_TD))
    if any(part.ndim == 0 or part.shape[0] != x_TD.shape[0] for part in payload):
        raise ConfigError(
            f"token format {type(token_format).__name__} encodes {x_TD.shape[0]} rows as shapes "
            f"{[tuple(part.shape) for part in payload]}; encode must return tensors [T, ...]"
        )
    found = row_bytes(payload)
    if found != token_format.msg_bytes:
        raise ConfigError(
            f"token format {type(token_format).__name__} encodes a row in {found} bytes but says msg_bytes "
            f"{token_format.msg_bytes}; correct msg_bytes"
        )
    return payload


def decode_rows(token_format: TokenFormat, payload: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
    """`[C, hidden]` in `dtype` of the payload of C rows.

    Raises:
        ConfigError: the format decodes to something else.
    """
    rows_CD = token_format.decode(payload, dtype=dtype)
    wanted = (payload[0].shape[0], token_format.hidden)
    if tuple(rows_CD.shape) != wanted or rows_CD.dtype != dtype:
        raise ConfigError(
            f"token format {type(token_format).__name__} decodes to {tuple(rows_CD.shape)} {rows_CD.dtype}, expected "
            f"{wanted} {dtype}; decode must return rows [C, hidden] in the dtype that it is given"
        )
    return rows_CD


def round_rows(x_TD: Tensor, token_format: TokenFormat) -> Tensor:
    """x as it arrives, for rows that need not travel; the gradient passes straight through."""
    return x_TD if isinstance(token_format, InputFormat) else _RoundRows.apply(x_TD, token_format)


def round_gradient(values: Tensor, token_format: TokenFormat, *, dtype: torch.dtype) -> Tensor:
    """`values`, whose gradient `[T, D]` arrives as if it had travelled in `dtype`, x's, under the format."""
    return values if isinstance(token_format, InputFormat) else _RoundGradient.apply(values, token_format, dtype)


def after_trip(x_TD: Tensor, token_format: TokenFormat) -> Tensor:
    """x as it arrives, in its dtype. Not for autograd."""
    if isinstance(token_format, InputFormat):
        return x_TD
    return decode_rows(token_format, encode_rows(token_format, x_TD), dtype=x_TD.dtype)


class _RoundRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, token_format: TokenFormat) -> Tensor:
        return after_trip(x_TD, token_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _RoundGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, token_format: TokenFormat, dtype: torch.dtype) -> Tensor:
        ctx.token_format, ctx.dtype = token_format, dtype
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return after_trip(gradient.to(ctx.dtype), ctx.token_format).to(gradient.dtype), None, None
