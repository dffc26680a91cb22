"""NCCL EP (PyPI nccl-extensions, module `nccl.ep`) as a `Transport`: algorithm HIGH_THROUGHPUT, layout FLAT.

FLAT rows carry no source, so eight bf16 columns (16 bytes, the granularity of a row) travel behind each token with its
rank and index as bits; they come back in combine's sums and are cut off. The receive buffers have the static size
R * max_tokens, which every mode of the library accepts. Backward: `combine` and `dispatch` with `PassDir.BWD`.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from moe_layer.dispatch.library import Arrived, Sizes
from moe_layer.dispatch.wire import Link
from moe_layer.errors import RoutingError

_TAG = 8  # bf16 columns = two int64


def load() -> Any:
    """The module `nccl.ep`, with its torch interop beside it."""
    importlib.import_module("nccl.ep.interop.torch")
    return importlib.import_module("nccl.ep")


class NcclEpTransport:
    """See `Transport`. The ticket is the library's handle and the number of rows received."""

    def __init__(self, nccl_ep: Any, link: Link, sizes: Sizes) -> None:
        self.ep, self.sizes, self._first = nccl_ep, sizes, link.rank * sizes.max_tokens
        self._room = link.size * sizes.max_tokens
        self._communicator = nccl_ep.interop.torch.get_nccl_comm_from_group(link.group)
        config = nccl_ep.GroupConfig(
            algorithm=nccl_ep.Algorithm.HIGH_THROUGHPUT,
            num_experts=sizes.num_experts,
            max_dispatch_tokens_per_rank=sizes.max_tokens,
            max_recv_tokens_per_rank=self._room,
            max_token_bytes=2 * (sizes.hidden + _TAG),
            timeout_ns=int(link.deadline_s * 1e9),
            num_topk=sizes.top_k,
        )
        self.group = nccl_ep.Group.create(self._communicator, config)

    def dispatch(self, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Arrived:
        if bool((ids_TK < 0).any()):
            raise RoutingError(
                "dispatch.backend nccl_ep sends every slot, and some ids are -1 (padding, capacity); use all_to_all, "
                "deep_ep or nvlink for such batches"
            )
        ep, stream = self.ep, _stream(x_TD)
        total = torch.zeros(1, dtype=torch.int32, device=x_TD.device)
        info = ep.LayoutInfo(recv_total_counter=ep.Tensor(total), recv_topk_idx_kind=ep.ExpertIdKind.LOCAL)
        handle = self.group.create_handle(
            ep.Layout.FLAT, ep.Tensor(ids_TK), layout_info=info, config=ep.HandleConfig(), stream=stream
        )
        K = ids_TK.shape[1]
        rows = x_TD.new_empty(self._room, self.sizes.hidden + _TAG)
        weights_CK = weights_TK.new_empty(self._room, K)
        local_CK = ids_TK.new_empty(self._room, K)
        handle.dispatch(
            ep.DispatchInputs(tokens=ep.Tensor(self._tagged(x_TD)), topk_weights=ep.Tensor(weights_TK)),
            ep.DispatchOutputs(
                tokens=ep.Tensor(rows), topk_weights=ep.Tensor(weights_CK), topk_idx=ep.Tensor(local_CK)
            ),
            config=ep.DispatchConfig(pass_direction=ep.PassDir.FWD),
            stream=stream,
        )
        count = int(total)
        rows = rows[:count]
        source_C = rows[:, -_TAG:].contiguous().view(torch.int64)[:, 0]
        ticket = _Ticket(handle, count, x_TD.shape[0], K)
        return Arrived(rows[:, :-_TAG].contiguous(), local_CK[:count], weights_CK[:count], source_C, ticket)

    def dispatch_again(self, x_TD: Tensor, ticket: Any) -> Tensor:
        ep = self.ep
        rows = x_TD.new_empty(self._room, self.sizes.hidden + _TAG)
        ticket.handle.dispatch(
            ep.DispatchInputs(tokens=ep.Tensor(self._tagged(x_TD))),
            ep.DispatchOutputs(tokens=ep.Tensor(rows)),
            config=ep.DispatchConfig(pass_direction=ep.PassDir.BWD),
            stream=_stream(x_TD),
        )
        return rows[: ticket.rows, :-_TAG].contiguous()

    def combine(self, rows_CD: Tensor, ticket: Any) -> Tensor:
        ep = self.ep
        y_TD = rows_CD.new_empty(ticket.tokens, self.sizes.hidden + _TAG)
        ticket.handle.combine(
            ep.CombineInputs(tokens=ep.Tensor(self._whole(rows_CD, _TAG))),
            ep.CombineOutputs(tokens=ep.Tensor(y_TD)),
            config=ep.CombineConfig(pass_direction=ep.PassDir.FWD),
            stream=_stream(rows_CD),
        )
        return y_TD[:, :-_TAG].contiguous()

    def combine_back(self, rows_CD: Tensor, weights_CK: Tensor, ticket: Any) -> tuple[Tensor, Tensor]:
        ep = self.ep
        y_TD = rows_CD.new_empty(ticket.tokens, self.sizes.hidden + _TAG)
        weights_TK = weights_CK.new_empty(ticket.tokens, ticket.top_k, dtype=torch.float32)
        ticket.handle.combine(
            ep.CombineInputs(
                tokens=ep.Tensor(self._whole(rows_CD, _TAG)), topk_weights=ep.Tensor(self._whole(weights_CK.float(), 0))
            ),
            ep.CombineOutputs(tokens=ep.Tensor(y_TD), topk_weights=ep.Tensor(weights_TK)),
            config=ep.CombineConfig(pass_direction=ep.PassDir.BWD),
            stream=_stream(rows_CD),
        )
        return y_TD[:, :-_TAG].contiguous(), weights_TK

    def close(self) -> None:
        self.group.destroy()

    def _tagged(self, x_TD: Tensor) -> Tensor:
        """x with rank * max_tokens + token behind each row, as bits."""
        T = x_TD.shape[0]
        source_T = torch.arange(self._first, self._first + T, device=x_TD.device)
        tag = torch.stack((source_T, torch.zeros_like(source_T)), dim=1).view(torch.bfloat16)
        return torch.cat((x_TD, tag), dim=1)

    def _whole(self, values: Tensor, columns: int) -> Tensor:
        """Zeros behind the columns and rows, to the shape that dispatch received."""
        return torch.nn.functional.pad(values, (0, columns, 0, self._room - values.shape[0])).contiguous()


class _Ticket:
    """Frees the library's handle with the last reference (it is local to this rank, not collective)."""

    def __init__(self, handle: Any, rows: int, tokens: int, top_k: int) -> None:
        self.handle, self.rows, self.tokens, self.top_k = handle, rows, tokens, top_k

    def __del__(self) -> None:
        self.handle.destroy()


def _stream(tensor: Tensor) -> int:
    """The current CUDA stream as the integer that `nccl.ep` takes."""
    return torch.cuda.current_stream(tensor.device).cuda_stream if tensor.is_cuda else 0
