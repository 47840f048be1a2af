"""A gateway, a node, or both are stopped for a while, and go on: it costs time, and nothing else.

The gateway is a process as any; nodes are processes that lack only an engine. `make test` takes short
beats, so that two seconds are long; `make chaos-stops` takes those that systems have by default.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from common.sampling import SamplingParams
from common.store.client import RedisClient
from common.store.registry import NodeRecord, Registry, Role
from tests.integration.test_gateway_process import Process, started
from tests.support.asked import a_request
from tests.support.fake_cluster import endless
from tests.support.load import Load
from tests.support.redis import redis_client, redis_server, wait_until

__all__ = ["redis_client", "redis_server"]

ALL = os.environ.get("CHAOS") == "all"
TABLE = os.environ.get("CHAOS_TABLE")  # a file, to which each case adds its row

WHO = ("gateway", "a node", "a node, then the gateway")
# Seconds stopped; where silence ends a link; then until a gateway is given up; and of each token.
# By default: 1 is not noticed, 4 ends the links, 7 and more also the requests.
BEATS = (0.5, 3.0, 0.08) if ALL else (0.05, 0.5, 0.03)
CASES = [(who, seconds) for who in WHO for seconds in (1.0, 4.0, 7.0, 12.0, 30.0)]
SAMPLE = [pytest.param("gateway", 2.0, marks=pytest.mark.slow), ("a node, then the gateway", 2.0)]
PROMPTS = [[1, 400 + index, 402, 403] for index in range(6)]
CHOICES, TOKENS = 4, 60


def body(prompt: list[int]) -> dict[str, Any]:
    return {"model": "stories", "prompt": prompt, "seed": 3, "n": CHOICES, "max_tokens": TOKENS}


def truth(prompt: list[int]) -> dict[int, list[int]]:
    sent = a_request(prompt, SamplingParams(max_tokens=TOKENS, seed=3))
    return {choice: endless(sent, choice)[:TOKENS] for choice in range(CHOICES)}


@contextlib.asynccontextmanager
async def a_node_process(redis_url: str) -> AsyncIterator[asyncio.subprocess.Process]:
    node = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.support.mini_node",
        redis_url,
        *map(str, BEATS),
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    assert node.stdout is not None
    try:
        await node.stdout.readline()
        yield node
    finally:
        node.kill()
        await node.communicate()


@contextlib.asynccontextmanager
async def stopped(process: asyncio.subprocess.Process, seconds: float) -> AsyncIterator[None]:
    """While the body runs, and until so much time has passed."""
    process.send_signal(signal.SIGSTOP)
    went_on = asyncio.get_running_loop().time() + seconds
    try:
        yield
        await asyncio.sleep(went_on - asyncio.get_running_loop().time())
    finally:
        process.send_signal(signal.SIGCONT)


async def stop(who: str, gateway: Process, node: asyncio.subprocess.Process, seconds: float) -> None:
    if who == "gateway":
        async with stopped(gateway.process, seconds):
            pass
    elif who == "a node":
        async with stopped(node, seconds):
            pass
    else:
        async with stopped(node, seconds):
            await asyncio.sleep(seconds / 2)
            gateway.process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds / 2)
        gateway.process.send_signal(signal.SIGCONT)


async def nodes(client: RedisClient) -> list[NodeRecord]:
    return (await Registry(client).snapshot()).of_role(Role.UNIFIED)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(("who", "seconds"), CASES if ALL else SAMPLE)
async def test_who_is_stopped_and_goes_on_costs_time_and_nothing_else(
    redis_client: RedisClient, who: str, seconds: float
) -> None:
    url = redis_client.settings.url
    async with (
        started(url, "--bus-beat-interval-s", str(BEATS[0])) as gateway,
        a_node_process(url) as node,
        a_node_process(url),
    ):
        await wait_until(lambda: str(gateway.lines).count("node.linked") == 2, "both are linked")
        async with Load(gateway.url, [body(prompt) for prompt in PROMPTS], streams=True) as load:
            await wait_until(lambda: load.num_begun == len(PROMPTS), "all streams run")
            await stop(who, gateway, node, seconds)
            went_on_at = time.monotonic()
            await asyncio.gather(*load.tasks)
        for client, prompt in zip(load.clients, PROMPTS, strict=True):
            assert (client.status, client.error) == (200, None)
            assert client.token_ids == truth(prompt)
        ended_at = max(client.ended_at for client in load.clients)

        async def idle() -> bool:
            return not any(r.unacknowledged or r.open_attempts for r in await nodes(redis_client))

        await wait_until(idle, "nothing is open, and nothing unacknowledged")
        note(
            who,
            f"{seconds:g} s",
            f"{len(PROMPTS) * CHOICES} right",
            f"{str(gateway.lines).count('node.lost')} deaths declared by the gateway",
            f"the last answer {max(0.0, ended_at - went_on_at):.1f} s after",
            f"idle {time.monotonic() - ended_at:.1f} s after that",
        )


def note(*parts: str) -> None:
    """One row of the table of `make chaos-stops`."""
    print(" | ".join(parts))
    if TABLE:
        with Path(TABLE).open("a") as file:
            file.write(" | ".join(parts) + "\n")
