"""A gateway or nodes of a whole system are stopped for a while, and go on: it costs time, and nothing
else; then a drain has nothing to wait for. Only `make chaos-stops` runs it: for `make test` the same is
in tests/integration/test_stopped_processes.py, with nodes that lack an engine.
"""

from __future__ import annotations

import asyncio
import os
import re
import signal
import time
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import pytest
import pytest_asyncio

from common.engine import Engine
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until

ALL = os.environ.get("CHAOS") == "all"
TABLE = os.environ.get("CHAOS_TABLE")  # a file, to which each case adds its row

# Long enough that all but the shortest stop catches them in the middle.
LOAD = [
    body | {"n": 8, "max_tokens": 200, "ignore_eos": True} for body in bodies(4, prompt=(20, 60), seed=23)
]
WHO = {
    "gateway": ("gateway",),
    "decode node": ("decode-2",),
    "prefill node": ("prefill-0",),
    "gateway and decode node": ("decode-2", "gateway"),
}
SECONDS = (1, 4, 7, 12, 30)

pytestmark = pytest.mark.skipif(not ALL, reason="it is part of make chaos-stops")


@pytest.fixture(scope="module")
def shared() -> Iterator[Deployment]:
    """One with default settings."""
    with Deployment(STORIES, prefill=2, decode=2) as deployment:
        yield deployment


@pytest_asyncio.fixture
async def stopped(shared: Deployment) -> AsyncIterator[Deployment]:
    """Two prefill and two decode nodes. Afterwards nothing may be left of any request."""
    shared.start_missing()
    await shared.wait_ready()
    try:
        yield shared
    finally:
        for name in shared.processes:
            shared.signal(name, signal.SIGCONT)
    await shared.assert_idle()


@pytest.mark.timeout(200)
@pytest.mark.parametrize("seconds", SECONDS)
@pytest.mark.parametrize("who", WHO)
async def test_who_is_stopped_and_goes_on_costs_time_and_nothing_else(
    stopped: Deployment, engine: Engine, who: str, seconds: int
) -> None:
    system, names = stopped, WHO[who]
    expected = truth(engine, LOAD)
    async with Load(system.url, LOAD) as load:
        await wait_until(lambda: load.num_begun >= 2, "some streams run")
        for name in names:  # each half of the time after the one before
            system.signal(name, signal.SIGSTOP)
            if name is not names[-1]:
                await asyncio.sleep(seconds / 2)
        await asyncio.sleep(seconds if len(names) == 1 else seconds / 2)
        for name in names:
            system.signal(name, signal.SIGCONT)
            if name is not names[-1]:
                await asyncio.sleep(seconds / 2)
        went_on_at = time.monotonic()
        ended_at = await load.finish(expected)
    await system.assert_idle()
    retries = await count(system, "pdq_gateway_retries_total")
    drained_at = time.monotonic()
    assert await system.terminate("decode-3") == 0, "nothing is left that a drain waits for"
    right = sum(len(client.token_ids) for client in load.clients)
    note(
        who,
        f"{seconds} s",
        f"{right} right",
        f"{retries:.0f} retries so far",
        f"{max(0.0, ended_at - went_on_at):.1f} s to the last answer",
        f"drained in {time.monotonic() - drained_at:.1f} s",
    )


def note(*parts: str) -> None:
    """One row of the table of `make chaos-stops`."""
    print(" | ".join(parts))
    if TABLE:
        with Path(TABLE).open("a") as file:
            file.write(" | ".join(parts) + "\n")


async def count(system: Deployment, metric: str) -> float:
    """Of the gateway, over all labels."""
    async with httpx.AsyncClient() as http:
        text = (await http.get(f"{system.url}/metrics")).text
    return sum(float(value) for value in re.findall(rf"^{metric}\S* (\S+)$", text, re.M))
