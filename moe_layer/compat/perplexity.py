"""Perplexity's all-to-all interface (pplx-kernels, pplx-garden) over any of this package's dispatchers, with routing
probabilities in the rows' order on request.

Replace `pplx_kernels.AllToAll` or `P2PAllToAll` by `AllToAll`. What differs, all of it deliberate: any device and any
backend of `DispatchConfig`; construction (`expert_padding` is `config.alignment`), keyword arguments only, `dispatch`
takes the weights in either case, and `context.close()` stands for `destroy()`; rows of an expert come in a fixed order
(source rank, token); index -1 (0xFFFFFFFF as uint32) is a slot that is not routed; `out_expert_prob` is new
(pplx-garden#7); a buffer that is too small is an error before anything is written.

Who multiplies: `combine`, always, and only at home: y[t] = sum_k weights[t, k] * expert_y[row of (t, k)], in fp32 by
the fixed tree of docs/design.md section 3 (fp64 for fp64 rows). `dispatch` never multiplies: with `out_expert_prob` it
forwards `weights` beside the rows, 4K bytes a token and destination rank; without, no probability leaves the rank. An
expert that multiplies by the forwarded probability itself passes ones as `weights` to `combine`. Exception: under
`backend: replicated` every rank holds all weights, so each weights its own experts' rows before the group's sum.

For inference: results are written into the caller's buffers and autograd does not follow them (tensors that require
grad are refused while grad mode is on). To train, use `moe_layer.dispatch.make_dispatcher`.

Shape letters: T tokens, K slots, H hidden, S scales a token, E experts, L local experts, R ranks, N rows, C rows that
a padded buffer holds per expert.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moe_layer.compat.perplexity_buffers import (
    Rows,
    RowTarget,
    check_halves,
    check_no_grad,
    check_scales,
    check_slots,
    check_tensor,
    merge_bytes,
    own_weights,
    real_tokens,
)
from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.dispatch.base import homeward
from moe_layer.errors import CapacityError, ConfigError
from moe_layer.types import Received, Routing

if TYPE_CHECKING:
    from moe_layer.parallel.context import ParallelContext

_FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


@dataclass
class _Call:
    """One dispatch and its combine. ids_TK: int32 as given; widths: bytes a row of x, scales, weights; trip: handle and
    token between a send and its recv."""

    ids_TK: Tensor
    widths: tuple[int, int, int]
    trip: tuple[Any, Tensor] | None
    received: Received | None = None
    rows: Rows | None = None
    combining: bool = False


class AllToAll:
    """Dispatch and combine of one layer. An object has one call in flight; interleave calls through several objects,
    which all ranks use in the same order.

    Args:
        config: None is `DispatchConfig(apply_probs="source")`; under static capacity `max_tokens_per_rank` is
            filled in.
        context: the ranks; None is one rank. With more, construction is a collective call.
        num_experts, experts_per_token, hidden_dim: E, K, H.
        max_num_tokens: most tokens a rank may send. No expert gets more than R * max_num_tokens rows, no rank more
            than R * max_num_tokens * min(K, L), plus pads under `alignment`.
        in_dtype: of `dp_x` and `out_expert_x`; any, values are moved and never read.
        layer_index: named in errors.

    Raises:
        ConfigError: the config applies probabilities elsewhere than at the source, or asks for compact or quantised
            rows.
    """

    def __init__(
        self,
        config: DispatchConfig | None = None,
        context: ParallelContext | None = None,
        *,
        num_experts: int,
        experts_per_token: int,
        hidden_dim: int,
        max_num_tokens: int,
        in_dtype: torch.dtype = torch.bfloat16,
        layer_index: int = 0,
    ) -> None:
        config = DispatchConfig(apply_probs="source") if config is None else config
        if config.apply_probs != "source" or config.rows == "compact":
            raise ConfigError(
                f"dispatch.apply_probs is {config.apply_probs} and dispatch.rows {config.rows}, but perplexity's "
                "interface weights at home and delivers expert-major rows; set apply_probs source and rows auto"
            )
        if config.dispatch_format != "input":
            raise ConfigError(
                f"dispatch.dispatch_format is {config.dispatch_format}, but perplexity's interface moves rows as they "
                "are; set it to input, quantise before dispatch and pass dp_x_scale"
            )
        if config.chunks != 1:
            raise ConfigError(
                f"dispatch.chunks is {config.chunks}, but perplexity's interface leaves it to you how many tokens a "
                "call gets; set chunks to 1"
            )
        if config.max_tokens_per_rank not in (None, max_num_tokens):
            raise ConfigError(
                f"dispatch.max_tokens_per_rank is {config.max_tokens_per_rank} and max_num_tokens {max_num_tokens}; "
                "leave the first one out"
            )
        self.config = replace(config, max_tokens_per_rank=max_num_tokens) if config.capacity == "static" else config
        self.num_experts, self.experts_per_token = num_experts, experts_per_token
        self.hidden_dim, self.max_num_tokens, self.in_dtype = hidden_dim, max_num_tokens, in_dtype
        self.num_local_experts = num_experts // (1 if context is None else context.ep_size)
        self.dispatcher = make_dispatcher(
            self.config, num_experts=num_experts, top_k=experts_per_token, context=context, layer_index=layer_index
        )
        self._call: _Call | None = None

    def dispatch(
        self,
        *,
        out_expert_num_tokens: Tensor,
        out_expert_x: Tensor,
        out_expert_prob: Tensor | None = None,
        out_expert_x_scale: Tensor | None = None,
        dp_x: Tensor,
        dp_x_scale: Tensor | None = None,
        indices: Tensor,
        weights: Tensor,
        bound_m: Tensor | None = None,
        do_send: bool = True,
        do_recv: bool = True,
    ) -> None:
        """Tokens to the ranks of their experts.

        With `do_recv=False` only the sending half runs, which returns when the counts are exchanged; the other half
        follows with `do_send=False` and the same arguments, and `dp_x` must stay unchanged in between. The receiving
        half reads the counts on the host (one synchronisation on CUDA). A dispatch need not be followed by a combine.

        Args:
            out_expert_num_tokens: int32 `[L]`, rows of each local expert, pads not counted.
            out_expert_x: `[L, C, H]`, rows of expert e first in `out_expert_x[e]`; or `[N, H]`, experts one after the
                other (each padded with zero rows to `config.alignment`). `in_dtype`. Rows past the end stay untouched.
            out_expert_prob: fp32 `[L, C]` or `[N]`: the weight of each row's slot. All ranks pass it, or none.
            out_expert_x_scale: `[L, C, S]` or `[N, S]`, dtype of `dp_x_scale`; given with it.
            dp_x: `[T, H]`, T <= max_num_tokens. dp_x_scale: `[T, S]`, any dtype; both travel as they are.
            indices: uint32, int32 or int64 `[T, K]`, global experts. weights: fp32 `[T, K]`.
            bound_m: integer, 0-d or one element: number of real tokens; later ones are not sent.

        Raises:
            ValueError: a tensor's shape, dtype, device or range is wrong; its name is in the message.
            CapacityError: an `out_` buffer is too small, or T > max_num_tokens. In the first case nothing was written
                and the call stays pending: repeat with `do_send=False` and larger buffers.
            RuntimeError: halves out of order. DispatchTimeout, RankMismatch: see docs/troubleshooting.md.
        """
        check_halves(do_send, do_recv)
        target = RowTarget(out_expert_num_tokens, out_expert_x, out_expert_prob, out_expert_x_scale)
        target.check(local=self.num_local_experts, hidden=self.hidden_dim, dtype=self.in_dtype)
        check_no_grad(out_expert_x=out_expert_x, dp_x=dp_x, weights=weights)
        with torch.no_grad():
            ids_TK = self._check_tokens(dp_x, indices, weights)
            width = check_scales(dp_x, dp_x_scale, target)
            prob_width = 0 if out_expert_prob is None else 4 * self.experts_per_token
            widths = (dp_x.element_size() * self.hidden_dim, width, prob_width)
            if do_send:
                if self._call is not None and self._call.trip is not None:
                    raise RuntimeError(f"dispatch send while {_pending(self._call)}; receive it first")
                self._call = None
                routing = self._routing(ids_TK, weights, bound_m)
                payload = merge_bytes(dp_x, dp_x_scale, None if out_expert_prob is None else weights)
                trip = self.dispatcher.dispatch_send(payload, routing)
                self._call = _Call(ids_TK, widths, trip)
            if do_recv:
                self._receive(target, widths)

    def combine(
        self,
        *,
        out_tokens: Tensor,
        indices: Tensor,
        weights: Tensor,
        expert_y: Tensor,
        bound_m: Tensor | None = None,
        do_send: bool = True,
        do_recv: bool = True,
        accumulate: bool = False,
    ) -> None:
        """The experts' rows back to their tokens, summed with `weights`.

        Args:
            out_tokens: `[T or more, H]`, dtype of `expert_y`. Rows from `bound_m` (default T) on stay untouched; a
                token without experts gets zeros.
            indices, weights: as in `dispatch`; the weights given to the sending half count.
            expert_y: `[L, C, H]` or `[N, H]`, rows where `dispatch` put them; bf16, fp16, fp32, on CPU fp64. Pads and
                rows past the end are not read.
            bound_m: see `out_tokens`.
            accumulate: add to what `out_tokens` holds, such as a shared expert's output: in fp32, rounded once. The
                receiving half decides.

        Raises: as `dispatch`; RuntimeError too when there is no received dispatch to answer.
        """
        check_halves(do_send, do_recv)
        check_no_grad(out_tokens=out_tokens, expert_y=expert_y, weights=weights)
        call = self._call
        if call is None or call.received is None or call.rows is None:
            raise RuntimeError(f"combine while {_pending(call)}; dispatch and receive first, once per combine")
        if do_send and call.combining:
            raise RuntimeError(f"combine send while {_pending(call)}; receive it first")
        if not do_send and not call.combining:
            raise RuntimeError(f"combine receive while {_pending(call)}; send first")
        with torch.no_grad():
            real_T = self._check_combine(call, out_tokens, indices, weights, expert_y, bound_m)
            if do_send:
                rows = call.rows.back_from(expert_y)
                received = homeward(call.received, dtype=expert_y.dtype, weights_TK=weights)
                if self.config.backend == "replicated":
                    received = replace(received, probs_N=own_weights(weights, received.src_N3))
                self._call = None  # an exception below ends the call
                call.trip = self.dispatcher.combine_send(rows, received)
                call.combining, self._call = True, call
            if do_recv:
                assert call.trip is not None
                self._call = None
                out_TH = out_tokens[: call.ids_TK.shape[0]]
                y_TH = self.dispatcher.combine_recv(*call.trip, out_TH if accumulate else None)
                out_TH.copy_(y_TH if real_T is None else torch.where(real_T.unsqueeze(1), y_TH, out_TH))

    def _receive(self, target: RowTarget, widths: tuple[int, int, int]) -> None:
        call = self._call
        if call is None or call.combining or (call.trip is None and call.rows is not None):
            raise RuntimeError(f"dispatch receive while {_pending(call)}; send first")
        if call.widths != widths:
            raise ValueError(
                f"bytes a row of (dp_x, dp_x_scale, out_expert_prob) are {widths}, the sending half had {call.widths}; "
                "give both halves the same arguments"
            )
        if call.received is None:
            assert call.trip is not None
            self._call = None  # an exception in the trip ends the call
            call.received = self.dispatcher.dispatch_recv(*call.trip)
            self._call = call
        rows = Rows.of(call.received)
        rows.check_room(target)
        rows.write(target, call.received, widths)
        call.rows, call.trip = rows, None

    def _check_tokens(self, dp_x: Tensor, indices: Tensor, weights: Tensor) -> Tensor:
        """indices as int32."""
        check_tensor("dp_x", dp_x, (-1, self.hidden_dim), dtypes=(self.in_dtype,))
        T = dp_x.shape[0]
        if T > self.max_num_tokens:
            raise CapacityError(f"dp_x has {T} tokens, max_num_tokens is {self.max_num_tokens}; raise it to {T}")
        return check_slots(indices, weights, shape=(T, self.experts_per_token), device=dp_x.device)

    def _routing(self, ids_TK: Tensor, weights: Tensor, bound_m: Tensor | None) -> Routing:
        real_T = real_tokens(bound_m, tokens=ids_TK.shape[0], device=ids_TK.device)
        ids_TK = ids_TK if real_T is None else torch.where(real_T.unsqueeze(1), ids_TK, -1)
        return Routing.from_ids(ids_TK, weights, num_experts=self.num_experts)

    def _check_combine(
        self, call: _Call, out: Tensor, indices: Tensor, weights: Tensor, y: Tensor, bound_m: Tensor | None
    ) -> Tensor | None:
        """Bool `[T]`: rows of `out_tokens` to be written, None for all."""
        assert call.rows is not None
        T, H = call.ids_TK.shape[0], self.hidden_dim
        shape = (self.num_local_experts, -1, H) if isinstance(y, Tensor) and y.ndim == 3 else (-1, H)
        # the CUDA sum has no fp64 kernel
        dtypes = _FLOATS[:-1] if call.ids_TK.is_cuda else _FLOATS
        check_tensor("expert_y", y, shape, dtypes=dtypes, device=call.ids_TK.device)
        call.rows.check_expert_y(y)
        check_tensor("out_tokens", out, (-1, H), dtypes=(y.dtype,), device=y.device)
        if out.shape[0] < T:
            raise CapacityError(f"out_tokens has {out.shape[0]} rows for {T} dispatched tokens; make it [{T}, {H}]")
        ids_TK = check_slots(indices, weights, shape=(T, self.experts_per_token), device=y.device)
        if not ids_TK.is_cuda and not torch.equal(ids_TK, call.ids_TK):
            raise ValueError("indices differ from those of the dispatch that this combine answers; give the same ones")
        return real_tokens(bound_m, tokens=T, device=y.device)


def _pending(call: _Call | None) -> str:
    """What the object is doing, for errors."""
    if call is None:
        return "no call is in flight"
    if call.combining:
        return "a combine was sent and not received"
    return "a dispatch was sent and not received" if call.rows is None else "a dispatch was received and not combined"
