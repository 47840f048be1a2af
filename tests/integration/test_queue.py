"""A node's queue in a real Redis: read with room only, claimed, moved, deleted when done."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest

from common.errors import ServiceUnavailable
from common.sampling import SamplingParams
from common.store.client import RedisClient
from common.store.queue import NodeQueue, QueueLength, move_unread, queue_lengths
from common.store.registry import Registry
from common.store.requests import Load, Place, Requests, Where
from tests.support.redis import HANGS_S, Traffic, a_dispatch, wait_until


async def a_queue(client: RedisClient, incarnation: str) -> NodeQueue:
    queue = NodeQueue(client, incarnation)
    await queue.open()
    return queue


async def fill(client: RedisClient, node: str, count: int, first: int = 0) -> list[str]:
    names = [f"r-{number}" for number in range(first, first + count)]
    for name in names:
        await Requests(client).accept(a_dispatch(name), node)
    return names


async def test_entries_come_in_order_and_no_more_than_there_is_room_for(redis_client: RedisClient) -> None:
    queue = await a_queue(redis_client, "p-1")
    names = await fill(redis_client, "p-1", 5)
    assert await queue.take(0) == []
    first = await queue.take(3)
    assert [entry.dispatch.request.id for entry in first] == names[:3]
    assert first[0].dispatch.request.params == SamplingParams()
    assert await queue_lengths(redis_client, ["p-1", "none"]) == [
        QueueLength(waiting=2, at_work=3),
        QueueLength(0, 0),
    ]
    assert [entry.dispatch.request.id for entry in await queue.take(3)] == names[3:]
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


async def test_done_deletes_entries_and_does_not_only_acknowledge_them(redis_client: RedisClient) -> None:
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
    assert [entry.dispatch.request.id for entry in await waiting] == ["r-0"]


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
    assert [e.dispatch.request.id for e in await queue.take(1)] == ["r-1"]
    assert [e.dispatch.request.id for e in await queue.take(5)] == ["r-2"]
    assert await queue.take(5) == []
    assert [e.dispatch.request.id for e in held] == ["r-0"]


async def test_attempts_no_longer_wanted_are_dropped_on_the_way(redis_client: RedisClient) -> None:
    requests, queue = Requests(redis_client), await a_queue(redis_client, "p-1")
    await fill(redis_client, "p-1", 4)
    await requests.accept(a_dispatch("r-0", attempt=2), "p-2")
    await requests.cancel("r-1", "gone")
    await requests.claim("r-2", 1, "p-9")
    assert [entry.dispatch.request.id for entry in await queue.take(9)] == ["r-3"]
    assert queue.dropped == 1, "the others had left the stream before"
    assert await redis_client.command("XLEN", redis_client.keys.stream("p-1")) == 1


async def test_an_entry_that_is_no_dispatch_is_deleted_and_counted(redis_client: RedisClient) -> None:
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
    assert [e.dispatch.request.id for e in await second.take(9)] == ["r-1", "r-2"]
    assert [e.dispatch.request.id for e in await first.take(9)] == ["r-3", "r-4"]
    assert at_work.dispatch.request.id == "r-0"
    assert await requests.loads(["p-1", "p-2"]) == {"p-1": Load(3, 15), "p-2": Load(2, 10)}
    record = await requests.get("r-1")
    assert record is not None
    assert record.attempts[0].node == record.attempts[0].claim == "p-2"


async def test_nothing_moves_to_a_node_that_is_not_there(redis_client: RedisClient) -> None:
    """A pull whose answer was lost may be served after its node has left, when a late entry has
    made the stream again."""
    await fill(redis_client, "p-1", 3)
    assert await move_unread(redis_client, "p-1", "p-2", 99) == 0
    await a_queue(redis_client, "p-2")
    await Registry(redis_client).leave("p-2")
    await fill(redis_client, "p-2", 1, first=9)
    assert await move_unread(redis_client, "p-1", "p-2", 99) == 0
    assert await queue_lengths(redis_client, ["p-1", "p-2"]) == [QueueLength(3, 0), QueueLength(1, 0)]


async def test_moving_deletes_what_the_record_does_not_name(redis_client: RedisClient) -> None:
    await a_queue(redis_client, "p-2")
    stream = redis_client.keys.stream("p-1")
    await redis_client.command("XADD", stream, "*", "request", "r-0", "attempt", 1, "dispatch", "")
    await redis_client.command("EXPIRE", stream, 60)
    await fill(redis_client, "p-1", 2)
    assert await move_unread(redis_client, "p-1", "p-2", 1) == 1
    assert await move_unread(redis_client, "p-1", "p-2", 1) == 1
    assert await redis_client.command("EXISTS", stream) == 0
    assert await move_unread(redis_client, "p-1", "p-2", 1) == 0
    assert await move_unread(redis_client, "none", "p-2", 1) == 0
    assert await move_unread(redis_client, "p-2", "p-2", 1) == 0


async def test_reading_and_moving_at_once_give_each_entry_to_one_node(redis_client: RedisClient) -> None:
    queues = [await a_queue(redis_client, f"p-{i}") for i in range(3)]
    names = await fill(redis_client, "p-0", 30)
    taken: list[str] = []

    async def work(queue: NodeQueue) -> None:
        while len(taken) < len(names):
            entries = await queue.take(2)
            taken.extend(entry.dispatch.request.id for entry in entries)
            await queue.done(entries)

    async def move() -> None:
        while len(taken) < len(names):
            for source, target in (("p-0", "p-1"), ("p-1", "p-2"), ("p-2", "p-0")):
                await move_unread(redis_client, source, target, 2)

    await asyncio.wait_for(asyncio.gather(*map(work, queues), move()), HANGS_S)
    assert sorted(taken) == sorted(names)
    assert sum(queue.dropped for queue in queues) == 0
    assert await queue_lengths(redis_client, ["p-0", "p-1", "p-2"]) == [QueueLength(0, 0)] * 3


# ── Leaving ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_node_gives_back_what_it_has_not_claimed_to_another(redis_client: RedisClient) -> None:
    requests = Requests(redis_client)
    leaving, other = await a_queue(redis_client, "p-1"), await a_queue(redis_client, "p-2")
    await fill(redis_client, "p-1", 4)
    (at_work,) = await leaving.take(1)
    await redis_client.command(
        "XREADGROUP", "GROUP", "node", "p-1", "COUNT", 1, "STREAMS", redis_client.keys.stream("p-1"), ">"
    )  # read, and not claimed
    assert await leaving.give_back("nobody") == 0
    assert await leaving.give_back("p-2") == 3
    assert await leaving.give_back("p-2") == 0
    assert [e.dispatch.request.id for e in await other.take(9)] == ["r-1", "r-2", "r-3"]
    assert await requests.loads(["p-1", "p-2"]) == {"p-1": Load(1, 5), "p-2": Load(3, 15)}
    assert await queue_lengths(redis_client, ["p-1"]) == [QueueLength(waiting=0, at_work=1)]
    await leaving.done([at_work])


async def test_what_is_for_one_node_only_moves_to_no_other(redis_client: RedisClient) -> None:
    requests = Requests(redis_client)
    queue, other = await a_queue(redis_client, "p-1"), await a_queue(redis_client, "p-2")
    await requests.accept(dataclasses.replace(a_dispatch("r-0"), node="p-1"), "p-1")
    await fill(redis_client, "p-1", 2, first=1)
    assert await move_unread(redis_client, "p-1", "p-2", 9) == 2
    assert await queue.give_back("p-2") == 1
    assert await requests.locate([("r-0", 1, 0)]) == [Where(Place.RETURNED)]
    assert [e.dispatch.request.id for e in await other.take(9)] == ["r-1", "r-2"]


async def test_what_a_node_gives_back_to_nobody_is_known_to_wait_for_its_gateway(
    redis_client: RedisClient,
) -> None:
    requests = Requests(redis_client)
    leaving = await a_queue(redis_client, "p-1")
    await fill(redis_client, "p-1", 2)
    assert await leaving.give_back("") == 2
    assert await requests.locate([("r-0", 1, 0)]) == [Where(Place.RETURNED)]
    assert await requests.loads(["p-1"]) == {"p-1": Load()}
    await requests.accept(a_dispatch("r-0", attempt=2), "p-2")
    assert await requests.locate([("r-0", 2, 0)]) == [Where(Place.QUEUED, "p-2")]


async def test_leaving_gives_back_what_came_at_the_last_moment(redis_client: RedisClient) -> None:
    requests = Requests(redis_client)
    await a_queue(redis_client, "p-1")
    await fill(redis_client, "p-1", 40)
    assert await Registry(redis_client).leave("p-1") == 40
    assert await redis_client.command("KEYS", "pdq:*:p-1") == []
    asked = [(f"r-{number}", 1, 0) for number in range(40)]
    assert await requests.locate(asked) == [Where(Place.RETURNED)] * 40


async def test_a_read_that_waits_ends_when_the_queue_is_stopped(redis_client: RedisClient) -> None:
    queue = await a_queue(redis_client, "p-1")
    waiting = asyncio.create_task(queue.take(4, wait_s=600.0))

    async def blocked() -> bool:
        return "xreadgroup" in str(await redis_client.command("CLIENT", "LIST"))

    await wait_until(blocked, "the read waits in Redis")
    queue.stop()
    assert await waiting == []
    await fill(redis_client, "p-1", 1)
    assert await queue.take(4) == []
    assert await queue.give_back("") == 1


async def test_an_entry_that_a_late_read_has_delivered_is_found(redis_client: RedisClient) -> None:
    """Redis serves a read whose client has given it up, after a later one of the same node."""
    queue = await a_queue(redis_client, "p-1")
    assert await queue.take(4) == []
    await fill(redis_client, "p-1", 1)
    await redis_client.command(
        "XREADGROUP", "GROUP", "node", "p-1", "COUNT", 9, "STREAMS", redis_client.keys.stream("p-1"), ">"
    )
    queue.strays_interval_s = 0.0
    assert [entry.dispatch.request.id for entry in await queue.take(4)] == ["r-0"]
    assert await queue.take(4) == []


async def test_a_malformed_entry_is_known_to_be_nowhere(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    requests = Requests(redis_client)
    queue = await a_queue(redis_client, "p-1")
    with monkeypatch.context() as patch:
        patch.setattr("common.store.requests.encode", lambda _: b"of another version")
        await fill(redis_client, "p-1", 1)
    assert await queue.take(4) == []
    assert queue.dropped == 1
    assert await requests.locate([("r-0", 1, 0)]) == [Where(Place.NOWHERE)]
    assert await requests.loads(["p-1"]) == {"p-1": Load()}
