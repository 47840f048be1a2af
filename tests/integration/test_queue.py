"""A node's queue in a real Redis: read with room only, claimed, moved, deleted when done."""

from __future__ import annotations

import asyncio

import pytest

from common.errors import ServiceUnavailable
from common.queue import NodeQueue, QueueLength, move_unread, queue_lengths
from common.redis_client import RedisClient
from common.requests import Load, Requests
from common.sampling import SamplingParams
from tests.support.redis import Traffic, a_dispatch, wait_until


async def a_queue(client: RedisClient, incarnation: str) -> NodeQueue:
    queue = NodeQueue(client, incarnation)
    await queue.open()
    return queue


async def fill(client: RedisClient, node: str, count: int, first: int = 0) -> list[str]:
    names = [f"r-{number}" for number in range(first, first + count)]
    for name in names:
        await Requests(client).accept(a_dispatch(name), node)
    return names


async def test_entries_come_in_order_and_no_more_than_there_is_room_for(
    redis_client: RedisClient,
) -> None:
    queue = await a_queue(redis_client, "p-1")
    names = await fill(redis_client, "p-1", 5)
    assert await queue.take(0) == []
    first = await queue.take(3)
    assert [entry.dispatch.request for entry in first] == names[:3]
    assert first[0].dispatch.params == SamplingParams()
    assert await queue_lengths(redis_client, ["p-1", "none"]) == [
        QueueLength(waiting=2, at_work=3),
        QueueLength(0, 0),
    ]
    assert [entry.dispatch.request for entry in await queue.take(3)] == names[3:]
    assert await queue.take(3) == []


async def test_the_lengths_of_many_queues_cost_one_round_trip(redis_client: RedisClient) -> None:
    names = [f"p-{n}" for n in range(20)]
    for name in names[:10]:
        await a_queue(redis_client, name)
    assert await queue_lengths(redis_client, names) == [QueueLength(0, 0)] * 20
    traffic = Traffic(redis_client)
    async with traffic:
        assert await queue_lengths(redis_client, names) == [QueueLength(0, 0)] * 20
    assert traffic.commands["evalsha"] == 1
    assert traffic.commands["xlen"] == len(names)  # asked by the script


async def test_done_deletes_entries_and_does_not_only_acknowledge_them(
    redis_client: RedisClient,
) -> None:
    queue = await a_queue(redis_client, "p-1")
    await fill(redis_client, "p-1", 2)
    entries = await queue.take(2)
    await queue.done(entries[:1])
    await queue.done(entries[:1])
    assert await redis_client.command("XLEN", redis_client.keys.stream("p-1")) == 1
    await queue.done(entries[1:])
    assert await redis_client.command("XLEN", redis_client.keys.stream("p-1")) == 0
    assert await queue_lengths(redis_client, ["p-1"]) == [QueueLength(0, 0)]


async def test_what_could_not_be_deleted_goes_when_redis_is_back(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = await a_queue(redis_client, "p-1")
    await fill(redis_client, "p-1", 3)
    entries = await queue.take(3)

    async def away(*_: object) -> None:
        raise ServiceUnavailable("Redis cannot be reached")

    with monkeypatch.context() as outage:
        outage.setattr(redis_client, "pipeline", away)
        for entry in entries[:2]:
            with pytest.raises(ServiceUnavailable):
                await queue.done([entry])
    assert await queue_lengths(redis_client, ["p-1"]) == [QueueLength(waiting=0, at_work=3)]
    assert await queue.take(5) == []
    assert await queue_lengths(redis_client, ["p-1"]) == [QueueLength(waiting=0, at_work=1)]
    await queue.done(entries[2:])


async def test_waiting_ends_as_soon_as_an_entry_comes(redis_client: RedisClient) -> None:
    queue = await a_queue(redis_client, "p-1")
    waiting = asyncio.create_task(queue.take(4, wait_s=1.0))

    async def blocked() -> bool:
        return b"cmd=xreadgroup" in await redis_client.command("CLIENT", "LIST") or (
            "xreadgroup" in str(await redis_client.command("CLIENT", "LIST"))
        )

    await wait_until(blocked, "the read waits in Redis")
    await fill(redis_client, "p-1", 1)
    assert [entry.dispatch.request for entry in await waiting] == ["r-0"]


async def test_cancelling_a_read_loses_nothing(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    queue = await a_queue(redis_client, "p-1")
    held = (await fill(redis_client, "p-1", 1), await queue.take(1))[1]
    await fill(redis_client, "p-1", 2, first=1)
    real = Requests.claim
    reached = asyncio.Event()

    async def hangs(*_: object) -> None:
        reached.set()
        await asyncio.Event().wait()

    monkeypatch.setattr(Requests, "claim", hangs)
    taking = asyncio.create_task(queue.take(2))
    await reached.wait()  # read, not claimed
    taking.cancel()
    await asyncio.gather(taking, return_exceptions=True)
    monkeypatch.setattr(Requests, "claim", real)
    assert [e.dispatch.request for e in await queue.take(1)] == ["r-1"]
    assert [e.dispatch.request for e in await queue.take(5)] == ["r-2"]
    assert await queue.take(5) == []
    assert [e.dispatch.request for e in held] == ["r-0"]


async def test_attempts_no_longer_wanted_are_dropped_on_the_way(redis_client: RedisClient) -> None:
    requests, queue = Requests(redis_client), await a_queue(redis_client, "p-1")
    await fill(redis_client, "p-1", 4)
    await requests.accept(a_dispatch("r-0", attempt=2), "p-2")
    await requests.cancel("r-1", "gone")
    await requests.claim("r-2", 1, "p-9")
    assert [entry.dispatch.request for entry in await queue.take(9)] == ["r-3"]
    assert queue.dropped == 3
    assert await redis_client.command("XLEN", redis_client.keys.stream("p-1")) == 1


async def test_an_entry_that_is_no_dispatch_is_deleted_and_counted(
    redis_client: RedisClient,
) -> None:
    queue, stream = await a_queue(redis_client, "p-1"), redis_client.keys.stream("p-1")
    await redis_client.command("XADD", stream, "*", "dispatch", b"\xff\x00garbage")
    await redis_client.command("XADD", stream, "*", "something", "else")
    assert await queue.take(5) == []
    assert queue.dropped == 2
    assert await redis_client.command("XLEN", stream) == 0


async def test_the_queue_survives_the_loss_of_its_stream(redis_client: RedisClient) -> None:
    queue = await a_queue(redis_client, "p-1")
    await redis_client.command("FLUSHALL")
    assert await queue.take(5) == []
    await fill(redis_client, "p-1", 1)
    assert len(await queue.take(5)) == 1


async def test_unread_entries_move_oldest_first_with_their_load(redis_client: RedisClient) -> None:
    requests = Requests(redis_client)
    first, second = await a_queue(redis_client, "p-1"), await a_queue(redis_client, "p-2")
    await fill(redis_client, "p-1", 5)
    (at_work,) = await first.take(1)
    assert await move_unread(redis_client, "p-1", "p-2", 2) == 2
    assert [e.dispatch.request for e in await second.take(9)] == ["r-1", "r-2"]
    assert [e.dispatch.request for e in await first.take(9)] == ["r-3", "r-4"]
    assert at_work.dispatch.request == "r-0"
    assert await requests.loads(["p-1", "p-2"]) == {"p-1": Load(3, 15), "p-2": Load(2, 10)}
    record = await requests.get("r-1")
    assert record is not None
    assert record.attempts[0].node == record.attempts[0].claim == "p-2"


async def test_entries_move_to_a_node_that_is_not_there_yet(redis_client: RedisClient) -> None:
    await fill(redis_client, "p-1", 3)  # its node never opened it
    assert await move_unread(redis_client, "p-1", "p-2", 99) == 3
    queue = await a_queue(redis_client, "p-2")
    assert len(await queue.take(9)) == 3


async def test_moving_deletes_what_is_no_longer_wanted_and_goes_on_behind_it(
    redis_client: RedisClient,
) -> None:
    await fill(redis_client, "p-1", 3)
    await Requests(redis_client).cancel("r-0", "gone")
    await Requests(redis_client).cancel("r-1", "gone")
    assert await move_unread(redis_client, "p-1", "p-2", 1) == 1
    assert await redis_client.command("XLEN", redis_client.keys.stream("p-1")) == 0
    assert await move_unread(redis_client, "p-1", "p-2", 1) == 0
    assert await move_unread(redis_client, "none", "p-2", 1) == 0
    assert await move_unread(redis_client, "p-2", "p-2", 1) == 0


async def test_reading_and_moving_at_once_give_each_entry_to_one_node(
    redis_client: RedisClient,
) -> None:
    queues = [await a_queue(redis_client, f"p-{i}") for i in range(3)]
    names = await fill(redis_client, "p-0", 30)
    taken: list[str] = []

    async def work(queue: NodeQueue) -> None:
        while len(taken) < len(names):
            entries = await queue.take(2)
            taken.extend(entry.dispatch.request for entry in entries)
            await queue.done(entries)

    async def move() -> None:
        while len(taken) < len(names):
            for source, target in (("p-0", "p-1"), ("p-1", "p-2"), ("p-2", "p-0")):
                await move_unread(redis_client, source, target, 2)

    await asyncio.wait_for(asyncio.gather(*map(work, queues), move()), 30)
    assert sorted(taken) == sorted(names)
    assert sum(queue.dropped for queue in queues) == 0
    assert await queue_lengths(redis_client, ["p-0", "p-1", "p-2"]) == [QueueLength(0, 0)] * 3
