"""The parts of scripts/rl_replay.py on a GPU, on a model of two layers: rollouts, replay in the trainer, one GRPO step.

Run it before the script: it takes seconds and says what is wrong.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.gpu
pytest.importorskip("transformers", reason="rollouts come from a transformers model")

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

from rl.grpo import train  # noqa: E402
from rl.rollout import generate, make_engine, make_trainer  # noqa: E402
from rl.scoring import score  # noqa: E402
from rl.settings import Settings, Shape, load_settings  # noqa: E402
from rl.task import Grammar, pretrain  # noqa: E402

DEVICE = torch.device("cuda")


@pytest.fixture(scope="module")
def settings() -> Settings:
    found = load_settings(ROOT / "configs/rl/tiny.yaml", quick=True, cuda=True)
    assert (found.grpo.rollout, found.grpo.trainer) == ("fp8_1x128", "bf16")
    grpo = dataclasses.replace(found.grpo, steps=1, prompts=1, group=4, mini_batches=2)
    return dataclasses.replace(found, response=12, grpo=grpo)


@pytest.fixture(scope="module")
def grammar(settings: Settings) -> Grammar:
    return Grammar(settings.vocab, seed=0)


@pytest.fixture(scope="module")
def policy(settings: Settings, grammar: Grammar) -> torch.nn.Module:
    model, cost = pretrain(settings, Shape(layers=2, top_k=2, ffn=32, steps=20), grammar, seed=0, device=DEVICE)
    assert math.isfinite(cost["loss_last"]) and cost["loss_last"] < cost["loss_first"]
    return model


@pytest.mark.parametrize("rollout_format", ["fp32", "bf16", "int8", "fp8_1x128"])
@pytest.mark.parametrize("trainer_dtype", [torch.float32, torch.bfloat16])
def test_rollout_and_replay(
    settings: Settings,
    grammar: Grammar,
    policy: torch.nn.Module,
    rollout_format: str,
    trainer_dtype: torch.dtype,
) -> None:
    prompts = grammar.sample(8, settings.prompt, torch.Generator().manual_seed(0)).to(DEVICE)
    rollout = generate(make_engine(policy, rollout_format), prompts, response=settings.response, seed=0)
    assert rollout.trace.num_tokens == 8 * (settings.prompt + settings.response - 1)
    trainer = make_trainer(policy, trainer_dtype).eval()
    through = make_trainer(policy, trainer_dtype, weights="straight_through").eval()
    found = score(trainer, through, rollout)
    assert found["effective_equals_recorded"] and found["shifted_tokens_refused"] and not found["aligned_alarm"]
    assert all(math.isfinite(value) for variant in found["variants"].values() for value in variant.values())
    assert found["variants"]["R3"]["max_ratio"] < 1.5


def test_grpo_in_every_mode(settings: Settings, grammar: Grammar, policy: torch.nn.Module) -> None:
    for mode in settings.grpo.modes:
        (record,) = train(settings, policy, grammar, mode=mode, seed=0)
        assert all(math.isfinite(value) for value in record.values() if isinstance(value, float)), (mode, record)
