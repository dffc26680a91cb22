"""`dispatch.chunks` over several ranks: as many dispatches a pass on every rank, results of one rank with one part."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moe_layer.config.model import DispatchConfig, ExpertsConfig, MoEConfig, RouterConfig
from moe_layer.config.model import SharedExpertConfig as Shared
from moe_layer.dispatch import make_dispatcher
from moe_layer.errors import CapacityError, RankMismatch
from moe_layer.layer import MoELayer
from moe_layer.parallel import parallelize
from moe_layer.parallel.context import ParallelContext
from tests.distributed.cases import config_for
from tests.distributed.pool import Pool
from tests.distributed.ranks import ThreadRanks

D, T = 16, 22
SHARED = {"none": None, "overlap": Shared(intermediate_size=10, gate=True)} | {
    "packed": Shared(intermediate_size=12, gate=True, mode="packed")
}


def make(dispatch: DispatchConfig, shared: str = "none") -> MoELayer:
    config = MoEConfig(
        hidden_size=D,
        router=RouterConfig(num_experts=8, top_k=3),
        experts=ExpertsConfig(intermediate_size=12, init_std=0.3),
        shared_expert=SHARED[shared],
        dispatch=dispatch,
    )
    torch.manual_seed(4)
    return MoELayer(config, dtype=torch.float64)


def run(layer: MoELayer, share: slice) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(9)
    x, upstream = (torch.randn(T, D, generator=generator, dtype=torch.float64)[share] for _ in range(2))
    x = x.clone().requires_grad_()
    y = layer(x)
    y.backward(upstream)
    found = {"y": y.detach(), "dx": x.grad, "load": layer.router.tokens_per_expert.clone()}
    for name, parameter in layer.named_parameters():
        gradient = parameter.grad
        found[name] = gradient.full_tensor() if isinstance(gradient, DTensor) else gradient
    return found  # type: ignore[return-value]


def on_ranks(keys: dict[str, Any], shared: str, ep: int, cuts: list[int]) -> dict[str, Tensor]:
    """This rank's results; rank r has the tokens `[cuts[r], cuts[r + 1])` (replicated: all)."""
    mesh = init_device_mesh("cpu", (4 // ep, ep), mesh_dim_names=("dp", "ep"))
    layer = make(config_for(**{"deadline_s": 20, **keys}), shared)
    context = parallelize(layer, mesh)
    r = dist.get_rank() % ep
    found = run(layer, slice(None) if keys["backend"] == "replicated" else slice(cuts[r], cuts[r + 1]))
    context.close()
    return found


def assert_close(got: Tensor, want: Tensor, name: str) -> None:
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12, msg=lambda text: f"{name}: {text}")


def one_rank(shared: str) -> dict[str, Tensor]:
    return run(make(DispatchConfig(), shared), slice(None))


@pytest.mark.dist
@pytest.mark.parametrize("ep, cuts", [(2, [0, 9, 22]), (4, [0, 2, 2, 11, 22])])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("rows", ["expert_major", "compact"])
@pytest.mark.parametrize("backend", ["all_to_all", "all_gather", "nvlink"])
def test_tokens_of_their_own(pool: Pool, backend: str, rows: str, shared: str, ep: int, cuts: list[int]) -> None:
    """Three parts of unequal shares, of two tokens, of none."""
    want = one_rank(shared)
    keys = {"backend": backend, "rows": rows, "chunks": 3}
    results = pool.run(on_ranks, keys, shared, ep, cuts)[:ep]
    for name, value in want.items():
        parts = [result[name] for result in results]
        if name in ("y", "dx"):
            assert_close(torch.cat(parts), value, name)
        elif name.startswith("experts."):
            assert_close(parts[0], value, name)
        else:
            assert_close(torch.stack(parts).sum(0), value, name)


@pytest.mark.dist
@pytest.mark.parametrize(
    "keys",
    [
        {"backend": "all_to_all", "p2p_world_size": 2},
        {"backend": "all_to_all", "apply_probs": "combine"},
        {"backend": "nvlink", "apply_probs": "source"},
        {"backend": "nvlink", "alignment": 8, "ring_depth": 1},
    ],
)
def test_other_ways(pool: Pool, keys: dict[str, Any]) -> None:
    """Two domains of two ranks, other places of the probabilities, pads, a ring of one slot."""
    want = one_rank("none")
    results = pool.run(on_ranks, {**keys, "chunks": 2}, "none", 4, [0, 2, 2, 11, 22])
    for name in ("y", "dx"):
        assert_close(torch.cat([result[name] for result in results]), want[name], name)
    for name in ("experts.gate_up_proj", "experts.down_proj"):
        assert_close(results[0][name], want[name], name)


@pytest.mark.dist
@pytest.mark.parametrize("backend", ["all_to_all", "nvlink"])
@pytest.mark.parametrize("shared", ["overlap", "packed"])
def test_static_capacity_is_that_of_a_part(pool: Pool, backend: str, shared: str) -> None:
    """Room for 3 * ceil(11 / 2) tokens of a rank a part."""
    keys = {"backend": backend, "chunks": 2, "capacity": "static", "static_factor": 3.0, "max_tokens_per_rank": 11}
    results = pool.run(on_ranks, keys, shared, 2, [0, 11, 22])[:2]
    want = one_rank(shared)
    for name in ("y", "dx"):
        assert_close(torch.cat([result[name] for result in results]), want[name], name)


@pytest.mark.dist
@pytest.mark.parametrize("reduce", [True, False])
@pytest.mark.parametrize("shared", SHARED)
@pytest.mark.parametrize("ep", [2, 4])
def test_replicated_tokens(pool: Pool, shared: str, ep: int, reduce: bool) -> None:
    """With `reduce` every rank has everything; without, the ranks' results add up."""
    want = one_rank(shared)
    keys = {"backend": "replicated", "chunks": 3, "reduce": reduce}
    results = pool.run(on_ranks, keys, shared, ep, [])[:ep]
    for name, value in want.items():
        if name in ("load", "router.weight") and not reduce:
            continue
        if name.startswith("experts.") or reduce:
            for result in results:
                assert_close(result[name], value, name)
        elif name != "shared_expert_gate.weight":
            assert_close(torch.stack([result[name] for result in results]).sum(0), value, name)


def test_other_numbers_of_parts_are_noticed(ranks: ThreadRanks) -> None:
    def one(context: ParallelContext) -> None:
        config = config_for("all_to_all", chunks=1 + context.ep_rank, deadline_s=5.0)
        make_dispatcher(config, num_experts=4, top_k=2, context=context)

    for error in ranks.run(2, one, fresh=True):
        assert isinstance(error, RankMismatch) and "dispatch.chunks: 1 on rank 0, 2 on rank 1" in str(error)


def test_window_holds_a_part(ranks: ThreadRanks) -> None:
    """nvlink's buffers shrink with the parts, and a part that does not fit is refused with both numbers."""

    def size(chunks: int) -> list[int]:
        def one(context: ParallelContext) -> int:
            config = config_for("nvlink", chunks=chunks, max_tokens_per_rank=4099)
            return make_dispatcher(config, num_experts=4, top_k=2, context=context).buffer_bytes(256, torch.bfloat16)  # type: ignore[attr-defined]

        return ranks.run(2, one)

    assert DispatchConfig(backend="nvlink", chunks=4, max_tokens_per_rank=4099).max_tokens_per_part == 1025
    assert size(4)[0] < 0.27 * size(1)[0]

    def too_many(context: ParallelContext) -> None:
        layer = make(config_for("nvlink", chunks=2, max_tokens_per_rank=20))
        layer.bind(context)
        layer(torch.zeros(23, D, dtype=torch.float64))

    for error in ranks.run(2, too_many, fresh=True):
        assert isinstance(error, CapacityError)
        assert "11 tokens exceed dispatch.max_tokens_per_rank (10, 20 in 2 dispatch.chunks)" in str(error)
