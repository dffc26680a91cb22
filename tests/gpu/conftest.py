"""What the tests on two GPUs share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool


@pytest.fixture(scope="module")
def pair() -> Iterator[Pool]:
    workers = Pool(2)
    yield workers
    workers.close()
