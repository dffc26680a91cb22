"""DeepEP's ElasticBuffer (github.com/deepseek-ai/DeepEP, version 2) as a `Transport`: compact ("non-expanded") rows.

Backward as DeepEP intends it: of dispatch, `combine` with `topk_weights` (the gradients of the weights); of combine,
`dispatch` with the cached handle.
"""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from moe_layer.dispatch.library import Arrived, Sizes
from moe_layer.dispatch.wire import Link


def load() -> Any:
    """The module. It initialises its JIT runtime at import, so it is imported where it is used."""
    return importlib.import_module("deep_ep")


class DeepEpTransport:
    """See `Transport`. The ticket is DeepEP's handle and the rows of its receive buffers."""

    def __init__(self, deep_ep: Any, link: Link, sizes: Sizes) -> None:
        self.sizes, self._index_dtype = sizes, deep_ep.topk_idx_t
        seconds = max(1, math.ceil(link.deadline_s))
        self.buffer = deep_ep.ElasticBuffer(
            link.group,
            num_max_tokens_per_rank=sizes.max_tokens,
            hidden=sizes.hidden,
            num_topk=sizes.top_k,
            num_cpu_timeout_secs=seconds,
            num_gpu_timeout_secs=seconds,
            explicitly_destroy=True,
        )

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Arrived:
        rows, local_CK, weights_CK, handle, _ = self.buffer.dispatch(
            x_TD,
            topk_idx=ids_TK.to(self._index_dtype),
            topk_weights=weights_TK,
            num_experts=self.sizes.num_experts,
            num_max_tokens_per_rank=self.sizes.max_tokens,
            do_cpu_sync=True,
        )
        count = handle.num_recv_tokens
        source_C = handle.recv_src_metadata[:count, 0].long()
        return Arrived(rows[:count], local_CK[:count], weights_CK[:count], source_C, (handle, rows.shape[0]))

    def dispatch_again(self, x_TD: Tensor, ticket: Any) -> Tensor:
        handle, _ = ticket
        rows, *_ = self.buffer.dispatch(x_TD, handle=handle)
        return rows[: handle.num_recv_tokens]

    def combine(self, rows_CD: Tensor, ticket: Any) -> Tensor:
        handle, room = ticket
        y_TD, _, _ = self.buffer.combine(_filled(rows_CD, room), handle)
        return y_TD

    def combine_back(self, rows_CD: Tensor, weights_CK: Tensor, ticket: Any) -> tuple[Tensor, Tensor]:
        handle, room = ticket
        y_TD, weights_TK, _ = self.buffer.combine(
            _filled(rows_CD, room), handle, topk_weights=_filled(weights_CK, room)
        )
        return y_TD, weights_TK

    def close(self) -> None:
        self.buffer.destroy()


def _filled(values: Tensor, rows: int) -> Tensor:
    """The values with zero rows behind them, in as many rows as the receive buffer had."""
    return torch.nn.functional.pad(values, (0, 0, 0, rows - values.shape[0])).contiguous()
