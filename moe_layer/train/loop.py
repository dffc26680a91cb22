"""The training step, validation, and what one log interval reduces to numbers.

L MoE layers, E experts, V vocabulary, B sequences, S positions.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moe_layer.config.train import TrainConfig
from moe_layer.errors import TrainingError
from moe_layer.observe.flops import peak_tflops, train_flops_per_token
from moe_layer.observe.metrics import load_metrics
from moe_layer.parallel import clip_grad_norm, sync_gradients
from moe_layer.router import LOG_NAMES
from moe_layer.train.data import VOCAB, Sampler, TextData, validation_batch
from moe_layer.train.model import Decoder, token_losses
from moe_layer.train.optim import Optimizer, learning_rate
from moe_layer.train.world import World


@dataclass(frozen=True)
class Validation:
    """Mean loss in nats per byte and every expert's tokens (one row per MoE layer)."""

    loss: float
    counts: list[list[int]]


class Trainer:
    """Model, optimiser and data of a run; `train_step` is one optimiser step.

    Losses stay on the device and are read once per log interval.
    """

    def __init__(
        self, config: TrainConfig, *, model: Decoder, optimizer: Optimizer, text: TextData, world: World
    ) -> None:
        self.config, self.model, self.optimizer, self.text, self.world = config, model, optimizer, text, world
        self.layers = list(model.moe_layers())
        loop = config.train
        self.micro_steps = loop.global_batch // (loop.micro_batch * world.data_ranks)
        self._sampler = Sampler(
            text.train,
            sequence_length=config.data.sequence_length,
            global_batch=loop.global_batch,
            seed=config.seed,
        )
        self._loss = torch.zeros((), dtype=torch.float64, device=world.device)
        self._norm = torch.zeros((), dtype=torch.float32, device=world.device)
        self._window_steps = 0
        self._window_start = time.perf_counter()
        for layer in self.layers:
            layer.set_loss_scale(torch.tensor(1.0 / self.micro_steps))

    def train_step(self, step: int) -> float:
        """Forward, backward and update for the global batch of `step`; returns the learning rate.

        Raises:
            RoutingError, CapacityError, DispatchTimeout: what `layer.check()` found, before the parameters change.
        """
        cfg = self.config
        batch = self._sampler.batch(step, rank=self.world.data_rank, ranks=self.world.data_ranks)
        self.model.train()
        self.optimizer.zero_grad()
        for micro_BS in batch.split(cfg.train.micro_batch):
            tokens_BS = self._to_device(micro_BS)
            losses = token_losses(self.model(tokens_BS[:, :-1]).logits, tokens_BS[:, 1:])
            loss = losses.mean() / self.micro_steps
            loss.backward()
            self._loss += loss.detach()
        sync_gradients(self.model)
        self._norm = clip_grad_norm(self.model, cfg.optimizer.clip_norm or float("inf"))
        for layer in self.layers:
            layer.check()
        lr = learning_rate(step, config=cfg.optimizer, steps=cfg.train.steps)
        self.optimizer.step(lr)
        for layer in self.layers:
            layer.update_bias()
        self._window_steps += 1
        return lr

    def collect(self, step: int) -> dict[str, Any]:
        """Numbers of the steps since the last call: one reduction over ranks, one copy to the host.

        Raises:
            TrainingError: the loss or the gradient norm is not finite.
        """
        stats = [layer.collect_stats() for layer in self.layers]
        packed = [self._loss.reshape(1)]
        for layer_stats in stats:
            packed.append(layer_stats["load"].double())
            packed.append(torch.stack([layer_stats[name].double() for name in LOG_NAMES]))
        flat = self.world.total(torch.cat([p.reshape(-1) for p in packed]))
        values = torch.cat([flat, self._norm.double().reshape(1)]).tolist()
        seconds = time.perf_counter() - self._window_start
        loss = values[0] / self.world.data_ranks / self._window_steps
        if not (abs(loss) < float("inf") and abs(values[-1]) < float("inf")):
            raise TrainingError(
                f"step {step}: loss is {loss} and gradient norm {values[-1]}, not finite; lower optimizer.lr "
                f"({self.config.optimizer.lr}), set optimizer.clip_norm, or resume from an earlier checkpoint"
            )
        out = {"loss/train": loss, "opt/grad_norm": values[-1], **self._routing_numbers(values[1:-1])}
        out.update(self._speed(self._window_steps, seconds))
        self._loss.zero_()
        self._window_steps = 0
        self._window_start = time.perf_counter()
        return out

    @torch.no_grad()
    def validate(self) -> Validation:
        """Mean loss over `train.val_batches` micro-batches per rank of evenly spaced windows, and every expert's
        tokens."""
        cfg, world = self.config, self.world
        per_rank = cfg.train.val_batches * cfg.train.micro_batch
        total = per_rank * world.data_ranks
        experts = cfg.moe.router.num_experts
        counts_LE = torch.zeros(len(self.layers), experts, dtype=torch.int64, device=world.device)
        loss = torch.zeros((), dtype=torch.float64, device=world.device)
        self.model.eval()
        began = time.perf_counter()
        for first in range(world.data_rank * per_rank, (world.data_rank + 1) * per_rank, cfg.train.micro_batch):
            indices = range(first, first + cfg.train.micro_batch)
            rows = validation_batch(
                self.text.val, sequence_length=cfg.data.sequence_length, sequences=total, indices=indices
            )
            tokens_BS = self._to_device(rows)
            out = self.model(tokens_BS[:, :-1], return_routing=True)
            loss += token_losses(out.logits, tokens_BS[:, 1:]).double().mean()
            counts_LE += torch.stack([routing.counts_E for routing in out.routings])
        self.model.train()
        flat = world.total(torch.cat([loss.reshape(1), counts_LE.double().reshape(-1)])).tolist()
        self._window_start += time.perf_counter() - began  # validation is not training time
        rows_LE = [[round(c) for c in flat[1 + i * experts : 1 + (i + 1) * experts]] for i in range(len(self.layers))]
        return Validation(loss=flat[0] / (cfg.train.val_batches * world.data_ranks), counts=rows_LE)

    def _to_device(self, rows_BS: Tensor) -> Tensor:
        if self.world.device.type == "cuda":
            return rows_BS.pin_memory().to(self.world.device, non_blocking=True).long()
        return rows_BS.long()

    def _routing_numbers(self, values: list[float]) -> Mapping[str, Any]:
        """Per-layer counts and loss sums of the window as `moe/...` and `loss/...` numbers."""
        experts, width = self.config.moe.router.num_experts, self.config.moe.router.num_experts + len(LOG_NAMES)
        rows = [values[i * width : (i + 1) * width] for i in range(len(self.layers))]
        counts = [[round(c) for c in row[:experts]] for row in rows]
        logs = [dict(zip(LOG_NAMES, row[experts:], strict=True)) for row in rows]
        calls = max(1.0, sum(log["micro_batches"] for log in logs))
        slots = max(1.0, sum(log["tokens"] for log in logs) * self.config.moe.router.top_k)
        return {
            "loss/aux": sum(log["aux"] for log in logs) / calls,
            "loss/z": sum(log["z"] for log in logs) / calls,
            "moe/dropped": sum(log["dropped"] for log in logs) / slots,
            "moe/nonfinite_rows": sum(log["nonfinite_rows"] for log in logs),
            **load_metrics(counts),
            "moe/counts": counts,
        }

    def _speed(self, steps: int, seconds: float) -> dict[str, float | None]:
        cfg = self.config
        tokens = steps * cfg.train.global_batch * cfg.data.sequence_length
        rate = tokens / max(seconds, 1e-9)
        out: dict[str, float | None] = {"perf/tokens_per_s": rate, "perf/tflops": None, "perf/mfu": None}
        if self.world.device.type == "cuda":
            out["perf/memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            tflops = rate * train_flops_per_token(cfg, vocab=VOCAB) / 1e12 / self.world.size
            out["perf/tflops"] = tflops
            peak = peak_tflops(torch.cuda.get_device_name())
            if peak is not None and cfg.train.dtype == "bf16":
                out["perf/mfu"] = tflops / peak
        return out
