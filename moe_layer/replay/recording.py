"""Recorded ids on their way to a trace: copied to pinned host memory as each router runs, without waiting.

`Recording` keeps every call (training passes, prefill and decode steps). `StaticRecording` writes into
buffers of a fixed size on the device, which a CUDA graph can capture; `commit` after each graph launch takes them home.

T tokens, L layers, K top-k, N rows of the trace.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping

import torch
from torch import Tensor

from moe_layer.errors import TraceError
from moe_layer.replay.spec import TraceSpec, integer_tensor
from moe_layer.replay.tap import Routed, is_capturing
from moe_layer.replay.trace import RoutingTrace

FIRST_CHUNK, LARGEST_CHUNK = 1 << 16, 1 << 22
"""Bytes of pinned memory that are taken at once."""


class Recording:
    """What one `record` block saw. `trace()` waits for the last copy."""

    _nothing = "no layer ran inside record(); run the model in it before the block ends"

    def __init__(self, spec: TraceSpec, *, weights: bool, host: PinnedMemory | None = None) -> None:
        self.spec = spec
        self._keeps_weights = weights
        self._calls: list[list[tuple[Tensor, Tensor | None, Tensor | None]]] = [[] for _ in spec.layers]
        self._host = PinnedMemory() if host is None else host
        self._streams: set[torch.cuda.Stream] = set()
        self._events: list[torch.cuda.Event] = []

    @property
    def host_bytes(self) -> int:
        """Bytes of what was recorded so far: ids, and weights and masks where they are kept."""
        return sum(part.nbytes for calls in self._calls for call in calls for part in call if part is not None)

    def add(self, layer: int, routed: Routed) -> None:
        """One router call: ids in the trace's dtype, and who was routed at all."""
        if is_capturing(routed.ids_TK):
            raise TraceError(
                "a CUDA graph cannot capture record(); use record(max_tokens=...) and commit() after each launch"
            )
        weights = routed.weights_TK.detach().float() if self._keeps_weights else None
        self._calls[layer].append(
            (
                self._to_host(routed.ids_TK, self.spec.dtype),
                self._kept(weights),
                self._kept(routed.valid_T),
            )
        )

    def finish(self) -> None:
        """End of the block."""
        self._check_calls()
        self._mark()

    def _to_host(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        """A copy in pinned memory; does not wait. CPU tensors are copied where they are, as are those of a compiled
        graph until the block ends.
        """
        if not tensor.is_cuda or torch.compiler.is_compiling():
            return tensor.to(dtype, copy=True)
        self._streams.add(torch.cuda.current_stream(tensor.device))
        return self._host.take(tensor.shape, dtype).copy_(tensor, non_blocking=True)

    def _kept(self, tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else self._to_host(tensor, tensor.dtype)

    def _mark(self) -> None:
        """Events behind the copies, on every stream that has some."""
        for calls in self._calls:
            for at, (ids, weights, valid) in enumerate(calls):
                if ids.is_cuda:  # recorded by a compiled graph
                    calls[at] = (self._to_host(ids, ids.dtype), self._kept(weights), self._kept(valid))
        for stream in self._streams:
            event = torch.cuda.Event()
            event.record(stream)
            self._events.append(event)
        self._streams.clear()

    def _wait(self) -> None:
        self._mark()  # copies of a block that is still open
        for event in self._events:
            event.synchronize()
        self._events.clear()

    def _check_calls(self) -> None:
        """Every layer has run over the same tokens, else rows cannot be lined up."""
        shapes = [tuple(call[0].shape[0] for call in calls) for calls in self._calls]
        if not any(shapes):
            raise TraceError(self._nothing)
        for name, shape in zip(self.spec.layers, shapes, strict=True):
            if shape != shapes[0] or not shape:
                raise TraceError(
                    f"layer {name!r} ran over {list(shape)} tokens and layer {self.spec.layers[0]!r} over "
                    f"{list(shapes[0])}; "
                    "run the whole model inside record(), or exclude layers that do not run"
                )

    def trace(
        self,
        token_index: Tensor | None = None,
        *,
        num_tokens: int | None = None,
        cu_seqlens: Tensor | list[int] | None = None,
        token_ids: Tensor | None = None,
        weights_version: Tensor | int | None = None,
        notes: Mapping[str, str] | None = None,
    ) -> RoutingTrace:
        """The recorded rows as a trace.

        Args:
            token_index: for each recorded row (in the order of the calls) its row in the trace, -1 = pad: the map that
                the micro-batch was made with. Default: rows as recorded.
            num_tokens: rows of the trace with `token_index`, default the largest index + 1; rows nobody recorded are
                missing.
            cu_seqlens, token_ids, weights_version, notes: see `RoutingTrace.from_ids`; they describe the trace's rows.

        Raises:
            TraceError: maps or boundaries that do not fit, or ids that are no trace.
        """
        self._wait()
        ids_NLK, weights_NLK = self._rows(sparse=token_index is not None)
        if token_index is not None:
            ids_NLK, weights_NLK = _scatter(ids_NLK, weights_NLK, token_index, num_tokens)
        return RoutingTrace.from_ids(
            ids_NLK,
            num_experts=self.spec.num_experts,
            layers=self.spec.layers,
            cu_seqlens=cu_seqlens,
            weights=weights_NLK,
            token_ids=token_ids,
            weights_version=weights_version,
            notes=notes,
        )

    def _rows(self, *, sparse: bool) -> tuple[Tensor, Tensor | None]:
        """`[N, L, K]` ids, -1 in rows that were not routed, and weights.

        Ids stay in the trace's dtype where none is -1, nor will be (`sparse`): all of a rollout is here at once.
        """
        self._check_calls()
        masked = sparse or any(valid is not None for calls in self._calls for _, _, valid in calls)
        dtype = self.spec.dtype
        if masked:
            dtype = torch.int16 if dtype == torch.uint8 else torch.int32
        N, shape = sum(call[0].shape[0] for call in self._calls[0]), (len(self._calls), self.spec.top_k)
        ids_NLK = torch.empty(N, *shape, dtype=dtype)
        weights_NLK = torch.empty(N, *shape) if self._keeps_weights else None
        for layer, calls in enumerate(self._calls):
            start = 0
            for ids_TK, weights_TK, valid_T in calls:
                rows = slice(start, start := start + ids_TK.shape[0])
                ids_NLK[rows, layer] = _masked(ids_TK.to(dtype), valid_T)
                if weights_NLK is not None and weights_TK is not None:
                    weights_NLK[rows, layer] = weights_TK
        return ids_NLK, weights_NLK


class StaticRecording(Recording):
    """Device buffers `[L, max_tokens, K]` that live as long as this object; use it with CUDA graphs."""

    _nothing = "nothing was taken home; call commit(num_tokens) after each launch"

    def __init__(
        self, spec: TraceSpec, *, max_tokens: int, device: torch.device, host: PinnedMemory | None = None
    ) -> None:
        super().__init__(spec, weights=False, host=host)
        layers = len(spec.layers)
        with torch.inference_mode(False):  # written to in any mode later
            self.ids = torch.zeros(layers, max_tokens, spec.top_k, dtype=spec.dtype, device=device)
            self.routed = torch.ones(layers, max_tokens, dtype=torch.bool, device=device)
        self._masked = False
        self._most = [0] * layers  # tokens of the layer's largest call: rows behind them were never written

    def add(self, layer: int, routed: Routed) -> None:
        T = routed.ids_TK.shape[0]
        if T > self.ids.shape[1]:
            raise TraceError(f"record has room for {self.ids.shape[1]} tokens and the layer ran {T}; raise max_tokens")
        # A compiled graph may have been traced with another T.
        most = self.ids.shape[1] if torch.compiler.is_compiling() else T
        self._most[layer] = max(self._most[layer], most)
        self.ids[layer, :T].copy_(routed.ids_TK)
        if routed.valid_T is not None:
            self._masked = True
            self.routed[layer, :T].copy_(routed.valid_T)
        elif self._masked:
            self.routed[layer, :T].fill_(True)

    def commit(self, num_tokens: int) -> None:
        """Take home the first `num_tokens` rows of every layer, on the stream of the launch before; does not wait.

        Raises:
            TraceError: more rows than `max_tokens`, or than some layer ever ran, or inside a capture.
        """
        if is_capturing(self.ids):
            raise TraceError("a CUDA graph cannot capture commit(); call it after each launch of the graph")
        if not 0 <= num_tokens <= self.ids.shape[1]:
            raise TraceError(f"commit({num_tokens}) of buffers for {self.ids.shape[1]} tokens; raise max_tokens")
        least = min(self._most)
        if num_tokens > least:
            name = self.spec.layers[self._most.index(least)]
            raise TraceError(
                f"commit({num_tokens}), but layer {name!r} ran over at most {least} tokens; run or capture "
                "the whole model inside record(), and commit the tokens of its launch"
            )
        ids = self._to_host(self.ids[:, :num_tokens], self.ids.dtype)
        routed = self._to_host(self.routed[:, :num_tokens], torch.bool) if self._masked else None
        for layer in range(len(self.spec.layers)):
            self._calls[layer].append((ids[layer], None, None if routed is None else routed[layer]))

    def finish(self) -> None:
        """The block may only have captured a graph: rows come with `commit`."""


class PinnedMemory:
    """Pinned tensors cut from large chunks, for all recordings of a session: a decoding step records a few bytes a
    layer, and pinning pages is slow. A chunk lives as long as a tensor of it.
    """

    def __init__(self) -> None:
        self._chunk: dict[torch.dtype, Tensor] = {}
        self._bytes = FIRST_CHUNK
        self._lock = threading.Lock()  # threads may record at a time

    def take(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """Uninitialised, of this shape and dtype; its memory is never handed out again."""
        wanted = shape.numel()
        with self._lock:
            chunk = self._chunk.get(dtype)
            if chunk is None or chunk.numel() < wanted:
                size = max(wanted, self._bytes // dtype.itemsize)
                with torch.inference_mode(False):  # written to in any mode later
                    chunk = torch.empty(size, dtype=dtype, pin_memory=True)
                self._bytes = min(2 * self._bytes, LARGEST_CHUNK)
            self._chunk[dtype] = chunk[wanted:]
        return chunk[:wanted].view(shape)


def _masked(ids_TK: Tensor, valid_T: Tensor | None) -> Tensor:
    return ids_TK if valid_T is None else torch.where(valid_T.unsqueeze(1), ids_TK, -1)


def _scatter(
    ids: Tensor, weights: Tensor | None, token_index: Tensor, num_tokens: int | None
) -> tuple[Tensor, Tensor | None]:
    index = integer_tensor(token_index, "token_index").detach().cpu().to(torch.int64).reshape(-1)
    if index.numel() != ids.shape[0]:
        raise TraceError(
            f"token_index has {index.numel()} entries and {ids.shape[0]} rows were recorded; they must be equal"
        )
    largest = int(index.max()) if index.numel() else -1
    total = largest + 1 if num_tokens is None else num_tokens
    kept = index >= 0
    if index.numel() and (largest >= total or int(index.min()) < -1):
        raise TraceError(f"token_index runs from {int(index.min())} to {largest} for {total} rows; see index_map")
    target = index[kept]
    if target.unique().numel() != target.numel():
        raise TraceError("token_index names a row of the trace twice; every token is recorded once")
    out = torch.full((total, *ids.shape[1:]), -1, dtype=ids.dtype)
    out[target] = ids[kept]
    if weights is None:
        return out, None
    out_weights = torch.zeros(total, *weights.shape[1:])
    out_weights[target] = weights[kept]
    return out, out_weights
