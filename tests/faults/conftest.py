"""One system of two prefill and two decode nodes for all of tests/faults, whole again after each.

Its nodes draft tokens, and the truth is of an engine that does not.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from common.engine import Engine
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.engines import poisoned_engine

# A stopped node is dead after 1.5 seconds: as short as two busy cores allow.
BEATS = ("--bus-beat-interval-s", "0.25")


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The truth."""
    return poisoned_engine(max_num_seqs=16)


@pytest.fixture(scope="session")
def two_by_two() -> Iterator[Deployment]:
    flags = (*BEATS, "--speculative", "ngram")
    with Deployment(STORIES, prefill=2, decode=2, flags=flags, gateway_flags=BEATS) as deployment:
        yield deployment


@pytest_asyncio.fixture
async def system(two_by_two: Deployment) -> AsyncIterator[Deployment]:
    """Two prefill and two decode nodes. Afterwards nothing may be left of any request."""
    two_by_two.start_missing()
    await two_by_two.wait_ready()
    yield two_by_two
    await two_by_two.assert_idle()
