"""Shared by all tests: fixed seeds, one thread, and markers that say what a test needs."""

from __future__ import annotations

import os
import random

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, settings

# Derandomised: a run repeats, on every machine; the deadline is off because two cores are shared with other work.
settings.register_profile(
    "moe", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("moe")


def pytest_configure(config: pytest.Config) -> None:
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """`gpu` tests are skipped with a reason where there is no GPU, never silently deselected."""
    if torch.cuda.is_available():
        return
    reason = "needs a CUDA GPU"
    for item in items:
        if "gpu" in item.path.parts or item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(autouse=True)
def _seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
