"""FSDP2 on everything but the experts (dp 2 x ep 2): gradients, norm and training equal to one process."""

from __future__ import annotations

import dataclasses
import math
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from moe_layer.config.model import SharedExpertConfig
from moe_layer.errors import ConfigError
from moe_layer.parallel import clip_grad_norm, parallelize, sync_gradients
from moe_layer.parallel.fsdp import shard_rest
from tests.distributed.pool import Pool
from tests.distributed.test_parallelize import B, Model, config, data, full_state, train

pytestmark = pytest.mark.dist


def model(mode: str) -> Model:
    """The small model of test_parallelize; its shared expert as wide as the routed ones."""
    return Model(dataclasses.replace(config(), shared_expert=SharedExpertConfig(intermediate_size=12, mode=mode)))


def gradients(net: nn.Module, share: slice, *, average: bool) -> tuple[dict[str, Tensor], float]:
    """Full gradients (zeros for None) and their norm, without clipping."""
    (net(data(0)[share]) - 1).square().mean().backward()
    if average:
        sync_gradients(net)
    norm = float(clip_grad_norm(net, math.inf))
    return full_gradients(net), norm


def full_gradients(net: nn.Module) -> dict[str, Tensor]:
    """Of every parameter, zeros for None; collective where they are sharded."""
    found = {}
    for name, parameter in net.named_parameters():
        gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient.clone()
    return found


def on_mesh(mode: str, blocks: bool) -> tuple[dict[str, Tensor], float, set[str], list[float], dict[str, Tensor]]:
    """Gradients, norm, names of what FSDP shards, and the norms of five clipped training steps with the end state."""
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")  # nothing here works in place
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    net = model(mode)
    context = parallelize(net, mesh)
    shard_rest(net, mesh, modules=net.blocks if blocks else ())
    per, rank = B // 4, dist.get_rank()
    share = slice(rank * per, (rank + 1) * per)
    sharded = {n for n, p in net.named_parameters() if isinstance(p, DTensor) and p.device_mesh.size() == 4}
    found, norm = gradients(net, share, average=True)
    _, norms = train(net, share=share, steps=5, average=True)
    state = full_state(net)
    context.close()
    return found, norm, sharded, norms, state


@pytest.mark.parametrize(("mode", "blocks"), [("overlap", True), ("overlap", False), ("packed", True)])
def test_equal_to_one_process(pool: Pool, mode: str, blocks: bool) -> None:
    single = model(mode)
    want, want_norm = gradients(single, slice(None), average=False)
    _, want_norms = train(single, share=slice(None), steps=5, average=False)
    want_state = full_state(single)
    for found, norm, sharded, norms, state in pool.run(on_mesh, mode, blocks):
        assert "embed.weight" in sharded and "blocks.0.router.weight" in sharded
        assert ("blocks.1.shared_expert.up_proj.weight" in sharded) == (mode == "overlap")
        assert not any(".experts." in name for name in sharded)
        assert math.isclose(norm, want_norm, rel_tol=2e-6), (norm, want_norm)
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=lambda t, n=name: f"{n}: {t}")
        assert all(math.isclose(a, b, rel_tol=2e-5) for a, b in zip(norms, want_norms, strict=True)), (
            norms,
            want_norms,
        )
        for name, value in want_state.items():
            if "tokens_per_expert" not in name:  # counts of a rank's own tokens
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)


def everything_sharded() -> tuple[dict[str, Tensor], float]:
    """dp 4: FSDP shards the experts as well, which `parallelize` leaves whole at ep 1."""
    warnings.filterwarnings("ignore", message=".*returned a view tensor.*")
    net = model("overlap")
    context = parallelize(net, init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "ep")))
    for block in net.blocks:
        fully_shard(block)
    fully_shard(net)
    per, rank = B // 4, dist.get_rank()
    found = gradients(net, slice(rank * per, (rank + 1) * per), average=True)
    assert all(isinstance(p, DTensor) for p in net.parameters())
    context.close()
    return found


def test_experts_that_only_fsdp_shards(pool: Pool) -> None:
    want, want_norm = gradients(model("overlap"), slice(None), average=False)
    for found, norm in pool.run(everything_sharded):
        assert math.isclose(norm, want_norm, rel_tol=2e-6), (norm, want_norm)
        for name, value in want.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-7, msg=lambda t, n=name: f"{n}: {t}")


def refusals() -> list[str]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    texts = []
    try:
        shard_rest(model("overlap"), mesh)
    except ConfigError as error:
        texts.append(str(error))
    net = model("overlap")
    context = parallelize(net, mesh)
    fully_shard(net.embed, mesh=mesh["dp"])
    net(data(0)[:2]).sum().backward()
    try:
        sync_gradients(net)
    except ConfigError as error:
        texts.append(str(error))
    context.close()
    net = model("overlap")
    context = parallelize(net, mesh)
    fully_shard(net.blocks[0], mesh=mesh["dp"])
    for call in (lambda: sync_gradients(net), lambda: clip_grad_norm(net, 1.0)):
        try:
            call()
        except ConfigError as error:
            texts.append(str(error))
    context.close()
    return texts


def test_refusals(pool: Pool) -> None:
    for unparallelized, half, *twice in pool.run(refusals):
        assert "call parallelize(model, mesh)" in unparallelized
        assert "FSDP shards parameters over 2 ranks and parallelize uses 4" in half
        assert len(twice) == 2
        assert all("experts are sharded by FSDP too" in text and "fsdp.shard_rest" in text for text in twice)
