"""moe_layer.compat.perplexity on two GPUs: counts, rows, scales and probabilities against loops, halves apart."""

from __future__ import annotations

import dataclasses
from typing import TypeVar

import pytest
import torch
import torch.distributed as dist

from moe_layer.parallel import compat
from moe_layer.parallel.context import ParallelContext
from tests.distributed.perplexity_cases import (
    FILL,
    MOST,
    E,
    H,
    Out,
    Tokens,
    check_buffers,
    combined,
    config_of,
    inputs,
    make,
    make_out,
    make_tokens,
    run_experts,
)
from tests.distributed.pool import Pool

pytestmark = [pytest.mark.gpu, pytest.mark.dist]
needs_two = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")
BACKENDS = ["all_to_all", "all_gather", "replicated", "nvlink"]
Part = TypeVar("Part", Tokens, Out)


def _to(part: Part, device: torch.device | str) -> Part:
    return dataclasses.replace(part, **{f.name: getattr(part, f.name).to(device) for f in dataclasses.fields(part)})


def _context(device_type: str) -> ParallelContext:
    rank = dist.get_rank()
    device = torch.device(device_type, rank) if device_type == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    group = compat.new_group([0, 1], backend="nccl" if device.type == "cuda" else "gloo", timeout_s=50)
    store = compat.prefixed(compat.default_store(), "perplexity")
    return ParallelContext(group, ep_rank=rank, ep_size=2, device=device, store=store, owned=(group,))


def there_and_back(backend: str, device_type: str) -> list[str]:
    """Two objects (padded and contiguous buffers) whose halves are interleaved; fp32 experts' rows, fp64 expectations.

    The tokens are fp8 rows with fp16 scales: 7 on rank 0 and none on rank 1 for one object, 5 and 9 for the other.
    """
    context = _context(device_type)
    device, rank, local = context.device, context.ep_rank, E // 2
    x_dtype, done = torch.float8_e4m3fn, []
    layers = [
        make(context, config=config_of(backend, alignment=a, deadline_s=20.0), in_dtype=x_dtype, layer_index=j)
        for j, a in enumerate((1, 8))
    ]
    for ids_dtype in (torch.uint32, torch.int32, torch.int64):
        tokens = [
            [make_tokens(10 * j + r, T, dtype=x_dtype, idle=(2,)) for r, T in enumerate(sizes)]
            for j, sizes in enumerate(((7, 0), (5, 9)))
        ]
        if backend == "replicated":  # both ranks hold the same tokens, which count once
            tokens = [[one[0], one[0]] for one in tokens]
        nobody = make_tokens(0, 0, dtype=x_dtype)
        sources = [
            [one[r] if r == rank else nobody for r in (0, 1)] if backend == "replicated" else one for one in tokens
        ]
        mine = [_to(one[rank], device) for one in tokens]
        outs = [
            _to(make_out(local, rows, padded=padded, dtype=x_dtype), device)
            for rows, padded in ((2 * MOST, True), (60 + 8 * local, False))
        ]
        given = [inputs(one, scale=True, ids_dtype=ids_dtype) for one in mine]
        calls = [out.arguments(prob=True, scale=True) | one for out, one in zip(outs, given, strict=True)]
        for j in (0, 1):
            layers[j].dispatch(**calls[j], do_recv=False)
        for j in (1, 0):
            layers[j].dispatch(**calls[j], do_send=False)
        backs = []
        for j in (0, 1):
            out = _to(outs[j], "cpu")
            places = check_buffers(out, sources[j], rank, alignment=(1, 8)[j], prob=True, scale=True)
            backs.append(
                {
                    "out_tokens": torch.full((MOST + 1, H), float(FILL), dtype=torch.float32, device=device),
                    "expert_y": run_experts(places, out).float().to(device),
                    "indices": given[j]["indices"],
                    "weights": mine[j].w_TK * 2 - 1,
                }
            )
            layers[j].combine(**backs[j], do_recv=False)
        for j in (1, 0):
            layers[j].combine(**backs[j], do_send=False)
            got, one, T = backs[j]["out_tokens"].cpu(), tokens[j][rank], tokens[j][rank].x_TH.shape[0]
            torch.testing.assert_close(got[:T].double(), combined(one, one.w_TK * 2 - 1), rtol=1e-5, atol=1e-5)
            assert (got[T:] == FILL).all()
            done.append(f"{ids_dtype} {j}")
    context.close()
    return done


@needs_two
@pytest.mark.parametrize("backend", BACKENDS)
def test_there_and_back_on_two_gpus(pair: Pool, backend: str) -> None:
    for done in pair.run(there_and_back, backend, "cuda"):
        assert len(done) == 6
