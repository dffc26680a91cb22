"""The language, the reward and the pretrained model.

The language is a second-order Markov grammar: after each pair of tokens four successors are possible. The reward of a
response is the share of its tokens below a quarter of the vocabulary.

V vocabulary, B batch, S sequence.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor, nn

from rl.settings import Settings, Shape

SUCCESSORS = 4


class Grammar:
    """Successors `[V, V, 4]` and their probabilities."""

    def __init__(self, vocab: int, *, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.vocab = vocab
        scores = torch.rand(vocab, vocab, vocab, generator=generator)
        self.successors = scores.argsort(-1)[..., :SUCCESSORS]
        self.probabilities = torch.softmax(torch.randn(vocab, vocab, SUCCESSORS, generator=generator), -1)

    def sample(self, batch: int, length: int, generator: torch.Generator) -> Tensor:
        """int64 `[B, S]`."""
        tokens = torch.randint(0, self.vocab, (batch, length), generator=generator)
        for at in range(2, length):
            a, b = tokens[:, at - 2], tokens[:, at - 1]
            choice = torch.multinomial(self.probabilities[a, b], 1, generator=generator)
            tokens[:, at] = self.successors[a, b].gather(1, choice).squeeze(1)
        return tokens


def reward(tokens: Tensor, *, prompt: int, vocab: int) -> Tensor:
    """fp32 `[B]`."""
    return (tokens[:, prompt:] < vocab // 4).float().mean(1)


def make_model(settings: Settings, shape: Shape, *, seed: int, device: torch.device) -> nn.Module:
    """A transformers Qwen3-MoE model of the shape, fp32, random weights, on the device."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        vocab_size=settings.vocab,
        hidden_size=settings.hidden,
        intermediate_size=settings.hidden,
        moe_intermediate_size=shape.ffn,
        num_hidden_layers=shape.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=settings.hidden // 4,
        num_experts=settings.experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        max_position_embeddings=256,
        router_aux_loss_coef=0.01,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=None,
    )
    torch.manual_seed(seed)
    # torch's grouped GEMM loops on the host for fp32 on a GPU; gathered weights are no burden at this size.
    experts = "grouped_mm" if device.type == "cpu" else "batched_mm"
    return AutoModelForCausalLM.from_config(config, experts_implementation=experts).to(device)


def pretrain(
    settings: Settings, shape: Shape, grammar: Grammar, *, seed: int, device: torch.device
) -> tuple[nn.Module, dict]:
    """Train from scratch; the model and what it cost."""
    model = make_model(settings, shape, seed=seed, device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=settings.pretrain.lr, weight_decay=0.01)
    warmup = max(1, shape.steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warmup) * max(0.05, 1 - step / shape.steps)
    )
    generator = torch.Generator().manual_seed(seed)
    start, losses = time.perf_counter(), []
    for _ in range(shape.steps):
        tokens = grammar.sample(settings.pretrain.batch, settings.pretrain.sequence, generator).to(device)
        loss = model(input_ids=tokens, labels=tokens, output_router_logits=True).loss
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.detach())
    first, last = torch.stack(losses[:5]).mean().item(), torch.stack(losses[-20:]).mean().item()
    return model.eval(), {"loss_first": first, "loss_last": last, "seconds": time.perf_counter() - start}
