"""moe_layer.compat.perplexity over gloo: what arrives where, against literal loops; halves; bytes; errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_layer.errors import DispatchTimeout, RankMismatch
from moe_layer.parallel.context import ParallelContext
from tests.distributed.perplexity_cases import (
    FILL,
    MOST,
    CountingGroup,
    E,
    H,
    K,
    Out,
    S,
    Tokens,
    check_buffers,
    combined,
    config_of,
    inputs,
    make,
    make_out,
    make_tokens,
    on_ranks,
    rank_of,
    run_experts,
)
from tests.distributed.ranks import ThreadRanks

LAYOUTS = [("padded", 1), ("contiguous", 1), ("contiguous", 8), ("padded", 8)]


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("backend", ["auto", "all_gather", "replicated", "nvlink"])
@pytest.mark.parametrize(("layout", "alignment"), LAYOUTS)
@pytest.mark.parametrize("prob", [True, False])
def test_there_and_back_against_loops(
    ranks: ThreadRanks, size: int, backend: str, layout: str, alignment: int, prob: bool
) -> None:
    """Different T per rank (0 too), an expert without tokens, -1 slots; fp8 rows with fp16 scales; combine in fp64."""
    dtype = torch.float8_e4m3fn
    tokens = [make_tokens(10 + r, [7, 0, 9, 4][r], dtype=dtype, idle=(2,)) for r in range(size)]
    if backend == "replicated":
        tokens = [tokens[0]] * size
    nobody = make_tokens(0, 0)
    local, padded = E // size, layout == "padded"

    def one(context: ParallelContext | None) -> None:
        rank = rank_of(context)
        mine = tokens[rank]
        sources = [mine if r == rank else nobody for r in range(size)] if backend == "replicated" else tokens
        layer = make(context, config=config_of(backend, alignment=alignment, deadline_s=5), in_dtype=dtype)
        for ids_dtype in (torch.uint32, torch.int32, torch.int64):
            out = make_out(local, MOST * size if padded else 30 * size + 8 * local, padded=padded, dtype=dtype)
            given = inputs(mine, scale=True, ids_dtype=ids_dtype)
            layer.dispatch(**out.arguments(prob=prob, scale=True), **given)
            places = check_buffers(out, sources, rank, alignment=alignment, prob=prob, scale=True)
            y = run_experts(places, out)
            # combine multiplies by its own weights, whether or not probabilities travelled
            weights = mine.w_TK if ids_dtype == torch.int32 else mine.w_TK * 2 - 1
            result = torch.full((MOST + 1, H), float(FILL), dtype=torch.float64)
            layer.combine(out_tokens=result, indices=given["indices"], weights=weights, expert_y=y)
            T = mine.x_TH.shape[0]
            torch.testing.assert_close(result[:T], combined(mine, weights), rtol=1e-12, atol=1e-12)
            assert (result[T:] == FILL).all()

    on_ranks(ranks, size, one)


@pytest.mark.parametrize("size", [1, 2, 4])
def test_halves_of_two_objects_interleaved(ranks: ThreadRanks, size: int) -> None:
    """Send A, send B, receive B, receive A; the same for combine. No scales, bf16 rows, one layout each."""
    tokens = [[make_tokens(20 + r + 50 * j, 5 + r, dtype=torch.bfloat16) for r in range(size)] for j in range(2)]
    local = E // size

    def one(context: ParallelContext | None) -> None:
        rank = rank_of(context)
        layers = [make(context, config=config_of(), in_dtype=torch.bfloat16, layer_index=j) for j in range(2)]
        outs = [make_out(local, rows, padded=p, dtype=torch.bfloat16) for rows, p in ((MOST * 4, True), (120, False))]
        calls = [out.arguments(prob=j == 0, scale=False) | inputs(tokens[j][rank]) for j, out in enumerate(outs)]
        for j in (0, 1):
            layers[j].dispatch(**calls[j], do_recv=False)
            assert (outs[j].x == FILL).all()
        backs: list[dict[str, Any]] = []
        for j in (1, 0):
            layers[j].dispatch(**calls[j], do_send=False)
        for j in (0, 1):
            places = check_buffers(outs[j], tokens[j], rank, alignment=1, prob=j == 0, scale=False)
            outs[j].scale.zero_()
            mine = tokens[j][rank]
            backs.append(
                {
                    "out_tokens": torch.full((mine.x_TH.shape[0], H), float(FILL), dtype=torch.float64),
                    "expert_y": run_experts(places, outs[j]),
                    "indices": mine.ids_TK,
                    "weights": mine.w_TK,
                }
            )
            layers[j].combine(**backs[j], do_recv=False)
            assert (backs[j]["out_tokens"] == FILL).all()
        for j in (1, 0):
            layers[j].combine(**backs[j], do_send=False)
            mine = tokens[j][rank]
            plain = Tokens(mine.x_TH, torch.zeros_like(mine.scale_TS), mine.ids_TK, mine.w_TK)
            torch.testing.assert_close(backs[j]["out_tokens"], combined(plain, mine.w_TK), rtol=1e-12, atol=1e-12)

    on_ranks(ranks, size, one)


@pytest.mark.parametrize("size", [1, 2, 4])
@pytest.mark.parametrize("backend", ["auto", "all_gather", "nvlink"])
def test_bound_m(ranks: ThreadRanks, size: int, backend: str) -> None:
    """Tokens past the bound are not sent, their output rows stay untouched; garbage there does not matter."""
    dtypes = [torch.int64, torch.uint32, torch.int32, torch.int32]
    tokens = [make_tokens(30 + r, 8) for r in range(size)]
    bounds = [5, 0, 8, 3]
    cut = [
        Tokens(*(part[: bounds[r]] for part in (t.x_TH, t.scale_TS, t.ids_TK, t.w_TK))) for r, t in enumerate(tokens)
    ]

    def one(context: ParallelContext | None) -> None:
        rank = rank_of(context)
        m = bounds[rank]
        bound = torch.tensor(m if rank % 2 else [m], dtype=dtypes[rank])
        layer = make(context, config=config_of(backend))
        out = make_out(E // size, 40, padded=True)
        out.scale.zero_()
        weights = tokens[rank].w_TK.clone()
        weights[m:] = torch.nan
        given = inputs(tokens[rank]) | {"weights": weights}
        layer.dispatch(**out.arguments(prob=True, scale=False), **given, bound_m=bound)
        out.scale.fill_(FILL)
        places = check_buffers(out, cut, rank, alignment=1, prob=True, scale=False)
        result = torch.full((8, H), float(FILL), dtype=torch.float64)
        y = run_experts(places, Out(out.count_L, out.x, out.prob, torch.zeros_like(out.scale)))
        layer.combine(out_tokens=result, indices=given["indices"], weights=weights, expert_y=y, bound_m=bound)
        plain = Tokens(cut[rank].x_TH, torch.zeros(m, S), cut[rank].ids_TK, cut[rank].w_TK)
        torch.testing.assert_close(result[:m], combined(plain, plain.w_TK), rtol=1e-12, atol=1e-12)
        assert (result[m:] == FILL).all()

    on_ranks(ranks, size, one)


@pytest.mark.parametrize("backend", ["all_to_all", "all_gather", "nvlink"])
def test_one_row_behind_an_odd_number_of_bytes(ranks: ThreadRanks, backend: str) -> None:
    """A single fp8 row of 6 columns: what follows it in its message begins where an int32 cannot."""
    one_token = Tokens(*(part[:1] for part in vars(make_tokens(3, 4, dtype=torch.float8_e4m3fn)).values()))
    one_token.ids_TK[:] = torch.tensor([[-1, 5, -1]])
    tokens = [one_token, make_tokens(0, 0, dtype=torch.float8_e4m3fn)]

    def one(context: ParallelContext | None) -> None:
        rank = rank_of(context)
        layer = make(context, config=config_of(backend, deadline_s=5), in_dtype=torch.float8_e4m3fn)
        out = make_out(E // 2, MOST, padded=True, dtype=torch.float8_e4m3fn)
        given = inputs(tokens[rank])
        layer.dispatch(**out.arguments(prob=True, scale=False), **given)
        out.scale[...] = FILL
        places = check_buffers(out, tokens, rank, alignment=1, prob=True, scale=False)
        assert len(places) == rank
        y = run_experts(places, Out(out.count_L, out.x, out.prob, torch.zeros_like(out.scale)))
        result = torch.full((1, H), float(FILL), dtype=torch.float64)
        layer.combine(out_tokens=result, indices=given["indices"], weights=given["weights"], expert_y=y)
        plain = Tokens(one_token.x_TH, torch.zeros(1, S), one_token.ids_TK, one_token.w_TK)
        if rank == 0:
            torch.testing.assert_close(result, combined(plain, plain.w_TK), rtol=1e-12, atol=1e-12)

    on_ranks(ranks, 2, one)


@pytest.mark.parametrize("size", [1, 2])
@pytest.mark.parametrize("backend", ["auto", "all_gather", "replicated", "nvlink"])
def test_accumulate(ranks: ThreadRanks, size: int, backend: str) -> None:
    """Added once to what lies in `out_tokens`, in fp32, whatever half asks; rows past the bound stay untouched."""
    tokens = [make_tokens(30 + (0 if backend == "replicated" else r), 8) for r in range(size)]

    def one(context: ParallelContext | None) -> None:
        mine, bound = tokens[rank_of(context)], torch.tensor(6)
        layer = make(context, config=config_of(backend))
        given = inputs(mine)
        slots = {"indices": given["indices"], "weights": given["weights"], "bound_m": bound}
        for dtype in (torch.float64, torch.bfloat16):
            out = make_out(E // size, 40, padded=True)
            layer.dispatch(**out.arguments(prob=False, scale=False), **given, bound_m=bound)
            y = torch.ones_like(out.x).to(dtype)
            before = torch.linspace(-2, 2, 8 * H).view(8, H).to(dtype)
            before[6:] = torch.nan
            result = before.clone()
            layer.combine(out_tokens=result, expert_y=y, **slots, do_recv=False)
            layer.combine(out_tokens=result, expert_y=y, **slots, do_send=False, accumulate=True)
            total_T1 = torch.where(mine.ids_TK >= 0, mine.w_TK, 0).double().sum(1, keepdim=True)
            want = (before.double() + total_T1)[:6]
            tolerance = 1e-6 if dtype == torch.float64 else 2**-8
            torch.testing.assert_close(result[:6].double(), want, rtol=tolerance, atol=1e-6)
            assert result[6:].isnan().all()

    on_ranks(ranks, size, one)


@pytest.mark.parametrize("backend", ["auto", "all_gather", "nvlink"])
def test_the_same_bits_at_any_number_of_ranks(ranks: ThreadRanks, backend: str) -> None:
    """fp32 rows: out_tokens of 1, 2 and 4 ranks that share the same tokens."""
    whole = make_tokens(70, 8)

    def one(context: ParallelContext | None, size: int) -> torch.Tensor:
        begin = rank_of(context) * 8 // size
        parts = (whole.x_TH, whole.scale_TS, whole.ids_TK, whole.w_TK)
        mine = Tokens(*(part[begin : begin + 8 // size] for part in parts))
        layer, out = (
            make(context, config=config_of(backend if context else "auto")),
            make_out(E // size, 30, padded=True),
        )
        layer.dispatch(**out.arguments(prob=True, scale=False), **inputs(mine))
        result = torch.empty(8 // size, H)
        layer.combine(out_tokens=result, indices=mine.ids_TK, weights=mine.w_TK, expert_y=torch.tanh(out.x) / 3)
        return result

    want = one(None, 1)
    for size in (2, 4):
        got = torch.cat(ranks.run(size, lambda context, size=size: one(context, size)))
        assert torch.equal(got, want)


@pytest.mark.parametrize("nothing", ["no tokens", "no routed slot"])
def test_nothing_to_send_anywhere(ranks: ThreadRanks, nothing: str) -> None:
    T = 0 if nothing == "no tokens" else 4
    tokens = Tokens(
        torch.ones(T, H), torch.ones(T, S).half(), torch.full((T, K), -1, dtype=torch.int32), torch.ones(T, K)
    )

    def one(context: ParallelContext | None) -> None:
        layer, out = make(context), make_out(E // 2 if context else E, 4, padded=context is None)
        layer.dispatch(**out.arguments(prob=True, scale=True), **inputs(tokens, scale=True))
        assert not out.count_L.any() and (out.x == FILL).all() and (out.prob == FILL).all()
        result = torch.full((T, H), float(FILL))
        layer.combine(out_tokens=result, indices=tokens.ids_TK, weights=tokens.w_TK, expert_y=out.x * torch.nan)
        assert not result.any()

    on_ranks(ranks, 1, one)
    on_ranks(ranks, 2, one)


# ---- the wire ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("backend", ["all_to_all", "all_gather", "replicated"])
def test_no_probability_bytes_unless_asked_for(ranks: ThreadRanks, size: int, backend: str) -> None:
    """Collectives and bytes of a dispatch, counted at the group: headers of 64 bytes a peer; rows of H elements, S
    scales; K ids and the token index in int32. With `out_expert_prob` 4 K bytes a row more, in no more collectives."""
    tokens = [make_tokens(40 + r, 6, dtype=torch.bfloat16) for r in range(size)]
    tokens = tokens[:1] * size if backend == "replicated" else tokens

    def sent(context: ParallelContext, *, prob: bool, scale: bool) -> list[int]:
        counting = CountingGroup(context.ep_group)
        counted = ParallelContext(counting, ep_rank=context.ep_rank, ep_size=size, store=context.store)
        layer = make(counted, config=config_of(backend), in_dtype=torch.bfloat16)
        counting.sent.clear()
        out = make_out(E // size, 30, padded=True, dtype=torch.bfloat16)
        given = inputs(tokens[context.ep_rank], scale=scale)
        layer.dispatch(**out.arguments(prob=prob, scale=scale), **given)
        assert (out.prob == FILL).all() or prob
        return counting.sent

    def one(context: ParallelContext) -> None:
        ids = tokens[context.ep_rank].ids_TK.tolist()
        local = E // size
        rows = sum(len({e // local for e in slots if e >= 0}) for slots in ids) if backend == "all_to_all" else len(ids)
        meta = 4 * (K + 1)
        for scale in (False, True):
            width = 2 * H + 2 * S * scale
            plain, with_prob = (sent(context, prob=prob, scale=scale) for prob in (False, True))
            if backend == "replicated":
                assert plain == with_prob == []
            else:
                assert plain == [64 * size, rows * width, rows * meta]
                assert with_prob == [64 * size, rows * (width + 4 * K), rows * meta]

    ranks.run(size, one)


def test_ranks_disagree_about_probabilities(ranks: ThreadRanks) -> None:
    def one(context: ParallelContext) -> None:
        out = make_out(E // 2, 30, padded=True)
        layer = make(context, config=config_of(deadline_s=3))
        layer.dispatch(**out.arguments(prob=context.ep_rank == 1, scale=False), **inputs(make_tokens(1, 3)))

    for error in ranks.run(2, one, fresh=True):
        assert isinstance(error, RankMismatch) and "row_bytes" in str(error)


@pytest.mark.parametrize("phase", ["dispatch", "combine"])
def test_an_absent_rank_is_named_in_time(ranks: ThreadRanks, phase: str) -> None:
    """Rank 1 leaves out one call; the others get the typed error, then and at every later call."""

    def one(context: ParallelContext) -> list[str]:
        layer = make(context, config=config_of(deadline_s=1.0), layer_index=3)
        tokens, out = make_tokens(context.ep_rank, 4), make_out(E // 4, 60, padded=True)
        given = out.arguments(prob=True, scale=False) | inputs(tokens)
        back = {"indices": tokens.ids_TK, "weights": tokens.w_TK, "expert_y": out.x, "out_tokens": torch.zeros(4, H)}
        if phase == "combine":
            layer.dispatch(**given)
        if context.ep_rank == 1:
            return []
        texts = []
        with pytest.raises(DispatchTimeout) as caught:
            layer.dispatch(**given) if phase == "dispatch" else layer.combine(**back)
        texts.append(str(caught.value))
        with pytest.raises(DispatchTimeout, match="unusable since"):
            layer.dispatch(**given)
        with pytest.raises(RuntimeError, match="no call is in flight"):
            layer.combine(**back)
        return texts

    results = ranks.run(4, one, fresh=True)
    for rank in (0, 2, 3):
        (text,) = results[rank]
        assert f"layer 3, step 0, phase {phase}" in text and "ranks [1] of 4 did not report" in text
