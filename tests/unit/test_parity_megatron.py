"""MoELayer against megatron-core's real MoELayer and router functions: values, losses, all gradients; fp32, CPU."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from moe_layer.balance import update_expert_bias
from moe_layer.checkpoint import import_block, megatron_mapping
from moe_layer.compat.megatron_config import moe_config
from moe_layer.layer import MoELayer
from moe_layer.losses import load_balancing_loss, z_loss
from moe_layer.ops.route_topk import route_topk
from tests.unit.megatron_host import megatron_layer, megatron_on_cpu, state_of, transformer_config
from tests.unit.parity import assert_close, gradients, relative

pytest.importorskip("megatron.core", reason="megatron-core is the oracle: pip install megatron-core==0.16.1")
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning", "ignore::FutureWarning")

SHARED = dict(moe_shared_expert_intermediate_size=20)
SIGMOID = dict(moe_router_score_function="sigmoid", moe_router_pre_softmax=False)
CASES: dict[str, dict[str, Any]] = {
    "softmax after top-k": {},
    "softmax before top-k": dict(moe_router_pre_softmax=True, moe_router_topk=3),
    "one expert": dict(moe_router_pre_softmax=True, moe_router_topk=1),
    "batch loss": dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1),
    "sequence loss": dict(moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.1, moe_router_topk=3),
    "global loss": dict(moe_router_load_balancing_type="global_aux_loss", moe_aux_loss_coeff=0.1),
    "z loss": dict(moe_z_loss_coeff=0.01),
    "shared expert": SHARED,
    "gated shared expert": dict(moe_shared_expert_gate=True, **SHARED),
    "deepseek": dict(
        moe_router_topk=4, moe_router_num_groups=4, moe_router_group_topk=2, moe_router_topk_scaling_factor=2.5,
        moe_router_enable_expert_bias=True, moe_router_load_balancing_type="seq_aux_loss", moe_aux_loss_coeff=0.1,
        **SIGMOID, **SHARED,
    ),
    "sigmoid with batch loss": dict(moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1, **SIGMOID),
    "biases": dict(add_bias_linear=True),
    "capacity": dict(moe_expert_capacity_factor=1.0, moe_router_load_balancing_type="aux_loss", moe_aux_loss_coeff=0.1),
    "all-gather dispatcher": dict(moe_token_dispatcher_type="allgather"),
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def _host(tmp_path_factory: pytest.TempPathFactory):
    with megatron_on_cpu(tmp_path_factory.mktemp("megatron")):
        yield


@pytest.mark.parametrize("case", CASES)
def test_layers_agree(case: str) -> None:
    config = transformer_config(**CASES[case])
    theirs = megatron_layer(config)
    ours = MoELayer(moe_config(config))
    mapping = megatron_mapping(ours.config)
    import_block(ours, mapping, state_of(theirs))
    generator = torch.Generator().manual_seed(1)
    x_SBD, dy_SBD = torch.randn(2, 9, 3, 32, generator=generator)
    expected = gradients(lambda x: theirs(x)[0], x_SBD, dy_SBD, dict(theirs.named_parameters()))
    found = gradients(  # ours takes [B, S, D]
        lambda x: ours(x.transpose(0, 1)).transpose(0, 1), x_SBD, dy_SBD, dict(ours.named_parameters())
    )
    renamed = {"router.expert_bias": torch.zeros(8)} if ours.config.router.expert_bias else {}
    renamed |= {name: tensor for name, tensor in found.items() if name not in ("y", "dx")}
    theirs_of_ours = {name: t for name, t in mapping.from_ours(renamed).items() if name in expected}
    assert_close(theirs_of_ours | {"y": found["y"], "dx": found["dx"]}, expected)
    assert_losses_agree(ours, x_SBD)
    if ours.config.router.expert_bias:
        assert torch.equal(theirs.router.local_tokens_per_expert.long(), ours.router.tokens_per_expert)
        assert ours.router.tokens_per_expert.any()


def assert_losses_agree(ours: MoELayer, x_SBD: torch.Tensor) -> None:
    """Unscaled losses against what Megatron logged."""
    from megatron.core.transformer.moe.moe_utils import get_moe_layer_wise_logging_tracker

    tracker = get_moe_layer_wise_logging_tracker()
    logged = {name: entry["values"][0].item() for name, entry in tracker.items()}
    tracker.clear()
    ours.router.aux_history.zero_()
    _, routing = ours(x_SBD.transpose(0, 1), return_routing=True)
    for name, loss in routing.losses_unscaled.items():
        (key,) = [key for key in logged if ("z_loss" in key) == (name == "z")]
        assert loss.item() == pytest.approx(logged.pop(key), rel=1e-6)
    assert not logged, "Megatron logged a loss that ours lacks"


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("kind", ["aux_loss", "seq_aux_loss"])
def test_losses_ignore_padding_as_megatrons(kind: str, padded: bool) -> None:
    """y is left out: Megatron computes padding tokens, ours does not route them."""
    config = transformer_config(
        moe_router_load_balancing_type=kind, moe_aux_loss_coeff=1.0, moe_z_loss_coeff=1.0, num_layers=1
    )
    theirs, ours = megatron_layer(config), MoELayer(moe_config(config))
    import_block(ours, megatron_mapping(ours.config), state_of(theirs))
    x_SBD = torch.randn(9, 3, 32)
    valid_BS = torch.ones(3, 9, dtype=torch.bool)
    if padded:  # every sequence the same length: Megatron's sequence loss divides by the mean length
        valid_BS[:, 6:] = False
    for parameter in (theirs.router.weight, ours.router.weight):
        parameter.grad = None
    theirs(x_SBD, padding_mask=~valid_BS)[0].mul(0).sum().backward()
    ours(x_SBD.transpose(0, 1), valid=valid_BS).mul(0).sum().backward()
    assert relative(ours.router.weight.grad, theirs.router.weight.grad) < 1e-6
    assert theirs.router.weight.grad.abs().max() > 0


@pytest.mark.parametrize("groups", [None, (4, 2)])
@pytest.mark.parametrize(
    ("score", "pre", "bias"),
    [("softmax", True, False), ("softmax", False, False), ("sigmoid", False, False), ("sigmoid", False, True)],
)
def test_topk_routing_with_score_function(score: str, pre: bool, bias: bool, groups: tuple | None) -> None:
    """Selection and weights; `group_limited_topk` is what it calls when there are groups."""
    from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function

    logits = torch.randn(200, 16)
    expert_bias = torch.randn(16) * 0.2 if bias else None
    num_groups, group_topk = groups or (None, None)
    leaf = logits.clone().requires_grad_()
    probs_TE, map_TE = topk_routing_with_score_function(
        leaf, 4, use_pre_softmax=pre, num_groups=num_groups, group_topk=group_topk, scaling_factor=1.5,
        score_function=score, expert_bias=expert_bias,
    )  # fmt: skip
    d_probs = torch.randn(200, 16)
    probs_TE.backward(d_probs)
    mine = logits.clone().requires_grad_()
    routed = route_topk(
        mine, expert_bias, top_k=4, score_function=score, softmax_order="pre" if pre else "post",
        renormalize=score == "sigmoid", scaling_factor=1.5, num_groups=num_groups or 0, group_topk=group_topk or 0,
        group_rule="sum_topk_per_group", want_probs=True,
    )  # fmt: skip
    routed.probs.backward(d_probs)
    chosen = torch.zeros(200, 16, dtype=torch.bool).scatter_(1, routed.ids.long(), True)
    assert torch.equal(chosen, map_TE)
    assert relative(routed.probs, probs_TE) < 1e-6
    assert relative(mine.grad, leaf.grad) < 1e-6


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_switch_load_balancing_loss_and_z_loss(score: str) -> None:
    from megatron.core.transformer.moe.moe_utils import (
        compute_routing_scores_for_aux_loss,
        switch_load_balancing_loss_func,
        z_loss_func,
    )

    logits = torch.randn(120, 16)
    leaf = logits.clone().requires_grad_()
    map_TE, scores_TE = compute_routing_scores_for_aux_loss(leaf, 4, score)
    aux = switch_load_balancing_loss_func(scores_TE, map_TE.sum(0), 120, 4, 16, 1.0)
    z = z_loss_func(leaf, 1.0)
    (aux + 0.3 * z).backward()
    mine = logits.clone().requires_grad_()
    routed = route_topk(mine, None, top_k=4, score_function=score, aux_counts="live", want_z=True)
    my_aux = load_balancing_loss(routed.aux_counts, routed.score_sum, top_k=4)
    my_z = z_loss(routed.z_sum, 120)
    (my_aux + 0.3 * my_z).backward()
    assert my_aux.item() == pytest.approx(aux.item(), rel=1e-6)
    assert my_z.item() == pytest.approx(z.item(), rel=1e-6)
    assert relative(mine.grad, leaf.grad) < 1e-6


def test_get_updated_expert_bias() -> None:
    from megatron.core.transformer.moe.moe_utils import get_updated_expert_bias

    counts = torch.tensor([5, 0, 3, 3, 4, 3, 3, 3])
    bias = torch.randn(8)
    expected = get_updated_expert_bias(counts.clone(), bias, 1e-3)
    mine = bias.clone()
    update_expert_bias(mine, counts.clone(), 1e-3)
    assert torch.equal(mine, expected)
    assert torch.equal(mine[2], bias[2])  # 3 is the mean: no step
