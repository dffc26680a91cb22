"""Our experts, and our whole layer, inside megatron-core: values, gradients, losses, checkpoints, refusals."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from moe_layer.checkpoint import import_block, megatron_mapping
from moe_layer.compat.megatron import MegatronExperts, MegatronMoELayer, megatron_submodules
from moe_layer.compat.megatron_config import experts_config, moe_config
from moe_layer.errors import ConfigError
from tests.unit.megatron_host import megatron_layer, megatron_on_cpu, state_of, transformer_config
from tests.unit.parity import assert_close, gradients

pytest.importorskip("megatron.core", reason="this is the adapter for megatron-core: pip install megatron-core==0.16.1")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

LOSSES = dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1, moe_z_loss_coeff=0.01)


@pytest.fixture(scope="module", autouse=True)
def _host(tmp_path_factory: pytest.TempPathFactory):
    with megatron_on_cpu(tmp_path_factory.mktemp("megatron")):
        yield


def load_experts(ours: nn.Module, theirs: nn.Module) -> None:
    """Copy a Megatron layer's weights into one that has our experts."""
    config = moe_config(transformer_config(add_bias_linear=ours.config.add_bias_linear))
    mapping = megatron_mapping(config)
    state = state_of(theirs)
    block = mapping.to_ours({name: state[name] for name in mapping.theirs})
    result = ours.load_state_dict(
        {name: tensor for name, tensor in block.items() if name.startswith("experts.")}
        | {name: tensor for name, tensor in state.items() if not name.startswith("experts.")}
    )
    assert not result.missing_keys
    assert not result.unexpected_keys


def quick_gelu_config(**changes: Any) -> Any:
    from megatron.core.fusions.fused_bias_geglu import quick_gelu

    return transformer_config(
        activation_func=quick_gelu,
        activation_func_clamp_value=0.6,
        glu_linear_offset=1.0,
        add_bias_linear=True,
        **changes,
    )


@pytest.mark.parametrize("dispatcher", ["alltoall", "allgather"])
@pytest.mark.parametrize("case", ["swiglu", "biases", "gpt-oss"])
def test_experts_in_their_layer(case: str, dispatcher: str) -> None:
    settings = dict(moe_token_dispatcher_type=dispatcher, **LOSSES)
    if case == "gpt-oss":
        config = quick_gelu_config(**settings)
    else:
        config = transformer_config(add_bias_linear=case == "biases", **settings)
    theirs, ours = megatron_layer(config), megatron_layer(config, experts=MegatronExperts)
    load_experts(ours, theirs)
    x_SBD, dy_SBD = torch.randn(2, 9, 3, 32)
    expected = gradients(lambda x: theirs(x)[0], x_SBD, dy_SBD, dict(theirs.named_parameters()))
    found = gradients(lambda x: ours(x)[0], x_SBD, dy_SBD, dict(ours.named_parameters()))
    mapping = megatron_mapping(moe_config(config))
    block = {name: tensor for name, tensor in found.items() if name not in ("y", "dx")}
    assert_close(mapping.from_ours(block) | {"y": found["y"], "dx": found["dx"]}, expected)
    ours.backward_dw()


def test_submodules_and_an_empty_batch() -> None:
    from megatron.core.transformer.moe.moe_layer import MoELayer

    layer = MoELayer(transformer_config(), megatron_submodules())
    assert isinstance(layer.experts, MegatronExperts)
    empty_ND, counts_L = torch.zeros(0, 32, requires_grad=True), torch.zeros(8, dtype=torch.int64)
    rows, bias = layer.experts(empty_ND, counts_L, torch.zeros(0))
    rows.sum().backward()
    assert bias is None
    assert rows.shape == (0, 32)
    assert not layer.experts.gate_up_proj.grad.any()
    assert layer.experts.gate_up_proj.allreduce is True


@pytest.mark.parametrize("aux", ["aux_loss", "seq_aux_loss", "global_aux_loss"])
def test_whole_layer(aux: str) -> None:
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_moe_layer_wise_logging_tracker

    config = transformer_config(**(LOSSES | dict(moe_router_load_balancing_type=aux)))
    theirs, ours = megatron_layer(config), MegatronMoELayer(config)
    ours.set_layer_number(1)
    mapping = megatron_mapping(ours.layer.config)
    import_block(ours.layer, mapping, state_of(theirs))
    x_SBD, dy_SBD = torch.randn(2, 9, 3, 32)
    tracker = get_moe_layer_wise_logging_tracker()
    tracker.clear()
    MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(0.25))
    try:
        expected = gradients(lambda x: theirs(x)[0], x_SBD, dy_SBD, dict(theirs.named_parameters()))
        logged = {name: entry["values"][0].item() for name, entry in tracker.items()}
        tracker.clear()
        found = gradients(lambda x: ours(x)[0], x_SBD, dy_SBD, dict(ours.layer.named_parameters()))
    finally:
        MoEAuxLossAutoScaler.main_loss_backward_scale = None
    block = {name: tensor for name, tensor in found.items() if name not in ("y", "dx")}
    assert_close(mapping.from_ours(block) | {"y": found["y"], "dx": found["dx"]}, expected)
    assert {name: entry["values"][0].item() for name, entry in tracker.items()} == pytest.approx(logged, rel=1e-6)
    tracker.clear()


def test_the_global_loss_looks_back_to_the_first_micro_batch_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core import parallel_state
    from megatron.core.distributed.finalize_model_grads import reset_model_temporary_tensors
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    config = transformer_config(**(LOSSES | dict(moe_router_load_balancing_type="global_aux_loss")))
    theirs, ours = megatron_layer(config), MegatronMoELayer(config)
    import_block(ours.layer, megatron_mapping(ours.layer.config), state_of(theirs))
    x_NSBD = torch.randn(4, 9, 3, 32)
    for step in range(2):
        theirs.zero_grad()
        ours.zero_grad()
        for x_SBD in x_NSBD[2 * step : 2 * step + 2]:
            for layer in (theirs, ours):
                (layer(x_SBD)[0].sum() * 0.0).backward()
        torch.testing.assert_close(ours.layer.router.weight.grad, theirs.router.weight.grad, rtol=1e-5, atol=1e-8)
        reset_model_temporary_tensors(config, [nn.ModuleList([theirs, ours])])
    get_moe_layer_wise_logging_tracker().clear()
    monkeypatch.setattr(parallel_state, "get_data_parallel_world_size", lambda **_: 2)
    with pytest.raises(ConfigError, match="'global_aux_loss' counts tokens over 2 data-parallel ranks"):
        MegatronMoELayer(config)


@pytest.mark.parametrize("recompute", [dict(recompute_granularity="selective", recompute_modules=["moe"])])
def test_whole_layer_recomputes_where_megatron_would(recompute: dict[str, Any]) -> None:
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    tracker = get_moe_layer_wise_logging_tracker()
    found, runs, logged = [], [], []
    for changes in ({}, recompute):
        torch.manual_seed(0)
        layer = MegatronMoELayer(transformer_config(**(LOSSES | changes)), layer_number=1)
        calls: list[int] = []
        layer.layer.experts.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        x_SBD = torch.randn(9, 3, 32, requires_grad=True)
        tracker.clear()
        layer(x_SBD)[0].square().sum().backward()
        logged.append(tracker["load_balancing_loss"]["values"][0].item())
        runs.append(len(calls))
        found.append([x_SBD.grad, *(p.grad for p in layer.parameters()), layer.layer.router.tokens_per_expert])
    tracker.clear()
    assert runs == [1, 2] and logged[0] == logged[1] != 0
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_whole_layer_masks_padding_and_serves_megatrons_bias_update() -> None:
    from megatron.core.distributed.finalize_model_grads import _update_router_expert_bias

    config = transformer_config(moe_router_score_function="sigmoid", moe_router_enable_expert_bias=True)
    layer = MegatronMoELayer(config)
    padding_BS = torch.zeros(3, 9, dtype=torch.bool)
    padding_BS[1, 4:] = True
    y_SBD, none = layer(torch.randn(9, 3, 32), padding_mask=padding_BS)
    assert none is None
    assert not y_SBD.transpose(0, 1)[padding_BS].any()
    y_SBD.sum().backward()
    router = layer.layer.router
    counts = router.tokens_per_expert.clone()
    assert int(counts.sum()) == 22 * 2
    _update_router_expert_bias([layer], config)
    assert torch.equal(torch.sign(router.expert_bias), torch.sign(counts.float().mean() - counts))
    with pytest.raises(ValueError, match="MegatronMoELayer has no intermediate_tensors"):
        layer(torch.randn(9, 3, 32), intermediate_tensors=())


@pytest.mark.parametrize("direction", ["theirs to ours", "ours to theirs"])
def test_distributed_checkpoints_interchange_with_sequential_mlp(
    direction: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.dist_checkpointing.validation import StrictHandling

    monkeypatch.setattr(filesystem_async, "_process_memory", lambda: 0)  # its writers hang without psutil
    config = transformer_config(add_bias_linear=True)
    layers = [megatron_layer(config), megatron_layer(config, experts=MegatronExperts)]
    if direction == "ours to theirs":
        layers.reverse()
    source, target = layers
    with torch.no_grad():
        for tensor in state_of(target).values():
            tensor.zero_()
    dist_checkpointing.save(source.experts.sharded_state_dict(prefix="experts."), str(tmp_path))
    wanted = target.experts.sharded_state_dict(prefix="experts.")
    # ours saves no `_extra_state` (it is None in theirs), as with --dist-ckpt-strictness log_unexpected
    loaded = dist_checkpointing.load(wanted, str(tmp_path), strict=StrictHandling.LOG_UNEXPECTED)
    target.experts.load_state_dict({name.removeprefix("experts."): tensor for name, tensor in loaded.items()})
    x_ND, probs_N = torch.randn(16, 32), torch.rand(16)
    counts_L = torch.tensor([2, 0, 5, 1, 3, 0, 4, 1])
    first, second = (layer.experts(x_ND, counts_L, probs_N)[0] for layer in layers)
    assert torch.allclose(first, second, rtol=1e-5, atol=1e-6)
    assert first.abs().max() > 0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(activation_func=F.gelu), "activation_func gelu with clamp None"),
        (dict(gated_linear_unit=False), "gated_linear_unit: False is not supported"),
        (dict(activation_func_fp8_input_store=True), "activation_func_fp8_input_store: True is not supported"),
        (
            dict(moe_apply_probs_on_input=True, moe_router_topk=1, moe_router_pre_softmax=True),
            "moe_apply_probs_on_input: True",
        ),
    ],
)
def test_experts_refuse_what_they_cannot_honour(changes: dict, message: str) -> None:
    config = transformer_config(**changes)
    with pytest.raises(ConfigError, match=message):
        experts_config(config)
    with pytest.raises(ConfigError, match=message):
        MegatronExperts(8, config)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("expert_model_parallel_size", 2),
        ("moe_router_load_balancing_type", "sinkhorn"),
        ("moe_router_dtype", "fp64"),
        ("moe_router_force_load_balancing", True),
        ("moe_latent_size", 16),
        ("calculate_per_token_loss", True),
    ],
)
def test_whole_layer_refuses_by_name(field: str, value: Any) -> None:
    config = transformer_config()
    setattr(config, field, value)
    with pytest.raises(ConfigError, match=f"{field}: {value!r}"):
        moe_config(config)
