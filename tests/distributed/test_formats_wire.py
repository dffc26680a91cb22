"""Token formats on the wire: bytes by count, and an int8 format that the dispatcher has never heard of."""

from __future__ import annotations

import itertools
import re
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from moe_layer.config.model import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.dispatch.formats import Fp8BlockFormat
from moe_layer.dispatch.wire import compat
from moe_layer.errors import ConfigError, RankMismatch, RoutingError
from moe_layer.parallel.context import ParallelContext
from moe_layer.types import Routing
from tests.distributed.cases import Case, assert_same_bits, config_for, even_cuts, joined, make_case, run_case
from tests.distributed.ranks import ThreadRanks

BACKENDS = ("all_to_all", "all_gather", "replicated", "nvlink", "nvlink:dense")
PROBS = ("activation", "combine", "source")
FP8 = DispatchConfig(dispatch_format="fp8_1x128")

# ---- bytes on the wire -------------------------------------------------------------------------------------------


def wire_bytes(
    ranks: ThreadRanks, monkeypatch: pytest.MonkeyPatch, case: Case, config: DispatchConfig, **options: Any
) -> list[int]:
    """Payload bytes that each collective of a forward and backward was given, over both ranks, headers left out."""
    sent: list[int] = []
    lock = threading.Lock()

    def counting(real: Any) -> Any:
        def call(group: Any, out: Tensor, source: Tensor, **rest: Any) -> Any:
            if source.dtype == torch.uint8 and source.ndim == 2:  # no header, and not the facts of bind
                with lock:
                    sent.append(source.nbytes)
            return real(group, out, source, **rest)

        return call

    with monkeypatch.context() as patch:
        patch.setattr(compat, "all_to_all", counting(compat.all_to_all))
        patch.setattr(compat, "all_gather", counting(compat.all_gather))
        ranks.run(2, lambda context: exchange_twice(case, config, context, **options))
    return sent


def exchange_twice(case: Case, config: DispatchConfig, context: ParallelContext, **options: Any) -> None:
    """Forward and backward with experts that change nothing."""
    cuts = even_cuts(case.x_TD.shape[0], 2)
    mine = slice(cuts[context.ep_rank], cuts[context.ep_rank + 1])
    d = make_dispatcher(config, num_experts=case.num_experts, top_k=case.top_k, context=context, **options)
    x = case.x_TD[mine].clone().requires_grad_()
    received = d.dispatch(x, Routing.from_ids(case.ids_TK[mine], case.w_TK[mine], num_experts=case.num_experts))
    d.combine(received.rows, received).sum().backward()


def rows_sent(case: Case, backend: str) -> int:
    """Rows that leave on one trip out, by loops; what a rank sends to itself counts."""
    cuts, L = even_cuts(case.x_TD.shape[0], 2), case.num_experts // 2
    if backend == "all_gather":
        return 2 * max(b - a for a, b in itertools.pairwise(cuts))
    return sum(len({e // L for e in slots if e >= 0}) for slots in case.ids_TK.tolist())


@pytest.mark.parametrize("backend", ["all_to_all", "all_gather"])
@pytest.mark.parametrize(("D", "dtype"), [(256, torch.float32), (200, torch.bfloat16)])
def test_bytes_on_the_wire(
    ranks: ThreadRanks, monkeypatch: pytest.MonkeyPatch, backend: str, D: int, dtype: torch.dtype
) -> None:
    """Each row out takes D bytes of values and 4 a block of scales, in dispatch and in combine's backward."""
    case = make_case(7, T=22, D=D, E=4, K=2, dtype=dtype)
    plain = wire_bytes(ranks, monkeypatch, case, config_for(backend))
    fp8 = wire_bytes(ranks, monkeypatch, case, config_for(backend, dispatch_format="fp8_1x128"))
    rows, message = rows_sent(case, backend), D + 4 * 2
    assert Fp8BlockFormat(D).msg_bytes == message
    assert sum(plain) - sum(fp8) == 2 * rows * (D * dtype.itemsize - message)
    # all that travels: twice the message, ids with the token and the weights, rows and d(probs) home
    home = rows * (2 if backend == "all_gather" else 1)
    assert sum(fp8) == rows * (2 * message + 4 * 3 + 4 * 2) + home * (2 * D * dtype.itemsize + 4 * 2)


# ---- a format of one's own ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Int8Rows:
    """One fp32 scale per row."""

    hidden: int
    row_alignment: int = 1
    claimed: int = 4

    @property
    def msg_bytes(self) -> int:
        return self.hidden + self.claimed

    def encode(self, x_TD: Tensor) -> list[Tensor]:
        scale_T1 = (x_TD.float().abs().amax(1, keepdim=True) / 127).clamp_min(2.0**-126)
        return [(x_TD.float() / scale_T1).round().to(torch.int8), scale_T1]

    def decode(self, payload: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
        return (payload[0].float() * payload[1]).to(dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("apply_probs", PROBS)
def test_int8_format_without_touching_the_dispatcher(ranks: ThreadRanks, backend: str, apply_probs: str) -> None:
    case, form = make_case(8, T=22, D=24, E=8, K=3), Int8Rows(24)
    want = run_case(case, DispatchConfig(apply_probs=apply_probs), token_format=form)
    config = config_for(backend, apply_probs=apply_probs)
    for size in (2, 4):
        got = ranks.run(size, lambda context: run_case(case, config, context, token_format=form))
        assert_same_bits(joined(got, replicated=backend == "replicated"), want)
    plain = run_case(case, DispatchConfig(apply_probs=apply_probs))
    for name in ("y", "dx", "dw", "d_experts"):
        error = (getattr(want, name) - getattr(plain, name)).norm() / getattr(plain, name).norm()
        assert 0 < error < 0.03, (name, error)


def test_int8_bytes(ranks: ThreadRanks, monkeypatch: pytest.MonkeyPatch) -> None:
    case, config = make_case(7, T=22, D=64, E=4, K=2), DispatchConfig(backend="all_to_all")
    plain = wire_bytes(ranks, monkeypatch, case, config)
    int8 = wire_bytes(ranks, monkeypatch, case, config, token_format=Int8Rows(64))
    assert sum(plain) - sum(int8) == 2 * rows_sent(case, "all_to_all") * (64 * 4 - 64 - 4)


def test_formats_that_do_not_fit(ranks: ThreadRanks) -> None:
    shape: dict[str, Any] = {"num_experts": 8, "top_k": 3, "context": None}
    with pytest.raises(ConfigError, match=r"dispatch_format \(fp8_1x128\) contradicts the token_format"):
        make_dispatcher(FP8, **shape, token_format=Int8Rows(8))
    with pytest.raises(ConfigError, match=r"alignment \(8\) must be a multiple of .* row_alignment \(16\)"):
        make_dispatcher(DispatchConfig(alignment=8), **shape, token_format=Int8Rows(8, row_alignment=16))
    make_dispatcher(DispatchConfig(alignment=16), **shape, token_format=Int8Rows(8, row_alignment=16))
    case = make_case(0, T=6, D=8, E=8, K=3)
    with pytest.raises(RoutingError, match="rows have 8 columns but the token format is for 16"):
        run_case(case, DispatchConfig(), token_format=Int8Rows(16))

    class Half:
        hidden, msg_bytes = 8, 12

        def encode(self, x_TD: Tensor) -> list[Tensor]:
            return [x_TD]

    with pytest.raises(ConfigError, match="token_format is Half and lacks row_alignment, decode; give it the members"):
        make_dispatcher(DispatchConfig(), **shape, token_format=Half())  # type: ignore[arg-type]


class LosesRows(Int8Rows):
    def encode(self, x_TD: Tensor) -> list[Tensor]:
        return [part[1:] for part in super().encode(x_TD)]


class LosesColumns(Int8Rows):
    def decode(self, payload: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
        return super().decode(payload, dtype=dtype)[:, 1:]


class LosesTheDtype(Int8Rows):
    def decode(self, payload: Sequence[Tensor], *, dtype: torch.dtype) -> Tensor:
        return super().decode(payload, dtype=dtype).half()


@pytest.mark.parametrize(
    ("form", "text"),
    [
        (Int8Rows(8, claimed=0), "Int8Rows encodes a row in 12 bytes but says msg_bytes 8; correct msg_bytes"),
        (LosesRows(8), r"LosesRows encodes \d+ rows as shapes \["),
        (LosesColumns(8), r"LosesColumns decodes to \(\d+, 7\) torch.float32, expected \(\d+, 8\) torch.float32"),
        (LosesTheDtype(8), r"LosesTheDtype decodes to \(\d+, 8\) torch.float16, expected \(\d+, 8\) torch.float32"),
    ],
)
def test_formats_that_break_their_word(ranks: ThreadRanks, form: Any, text: str) -> None:
    """On one rank, where nothing travels, as on two."""
    case = make_case(0, T=6, D=8, E=8, K=3)
    with pytest.raises(ConfigError, match=text):
        run_case(case, DispatchConfig(), token_format=form)
    for error in ranks.run(2, lambda context: run_case(case, DispatchConfig(), context, token_format=form), fresh=True):
        assert isinstance(error, ConfigError) and re.search(text, str(error))


def test_ranks_must_agree_about_the_format(ranks: ThreadRanks) -> None:
    def one(context: ParallelContext) -> None:
        form = Int8Rows(8) if context.ep_rank else None
        make_dispatcher(DispatchConfig(), num_experts=8, top_k=3, context=context, token_format=form)

    for error in ranks.run(2, one, fresh=True):
        assert isinstance(error, RankMismatch)
        assert "token_format: None on rank 0, 'Int8Rows of 8 columns in 12 bytes' on rank 1" in str(error)

    def named(context: ParallelContext) -> None:
        make_dispatcher(FP8 if context.ep_rank else DispatchConfig(), num_experts=8, top_k=3, context=context)

    for error in ranks.run(2, named, fresh=True):
        assert isinstance(error, RankMismatch)
        assert "dispatch.dispatch_format: 'input' on rank 0, 'fp8_1x128' on rank 1" in str(error)
