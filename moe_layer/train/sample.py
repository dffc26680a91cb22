"""Text from the trained model, byte by byte."""

from __future__ import annotations

import torch

from moe_layer.config.train import SampleConfig
from moe_layer.train.model import Decoder
from moe_layer.train.world import World


@torch.no_grad()
def sample_text(model: Decoder, config: SampleConfig, *, context: int, seed: int, world: World) -> str:
    """Continue `config.prompt` by `config.tokens` bytes; invalid UTF-8 shows as replacement characters.

    All ranks take part with the same bytes (experts live on all of them); rank 0's draw is broadcast, because a
    rounding difference between ranks would otherwise send them on different texts.

    Args:
        context: longest window of bytes the model sees.
    """
    generator = torch.Generator().manual_seed(seed)
    data = list(config.prompt.encode() or b"\n")
    was_training = model.training
    model.eval()
    for _ in range(config.tokens):
        window = torch.tensor([data[-context:]], dtype=torch.int64, device=world.device)
        logits_V = model(window).logits[0, -1].float().cpu()
        if config.temperature > 0:
            probs_V = torch.softmax(logits_V / config.temperature, dim=-1)
            choice = torch.multinomial(probs_V, 1, generator=generator)
        else:
            choice = logits_V.argmax(keepdim=True)
        data.append(int(world.broadcast(choice.to(world.device)).item()))
    model.train(was_training)
    return bytes(data).decode("utf-8", errors="replace")
