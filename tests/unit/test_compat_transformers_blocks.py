"""`replace_moe_blocks`: names, values, recording, saving and replay in Qwen3-MoE and Mixtral models."""

from __future__ import annotations

import copy
import dataclasses
import pickle
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from moe_layer.compat import transformers as ours
from moe_layer.compat.transformers_block import TransformersMoEBlock
from moe_layer.config.model import DispatchConfig, LossesConfig, ReplayConfig
from moe_layer.errors import ConfigError, RoutingError
from moe_layer.layer import MoELayer
from moe_layer.ops import _ext
from moe_layer.router import Router
from moe_layer.types import RoutingDecision
from tests.unit.hf_blocks import hf_block, hf_model
from tests.unit.parity import assert_close, gradients, relative

pytest.importorskip("transformers", reason="this is the adapter for transformers")
REPLACEABLE = ("qwen3_moe", "mixtral")
IDS = torch.randint(0, 64, (2, 11), generator=torch.Generator().manual_seed(2))


def run(model: nn.Module, **arguments) -> dict[str, torch.Tensor]:
    """Loss, auxiliary loss, recorded router logits and all gradients."""
    model.zero_grad()
    out = model(input_ids=IDS, labels=IDS, output_router_logits=True, **arguments)
    out.loss.backward()
    found = {"loss": out.loss.detach(), "aux": out.aux_loss.detach(), "logits": out.logits.detach()}
    found |= {f"router_logits.{i}": logits.detach() for i, logits in enumerate(out.router_logits)}
    return found | {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("record_first", [False, True])
@pytest.mark.parametrize("family", REPLACEABLE)
def test_values_gradients_and_recorded_logits_stay(family: str, record_first: bool) -> None:
    """`record_first`: transformers' hooks are on the old gates already when the blocks are replaced."""
    model = hf_model(family)
    expected = run(copy.deepcopy(model))
    if record_first:
        run(model)
    before = dict(model.named_parameters())
    names = list(model.state_dict())
    assert ours.replace_moe_blocks(model) == ("model.layers.0.mlp", "model.layers.1.mlp")
    assert list(model.state_dict()) == names
    assert all(parameter is before[name] for name, parameter in model.named_parameters())
    assert len(expected) > 20
    assert_close(run(model), expected, tolerance=5e-6)


@pytest.mark.parametrize("family", REPLACEABLE)
def test_gate_is_the_models_own_router_class(family: str) -> None:
    model = hf_model(family)
    base = type(model.model.layers[0].mlp.gate)
    ours.replace_moe_blocks(model)
    gate = model.model.layers[0].mlp.gate
    assert isinstance(gate, base)
    assert isinstance(gate, Router)
    assert type(gate).__name__ == f"MoELayer{base.__name__}"
    assert type(gate) is type(model.model.layers[1].mlp.gate)


@pytest.mark.parametrize("family", REPLACEABLE)
def test_save_pretrained_round_trip(family: str, tmp_path) -> None:
    from transformers import AutoModelForCausalLM

    model = hf_model(family)
    ours.replace_moe_blocks(model)
    model.save_pretrained(tmp_path)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    state = plain.state_dict()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    ours.replace_moe_blocks(plain)
    assert torch.equal(plain(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_state_dict_loads_into_a_replaced_model() -> None:
    plain, replaced = hf_model("qwen3_moe", seed=1), hf_model("qwen3_moe", seed=2)
    ours.replace_moe_blocks(replaced)
    replaced.load_state_dict(plain.state_dict(), strict=True)
    assert relative(replaced(input_ids=IDS).logits, plain(input_ids=IDS).logits) < 1e-6


@pytest.mark.parametrize("family", REPLACEABLE)
def test_three_optimizer_steps_agree(family: str) -> None:
    losses = []
    for replace in (False, True):
        model = hf_model(family)
        if replace:
            ours.replace_moe_blocks(model)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        losses.append([])
        for _ in range(3):
            run_loss = model(input_ids=IDS, labels=IDS, output_router_logits=True).loss
            optimizer.zero_grad()
            run_loss.backward()
            optimizer.step()
            losses[-1].append(run_loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert losses[0][0] > losses[0][2]


def test_gradient_checkpointing_gives_the_same_gradients() -> None:
    model = hf_model("mixtral")
    ours.replace_moe_blocks(model)
    model.train()
    expected = run(model)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    found = run(model, use_cache=False)
    for name in expected:
        assert torch.equal(found[name], expected[name]), name


def test_copies_and_pickles() -> None:
    model = hf_model("qwen3_moe")
    ours.replace_moe_blocks(model)
    block = model.model.layers[0].mlp
    x = torch.randn(2, 5, 32)
    for twin in (copy.deepcopy(block), pickle.loads(pickle.dumps(block))):
        assert torch.equal(twin(x), block(x))
        assert type(twin.gate) is type(block.gate)
        assert twin.gate.weight is not block.gate.weight


def test_dtype_and_mode_are_kept() -> None:
    model = hf_model("qwen3_moe").bfloat16().eval()
    ours.replace_moe_blocks(model)
    block = model.model.layers[0].mlp
    assert not any(module.training for module in block.modules())
    assert block(torch.randn(1, 3, 32).bfloat16()).dtype == torch.bfloat16
    assert model.generate(IDS, max_new_tokens=2, do_sample=False, pad_token_id=0).shape == (2, 13)


def test_replay_forces_the_recorded_experts() -> None:
    block = replaced_block("qwen3_moe")
    x = torch.randn(2, 5, 32)
    y, routing = block(x, return_routing=True)
    again, replayed = block(x, replay=RoutingDecision(routing.ids_TK), return_routing=True)
    assert torch.equal(again, y)
    assert torch.equal(replayed.ids_TK, routing.ids_TK)
    forced = (routing.ids_TK + 1) % 8
    other, replayed = block(x, replay=forced.reshape(2, 5, 3), return_routing=True)
    assert torch.equal(replayed.ids_TK, forced)
    assert not torch.allclose(other, y)
    with pytest.raises(RoutingError, match=r"replay ids must be \(2, 5, 3\) or \(10, 3\)"):
        block(x, replay=forced[:4])


def test_padding_tokens_are_not_routed() -> None:
    block = replaced_block("mixtral")
    valid = torch.tensor([[True, True, False], [True, False, False]])
    y, routing = block(torch.randn(2, 3, 32), valid=valid, return_routing=True)
    assert not y[~valid].any()
    assert y[valid].any()
    assert torch.equal((routing.ids_TK >= 0).all(1), valid.flatten())
    assert int(routing.counts_E.sum()) == 3 * 2


def replaced_block(family: str, **configure) -> TransformersMoEBlock:
    model = nn.ModuleDict({"mlp": hf_block(family).module})
    assert ours.replace_moe_blocks(model, **configure) == ("mlp",)
    return model["mlp"]


def test_configure_reaches_the_block_and_may_not_change_shapes() -> None:
    recorded = ReplayConfig(weights="recorded")
    block = replaced_block("qwen3_moe", configure=lambda config: dataclasses.replace(config, replay=recorded))
    x = torch.randn(4, 32)
    ids = torch.tensor([[0, 1, 2]] * 4)
    _, routing = block(x, replay=RoutingDecision(ids, weights=torch.full((4, 3), 0.25)), return_routing=True)
    assert torch.equal(routing.weights_TK, torch.full((4, 3), 0.25))
    with pytest.raises(ConfigError, match="configure changed the block's shapes"):
        replaced_block("qwen3_moe", configure=lambda config: dataclasses.replace(config, hidden_size=64))


def test_configured_losses_and_hooks_are_those_of_a_layer() -> None:
    losses = LossesConfig(aux="sequence", aux_coeff=0.5)
    block = replaced_block("qwen3_moe", configure=lambda config: dataclasses.replace(config, losses=losses))
    layer = MoELayer(block.config)
    layer.load_state_dict({name.replace("gate.w", "router.w"): value for name, value in block.state_dict().items()})
    x = torch.randn(4, 5, 32)
    grads = []
    for module, router in ((block, block.gate), (layer, layer.router)):
        module.set_loss_scale(0.25)
        (module(x).sum() * 0.0).backward()
        module.check()
        module.update_bias()
        grads.append((router.weight.grad, module.collect_stats()["load"]))
    torch.testing.assert_close(grads[0], grads[1])
    assert grads[0][0].any()


def test_configure_may_not_ask_for_what_a_block_does_not_do(monkeypatch: pytest.MonkeyPatch) -> None:
    chunks = DispatchConfig(chunks=2)
    with pytest.raises(ConfigError, match=r"dispatch\.chunks \(2\) is MoELayer's"):
        replaced_block("qwen3_moe", configure=lambda config: dataclasses.replace(config, dispatch=chunks))
    monkeypatch.setattr(_ext, "status", lambda: SimpleNamespace(loaded=False, reason="it is not there"))
    with pytest.raises(ConfigError, match="kernels: cuda is not possible, it is not there"):
        replaced_block("qwen3_moe", configure=lambda config: dataclasses.replace(config, kernels="cuda"))


def test_what_cannot_be_replaced_says_so() -> None:
    model = hf_model("olmoe")
    with pytest.raises(ValueError, match=r"OlmoeForCausalLM has no Qwen3MoeSparseMoeBlock .* enable\(\)"):
        ours.replace_moe_blocks(model)
    model = hf_model("mixtral", router_jitter_noise=0.1)
    with pytest.raises(ConfigError, match=r"router_jitter_noise 0\.1"):
        ours.replace_moe_blocks(model)
    model = hf_model("mixtral")
    model.model.layers[1].mlp.experts.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="MixtralExperts has forward hooks"):
        ours.replace_moe_blocks(model)
    assert type(model.model.layers[0].mlp).__name__ == "MixtralSparseMoeBlock"
    model = hf_model("mixtral")
    model.model.layers[1].mlp.gate._hf_hook = None  # accelerate's mark; its forward is an attribute of the instance
    with pytest.raises(ValueError, match=r"dispatched by accelerate .* then accelerate\.dispatch_model"):
        ours.replace_moe_blocks(model)


@pytest.mark.parametrize("depth", ["experts function", "block"])
def test_compiles_without_graph_breaks(depth: str) -> None:
    if depth == "block":
        module = replaced_block("qwen3_moe")
    else:
        block = hf_block("qwen3_moe")
        block.config._experts_implementation = ours.enable()
        module = block.module
    x, dy = torch.randn(2, 2, 7, 32)
    expected = gradients(module, x, dy, dict(module.named_parameters()))
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    found = gradients(compiled, x, dy, dict(module.named_parameters()))
    assert_close(found, expected)


def test_lora_on_expert_parameters() -> None:
    """PEFT finds the parameters by name and its adapters get the gradients they get in the original model."""
    peft = pytest.importorskip("peft", reason="peft is optional; tested where it is installed")
    config = peft.LoraConfig(r=4, target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
    results = []
    for replace in (False, True):
        model = hf_model("qwen3_moe")
        if replace:
            ours.replace_moe_blocks(model)
        model = peft.get_peft_model(model, config)
        generator = torch.Generator().manual_seed(3)
        adapters = {name: p for name, p in model.named_parameters() if p.requires_grad}
        with torch.no_grad():
            for parameter in adapters.values():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model(input_ids=IDS, labels=IDS).loss.backward()
        results.append({name: parameter.grad for name, parameter in adapters.items()})
    assert len(results[0]) == 8
    assert_close(results[1], results[0], tolerance=5e-6)
