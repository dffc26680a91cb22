"""tree_reduce against literal loops, bit for bit; its gradients; the op contract."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from moe_layer.ops.tree_reduce import reduction_blocks, tree_reduce
from tests import oracle_dispatch


def make(
    seed: int, *, M: int, K: int, E: int, D: int = 5, absent: float = 0.3, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Rows of very different sizes (so that every order gives other bits), a row map, ids, weights."""
    g = torch.Generator().manual_seed(seed)
    ids = torch.stack([torch.randperm(E, generator=g)[:K] for _ in range(M)]).int() if M else torch.zeros(0, K).int()
    rows = torch.randn(M * K + 2, D, generator=g) * 10.0 ** torch.randint(-3, 4, (M * K + 2, 1), generator=g)
    rows[::5] = -0.0
    row = torch.randperm(M * K + 2, generator=g)[: M * K].view(M, K).int()
    gone = torch.rand(M, K, generator=g) < absent
    return rows.to(dtype), torch.where(gone, -1, row), torch.where(gone, -1, ids), torch.rand(M, K, generator=g)


def same_bits(a: Tensor, b: Tensor) -> bool:
    view = torch.int64 if a.dtype == torch.float64 else torch.int32
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(view), b.contiguous().view(view))


@settings(max_examples=250)
@given(
    seed=st.integers(0, 2**20),
    K=st.integers(1, 8),
    # (E, blocks): whole trees, odd numbers of blocks (ranks that are no power of two), one block
    shape=st.sampled_from(
        [(8, 8), (16, 8), (64, 8), (12, 4), (10, 2), (9, 1), (9, 9), (12, 6), (10, 5), (12, 3), (16, 16)]
    ),
    M=st.integers(0, 9),
    absent=st.sampled_from([0.0, 0.3, 1.0]),
    weighted=st.booleans(),
    double=st.booleans(),
)
def test_bits_equal_literal_loops(
    seed: int, K: int, shape: tuple[int, int], M: int, absent: float, weighted: bool, double: bool
) -> None:
    E, blocks = shape
    rows, row, ids, weights = make(seed, M=M, K=K, E=E, absent=absent, dtype=torch.float64 if double else torch.float32)
    w = weights if weighted else None
    got = tree_reduce(rows, row, ids_MK=ids, weights_MK=w, num_experts=E, blocks=blocks)
    assert same_bits(got, oracle_dispatch.tree_sum(rows, row, ids, w, E, blocks))


def test_repeated_experts_go_by_slot() -> None:
    rows = torch.tensor([[1e8], [1.0], [-1e8], [1.0]])
    row = torch.arange(4, dtype=torch.int32).view(1, 4)
    ids = torch.tensor([[3, 3, 3, 3]], dtype=torch.int32)
    got = tree_reduce(rows, row, ids_MK=ids, num_experts=8, blocks=8)
    assert got.item() == 1.0  # left to right; fp32 loses the first 1, pairs would lose both


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("K", [3, 4, 6])
def test_narrow_rows_are_summed_in_fp32(dtype: torch.dtype, K: int) -> None:
    rows, row, ids, weights = make(1, M=20, K=K, E=16, dtype=dtype)
    got = tree_reduce(rows, row, ids_MK=ids, weights_MK=weights, num_experts=16, blocks=8)
    assert same_bits(got, oracle_dispatch.tree_sum(rows.float(), row, ids, weights, 16, 8))


@pytest.mark.parametrize("ranks", [2, 4, 8])
@pytest.mark.parametrize("K", [2, 4, 6, 8])
def test_partial_sums_of_ranks_give_the_same_bits(ranks: int, K: int) -> None:
    E = 16
    rows, row, ids, _ = make(2, M=60, K=K, E=E, absent=0.2)
    whole = tree_reduce(rows, row, ids_MK=ids, num_experts=E, blocks=8)
    owner = torch.where(ids >= 0, ids * ranks // E, -1)
    parts = [
        tree_reduce(rows, torch.where(owner == r, row, -1), ids_MK=ids, num_experts=E, blocks=8) for r in range(ranks)
    ]
    home = torch.arange(ranks * 60, dtype=torch.int32).view(ranks, 60).T
    of_rank = torch.arange(ranks, dtype=torch.int32).expand(60, ranks)
    got = tree_reduce(torch.cat(parts), home, ids_MK=of_rank, num_experts=ranks, blocks=ranks)
    assert same_bits(got, whole)


def test_threads_and_chunks_do_not_change_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, row, ids, _ = make(3, M=700, K=6, E=16, D=64)
    once = tree_reduce(rows, row, ids_MK=ids, num_experts=16, blocks=8)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert same_bits(tree_reduce(rows, row, ids_MK=ids, num_experts=16, blocks=8), once)
    finally:
        torch.set_num_threads(threads)
    monkeypatch.setattr("moe_layer.ops.tree_reduce._WORKSPACE", 8 * 64 * 50)
    assert same_bits(tree_reduce(rows, row, ids_MK=ids, num_experts=16, blocks=8), once)


def test_nan_stays_with_its_token() -> None:
    rows, row, ids, _ = make(4, M=12, K=4, E=16, absent=0.2)
    rows[row[5][row[5] >= 0][0]] = torch.nan
    got = tree_reduce(rows, row, ids_MK=ids, num_experts=16, blocks=8)
    assert got[5].isnan().all() and not got[torch.arange(12) != 5].isnan().any()


@pytest.mark.parametrize("K", [1, 3, 4, 5, 8])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("with_src", [False, True])
def test_gradcheck(K: int, weighted: bool, with_src: bool) -> None:
    rows, row, ids, weights = make(5, M=4, K=K, E=8, D=3, dtype=torch.float64)
    rows = rows.clamp(-3, 3).requires_grad_()
    w = weights.double().requires_grad_() if weighted else None
    src = None
    if with_src:
        src = torch.full((rows.shape[0],), -1, dtype=torch.int32)
        for m, slots in enumerate(row.tolist()):
            for n in slots:
                if n >= 0:
                    src[n] = m

    def fn(rows: Tensor, *w: Tensor) -> Tensor:
        return tree_reduce(rows, row, ids_MK=ids, weights_MK=w[0] if w else None, src_N=src, num_experts=8, blocks=8)

    inputs = (rows,) if w is None else (rows, w)
    assert torch.autograd.gradcheck(fn, inputs)


@pytest.mark.parametrize("K", [4, 6])
@pytest.mark.parametrize("weighted", [False, True])
def test_opcheck(K: int, weighted: bool) -> None:
    rows, row, ids, weights = make(6, M=6, K=K, E=8)
    w = weights.requires_grad_() if weighted else None
    args = (rows.requires_grad_(), row, ids, w, None, 8, 8)
    torch.library.opcheck(torch.ops.moe_layer.tree_reduce.default, args)
    d_out = torch.randn(6, rows.shape[1])
    bwd = (d_out, rows.detach(), row, None if w is None else w.detach(), None, rows.shape[0])
    torch.library.opcheck(torch.ops.moe_layer.tree_reduce_bwd.default, bwd)


def test_compiles_fullgraph() -> None:
    rows, row, ids, weights = make(7, M=30, K=4, E=16)
    rows.requires_grad_()
    weights.requires_grad_()

    def fn(rows: Tensor, weights: Tensor) -> Tensor:
        return tree_reduce(rows, row, ids_MK=ids, weights_MK=weights, num_experts=16, blocks=8) * 2

    eager, compiled = fn(rows, weights), torch.compile(fn, fullgraph=True, backend="aot_eager")(rows, weights)
    assert same_bits(eager.detach(), compiled.detach())
    g = torch.randn_like(eager)
    for a, b in zip(
        torch.autograd.grad(eager, (rows, weights), g), torch.autograd.grad(compiled, (rows, weights), g), strict=True
    ):
        assert torch.equal(a, b)


def test_blocks() -> None:
    assert [reduction_blocks(e) for e in (1, 2, 4, 6, 8, 12, 60, 64, 7)] == [1, 2, 4, 2, 8, 4, 4, 8, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_rounding_and_addition_are_part_of_the_op(dtype):
    torch.manual_seed(0)
    rows, add = torch.randn(40, 6, dtype=dtype), torch.randn(10, 6, dtype=dtype)
    row_MK = torch.randperm(40)[:30].view(10, 3).int()
    ids_MK = torch.rand(10, 8).argsort(1)[:, :3].int()
    plain = tree_reduce(rows, row_MK, ids_MK=ids_MK, num_experts=8, blocks=8)
    wanted = (plain.to(dtype).to(plain.dtype) + add.to(plain.dtype)).to(dtype)
    rows.requires_grad_()
    add.requires_grad_()
    got = tree_reduce(
        rows, row_MK, ids_MK=ids_MK, num_experts=8, blocks=8, add_MD=add, round_to_rows=True, like_rows=True
    )
    assert got.dtype == dtype and torch.equal(got, wanted)
    upstream = torch.randn_like(got)
    d_rows, d_add = torch.autograd.grad(got, (rows, add), upstream)
    assert torch.equal(d_add, upstream)
    assert torch.equal(d_rows[row_MK.flatten().long()], upstream.repeat_interleave(3, 0))
