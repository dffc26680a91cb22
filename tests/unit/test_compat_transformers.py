"""`enable()`: our experts function in every model family, against transformers' eager experts."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from moe_layer.compat import transformers as ours
from moe_layer.errors import RoutingError
from tests.unit.hf_blocks import FAMILIES, hf_block, hf_model
from tests.unit.parity import assert_close, gradients, relative

pytest.importorskip("transformers", reason="this is the adapter for transformers")


@pytest.fixture(autouse=True)
def _enabled() -> None:
    assert ours.enable() == "moe_layer"


@pytest.mark.parametrize("family", FAMILIES)
def test_models_agree_with_eager(family: str) -> None:
    """The tolerance is the whole model's: attention turns the block's last bit into a few of its own."""
    model = hf_model(family)
    ids = torch.randint(0, 64, (2, 11))
    reference = backward_of(model, ids)
    model.set_experts_implementation("moe_layer")
    found = backward_of(model, ids)
    assert_close(found, reference, tolerance=5e-6)


def backward_of(model: torch.nn.Module, ids: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    out = model(input_ids=ids, use_cache=False)
    dy = torch.randn(out.logits.shape, generator=torch.Generator().manual_seed(5))
    out.logits.backward(dy)
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if ".mlp." in name or "embed" in name}
    return {"logits": out.logits.detach()} | grads


@pytest.mark.parametrize("family", FAMILIES)
def test_sentinel_ids_are_skipped(family: str) -> None:
    """Expert parallelism of transformers marks slots of other ranks by ids >= num_experts with any weight."""
    experts = hf_block(family).module.experts
    experts._is_expert_parallel = True
    generator = torch.Generator().manual_seed(1)
    x, count = torch.randn(13, 32, generator=generator), int(experts.num_experts)
    ids = torch.stack([torch.randperm(count, generator=generator)[:3] for _ in range(13)])
    weights = torch.rand(13, 3, generator=generator)
    skip = torch.rand(13, 3, generator=generator) < 0.4
    sentinel = torch.where(torch.rand(13, 3, generator=generator) < 0.5, count, count + 5)
    dy = torch.randn(13, 32, generator=generator)

    def run(ids: torch.Tensor, weights: torch.Tensor) -> tuple[dict, torch.Tensor]:
        leaf = weights.clone().requires_grad_()
        found = gradients(
            lambda x: ours.experts_forward(experts, x, ids, leaf), x, dy, dict(experts.named_parameters())
        )
        return found, leaf.grad

    found, d_weights = run(torch.where(skip, sentinel, ids), weights)
    expected, d_expected = run(ids, weights.masked_fill(skip, 0.0))
    assert_close(found, expected)
    assert torch.equal(d_weights[skip], torch.zeros(int(skip.sum())))
    assert relative(d_weights[~skip], d_expected[~skip]) <= 1e-6


def test_no_tokens_and_all_sentinels_give_zero_gradients() -> None:
    experts = hf_block("qwen3_moe").module.experts
    for tokens, ids in ((0, 0), (5, 8)):
        experts.zero_grad()
        x = torch.randn(tokens, 32, requires_grad=True)
        weights = torch.rand(tokens, 2, requires_grad=True)
        y = ours.experts_forward(experts, x, torch.full((tokens, 2), ids), weights)
        y.sum().backward()
        assert y.shape == (tokens, 32)
        assert not y.any()
        for tensor in (x, weights, experts.gate_up_proj, experts.down_proj):
            assert tensor.grad is not None
            assert not tensor.grad.any()


def test_fp64() -> None:
    found, expected = both_ways(torch.float64)
    assert_close(found, expected, tolerance=1e-14)


def test_bf16_is_no_further_from_the_truth_than_eager() -> None:
    truth = {name: tensor.double() for name, tensor in both_ways(torch.float64)[1].items()}
    found, eager = both_ways(torch.bfloat16)
    for name in truth:
        assert found[name].dtype == torch.bfloat16
        ours_off, eager_off = relative(found[name].double(), truth[name]), relative(eager[name].double(), truth[name])
        assert ours_off <= 1.5 * eager_off, f"{name}: {ours_off} against eager's {eager_off}"


def both_ways(dtype: torch.dtype) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Our experts and the eager ones in gpt-oss's block, on the same bf16-representable numbers."""
    block = hf_block("gpt_oss", dtype=torch.bfloat16)
    block.module.to(dtype)
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(2, 7, 32, generator=generator).bfloat16().to(dtype) for _ in range(2))
    parameters = dict(block.module.experts.named_parameters())
    expected = gradients(block, x, dy, parameters)
    block.config._experts_implementation = "moe_layer"
    return gradients(block, x, dy, parameters), expected


@pytest.mark.parametrize(
    ("ids", "weights", "message"),
    [
        (torch.tensor([[0, -1]]), torch.ones(1, 2), "must be >= 0, got -1"),
        (torch.tensor([[0, 1]]), torch.ones(1, 3), r"\(1, 2\) and \(1, 3\)"),
        (torch.tensor([[0, 1], [1, 2]]), torch.ones(2, 2), r"got \(1, 32\)"),
    ],
)
def test_bad_ids_are_refused(ids: torch.Tensor, weights: torch.Tensor, message: str) -> None:
    experts = hf_block("mixtral").module.experts
    with pytest.raises(RoutingError, match=message):
        ours.experts_forward(experts, torch.randn(1, 32), ids, weights)


def test_unknown_kinds_of_experts_are_refused() -> None:
    experts = hf_block("mixtral").module.experts
    call = (torch.randn(1, 32), torch.tensor([[0, 1]]), torch.ones(1, 2))
    experts.act_fn = torch.nn.ReLU()
    with pytest.raises(ValueError, match=r"MixtralExperts\.act_fn is ReLU"):
        ours.experts_forward(experts, *call)
    experts.has_gate = False
    with pytest.raises(ValueError, match="MixtralExperts has no gate projection"):
        ours.experts_forward(experts, *call)

    class Odd(type(hf_block("gpt_oss").module.experts)):
        def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
            return gate_up

    odd = hf_block("gpt_oss").module.experts
    odd.__class__ = Odd
    with pytest.raises(ValueError, match="a gate function that moe_layer does not know"):
        ours.experts_forward(odd, *call)


def test_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers  # its lazy module may have replaced the one imported above

    monkeypatch.setattr(transformers, "__version__", "5.6.2")
    for call in (ours.enable, lambda: ours.replace_moe_blocks(torch.nn.Linear(1, 1))):
        with pytest.raises(ImportError, match=r"transformers 5\.6\.2 cannot register .* 'transformers>=5\.7'"):
            call()
    monkeypatch.setattr(transformers, "__version__", "5.7.0.dev0")
    ours.require_transformers()


def test_import_leaves_the_other_programs_alone() -> None:
    code = (
        "import sys, moe_layer.compat.transformers, moe_layer.compat.megatron, moe_layer.checkpoint.cli\n"
        "assert not {'transformers', 'megatron'} & set(sys.modules), sorted(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
