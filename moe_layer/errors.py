"""Every exception this package raises for a user; docs/troubleshooting.md has a remedy for each."""

from __future__ import annotations

from collections.abc import Sequence


class ConfigError(ValueError):
    """A configuration that cannot be honoured; `problems` lists every finding, one sentence each."""

    def __init__(self, problems: str | Sequence[str]) -> None:
        self.problems: tuple[str, ...] = (problems,) if isinstance(problems, str) else tuple(problems)
        lines = list(self.problems)
        if len(lines) > 1:
            lines = [f"{len(lines)} problems in the configuration:", *(f"  {p}" for p in lines)]
        super().__init__("\n".join(lines))


class RoutingError(ValueError):
    """Expert ids, weights or masks that do not fit the layer (range, shape, dtype, duplicates)."""


class TraceError(ValueError):
    """A recorded routing trace that is damaged or does not belong to this model or these tokens."""


class CheckpointError(ValueError):
    """A checkpoint with missing, extra, misshapen or corrupted tensors."""


class CapacityError(RuntimeError):
    """Static dispatch buffers overflowed and the policy is to raise."""


class DispatchTimeout(RuntimeError):
    """A peer did not report within the deadline; names layer, step, phase and the missing ranks."""


class RankMismatch(RuntimeError):
    """Ranks of one group disagree about the layer, the step, the phase, a size or the config."""


class TrainingError(RuntimeError):
    """A training run that cannot go on: its loss or gradient norm is not finite."""
