"""`parallelize` on real processes: a small model trains alike on dp x ep meshes and on one rank."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor

from moe_layer.config.model import ExpertsConfig, LossesConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_layer.errors import ConfigError
from moe_layer.layer import MoELayer
from moe_layer.parallel import clip_grad_norm, parallelize, parameter_groups, sync_gradients
from tests.distributed.cases import config_for
from tests.distributed.pool import Pool

pytestmark = pytest.mark.dist
D, B, S = 16, 8, 6


def config(backend: str = "auto", aux: float = 0.01) -> MoEConfig:
    return MoEConfig(
        hidden_size=D,
        router=RouterConfig(num_experts=8, top_k=2),
        experts=ExpertsConfig(intermediate_size=12, init_std=0.2),
        shared_expert=SharedExpertConfig(intermediate_size=8),
        losses=LossesConfig(aux="batch", aux_coeff=aux) if aux else LossesConfig(),
        dispatch=config_for(backend, deadline_s=20),
    )


class Model(nn.Module):
    def __init__(self, cfg: MoEConfig, layers: int = 2) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Linear(D, D)
        self.blocks = nn.ModuleList(MoELayer(cfg) for _ in range(layers))
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return x


def data(step: int) -> Tensor:
    return torch.randn(B, S, D, generator=torch.Generator().manual_seed(step))


def train(model: nn.Module, *, share: slice, steps: int, average: bool) -> tuple[list[float], list[float]]:
    """Losses (of this rank's share) and gradient norms."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses, norms = [], []
    for step in range(steps):
        optimizer.zero_grad()
        loss = (model(data(step)[share]) - 1).square().mean()
        loss.backward()
        if average:
            sync_gradients(model)
        norms.append(float(clip_grad_norm(model, 0.5)))
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, norms


def full_state(model: nn.Module) -> dict[str, Tensor]:
    return {
        name: (value.full_tensor() if isinstance(value, DTensor) else value).clone()
        for name, value in model.state_dict().items()
    }


def on_mesh(dp: int, ep: int, steps: int, backend: str) -> tuple[list[float], list[float], dict[str, Tensor]]:
    mesh = init_device_mesh("cpu", (dp, ep), mesh_dim_names=("dp", "ep"))
    model = Model(config(backend))
    if dist.get_rank() > 0:
        with torch.no_grad():
            model.embed.weight.zero_()  # the first rank's value counts
    context = parallelize(model, mesh)
    if ep > 1:
        assert all(isinstance(p, DTensor) and p.shape[0] == 8 for p in model.blocks[0].experts.parameters())
    per = B // (dp * ep)
    rank = dist.get_rank()
    losses, norms = train(model, share=slice(rank * per, (rank + 1) * per), steps=steps, average=True)
    assert context.step == steps
    state = full_state(model)
    context.close()
    return losses, norms, state


@pytest.mark.parametrize(
    ("dp", "ep", "backend"),
    [(1, 4, "auto"), (2, 2, "auto"), (4, 1, "auto"), (1, 4, "nvlink"), (2, 2, "nvlink")],
)
def test_meshes_train_like_one_rank(pool: Pool, dp: int, ep: int, backend: str) -> None:
    """Mean loss, gradient norm, all parameters after 6 steps; the auxiliary loss spans all ranks."""
    model = Model(config())
    losses, norms = train(model, share=slice(None), steps=6, average=False)
    results = pool.run(on_mesh, dp, ep, 6, backend)
    for step in range(6):
        mean = sum(result[0][step] for result in results) / 4
        assert math.isclose(mean, losses[step], rel_tol=2e-6), (step, mean, losses[step])
        assert all(math.isclose(result[1][step], norms[step], rel_tol=2e-5) for result in results)
    want = full_state(model)
    for _, _, state in results:
        assert state.keys() == want.keys()
        for name, value in want.items():
            if "tokens_per_expert" not in name:  # counts of a rank's own tokens
                torch.testing.assert_close(state[name], value, rtol=1e-4, atol=1e-6, msg=name)


def replicated(steps: int) -> tuple[list[float], list[float]]:
    """Every rank of the EP group sees the same batch."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model = Model(config("replicated", aux=0.0))
    context = parallelize(model, mesh)
    per, replica = B // 2, dist.get_rank() // 2
    out = train(model, share=slice(replica * per, (replica + 1) * per), steps=steps, average=True)
    context.close()
    return out


def test_replicated_tokens(pool: Pool) -> None:
    losses, norms = train(Model(config(aux=0.0)), share=slice(None), steps=4, average=False)
    results = pool.run(replicated, 4)
    for step in range(4):
        assert math.isclose((results[0][0][step] + results[2][0][step]) / 2, losses[step], rel_tol=2e-6)
        assert all(math.isclose(result[1][step], norms[step], rel_tol=2e-5) for result in results)


def adamw() -> tuple[str, list[float], dict[str, Tensor]]:
    """Losses and parameters under `foreach`, which CUDA tensors get by default; what it says to ungrouped ones."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "ep"))
    model = Model(config())
    context = parallelize(model, mesh)
    share = slice(B // 4 * dist.get_rank(), B // 4 * (dist.get_rank() + 1))
    (model(data(0)[share]) - 1).square().mean().backward()
    try:
        torch.optim.AdamW(model.parameters(), lr=0.0, foreach=True).step()
        said = "nothing"
    except RuntimeError as error:
        said = str(error)
    groups = parameter_groups(model)
    assert len(groups) == 2
    assert {id(p) for g in groups for p in g["params"]} == {id(p) for p in model.parameters()}
    losses, state = with_adamw(model, torch.optim.AdamW(groups, lr=0.01, foreach=True), share), full_state(model)
    context.close()
    return said, losses, state


def with_adamw(model: nn.Module, optimizer: torch.optim.Optimizer, share: slice) -> list[float]:
    losses = []
    for step in range(3):
        optimizer.zero_grad()
        loss = (model(data(step)[share]) - 1).square().mean()
        loss.backward()
        sync_gradients(model)
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses


def test_parameter_groups_for_foreach(pool: Pool) -> None:
    model = Model(config())
    (group,) = parameter_groups(model)
    assert all(a is b for a, b in zip(group["params"], model.parameters(), strict=True))
    losses = with_adamw(model, torch.optim.AdamW([group], lr=0.01), slice(None))
    results = pool.run(adamw)
    for step in range(3):
        assert math.isclose(sum(result[1][step] for result in results) / 4, losses[step], rel_tol=1e-5)
    for said, _, state in results:
        assert "mixed torch.Tensor and DTensor" in said
        for name, value in full_state(model).items():
            if "tokens_per_expert" not in name:
                torch.testing.assert_close(state[name], value, rtol=1e-3, atol=1e-4, msg=name)


def uneven() -> list[bool]:
    """One rank has no tokens at all: nobody hangs and every gradient exists."""
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "ep"))
    model = Model(config())
    context = parallelize(model, mesh)
    rows = (0, 1, 2, 5)[dist.get_rank()]
    loss = model(data(0)[:rows]).square().sum()
    loss.backward()
    sync_gradients(model)
    clip_grad_norm(model, 1.0)
    found = [
        p.grad is not None and bool(torch.isfinite(p.grad.to_local() if isinstance(p.grad, DTensor) else p.grad).all())
        for p in model.parameters()
    ]
    context.close()
    return found


def test_a_rank_without_tokens(pool: Pool) -> None:
    for found in pool.run(uneven):
        assert all(found)


def from_meta(dp: int, ep: int) -> dict[str, Tensor]:
    """Built without memory, split, then initialised; only the first rank has the right seed."""
    layer = MoELayer(config(), device="meta")
    context = parallelize(layer, init_device_mesh("cpu", (dp, ep), mesh_dim_names=("dp", "ep")))
    layer.to_empty(device="cpu")
    torch.manual_seed(7 + dist.get_rank())
    layer.reset_parameters()
    layer(torch.randn(3, D)).sum().backward()
    state = full_state(layer)
    context.close()
    return state


@pytest.mark.parametrize(("dp", "ep"), [(1, 4), (2, 2)])
def test_meta_construction_gives_every_rank_its_own_experts(pool: Pool, dp: int, ep: int) -> None:
    torch.manual_seed(7)
    eager = MoELayer(config(), device="meta").to_empty(device="cpu")
    eager.reset_parameters()
    want = full_state(eager)
    for state in pool.run(from_meta, dp, ep):
        assert state.keys() == want.keys()
        for name, value in want.items():
            assert torch.equal(state[name], value), name


def copies() -> tuple[Any, ...]:
    mesh = init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "ep"))
    layer = MoELayer(config())
    context = parallelize(layer, mesh)
    try:
        parallelize(layer, mesh)
    except ConfigError as error:
        twice = str(error)
    left_behind = (pickle.loads(pickle.dumps(context)), copy.deepcopy(context))
    twin, x = copy.deepcopy(layer), torch.randn(2, D)
    try:
        twin(x)
    except ValueError as error:
        unbound = str(error)
    twin.bind(context)
    same = torch.equal(twin(x), layer(x))
    context.close()
    context.close()
    try:
        layer(torch.zeros(2, D))
    except RuntimeError as error:
        closed = str(error)
    return twice, left_behind, unbound, same, closed


def test_lifecycle(pool: Pool) -> None:
    for _ in range(2):
        for twice, left_behind, unbound, same, closed in pool.run(copies):
            assert "parallelized already" in twice
            assert left_behind == (None, None)
            assert "copy.bind(layer.router.context)" in unbound and same
            assert closed == "the EP group is unusable since the context was closed"


def biases() -> tuple[int, int, list[float]]:
    """Warnings of a layer that knows no other ranks and of one that does, and the latter's bias."""
    router = RouterConfig(num_experts=4, top_k=1, score_function="sigmoid", expert_bias=True)
    net = MoELayer(MoEConfig(hidden_size=D, router=router, experts=ExpertsConfig(intermediate_size=4)))
    ids = torch.full((2, 1), min(dist.get_rank(), 2), dtype=torch.int32)  # expert 3 gets nothing
    counts = []
    for context in (None, parallelize(net, init_device_mesh("cpu", (4, 1), mesh_dim_names=("dp", "ep")))):
        net.bind(context)
        net(torch.randn(2, D), replay=ids).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            net.update_bias()
        counts.append(sum("expert_bias will differ between ranks; call" in str(w.message) for w in caught))
        if context is None:
            net.router.expert_bias.zero_()
    net.router.context.close()
    return (*counts, net.router.expert_bias.tolist())


def test_biases_of_a_layer_that_knows_no_other_ranks(pool: Pool) -> None:
    """Beside DDP or FSDP alone each rank would move its bias by its own tokens."""
    for alone, bound, bias in pool.run(biases):
        assert (alone, bound) == (1, 0)
        assert bias == pytest.approx([0.0, 0.0, -0.001, 0.001])


def wrong_meshes() -> list[str]:
    def refusal(model: nn.Module, shape: tuple[int, ...], names: tuple[str, ...]) -> str:
        try:
            parallelize(model, init_device_mesh("cpu", shape, mesh_dim_names=names))
        except ConfigError as error:
            return str(error)
        return "accepted"

    six = MoELayer(
        MoEConfig(
            hidden_size=D, router=RouterConfig(num_experts=6, top_k=2), experts=ExpertsConfig(intermediate_size=4)
        )
    )
    return [
        refusal(MoELayer(config()), (2, 2), ("dp", "tp")),
        refusal(nn.Linear(2, 2), (1, 4), ("dp", "ep")),
        refusal(six, (1, 4), ("dp", "ep")),
    ]


def test_refusals(pool: Pool) -> None:
    for names, empty, split in pool.run(wrong_meshes):
        assert '"dp" and "ep"' in names
        assert "no MoELayer" in empty
        assert split == "num_experts (6) must be divisible by parallel.ep (4); try 1, 2, 3, 6"


def test_clip_needs_a_positive_norm() -> None:
    with pytest.raises(ConfigError, match="max_norm must be positive"):
        clip_grad_norm(nn.Linear(2, 2), 0.0)


def test_clip_on_one_rank_is_torch_s() -> None:
    ours, theirs = nn.Linear(4, 4), nn.Linear(4, 4)
    theirs.load_state_dict(ours.state_dict())
    for model in (ours, theirs):
        model(torch.ones(3, 4)).square().sum().backward()
    norm = clip_grad_norm(ours, 0.1)
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(theirs.parameters(), 0.1))
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)
