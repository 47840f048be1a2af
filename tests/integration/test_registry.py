"""The registry in a real Redis: records, ages, and what it does not conclude."""

from __future__ import annotations

import asyncio
import dataclasses
from dataclasses import replace

import pytest

from common.errors import ConfigError, ServiceUnavailable
from common.store.client import RedisClient
from common.store.keys import NODE_TTL_S
from common.store.registry import NodeRecord, NodeState, Registry, Role, Snapshot, new_incarnation
from common.store.requests import Requests
from common.store.server import EmbeddedRedis
from tests.support.redis import Traffic, a_dispatch, wait_until


def a_node(incarnation: str = "p-1", role: Role = Role.PREFILL) -> NodeRecord:
    return NodeRecord(
        incarnation=incarnation,
        name="p",
        role=role,
        state=NodeState.READY,
        endpoint="tcp://127.0.0.1:7",
        pid=42,
        model="tiny",
        num_blocks=100,
        started_at=1,
        transports="shm,tcp",
    )


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


async def test_the_next_beat_says_who_is_alone_if_nobody_could_be_told_at_once(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else the record would name a request that is long past its steps, until the next one."""

    async def fail(*_: object) -> None:
        raise ServiceUnavailable("no answer")

    registry = Registry(redis_client)
    await registry.announce(a_node())
    await registry.say_alone("p-1", "r-1/1")
    with monkeypatch.context() as patch:
        patch.setattr(redis_client, "pipeline", fail)
        with pytest.raises(ServiceUnavailable):
            await registry.say_alone("p-1", "")
    assert await registry.alone("p-1") == "r-1/1"
    await registry.announce(a_node())
    assert await registry.alone("p-1") == ""


async def test_a_beat_writes_and_reads_ten_numbers_whatever_the_node_has_to_say_of_itself(
    redis_client: RedisClient,
) -> None:
    """Every node reads every other twice a second."""
    count, most_bytes = 50, 200
    writer, reader = Registry(redis_client), Registry(redis_client)
    links = [{"link": f"{n:016}", "peer": "p" * 60, "transport": "shm"} for n in range(count)]
    nodes = [replace(a_node(f"p-{n}"), layout="l" * 1000) for n in range(count)]
    for node in nodes:
        await writer.announce(node, links)
    assert (await reader.snapshot()).records == {node.incarnation: node for node in nodes}
    nodes = [replace(node, running=1, steps=10**9, beats=2) for node in nodes]
    traffic = Traffic(redis_client)
    async with traffic:
        for node in nodes:
            await writer.announce(node, links)
    assert traffic.received < count * 2 * most_bytes  # a script's digest and its keys are said, too
    assert traffic.commands["evalsha"] == traffic.commands["hset"] == count
    async with traffic:
        snapshot = await reader.snapshot()
    assert snapshot.records == {node.incarnation: node for node in nodes}
    assert traffic.sent < count * most_bytes
    assert (traffic.commands["get"], traffic.commands["evalsha"]) == (1, 1)  # each a round trip


async def test_an_identity_is_written_when_it_changes_and_links_when_they_do(
    redis_client: RedisClient,
) -> None:
    registry, key = Registry(redis_client), redis_client.keys.node("p-1")
    links = [{"link": "1", "peer": "d-1", "transport": "shm"}]
    await registry.announce(a_node(), links)
    await redis_client.command("HSET", key, "host", "unwritten", "kv_links", "[]")
    await registry.announce(replace(a_node(), beats=2), links)
    assert await redis_client.command("HMGET", key, "host", "kv_links") == [b"unwritten", b"[]"]
    await registry.announce(a_node(), [])
    await registry.announce(a_node(), links)
    assert await registry.kv_links(["p-1"]) == {"p-1": links}
    assert await redis_client.command("HGET", key, "host") == b"unwritten"
    await registry.announce(replace(a_node(), state=NodeState.DRAINING), links)
    assert await redis_client.command("HGET", key, "host") == b""


async def test_both_live_as_long_as_somebody_beats(redis_client: RedisClient) -> None:
    registry, keys = Registry(redis_client), redis_client.keys
    await registry.announce(a_node())
    for key in (keys.node("p-1"), keys.beat("p-1")):
        await redis_client.command("EXPIRE", key, 5)
    await registry.announce(a_node())
    for key in (keys.node("p-1"), keys.beat("p-1")):
        assert NODE_TTL_S - 5 < await redis_client.command("TTL", key) <= NODE_TTL_S


async def test_an_identity_without_a_beat_is_of_a_node_that_starts_or_is_dead(
    redis_client: RedisClient,
) -> None:
    registry = Registry(redis_client)
    await registry.announce(replace(a_node(), running=3))
    await redis_client.command("DEL", redis_client.keys.beat("p-1"))
    snapshot = await Registry(redis_client).snapshot()
    assert snapshot.records == {"p-1": replace(a_node(), state=NodeState.STARTING)}
    assert snapshot.standing("p-1") == "starting"
    assert await registry.alone("p-1") is None
    await redis_client.command("ZINCRBY", redis_client.keys.nodes(), -3_600_000, "p-1")
    assert (await registry.snapshot()).standing("p-1") == "lost"
    await registry.announce(a_node())
    assert (await registry.snapshot()).records == {"p-1": a_node()}


async def test_a_beat_without_an_identity_is_of_a_node_that_only_those_see_who_know_it(
    redis_client: RedisClient,
) -> None:
    writer, reader, newcomer = (Registry(redis_client) for _ in range(3))
    await writer.announce(a_node())
    await reader.snapshot()
    await redis_client.command("DEL", redis_client.keys.node("p-1"))
    assert (await reader.snapshot()).records == {"p-1": a_node()}
    assert (await newcomer.snapshot()).records == {}
    await writer.announce(a_node())
    assert (await newcomer.snapshot()).records == {"p-1": a_node()}


async def test_links_are_read_by_those_who_ask_for_them(redis_client: RedisClient) -> None:
    registry = Registry(redis_client)
    links = [{"link": "1", "peer": "d-1", "transport": "shm"}]
    await registry.announce(a_node(), links)
    await registry.announce(a_node("p-2"))
    assert await Registry(redis_client).kv_links(["p-1", "p-2", "none"]) == {
        "p-1": links,
        "p-2": [],
        "none": [],
    }
    await registry.announce(a_node())
    assert await registry.kv_links(["p-1"]) == {"p-1": []}


async def test_who_lost_its_record_writes_all_of_it_with_its_next_beat(redis_client: RedisClient) -> None:
    registry = Registry(redis_client)
    links = [{"link": "1", "peer": "d-1", "transport": "shm"}]
    await registry.announce(a_node(), links)
    await registry.snapshot()
    await redis_client.command("FLUSHALL")
    assert (await registry.snapshot()).records == {}
    await registry.announce(replace(a_node(), beats=2), links)
    assert (await registry.snapshot()).records == {"p-1": replace(a_node(), beats=2)}
    assert await registry.kv_links(["p-1"]) == {"p-1": links}


async def test_a_reader_notices_that_an_incarnation_describes_itself_anew(redis_client: RedisClient) -> None:
    writer, reader = Registry(redis_client), Registry(redis_client)
    await writer.announce(a_node())
    await reader.snapshot()
    other = replace(a_node(), endpoint="tcp://127.0.0.1:8", model="small")
    await writer.announce(other)
    assert (await reader.snapshot()).records == {"p-1": other}


async def test_a_beat_whose_answer_was_lost_is_followed_by_a_whole_record(
    redis_client: RedisClient, redis_server: EmbeddedRedis
) -> None:
    impatient = RedisClient(dataclasses.replace(redis_client.settings, retry_s=0.0))
    writer = Registry(impatient)
    await writer.announce(a_node())
    redis_server.kill()
    try:
        with pytest.raises(ServiceUnavailable):
            await writer.announce(replace(a_node(), beats=2))
    finally:
        await asyncio.to_thread(redis_server.start)
    await writer.announce(a_node())
    assert (await Registry(redis_client).snapshot()).records == {"p-1": a_node()}
    await impatient.close()


async def test_an_old_or_missing_record_is_shown_with_its_age_and_nothing_is_concluded(
    redis_client: RedisClient,
) -> None:
    registry = Registry(redis_client)
    await registry.announce(a_node())
    await redis_client.command("ZINCRBY", redis_client.keys.nodes(), -3_600_000, "p-1")
    snapshot = await registry.snapshot()
    assert snapshot.records["p-1"].state is NodeState.READY
    assert 3600 <= snapshot.ages["p-1"] < 3700
    await redis_client.command("DEL", redis_client.keys.node("p-1"), redis_client.keys.beat("p-1"))
    snapshot = await Registry(redis_client).snapshot()
    assert "p-1" not in snapshot.records
    assert "p-1" in snapshot.ages
    await registry.announce(a_node())
    assert (await Registry(redis_client).snapshot()).records == {"p-1": a_node()}


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
    keys = redis_client.keys

    async def found() -> dict[str, NodeRecord]:
        return (await Registry(redis_client).snapshot()).records

    for key in (keys.node("p-1"), keys.beat("p-1")):
        await redis_client.command("HSET", key, "from_the_future", "1")
    await redis_client.command("HDEL", keys.node("p-1"), "max_model_len", "identity")
    await redis_client.command("HDEL", keys.beat("p-1"), "running")
    assert await found() == {"p-1": a_node()}
    await redis_client.command("HSET", keys.beat("p-1"), "running", b"\xff\x00")
    assert await found() == {}
    await redis_client.command("HSET", keys.beat("p-1"), "running", "0")
    await redis_client.command("HSET", keys.node("p-1"), "role", "conductor")
    assert await found() == {}
    await redis_client.command("HSET", keys.node("p-1"), "role", "prefill", "state", "tired")
    assert await found() == {}


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


def test_a_node_that_says_nothing_any_more_is_not_shown_as_ready() -> None:
    record = NodeRecord("p-1", "p", Role.PREFILL, NodeState.READY)
    standing = [Snapshot({"p-1": record}, {"p-1": age}, "").standing("p-1") for age in (1, 6, 61)]
    assert standing == ["ready", "silent", "lost"]
