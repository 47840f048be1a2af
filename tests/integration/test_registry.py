"""The registry in a real Redis: records, ages, and what it does not conclude."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import replace

import pytest

from common.errors import ConfigError
from common.redis_client import RedisClient
from common.redis_keys import NODE_TTL_S
from common.redis_server import EmbeddedRedis
from common.registry import NodeRecord, NodeState, Registry, Role, Snapshot, new_incarnation
from common.requests import Requests
from tests.support.redis import a_dispatch, wait_until


def a_node(incarnation: str = "p-1", role: Role = Role.PREFILL) -> NodeRecord:
    return NodeRecord(
        incarnation=incarnation, name="p", role=role, state=NodeState.READY,
        endpoint="tcp://127.0.0.1:7", pid=42, model="tiny", num_blocks=100, started_at=1,
        transports="shm,tcp",
    )  # fmt: skip


async def test_a_record_comes_back_as_it_was_announced(redis_client: RedisClient) -> None:
    registry = Registry(redis_client)
    gateway = a_node("g-1", Role.GATEWAY)
    await registry.announce(a_node())
    await registry.announce(gateway)
    snapshot = await registry.snapshot()
    assert snapshot.records == {"p-1": a_node(), "g-1": gateway}
    assert snapshot.of_role(Role.GATEWAY) == [gateway]
    assert snapshot.of_role(Role.PREFILL, Role.UNIFIED) == [a_node()]
    assert all(0 <= age < 10 for age in snapshot.ages.values())
    ttl = await redis_client.command("TTL", redis_client.keys.node("p-1"))
    assert 0 < ttl <= NODE_TTL_S


async def test_a_beat_replaces_the_numbers(redis_client: RedisClient) -> None:
    registry = Registry(redis_client)
    await registry.announce(a_node())
    later = replace(a_node(), state=NodeState.DRAINING, running=3, free_blocks=7, beats=2)
    await registry.announce(later)
    assert (await registry.snapshot()).records == {"p-1": later}


async def test_an_old_or_missing_record_is_shown_with_its_age_and_nothing_is_concluded(
    redis_client: RedisClient,
) -> None:
    registry = Registry(redis_client)
    await registry.announce(a_node())
    await redis_client.command("ZINCRBY", redis_client.keys.nodes(), -3_600_000, "p-1")
    snapshot = await registry.snapshot()
    assert snapshot.records["p-1"].state is NodeState.READY
    assert 3600 <= snapshot.ages["p-1"] < 3700
    await redis_client.command("DEL", redis_client.keys.node("p-1"))
    snapshot = await registry.snapshot()
    assert "p-1" not in snapshot.records
    assert "p-1" in snapshot.ages
    await registry.announce(a_node())
    assert (await registry.snapshot()).records == {"p-1": a_node()}


async def test_leaving_removes_every_trace(redis_client: RedisClient) -> None:
    registry, requests = Registry(redis_client), Requests(redis_client)
    await registry.announce(a_node())
    await requests.accept(a_dispatch(), "p-1")
    await requests.cancel("r-1", "over")
    await registry.leave("p-1")
    assert (await registry.snapshot()).ages == {}
    assert await redis_client.command("KEYS", "pdq:*:p-1") == []


async def test_fields_of_another_version_are_no_obstacle(redis_client: RedisClient) -> None:
    registry = Registry(redis_client)
    await registry.announce(a_node())
    key = redis_client.keys.node("p-1")
    await redis_client.command("HSET", key, "from_the_future", "1")
    await redis_client.command("HDEL", key, "running")
    assert (await registry.snapshot()).records == {"p-1": a_node()}
    await redis_client.command("HSET", key, "role", "conductor")
    assert (await registry.snapshot()).records == {}


async def test_watching_goes_on_through_an_outage(
    redis_client: RedisClient, redis_server: EmbeddedRedis, caplog: pytest.LogCaptureFixture
) -> None:
    impatient = RedisClient(dataclasses.replace(redis_client.settings, retry_s=0.0))
    registry = Registry(redis_client)
    await registry.announce(a_node())
    seen: list[Snapshot] = []

    async def watch() -> None:
        async for snapshot in Registry(impatient).watch(0.01):
            seen.append(snapshot)

    watching = asyncio.create_task(watch())
    await wait_until(lambda: len(seen) >= 2, "two snapshots have come")
    before = seen[-1].generation
    redis_server.kill()
    try:
        await wait_until(lambda: "registry.unreachable" in caplog.text, "the outage is noticed")
    finally:
        await asyncio.to_thread(redis_server.start)
    await wait_until(lambda: seen[-1].generation != before, "the new generation is seen")
    assert seen[-1].records == {}
    await registry.announce(a_node())
    await wait_until(lambda: "p-1" in seen[-1].records, "the node is back")
    watching.cancel()
    await asyncio.gather(watching, return_exceptions=True)
    await impatient.close()


def test_incarnations_differ_and_bad_names_are_refused() -> None:
    assert new_incarnation("p") != new_incarnation("p")
    assert new_incarnation("node-1.a").startswith("node-1.a-")
    for name in ("", "a b", "a:b", "a/b", "x" * 65, "ä"):
        with pytest.raises(ConfigError):
            new_incarnation(name)
