from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.distributed.pool import Pool
from tests.distributed.ranks import ThreadRanks


@pytest.fixture(scope="session")
def ranks() -> Iterator[ThreadRanks]:
    """Thread ranks over gloo, for everything below `parallelize`."""
    threads = ThreadRanks()
    yield threads
    threads.close()


@pytest.fixture(scope="session")
def pool() -> Iterator[Pool]:
    """Four gloo processes, started on first use."""
    workers = Pool(4)
    yield workers
    workers.close()
