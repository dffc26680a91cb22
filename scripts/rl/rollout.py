"""Rollouts with a KV cache that record their routing, and the trainer's view of the same tokens.

B sequences, P prompt, G sampled tokens, S = P + G; a rollout runs S-1 tokens: the last one is never fed back.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from moe_layer import RoutingSession, RoutingTrace
from moe_layer.compat.transformers import replace_moe_blocks
from moe_layer.replay.adapters import record_transformers
from moe_layer.replay.index_map import generation_index, inverse_index
from rl.settings import dtype_of


@dataclass(frozen=True)
class Rollout:
    """tokens [B, S]; logprobs [B, G] under the rollout engine; trace of (S-1) rows per sequence, gate weights
    included.
    """

    tokens: Tensor
    logprobs: Tensor
    trace: RoutingTrace
    prompt: int

    @property
    def rows(self) -> int:
        """Of one sequence."""
        return self.tokens.shape[1] - 1

    def index(self, sequences: Tensor | None = None, *, shift: int = 0) -> Tensor:
        """Trace rows of these sequences `[B, S-1]`; `shift` 1 is the broken control: every token gets its left
        neighbour's.
        """
        chosen = torch.arange(self.tokens.shape[0]) if sequences is None else sequences
        columns = (torch.arange(self.rows) - shift).clamp(min=0)
        return chosen.unsqueeze(1) * self.rows + columns


def make_engine(model: nn.Module, rollout_format: str) -> nn.Module:
    """A copy of the policy as a rollout engine: transformers' blocks, or ours with quantised experts."""
    engine = copy.deepcopy(model)
    if rollout_format in ("int8", "fp8_1x128"):
        replace_moe_blocks(engine, configure=lambda config: _quantized(config, rollout_format))
    return engine.to(dtype_of(rollout_format)).eval().requires_grad_(False)


def _quantized(config: Any, rollout_format: str) -> Any:
    return replace(config, experts=replace(config.experts, weight_format=rollout_format))


def make_trainer(model: nn.Module, dtype: torch.dtype, *, weights: str = "live") -> nn.Module:
    """A copy of the policy with our blocks."""
    trainer = copy.deepcopy(model)
    backend = expert_backend(next(model.parameters()).device, dtype)

    def configure(config: Any) -> Any:
        return replace(
            config,
            replay=replace(config.replay, weights=weights),
            experts=replace(config.experts, backend=backend),
        )

    replace_moe_blocks(trainer, configure=configure)
    return trainer.to(dtype)


def expert_backend(device: torch.device, dtype: torch.dtype) -> str:
    """On a GPU by name: `auto` would compile QuACK's kernels for each of these tiny shapes."""
    if device.type == "cpu":
        return "auto"
    return "grouped_mm" if dtype == torch.bfloat16 else "reference"


def sync(engine: nn.Module, trainer: nn.Module) -> None:
    """New policy weights into the rollout engine, in its dtype."""
    wanted = engine.state_dict().keys()
    engine.load_state_dict({name: value for name, value in trainer.state_dict().items() if name in wanted})


@torch.no_grad()
def generate(engine: nn.Module, prompts: Tensor, *, response: int, seed: int, version: int = 0) -> Rollout:
    """Sample at temperature 1 and record every router call."""
    torch.manual_seed(seed)
    mask = torch.ones_like(prompts)
    quantized = any(hasattr(module, "routing_tap") for module in engine.modules())
    session = RoutingSession(engine) if quantized else None
    recorder = record_transformers(engine, weights=True) if session is None else session.record(weights=True)
    with recorder as recording:
        out = engine.generate(
            prompts,
            attention_mask=mask,
            max_new_tokens=response,
            min_new_tokens=response,
            do_sample=True,
            top_k=0,
            top_p=1.0,
            temperature=1.0,
            pad_token_id=0,
            return_dict_in_generate=True,
            output_logits=True,
        )
    if session is not None:
        session.close()
    tokens = out.sequences
    batch, rows = tokens.shape[0], tokens.shape[1] - 1
    logits = torch.stack(out.logits, dim=1).float()
    chosen = tokens[:, prompts.shape[1] :]
    logprobs = logits.log_softmax(-1).gather(2, chosen.unsqueeze(2)).squeeze(2)
    index = generation_index(mask, steps=response - 1)
    trace = recording.trace(
        inverse_index(index, rows=batch * rows),
        cu_seqlens=torch.arange(batch + 1) * rows,
        token_ids=tokens[:, :-1].cpu().flatten(),
        weights_version=version,
        notes={"engine": "transformers", "format": str(next(engine.parameters()).dtype)},
    )
    return Rollout(tokens, logprobs, trace, prompts.shape[1])


def logprobs_of(model: nn.Module, tokens: Tensor, *, prompt: int) -> Tensor:
    """fp32 `[B, G]` of the sampled tokens, from one pass over whole sequences."""
    logits = model(input_ids=tokens[:, :-1], use_cache=False).logits.float()
    found = logits.log_softmax(-1).gather(2, tokens[:, 1:].unsqueeze(2)).squeeze(2)
    return found[:, prompt - 1 :]


def discrepancy(trainer: Tensor, rollout: Tensor) -> dict[str, float]:
    """Of two log probabilities of the same tokens: k3 estimate of KL, largest ratio, share of tokens beyond 5%."""
    log_ratio = (trainer - rollout).double()
    ratio = log_ratio.exp()
    return {
        "kl": (ratio - 1 - log_ratio).mean().item(),
        "max_ratio": torch.maximum(ratio, 1 / ratio).max().item(),
        "beyond_5_percent": (log_ratio.abs() > 0.05).double().mean().item(),
    }
