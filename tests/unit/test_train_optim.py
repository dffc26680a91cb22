"""Learning rate, parameter groups, apex detection, optimiser state that crosses over."""

from __future__ import annotations

import itertools
import sys
from pathlib import Path

import pytest
import torch

from moe_layer.config.train import OptimizerConfig
from moe_layer.errors import ConfigError
from moe_layer.train.model import Decoder
from moe_layer.train.optim import Optimizer, find_apex, learning_rate
from tests.e2e.micro import micro_config


def test_schedule_warms_up_and_ends_at_min_lr() -> None:
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup_steps=4)
    rates = [learning_rate(step, config=config, steps=20) for step in range(20)]
    assert rates[:4] == [0.25, 0.5, 0.75, 1.0]
    assert rates[4] == pytest.approx(1.0) and rates[-1] == pytest.approx(0.1)
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_only_matrices_decay(tmp_path: Path) -> None:
    config = micro_config(tmp_path, "moe.experts.bias=true", "moe.router.linear_bias=true")
    model = Decoder(config.model, config.moe)
    optimizer = Optimizer(model, config.optimizer, device=torch.device("cpu"))
    decayed = {id(p) for g in optimizer.inner.param_groups if g["weight_decay"] for p in g["params"]}
    names = {name for name, p in model.named_parameters() if id(p) in decayed}
    assert "blocks.0.attention.q_proj.weight" in names and "blocks.1.mlp.experts.gate_up_proj" in names
    assert "blocks.0.mlp.router.weight" in names
    assert not any("norm" in n or n.endswith("bias") or "embedding" in n for n in names)


def test_another_project_called_apex_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    fused, reason = find_apex()
    assert fused is None and "PyPI's 'apex' is another project" in reason and str(tmp_path) in reason
    monkeypatch.delitem(sys.modules, "apex", raising=False)
    model = torch.nn.Linear(2, 2)
    with pytest.raises(ConfigError, match=r"optimizer\.name is apex_fused_adam, but"):
        Optimizer(model, OptimizerConfig(name="apex_fused_adam"), device=torch.device("cpu"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_out_and_back_bitwise(dtype: torch.dtype) -> None:
    def run(optimizer: Optimizer, model: torch.nn.Module, steps: range) -> None:
        for step in steps:
            model.weight.grad = torch.full_like(model.weight, 0.1 + step)
            model.bias.grad = torch.full_like(model.bias, 0.2 - step)
            optimizer.step(1e-4)

    config, cpu = OptimizerConfig(), torch.device("cpu")
    one, two = torch.nn.Linear(3, 3, dtype=dtype), torch.nn.Linear(3, 3, dtype=dtype)
    first, second = Optimizer(one, config, device=cpu), Optimizer(two, config, device=cpu)
    run(first, one, range(3))
    two.load_state_dict(one.state_dict())
    for name, tensor in second.state_tensors(3).items():
        tensor.copy_(first.state_tensors(3)[name])
    run(first, one, range(3, 40))
    run(second, two, range(3, 40))
    assert torch.equal(one.weight, two.weight) and torch.equal(one.bias, two.bias)


@pytest.mark.parametrize("masters", [True, False])
def test_small_steps_of_bf16_parameters_add_up(masters: bool) -> None:
    """40 steps of 6e-4 move a norm's scale of 1, as in fp32; bf16 alone rounds every one of them away."""
    config, cpu = OptimizerConfig(master_weights=masters), torch.device("cpu")
    half, full = torch.nn.RMSNorm(4, dtype=torch.bfloat16), torch.nn.RMSNorm(4)
    pairs = [(model, Optimizer(model, config, device=cpu)) for model in (half, full)]
    for _ in range(40):
        for model, optimizer in pairs:
            optimizer.zero_grad()
            model.weight.grad = torch.ones_like(model.weight)
            optimizer.step(6e-4)
    assert full.weight.max() < 0.98
    want = full.weight.detach().bfloat16() if masters else torch.ones(4).bfloat16()
    assert half.weight.dtype == torch.bfloat16 and torch.equal(half.weight.detach(), want)
