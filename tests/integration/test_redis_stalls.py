"""A Redis that stalls, refuses or forgets nothing: afterwards every count is what it was when idle."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from common.errors import ServiceUnavailable
from common.store.client import RedisClient
from common.store.queue import QueueLength, queue_lengths
from common.store.requests import Load
from common.store.server import EmbeddedRedis
from gateway.placement import DispatchLimits
from tests.support.redis import a_dispatch, redis_client, redis_server, wait_until
from tests.support.scripted_nodes import GATEWAY, World, answer

__all__ = ["redis_client", "redis_server"]

# A stall of seconds is as one of minutes.
IMPATIENT: dict[str, Any] = {"timeout_s": 0.1, "retry_s": 0.05, "max_connections": 8}
AUDITED = DispatchLimits(max_attempts=1000, audit_interval_s=0.0)  # at every look
PAUSE_MS = 2000


@contextlib.asynccontextmanager
async def stopped(server: EmbeddedRedis, client: RedisClient) -> AsyncIterator[None]:
    os.kill(server.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(server.pid, signal.SIGCONT)


@contextlib.asynccontextmanager
async def paused(server: EmbeddedRedis, client: RedisClient) -> AsyncIterator[None]:
    await client.command("CLIENT", "PAUSE", PAUSE_MS, "ALL")
    yield
    await client.command("PING")  # answered when the pause is over


@contextlib.asynccontextmanager
async def out_of_memory(server: EmbeddedRedis, client: RedisClient) -> AsyncIterator[None]:
    await client.command("CONFIG", "SET", "maxmemory", "1")
    try:
        yield
    finally:
        await client.command("CONFIG", "SET", "maxmemory", "0")


@contextlib.asynccontextmanager
async def read_only(server: EmbeddedRedis, client: RedisClient) -> AsyncIterator[None]:
    await client.command("REPLICAOF", "127.0.0.1", "1")  # where nobody listens
    try:
        yield
    finally:
        await client.command("REPLICAOF", "NO", "ONE")


Trouble = Callable[[EmbeddedRedis, RedisClient], contextlib.AbstractAsyncContextManager[None]]


@pytest.mark.parametrize("trouble", [stopped, paused, out_of_memory, read_only])
async def test_what_ends_while_redis_is_in_trouble_leaves_nothing_behind(
    redis_server: EmbeddedRedis, trouble: Trouble
) -> None:
    async with World(redis_server.url, limits=AUDITED, **IMPATIENT) as world:
        nodes = [await world.start_node() for _ in range(2)]
        for _ in range(12):
            await world.ask()
        for node in nodes:
            await world.take(node, 4)
            world.speak(node)
        accepted, late = world.asked[:12], []
        async with trouble(redis_server, world.client):
            for node in nodes:
                await world.compute(node)
            for task in accepted[::3]:
                task.cancel()
            late = world.ask_at_once(40)  # more than there are connections
            await asyncio.wait(late)
        await world.end()
        for task in accepted:
            assert task.cancelled() or task.result() == answer()
        for task in late:
            error = task.exception()
            assert isinstance(error, ServiceUnavailable)
            assert "Too many" not in error.message
        assert await world.left_behind() == []


async def test_an_end_is_written_however_long_redis_is_away(redis_server: EmbeddedRedis) -> None:
    async with World(redis_server.url, limits=AUDITED, **IMPATIENT) as world:
        (node,) = [await world.start_node()]
        await world.ask()
        await world.take(node)
        world.speak(node)
        async with stopped(redis_server, world.client):
            world.asked[0].cancel()
            await wait_until(lambda: failed_writes(world) >= 5, "it was tried again and again")
        await wait_until(lambda: unwritten_ends(world) == 0, "Redis has heard of it")
        assert await world.requests.open_requests(GATEWAY) == set()
        assert await world.requests.loads([node.name]) == {node.name: Load()}


async def test_no_request_is_taken_while_too_many_ends_are_unwritten(redis_server: EmbeddedRedis) -> None:
    async with World(redis_server.url, limits=dataclasses.replace(AUDITED, max_ends=3), **IMPATIENT) as world:
        await world.start_node()
        async with stopped(redis_server, world.client):
            (first,) = world.ask_at_once(1)
            await asyncio.wait({first})
            for _ in range(3):
                await asyncio.wait(world.ask_at_once(1))
        errors = [str(task.exception()) for task in world.asked]
        assert "no more until it has" in errors[-1]
        assert unwritten_ends(world) <= 3
        await world.end()
        assert await world.left_behind() == []


async def test_an_acceptance_that_redis_serves_too_late_is_found_and_ended(
    redis_server: EmbeddedRedis,
) -> None:
    """Its client had an error, its end found no record; then Redis read the command."""
    async with World(redis_server.url, limits=AUDITED) as world:
        node = await world.start_node()
        await world.requests.accept(a_dispatch("r-late", gateway=GATEWAY), node.name)
        await world.look()

        async def nothing_is_open() -> bool:
            return not await world.requests.open_requests(GATEWAY)

        await wait_until(nothing_is_open, "it was ended")
        assert await queue_lengths(world.client, [node.name]) == [QueueLength(0, 0)]
        assert await world.requests.loads([node.name]) == {node.name: Load()}


def failed_writes(world: World) -> float:
    return sum(
        sample.value
        for metric in world.metrics.store_errors.collect()
        for sample in metric.samples
        if sample.name.endswith("_total")
    )


def unwritten_ends(world: World) -> float:
    return world.metrics.unwritten_ends.collect()[0].samples[0].value
