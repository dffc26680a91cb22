"""One case per configuration key: two configurations that differ in it, and an observation that must differ too."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest

from moe_layer.config import MoEConfig, TrainConfig

Observer = Callable[[Any], Any]
"""Config -> anything comparable with ==."""


@dataclass(frozen=True)
class Case:
    """`key` changes what `observe` sees.

    Attributes:
        key: dotted name in TrainConfig.
        after: override of the second configuration. `given`: overrides of both.
        observe: what is looked at.
        raises: text of the error that the second configuration must end in, None when it must work.
    """

    key: str
    after: str
    observe: Observer
    given: tuple[str, ...] = ()
    raises: str | None = None

    def overrides(self) -> tuple[list[str], list[str]]:
        """Overrides of the first and of the second configuration, relative to the layer or to the run."""
        name = self.key.removeprefix("moe.")
        return list(self.given), [*self.given, f"{name}={self.after}"]


def check(case: Case, before: MoEConfig | TrainConfig, after: MoEConfig | TrainConfig) -> None:
    """Assert that the second configuration is seen to differ from the first, and that the first repeats."""
    assert before != after
    first = case.observe(before)
    assert case.observe(before) == first, "the observation must repeat, or a difference proves nothing"
    if case.raises is not None:
        with pytest.raises((ValueError, RuntimeError), match=case.raises):
            case.observe(after)
        return
    assert case.observe(after) != first, f"{case.key} changes nothing"
