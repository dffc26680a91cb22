"""A rollout of one process replayed by four: a trace in a file, dp x ep meshes, FSDP, recompute; and recorded back."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint

from moe_layer import RoutingSession, RoutingTrace
from moe_layer.parallel import clip_grad_norm, parallelize, sync_gradients
from moe_layer.parallel.fsdp import shard_rest
from moe_layer.replay import index_map
from tests.distributed.pool import Pool
from tests.distributed.test_fsdp import full_gradients
from tests.distributed.test_parallelize import B, Model, S, config, data

pytestmark = pytest.mark.dist
TOKENS = torch.arange(B * S) % 11


class Trained(Model):
    """`run` calls a block."""

    def forward(self, x: Tensor, run: Callable[[nn.Module, Tensor], Tensor]) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + run(block, x)
        return x


def rollout(path: Path) -> None:
    """Ids of another model than the one that trains, so that replay makes a difference."""
    net = Model(config())
    with torch.no_grad():
        for block in net.blocks:
            block.router.weight.normal_(generator=torch.Generator().manual_seed(1))
    with RoutingSession(net) as session, torch.no_grad(), session.record() as recording:
        net(data(1))
    recording.trace(token_ids=TOKENS, cu_seqlens=list(range(0, B * S + 1, S))).save(path)


def step(net: nn.Module, path: str, rows: Tensor, kind: str) -> tuple[dict[str, Tensor], float, RoutingTrace]:
    """Gradients of these rows `[b, S]` under the trace, their norm, and what the routers did."""
    session, trace = RoutingSession(net), RoutingTrace.open(path)
    plan = trace.plan(rows, layers=session.layers, tokens=TOKENS[rows], allow_missing=False)
    runs: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
        "plain": lambda block, x: block(x),
        "non-reentrant": lambda block, x: checkpoint(block, x, use_reentrant=False, context_fn=session.context_fn),
        "reentrant": lambda block, x: checkpoint(session.bind(block), x, use_reentrant=True),
    }
    with session.replay(plan), session.record() as recording:
        y = net(data(0).flatten(0, 1)[rows], runs[kind])
    (y - 1).square().mean().backward()
    if dist.is_initialized():
        sync_gradients(net)
    norm = float(clip_grad_norm(net, math.inf))
    found = full_gradients(net)
    session.close()
    return found, norm, recording.trace(rows, num_tokens=B * S, token_ids=TOKENS)


def on_mesh(path: str, dp: int, ep: int, backend: str, fsdp: bool, kind: str) -> tuple[Any, float, RoutingTrace]:
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    mesh = init_device_mesh("cpu", (dp, ep), mesh_dim_names=("dp", "ep"))
    net = Trained(config(backend))
    context = parallelize(net, mesh)
    if fsdp:
        shard_rest(net, mesh, modules=net.blocks)
    rows = index_map.packed_index([S] * B).view(B, S).tensor_split(4)[dist.get_rank()]
    result = step(net, path, rows, kind)
    context.close()
    return result


@pytest.mark.parametrize(
    ("dp", "ep", "backend", "fsdp", "kind"),
    [
        (2, 2, "auto", False, "plain"),
        (2, 2, "auto", True, "non-reentrant"),
        (1, 4, "auto", False, "reentrant"),
        (1, 4, "nvlink", False, "non-reentrant"),
        (4, 1, "auto", True, "reentrant"),
    ],
)
def test_a_rollout_replayed_on_meshes(
    pool: Pool, tmp_path: Path, dp: int, ep: int, backend: str, fsdp: bool, kind: str
) -> None:
    """Gradients and norm of one process under the same trace; the shards' records merge into the trace."""
    path = tmp_path / "rollout.safetensors"
    rollout(path)
    want, want_norm, _ = step(Trained(config()), str(path), torch.arange(B * S).view(B, S), "plain")
    results = pool.run(on_mesh, str(path), dp, ep, backend, fsdp, kind)
    for found, norm, _ in results:
        assert math.isclose(norm, want_norm, rel_tol=2e-6), (norm, want_norm)
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=lambda t, n=name: f"{n}: {t}")
    whole = results[0][2]
    for *_, part in results[1:]:
        whole = whole.merged(part)
    assert torch.equal(whole.wide_ids(), RoutingTrace.open(path).wide_ids())
