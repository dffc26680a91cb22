"""CALL-SIGNATURE DOUBLES of `deep_ep` (version 2.1) and `nccl.ep` (nccl-extensions 0.1.0): not the libraries.

They have the names, arguments, shapes and dtypes of what the adapters call, and move rows over the gloo group that they
are given, so that the adapters can run on a CPU. Rows arrive in a shuffled order, as the libraries are free to do. An
argument that a library would refuse is an assertion here. What they cannot show is anything about the libraries' speed,
memory or failures.
"""

from __future__ import annotations

import enum
import types
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar

import torch
from torch import Tensor

from moe_layer.parallel import compat


def swap(group: Any, pieces: list[Tensor]) -> list[Tensor]:
    """One tensor `[n_r, X]` to each rank; what each rank sent here."""
    counts = torch.tensor([len(piece) for piece in pieces])
    got = torch.empty_like(counts)
    ones = [1] * len(pieces)
    compat.all_to_all(group, got, counts, out_rows=ones, in_rows=ones).wait(timedelta(seconds=20))
    source = torch.cat(pieces).contiguous()
    raw = source.view(torch.uint8)
    out = raw.new_empty(int(got.sum()), raw.shape[1])
    rows = got.tolist()
    compat.all_to_all(group, out, raw, out_rows=rows, in_rows=counts.tolist()).wait(timedelta(seconds=20))
    return list(out.view(source.dtype).split(rows))


class Wire:
    """One dispatch: who sends which tokens where, and the shuffle of what arrived."""

    def __init__(self, group: Any, ids_TK: Tensor, num_experts: int) -> None:
        self.group, self.ids_TK, self.rank = group, ids_TK, group.rank()
        self.local = num_experts // group.size()
        owner_TK = torch.where(ids_TK >= 0, ids_TK // self.local, -1)
        self.tokens = [(owner_TK == rank).any(1).nonzero()[:, 0] for rank in range(group.size())]
        token = swap(group, [t.unsqueeze(1) for t in self.tokens])
        self.sizes = [len(t) for t in token]
        self.source = torch.cat([torch.cat((torch.full_like(t, r), t), dim=1) for r, t in enumerate(token)])
        self.shuffle = torch.randperm(len(self.source), generator=torch.Generator().manual_seed(self.rank))

    def out(self, values: Tensor) -> Tensor:
        return torch.cat(swap(self.group, [values[t] for t in self.tokens]))[self.shuffle]

    def local_ids(self) -> Tensor:
        ids = self.out(self.ids_TK) - self.rank * self.local
        return torch.where((ids >= 0) & (ids < self.local), ids, -1)

    def home(self, rows: Tensor) -> Tensor:
        """Sum over the ranks, in fp32, in the rows' dtype."""
        arrived = torch.empty_like(rows)
        arrived[self.shuffle] = rows
        total = torch.zeros(len(self.ids_TK), rows.shape[1])
        for tokens, part in zip(self.tokens, swap(self.group, list(arrived.split(self.sizes))), strict=True):
            total[tokens] += part.float()
        return total.to(rows.dtype)


# ---- deep_ep ---------------------------------------------------------------------------------------------------------


class ElasticBuffer:
    """`deep_ep.ElasticBuffer` in the non-expanded mode."""

    opened: ClassVar[list[Any]] = []

    def __init__(
        self,
        group: Any,
        num_bytes: int | None = None,
        num_cpu_bytes: int = 0,
        num_max_tokens_per_rank: int = 0,
        hidden: int = 0,
        num_topk: int = 0,
        use_fp8_dispatch: bool = False,
        deterministic: bool = False,
        allow_hybrid_mode: bool = True,
        allow_multiple_reduction: bool = True,
        prefer_overlap_with_compute: bool = True,
        sl_idx: int = 3,
        num_allocated_qps: int = 0,
        num_cpu_timeout_secs: int = 300,
        num_gpu_timeout_secs: int = 100,
        explicitly_destroy: bool = False,
    ) -> None:
        assert isinstance(num_cpu_timeout_secs, int) and isinstance(num_gpu_timeout_secs, int) and num_topk and hidden
        self.group, self.most, self.hidden = group, num_max_tokens_per_rank, hidden
        self.explicitly_destroy = explicitly_destroy
        self.opened.append(self)

    def dispatch(
        self,
        x: Tensor,
        topk_idx: Tensor | None = None,
        topk_weights: Tensor | None = None,
        cumulative_local_expert_recv_stats: Tensor | None = None,
        num_experts: int | None = None,
        num_max_tokens_per_rank: int | None = None,
        expert_alignment: int | None = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
        handle: Any = None,
        do_handle_copy: bool = True,
        do_cpu_sync: bool | None = None,
        do_expand: bool = False,
        do_zero_padding: bool = False,
        use_tma_aligned_col_major_sf: bool = False,
    ) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16 and x.shape[1] == self.hidden and x.is_contiguous()
        if handle is not None:
            assert topk_idx is None and not do_cpu_sync
            return handle.wire.out(x), None, None, handle, None
        assert topk_idx is not None and topk_idx.dtype == torch.int64 and num_experts is not None
        assert topk_weights is not None and topk_weights.dtype == torch.float32
        wire = Wire(self.group, topk_idx.clone(), num_experts)
        source = wire.source[wire.shuffle]
        metadata = torch.stack((source[:, 0] * self.most + source[:, 1], torch.zeros(len(source)).long()), dim=1).int()
        handle = types.SimpleNamespace(wire=wire, num_recv_tokens=len(source), recv_src_metadata=metadata)
        return wire.out(x), wire.local_ids(), wire.out(topk_weights), handle, None

    def combine(
        self,
        x: Tensor,
        handle: Any,
        topk_weights: Tensor | None = None,
        bias: Any = None,
        num_sms: int = 0,
        num_qps: int = 0,
        previous_event: Any = None,
        previous_event_before_epilogue: Any = None,
        async_with_compute_stream: bool = False,
        allocate_on_comm_stream: bool = False,
    ) -> tuple[Any, ...]:
        assert x.dtype == torch.bfloat16 and x.is_contiguous() and x.shape[0] == handle.num_recv_tokens
        weights = None
        if topk_weights is not None:
            assert topk_weights.dtype == torch.float32 and topk_weights.shape[0] == handle.num_recv_tokens
            weights = handle.wire.home(topk_weights)
        return handle.wire.home(x), weights, None

    def destroy(self) -> None:
        assert self.explicitly_destroy
        self.opened.remove(self)


def deep_ep() -> types.ModuleType:
    module = types.ModuleType("deep_ep")
    module.ElasticBuffer, module.topk_idx_t = ElasticBuffer, torch.int64  # type: ignore[attr-defined]
    return module


# ---- nccl.ep ---------------------------------------------------------------------------------------------------------


@dataclass
class EpTensor:
    buffer: Tensor

    def __post_init__(self) -> None:
        assert self.buffer.is_contiguous() and self.buffer.ndim >= 1


class Algorithm(enum.IntEnum):
    LOW_LATENCY = 0
    HIGH_THROUGHPUT = 1


class Layout(enum.IntEnum):
    UNSET = 0
    EXPERT_MAJOR = 1
    RANK_MAJOR = 2
    FLAT = 3


class PassDir(enum.IntEnum):
    FWD = 0
    BWD = 1


class ExpertIdKind(enum.IntEnum):
    AUTO = 0
    LOCAL = 1
    GLOBAL = 2


@dataclass
class GroupConfig:
    algorithm: Algorithm = Algorithm.LOW_LATENCY
    num_experts: int = 0
    max_dispatch_tokens_per_rank: int = 0
    max_recv_tokens_per_rank: int = 0
    max_token_bytes: int = 0
    rdma_buffer_size: int = 0
    num_qp_per_rank: int = 0
    num_channels: int = 0
    max_num_sms: int = 0
    enable_mask: bool = False
    timeout_ns: int = 0
    num_topk: int = 0


@dataclass
class HandleConfig:
    dispatch_output_per_expert_alignment: int = 0


@dataclass
class DispatchConfig:
    send_only: int = 0
    round_scales: int = 0
    pass_direction: PassDir = PassDir.FWD


@dataclass
class CombineConfig:
    send_only: int = 0
    pass_direction: PassDir = PassDir.FWD


@dataclass
class LayoutInfo:
    expert_counters: EpTensor | None = None
    src_rank_counters: EpTensor | None = None
    expert_offsets: EpTensor | None = None
    recv_total_counter: EpTensor | None = None
    recv_topk_idx_kind: ExpertIdKind = ExpertIdKind.AUTO


@dataclass
class Bundle:
    """DispatchInputs, DispatchOutputs, CombineInputs and CombineOutputs."""

    tokens: EpTensor | None = None
    topk_weights: EpTensor | None = None
    scales: EpTensor | None = None
    topk_idx: EpTensor | None = None


class EpHandle:
    def __init__(self, group: EpGroup, wire: Wire) -> None:
        self.group, self.wire, self.destroyed = group, wire, False

    def dispatch(
        self, inputs: Bundle, outputs: Bundle, *, layout_info: Any = None, config: DispatchConfig, stream: Any
    ) -> None:
        backward = config.pass_direction == PassDir.BWD
        assert layout_info is None and inputs.tokens is not None and outputs.tokens is not None
        assert (inputs.topk_weights is None) == backward == (outputs.topk_weights is None) == (outputs.topk_idx is None)
        x, room = inputs.tokens.buffer, self.group.config.max_recv_tokens_per_rank
        assert x.shape[1] * x.element_size() <= self.group.config.max_token_bytes
        self._write(outputs.tokens, self.wire.out(x), room)
        if not backward:
            self._write(outputs.topk_weights, self.wire.out(inputs.topk_weights.buffer), room)  # type: ignore[union-attr]
            self._write(outputs.topk_idx, self.wire.local_ids(), room)

    def combine(self, inputs: Bundle, outputs: Bundle, *, config: CombineConfig, stream: Any) -> None:
        backward = config.pass_direction == PassDir.BWD
        assert inputs.tokens is not None and outputs.tokens is not None
        assert (inputs.topk_weights is not None) == backward == (outputs.topk_weights is not None)
        count, room = len(self.wire.source), self.group.config.max_recv_tokens_per_rank
        for given, target in ((inputs.tokens, outputs.tokens), (inputs.topk_weights, outputs.topk_weights)):
            if given is not None and target is not None:
                assert given.buffer.shape[0] == room and target.buffer.dtype == given.buffer.dtype
                target.buffer.copy_(self.wire.home(given.buffer[:count].contiguous()))

    def destroy(self) -> None:
        assert not self.destroyed
        self.destroyed = True
        self.group.handles -= 1

    @staticmethod
    def _write(target: Any, values: Tensor, room: int) -> None:
        assert target.buffer.shape[0] == room and target.buffer.dtype == values.dtype
        target.buffer[: len(values)].copy_(values)


class EpGroup:
    opened: ClassVar[list[Any]] = []

    def __init__(self, group: Any, config: GroupConfig) -> None:
        self.group, self.config, self.handles = group, config, 0

    @classmethod
    def create(cls, comm: Any, config: GroupConfig) -> EpGroup:
        assert config.algorithm == Algorithm.HIGH_THROUGHPUT and config.max_token_bytes % 16 == 0
        assert config.max_recv_tokens_per_rank >= config.max_dispatch_tokens_per_rank > 0
        assert isinstance(config.timeout_ns, int)
        made = cls(comm.group, config)
        cls.opened.append(made)
        return made

    def create_handle(
        self, layout: Layout, topk_idx: EpTensor, *, layout_info: LayoutInfo, config: HandleConfig, stream: Any
    ) -> EpHandle:
        assert layout == Layout.FLAT and topk_idx.buffer.dtype == torch.int64 and isinstance(stream, int)
        assert layout_info.recv_total_counter is not None and layout_info.recv_topk_idx_kind == ExpertIdKind.LOCAL
        wire = Wire(self.group, topk_idx.buffer.clone(), self.config.num_experts)
        layout_info.recv_total_counter.buffer.fill_(len(wire.source))
        self.handles += 1
        return EpHandle(self, wire)

    def destroy(self) -> None:
        self.opened.remove(self)


def nccl_ep() -> dict[str, types.ModuleType]:
    """The modules `nccl`, `nccl.ep` and its torch interop, for sys.modules."""
    names = ("nccl", "nccl.ep", "nccl.ep.interop", "nccl.ep.interop.torch")
    nccl, ep, interop, torch_interop = (types.ModuleType(name) for name in names)
    nccl.ep, ep.interop, interop.torch = ep, interop, torch_interop  # type: ignore[attr-defined]
    torch_interop.get_nccl_comm_from_group = lambda group=None: types.SimpleNamespace(group=group)  # type: ignore[attr-defined]
    for name, value in {
        "Tensor": EpTensor,
        "Algorithm": Algorithm,
        "Layout": Layout,
        "PassDir": PassDir,
        "ExpertIdKind": ExpertIdKind,
        "GroupConfig": GroupConfig,
        "Group": EpGroup,
        "HandleConfig": HandleConfig,
        "DispatchConfig": DispatchConfig,
        "CombineConfig": CombineConfig,
        "LayoutInfo": LayoutInfo,
        "DispatchInputs": Bundle,
        "DispatchOutputs": Bundle,
        "CombineInputs": Bundle,
        "CombineOutputs": Bundle,
    }.items():
        setattr(ep, name, value)
    return dict(zip(names, (nccl, ep, interop, torch_interop), strict=True))
