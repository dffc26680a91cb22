"""The dispatcher alone, under a router and experts that are not ours; one rank, or several over gloo.

    python examples/dispatcher_only.py
    torchrun --nproc-per-node 2 examples/dispatcher_only.py

Every rank brings its own tokens and its share of the experts; y is the same for any number of ranks.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
from torch import Tensor

from moe_layer import Routing
from moe_layer.config import DispatchConfig
from moe_layer.dispatch import make_dispatcher
from moe_layer.parallel.context import ParallelContext

NUM_EXPERTS, TOP_K, HIDDEN, TOKENS = 8, 2, 32, 16


def my_router(x_TD: Tensor) -> Routing:
    """Anything that gives ids and weights; this one hashes the token."""
    first_T = x_TD.abs().sum(dim=-1).mul(1000).long() % NUM_EXPERTS
    ids_TK = torch.stack([first_T, (first_T + 3) % NUM_EXPERTS], dim=-1)
    return Routing.from_ids(ids_TK, torch.full_like(ids_TK, 0.5, dtype=torch.float32), num_experts=NUM_EXPERTS)


def my_experts(rows_ND: Tensor, probs_N: Tensor, offsets: list[int], experts: list[int]) -> Tensor:
    """Expert e multiplies by e + 1: rows arrive grouped by expert, `offsets` are the group boundaries."""
    parts = [rows_ND[a:b] * (e + 1) for e, a, b in zip(experts, offsets[:-1], offsets[1:], strict=True)]
    return torch.cat([*parts, rows_ND[offsets[-1] :]]) * probs_N[:, None]


def run() -> tuple[Tensor, Tensor]:
    """(y, what y should be) for this rank's tokens."""
    context = None
    if dist.is_initialized():
        world = dist.get_world_size()
        context = ParallelContext(dist.group.WORLD, ep_rank=dist.get_rank(), ep_size=world)
    dispatcher = make_dispatcher(DispatchConfig(), num_experts=NUM_EXPERTS, top_k=TOP_K, context=context)
    torch.manual_seed(context.ep_rank if context else 0)
    x_TD = torch.randn(TOKENS, HIDDEN)

    routing = my_router(x_TD)
    received = dispatcher.dispatch(x_TD, routing)
    rows_ND = my_experts(received.rows, received.probs_N, received.offsets_L1.tolist(), received.expert_ids_L.tolist())
    y_TD = dispatcher.combine(rows_ND, received)
    return y_TD, x_TD * (routing.weights_TK * (routing.ids_TK + 1)).sum(dim=-1, keepdim=True)


if __name__ == "__main__":
    if "RANK" in os.environ:
        dist.init_process_group("gloo")
    y, expected = run()
    torch.testing.assert_close(y, expected)
    print(f"rank {os.environ.get('RANK', '0')}: {y.shape[0]} tokens, y is right")
    if dist.is_initialized():
        dist.destroy_process_group()
