"""Entries that nobody has read go where there is time for them."""

from __future__ import annotations

import signal
from collections.abc import Iterator

import pytest

from common.engine import Engine
from common.queue import queue_lengths
from common.redis_client import text
from common.requests import Requests
from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.load import Load, bodies, truth
from tests.support.redis import wait_until

PATIENT = ("--bus-missed-beats", "1000")  # a stopped node is not dead here, it only reads nothing


@pytest.fixture(scope="module")
def patient() -> Iterator[Deployment]:
    with Deployment(
        STORIES, prefill=2, decode=1, flags=PATIENT, gateway_flags=PATIENT
    ) as deployment:
        yield deployment


async def test_an_idle_node_takes_what_waits_unread_at_another(
    patient: Deployment, engine: Engine
) -> None:
    asked = bodies(12, seed=3)
    expected = truth(engine, asked)
    records = await patient.records()
    stopped, idle = records["prefill-0"].incarnation, records["prefill-1"].incarnation
    patient.signal("prefill-0", signal.SIGSTOP)
    async with patient.redis_client() as client:

        async def reads_nothing() -> bool:
            clients = text(await client.command("CLIENT", "LIST"))
            mine = [line for line in clients.splitlines() if f"name={stopped} " in line]
            return bool(mine) and not any(" flags=b " in line for line in mine)

        await wait_until(reads_nothing, "its last read has timed out")
        async with Load(patient.url, asked) as load:

            async def waiting() -> bool:
                return (await queue_lengths(client, [stopped]))[0].waiting > 0

            await wait_until(waiting, "entries lie at the stopped node")
            await load.finish(expected)
        for record in await Requests(client).recent():
            (attempt,) = record.attempts  # moved, not tried again
            assert (attempt.node, attempt.claim) == (idle, idle)
    patient.signal("prefill-0", signal.SIGCONT)
    await patient.assert_idle()
