"""AdamW (torch's fused one, or NVIDIA apex's FusedAdam) over plain local tensors, and the learning-rate schedule.

The optimiser never sees a DTensor: an expert shard is stepped through a parameter that shares its storage. So the same
fused kernel runs at every EP size, and apex works with expert parallelism. Its state is wrapped back for checkpoints.

Half-precision parameters are stepped as fp32 copies (`optimizer.master_weights`) and rounded from them after each step.
In bf16 alone a step smaller than 1/512 of a weight is lost: a norm's scale of 1 never moved at any usual learning rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from importlib import import_module

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from moe_layer.config.train import OptimizerConfig
from moe_layer.errors import ConfigError

MOMENTS = ("exp_avg", "exp_avg_sq")


def learning_rate(step: int, *, config: OptimizerConfig, steps: int) -> float:
    """Linear warm-up from lr/warmup to lr, then a cosine that reaches min_lr at the last step."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    span = max(1, steps - 1 - config.warmup_steps)
    done = min(1.0, (step - config.warmup_steps) / span)
    return config.min_lr + (config.lr - config.min_lr) * 0.5 * (1.0 + math.cos(math.pi * done))


def find_apex() -> tuple[type | None, str]:
    """NVIDIA apex's FusedAdam, or None with the reason.

    `pip install apex` brings an unrelated project of that name; it has no `apex.optimizers`.
    """
    try:
        module = import_module("apex")
    except Exception as error:  # a broken native build raises anything; the reason is shown
        return None, f"apex does not import ({type(error).__name__}: {error})"
    try:
        return import_module("apex.optimizers").FusedAdam, "NVIDIA apex"
    except Exception as error:
        where = getattr(module, "__file__", "?")
        return None, (
            f"the package 'apex' at {where} has no working apex.optimizers.FusedAdam ({type(error).__name__}); "
            "PyPI's 'apex' is another project: uninstall it and build NVIDIA apex from https://github.com/NVIDIA/apex"
        )


@dataclass(frozen=True)
class _Trained:
    """One parameter: the model's (perhaps a DTensor), a plain one on the storage of its shard, and what is stepped
    (`local` itself, or its fp32 copy)."""

    name: str
    parameter: nn.Parameter
    local: nn.Parameter
    stepped: nn.Parameter


class Optimizer:
    """AdamW over a model whose expert parameters may be DTensors.

    fp32 copies are made here: who changes half-precision parameters later must make a new optimizer, or load its
    `state_tensors` as well.

    Attributes:
        description: one line on what was chosen and why.
    """

    def __init__(self, model: nn.Module, config: OptimizerConfig, *, device: torch.device) -> None:
        self._trained = [
            _trained(name, p, masters=config.master_weights) for name, p in model.named_parameters() if p.requires_grad
        ]
        self._copied = [one for one in self._trained if one.stepped is not one.local]
        groups: dict[float, list[nn.Parameter]] = {config.weight_decay: [], 0.0: []}
        for one in self._trained:
            groups[config.weight_decay if _decays(one.name, one.parameter) else 0.0].append(one.stepped)
        lists = [{"params": params, "weight_decay": decay} for decay, params in groups.items() if params]
        self._apex, self.description = _choose(config, device)
        options = {"lr": config.lr, "betas": (config.beta1, config.beta2), "eps": config.eps}
        if self._apex is not None:
            self.inner = self._apex(lists, adam_w_mode=True, **options)
        else:
            self.inner = torch.optim.AdamW(lists, fused=device.type in ("cpu", "cuda"), **options)

    def zero_grad(self) -> None:
        for one in self._trained:
            one.parameter.grad = one.local.grad = one.stepped.grad = None

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """One update with learning rate `lr`."""
        for one in self._trained:
            grad = one.parameter.grad
            grad = grad.to_local() if isinstance(grad, DTensor) else grad
            one.stepped.grad = None if grad is None else grad.to(one.stepped.dtype)
        for group in self.inner.param_groups:
            group["lr"] = lr
        self.inner.step()
        if self._copied:
            torch._foreach_copy_([one.local for one in self._copied], [one.stepped for one in self._copied])
        for one in self._copied:
            one.stepped.grad = None

    def state_tensors(self, steps: int) -> dict[str, Tensor]:
        """Moments by `optimizer.<moment>.<parameter>` and fp32 copies by `optimizer.master.<parameter>`, shards as
        DTensors; moments are created (zero) if they do not exist yet.

        Args:
            steps: updates done so far; restored into the step counters that torch and apex keep.
        """
        out = {}
        for one in self._trained:
            state = self.inner.state[one.stepped]
            for moment in MOMENTS:
                if moment not in state:
                    state[moment] = torch.zeros_like(one.stepped, memory_format=torch.preserve_format).detach()
                out[f"optimizer.{moment}.{one.name}"] = _as_sharded(state[moment], one.parameter)
            if self._apex is None:
                state["step"] = torch.tensor(float(steps), dtype=torch.float32, device=one.local.device)
        for one in self._copied:
            out[f"optimizer.master.{one.name}"] = _as_sharded(one.stepped.detach(), one.parameter)
        if self._apex is not None:
            for group in self.inner.param_groups:
                group["step"] = steps
        return out


def _choose(config: OptimizerConfig, device: torch.device) -> tuple[type | None, str]:
    if config.name == "adamw" or (config.name == "auto" and device.type != "cuda"):
        return None, f"torch AdamW, fused ({config.name} on {device.type})"
    fused, reason = find_apex()
    if fused is not None and device.type == "cuda":
        return fused, "NVIDIA apex FusedAdam"
    if config.name == "apex_fused_adam":
        reason = reason if fused is None else f"apex runs on CUDA only and train.device is {device.type}"
        raise ConfigError(f"optimizer.name is apex_fused_adam, but {reason}; set optimizer.name to auto or adamw")
    return None, f"torch AdamW, fused ({reason})"


def _decays(name: str, parameter: Tensor) -> bool:
    """Matrices decay; norms, biases and embeddings do not (expert biases are matrices [E, F])."""
    return parameter.ndim >= 2 and not name.endswith("bias") and "embedding" not in name


def _local(parameter: nn.Parameter) -> nn.Parameter:
    """The parameter itself, or a plain one that shares the storage of its local shard."""
    if not isinstance(parameter, DTensor):
        return parameter
    return nn.Parameter(parameter.detach().to_local())


def _trained(name: str, parameter: nn.Parameter, *, masters: bool) -> _Trained:
    local = _local(parameter)
    half = local.dtype in (torch.bfloat16, torch.float16)
    return _Trained(name, parameter, local, nn.Parameter(local.detach().float()) if half and masters else local)


def _as_sharded(state: Tensor, parameter: Tensor) -> Tensor:
    if not isinstance(parameter, DTensor):
        return state
    return DTensor.from_local(
        state,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )
