"""Entries that nobody has read go where there is time for them."""

from __future__ import annotations

import signal
from collections.abc import AsyncIterator, Iterator

import pytest
import pytest_asyncio

from common.engine import Engine
from common.store.client import RedisClient, text
from common.store.queue import NodeQueue, move_unread, queue_lengths
from common.store.requests import Requests
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until

PATIENT = ("--bus-missed-beats", "1000")  # a stopped node is not dead here, it only reads nothing


@pytest.fixture(scope="module")
def two_by_one() -> Iterator[Deployment]:
    with Deployment(STORIES, prefill=2, decode=1, flags=PATIENT, gateway_flags=PATIENT) as deployment:
        yield deployment


@pytest_asyncio.fixture
async def patient(two_by_one: Deployment) -> AsyncIterator[Deployment]:
    """All of them. Afterwards nothing may be left of any request."""
    two_by_one.start_missing()
    await two_by_one.wait_ready()
    yield two_by_one
    await two_by_one.assert_idle()


async def stop_reading(system: Deployment, client: RedisClient, name: str, incarnation: str) -> None:
    """SIGSTOP, once no read of its queue waits in Redis."""
    system.signal(name, signal.SIGSTOP)

    async def reads_nothing() -> bool:
        clients = text(await client.command("CLIENT", "LIST"))
        mine = [line for line in clients.splitlines() if f"name={incarnation} " in line]
        return bool(mine) and not any(" flags=b " in line for line in mine)

    await wait_until(reads_nothing, "its last read has timed out")


async def test_an_idle_node_takes_what_waits_unread_at_another(patient: Deployment, engine: Engine) -> None:
    asked = bodies(12, seed=3)
    expected = truth(engine, asked)
    records = await patient.records()
    stopped, idle = records["prefill-0"].incarnation, records["prefill-1"].incarnation
    async with patient.redis_client() as client:
        await stop_reading(patient, client, "prefill-0", stopped)
        async with Load(patient.url, asked) as load:

            async def waiting() -> bool:
                return (await queue_lengths(client, [stopped]))[0].waiting > 0

            await wait_until(waiting, "entries lie at the stopped node")
            await load.finish(expected)
        for record in await Requests(client).recent():
            (attempt,) = record.attempts  # moved, not tried again
            assert (attempt.node, attempt.claim) == (idle, idle)
    patient.signal("prefill-0", signal.SIGCONT)


@pytest.mark.parametrize("end", ["kill -9", "SIGTERM"])
async def test_a_node_that_ends_right_after_a_pull_keeps_nobody_waiting(
    patient: Deployment, engine: Engine, end: str
) -> None:
    """No gateway has heard of the pull: by what they were told, the other node has the entries."""
    asked = bodies(8, seed=5)
    expected = truth(engine, asked)
    records = await patient.records()
    other, puller = records["prefill-0"].incarnation, records["prefill-1"].incarnation
    async with patient.redis_client() as client:
        await stop_reading(patient, client, "prefill-0", other)
        await stop_reading(patient, client, "prefill-1", puller)
        async with Load(patient.url, asked) as load:

            async def all_wait() -> bool:
                lengths = await queue_lengths(client, [other, puller])
                return sum(length.waiting for length in lengths) == len(asked)

            await wait_until(all_wait, "every entry waits at a stopped node")
            await move_unread(client, other, puller, len(asked))
            if end == "kill -9":
                await NodeQueue(client, puller).take(len(asked) // 2)  # the rest is unread
                patient.kill("prefill-1")
                patient.signal("prefill-0", signal.SIGCONT)
            else:
                patient.signal("prefill-1", signal.SIGTERM)
                patient.signal("prefill-1", signal.SIGCONT)
                assert await patient.terminate("prefill-1") == 0
                patient.signal("prefill-0", signal.SIGCONT)
            await load.finish(expected)
