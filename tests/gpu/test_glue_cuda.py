"""sort_slots, tree_reduce and gather_rows: the CUDA kernels give the bits of the CPU reference."""

from __future__ import annotations

import pytest
import torch

from moe_layer.ops import _ext
from moe_layer.ops.gather_rows import gather_rows
from moe_layer.ops.sort_slots import sort_slots
from moe_layer.ops.tree_reduce import reduction_blocks, tree_reduce

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.skipif(not _ext.status().loaded, reason=f"CUDA library: {_ext.status().reason}"),
]


def random_ids(tokens, slots, experts, *, absent=0.0, skew=False):
    scores = torch.rand(tokens, experts)
    if skew:
        scores[:, : min(slots, experts)] += 2.0
    ids = scores.topk(min(slots, experts), dim=1).indices.int()
    return torch.where(torch.rand(ids.shape) < absent, -1, ids)


SORTS = [
    (0, 2, 8, 1, 0.0), (1, 1, 1, 1, 0.0), (37, 3, 8, 1, 0.2), (37, 3, 8, 16, 0.2), (500, 8, 128, 128, 0.0),
    (4096, 8, 128, 1, 0.1), (5000, 10, 512, 1, 0.0), (3000, 16, 256, 8, 0.5), (64, 4, 8192, 1, 0.0),
    (20000, 8, 6, 1, 0.0),
]  # fmt: skip


@pytest.mark.parametrize("skew", [False, True])
@pytest.mark.parametrize(("tokens", "slots", "experts", "alignment", "absent"), SORTS)
def test_sort_slots(tokens, slots, experts, alignment, absent, skew):
    torch.manual_seed(tokens)
    ids = random_ids(tokens, slots, experts, absent=absent, skew=skew)
    rows = ids.numel() + min(experts, ids.numel()) * (alignment - 1) + 5
    arguments = {"first_expert": 0, "num_local": experts, "alignment": alignment, "num_rows": rows}
    for weights in (torch.rand(ids.shape), None):
        want = sort_slots(ids, weights_CK=weights, **arguments)
        got = sort_slots(ids.cuda(), weights_CK=None if weights is None else weights.cuda(), **arguments)
        for name, a, b in zip(want._fields, want, got, strict=True):
            assert torch.equal(a, b.cpu()), name


def test_sort_slots_of_a_middle_rank():
    ids = random_ids(700, 4, 64)
    arguments = {"first_expert": 16, "num_local": 16, "alignment": 8, "num_rows": 4000}
    for a, b in zip(sort_slots(ids, **arguments), sort_slots(ids.cuda(), **arguments), strict=True):
        assert torch.equal(a, b.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("tokens", "slots", "experts", "hidden"), [
    (0, 2, 8, 16), (33, 1, 8, 16), (50, 3, 8, 7), (64, 8, 128, 2048), (40, 8, 256, 7168), (31, 10, 512, 512),
    (20, 16, 12, 64), (29, 8, 64, 704), (17, 16, 64, 776), (13, 20, 64, 704),
    (20, 40, 64, 24),
])  # fmt: skip
def test_tree_reduce(tokens, slots, experts, hidden, dtype):
    torch.manual_seed(hidden)
    ids = random_ids(tokens, slots, experts, absent=0.3)
    slots = ids.shape[1]
    rows = torch.randn(tokens * slots, hidden).to(dtype)
    row_MK = torch.randperm(tokens * slots).view(tokens, slots).int()
    row_MK = torch.where(ids < 0, -1, row_MK)
    weights, add = torch.rand(tokens, slots), torch.randn(tokens, hidden).to(dtype)
    for extra in (
        {},
        {"weights_MK": weights},
        {"add_MD": add, "round_to_rows": True, "like_rows": True},
        {"add_MD": add},
    ):
        common = {"num_experts": experts, "blocks": reduction_blocks(experts)}
        moved = {k: v.cuda() if isinstance(v, torch.Tensor) else v for k, v in extra.items()}
        want = tree_reduce(rows, row_MK, ids_MK=ids, **common, **extra)
        got = tree_reduce(rows.cuda(), row_MK.cuda(), ids_MK=ids.cuda(), **common, **moved)
        assert torch.equal(want, got.cpu()), (extra.keys(), (want.float() - got.cpu().float()).abs().max())


def test_tree_reduce_over_many_ranks():
    rows = torch.randn(90, 32)
    row_MK = torch.arange(90).view(10, 9).int()
    ids = torch.arange(9).expand(10, 9).int()
    want = tree_reduce(rows, row_MK, ids_MK=ids, num_experts=9, blocks=9)
    got = tree_reduce(rows.cuda(), row_MK.cuda(), ids_MK=ids.cuda(), num_experts=9, blocks=9)
    assert torch.equal(want, got.cpu())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.uint8])
@pytest.mark.parametrize("hidden", [1, 3, 64, 2048])
def test_gather_rows(hidden, dtype):
    x = torch.randint(0, 100, (30, hidden)).to(dtype)
    index = torch.randint(-1, 30, (77,)).int()
    for idx in (index, index.long()):
        assert torch.equal(gather_rows(x, idx), gather_rows(x.cuda(), idx.cuda()).cpu())
    assert gather_rows(x.cuda()[:0], torch.full((4,), -1, device="cuda")).eq(0).all()
