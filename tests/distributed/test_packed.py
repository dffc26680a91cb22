"""The packed shared expert over several ranks: outputs and gradients of the separate path on one rank."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moe_layer.config.model import ExpertsConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_layer.errors import RankMismatch
from moe_layer.layer import MoELayer
from moe_layer.parallel import parallelize
from tests.distributed.cases import config_for
from tests.distributed.pool import Pool

pytestmark = pytest.mark.dist
D, T = 16, 22


def make(mode: str, backend: str, *, reduce: bool = True, rows: str = "auto", gate: bool = True) -> MoELayer:
    config = MoEConfig(
        hidden_size=D,
        router=RouterConfig(num_experts=8, top_k=3),
        experts=ExpertsConfig(intermediate_size=12, init_std=0.3),
        shared_expert=SharedExpertConfig(intermediate_size=12, gate=gate, mode=mode),
        dispatch=config_for(backend, deadline_s=20, reduce=reduce, rows=rows),
    )
    torch.manual_seed(4)
    return MoELayer(config, dtype=torch.float64)


def run(layer: MoELayer, share: slice) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x, upstream = (torch.randn(T, D, generator=generator, dtype=torch.float64)[share] for _ in range(2))
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found  # type: ignore[return-value]


def on_ranks(mode: str, backend: str, ep: int, reduce: bool, rows: str) -> dict[str, Tensor]:
    """This rank's results on a mesh of 4/ep replicas (each replica sees the same data)."""
    mesh = init_device_mesh("cpu", (4 // ep, ep), mesh_dim_names=("dp", "ep"))
    layer = make(mode, backend, reduce=reduce, rows=rows)
    context = parallelize(layer, mesh)
    r = dist.get_rank() % ep
    found = run(layer, slice(None) if backend == "replicated" else slice(T * r // ep, T * (r + 1) // ep))
    context.close()
    return found


def assert_close(got: Tensor, want: Tensor, name: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12, msg=lambda text: f"{name}: {text}")


@pytest.mark.parametrize("ep", [2, 4])
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
@pytest.mark.parametrize("backend", ["all_to_all", "all_gather", "nvlink"])
def test_tokens_of_their_own(pool: Pool, backend: str, ep: int, rows: str) -> None:
    """Every rank has its tokens: y and dx join, dense gradients add up, experts have theirs."""
    want = run(make("overlap", "auto"), slice(None))
    results = pool.run(on_ranks, "packed", backend, ep, True, rows)[:ep]
    for name, value in want.items():
        parts = [result[name] for result in results]
        if name in ("y", "dx"):
            assert_close(torch.cat(parts), value, name)
        elif name.startswith("experts."):
            assert_close(parts[0], value, name)
        else:
            assert_close(torch.stack(parts).sum(0), value, name)


@pytest.mark.parametrize("mode", ["packed", "overlap"])
@pytest.mark.parametrize("ep", [2, 4])
def test_replicated_tokens(pool: Pool, mode: str, ep: int) -> None:
    """Each rank computes T/R tokens (22 over 4: 5, 6, 5, 6) and has everything in the end."""
    want = run(make("overlap", "auto"), slice(None))
    for result in pool.run(on_ranks, mode, "replicated", ep, True, "auto"):
        for name, value in want.items():
            assert_close(result[name], value, name)


@pytest.mark.parametrize("mode", ["packed", "overlap"])
def test_replicated_partial_sums(pool: Pool, mode: str) -> None:
    """`reduce: false`: what the ranks hold adds up to the whole, the shared expert counted once."""
    want = run(make("overlap", "auto"), slice(None))
    results = pool.run(on_ranks, mode, "replicated", 4, False, "auto")
    for name in ("y", "dx", *(n for n in want if n.startswith("shared_expert"))):
        assert_close(torch.stack([result[name] for result in results]).sum(0), want[name], name)


def shared_rows(ep: int) -> int:
    """Rows of the shared group in this rank's grouped call."""
    from moe_layer.experts import compute

    backend = compute.BACKENDS["reference"]
    original, seen = backend.forward, []

    def forward(layout: object, weights: object, spec: object) -> object:
        seen.append(int(layout.offsets[1]))  # type: ignore[attr-defined]
        return original(layout, weights, spec)

    backend.forward = forward
    try:
        on_ranks("packed", "replicated", ep, True, "auto")
    finally:
        backend.forward = original
    (rows,) = seen
    return rows


def test_a_rank_computes_its_share_only(pool: Pool) -> None:
    assert pool.run(shared_rows, 4) == [5, 6, 5, 6]


def uneven_tokens() -> str:
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "ep"))
    layer = make("packed", "replicated")
    context = parallelize(layer, mesh)
    try:
        layer(torch.zeros(8 + (dist.get_rank() == 1), D, dtype=torch.float64))
    except RankMismatch as error:
        return str(error)
    finally:
        context.close()
    return "no error"


def test_different_tokens_are_an_error(pool: Pool) -> None:
    for text in pool.run(uneven_tokens):
        assert "needs the same tokens on every rank" in text and "[8, 9, 8, 8]" in text
