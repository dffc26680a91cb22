"""A parallelized layer's checkpoints: saved at one EP size, loaded at another; a rank reads its own experts only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from moe_layer.checkpoint import export_block, import_block, load_layer, megatron_mapping, save_layer
from moe_layer.checkpoint.source import TensorSource, as_source
from moe_layer.config.model import ExpertsConfig, MoEConfig, RouterConfig, SharedExpertConfig
from moe_layer.errors import CheckpointError
from moe_layer.layer import MoELayer
from moe_layer.parallel import parallelize
from tests.distributed.pool import Pool

pytestmark = pytest.mark.dist
CONFIG = MoEConfig(
    hidden_size=8,
    router=RouterConfig(num_experts=8, top_k=2, score_function="sigmoid", expert_bias=True),
    experts=ExpertsConfig(intermediate_size=6),
    shared_expert=SharedExpertConfig(intermediate_size=5),
)


def random_layer(seed: int) -> MoELayer:
    layer = MoELayer(CONFIG)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for tensor in layer.state_dict().values():
            tensor.copy_(torch.randn(tensor.shape, generator=generator))
    return layer


def whole(layer: MoELayer) -> dict[str, Tensor]:
    return {name: t.full_tensor() if hasattr(t, "full_tensor") else t for name, t in layer.state_dict().items()}


def load_and_save(dp: int, ep: int, source: str, target: str) -> dict[str, Tensor]:
    layer = random_layer(seed=dist.get_rank())
    mesh = init_device_mesh("cpu", (dp, ep), mesh_dim_names=("dp", "ep"))
    context = parallelize(layer, mesh)
    load_layer(layer, source)
    save_layer(layer, target)
    state = {name: tensor.clone() for name, tensor in whole(layer).items()}
    context.close()
    return state


@pytest.mark.parametrize(("dp", "ep"), [(1, 4), (2, 2), (4, 1)])
def test_any_ep_size_loads_what_another_saved(pool: Pool, dp: int, ep: int, tmp_path: Path) -> None:
    layer = random_layer(seed=9)
    save_layer(layer, tmp_path / "one.safetensors")
    results = pool.run(load_and_save, dp, ep, str(tmp_path / "one.safetensors"), str(tmp_path / "many.safetensors"))
    for state in results:
        assert all(torch.equal(state[name], tensor) for name, tensor in layer.state_dict().items())
    again = random_layer(seed=10)
    load_layer(again, tmp_path / "many.safetensors")
    assert all(torch.equal(tensor, layer.state_dict()[name]) for name, tensor in again.state_dict().items())


class Counting:
    """A source that remembers which tensors were read."""

    def __init__(self, source: TensorSource) -> None:
        self.source = source
        self.names: set[str] = set()

    def shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(self.source.shapes())

    def read(self, name: str, *, rows: tuple[int, int] | None = None) -> Tensor:
        self.names.add(name)
        return self.source.read(name, rows=rows)


def import_from_megatron(tensors: dict[str, Tensor]) -> tuple[set[str], dict[str, Tensor]]:
    layer = random_layer(seed=dist.get_rank())
    context = parallelize(layer, init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "ep")))
    source = Counting(as_source(tensors))
    import_block(layer, megatron_mapping(CONFIG), source)
    exported = export_block(layer, megatron_mapping(CONFIG, "grouped"))
    context.close()
    return source.names, exported


def test_a_rank_imports_only_its_experts(pool: Pool) -> None:
    layer = random_layer(seed=9)
    results = pool.run(import_from_megatron, export_block(layer, megatron_mapping(CONFIG)))
    expected = export_block(layer, megatron_mapping(CONFIG, "grouped"))
    for rank, (names, exported) in enumerate(results):
        numbers = {int(name.split(".")[2]) for name in names if name.startswith("experts.")}
        assert numbers == {2 * rank, 2 * rank + 1}
        assert all(torch.equal(exported[name], tensor) for name, tensor in expected.items())


def load_damaged(path: str) -> str:
    layer = random_layer(seed=1)
    context = parallelize(layer, init_device_mesh("cpu", (1, 4), mesh_dim_names=("dp", "ep")))
    try:
        load_layer(layer, path)
        return "loaded"
    except CheckpointError as error:
        return str(error)
    finally:
        context.close()


def test_damage_is_found_by_the_rank_that_reads_it(pool: Pool, tmp_path: Path) -> None:
    layer = random_layer(seed=9)
    path = tmp_path / "layer.safetensors"
    save_layer(layer, path)
    data = bytearray(path.read_bytes())
    data[data.index(layer.experts.down_proj[5].detach().numpy().tobytes())] ^= 8
    path.write_bytes(data)
    found = pool.run(load_damaged, str(path))
    assert "experts.down_proj, experts [5] does not match its sha256" in found[2]
    assert found[0] == found[1] == found[3] == "loaded"
