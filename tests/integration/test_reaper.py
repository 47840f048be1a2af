"""The reaper against a real Redis: what it deletes, when, and what it leaves alone."""

from __future__ import annotations

import pytest

from common.errors import ServiceUnavailable
from common.store.client import RedisClient, text
from common.store.reaper import GATEWAY_LOST, Reaped, Reaper
from common.store.registry import NodeRecord, Registry, Role
from common.store.request_state import State
from common.store.requests import Load, Place, Requests, Where
from tests.support.redis import a_dispatch, leaked_keys


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def a_reaper(client: RedisClient, clock: Clock, name: str = "reaper-1") -> Reaper:
    return Reaper(client, name, dead_after_s=60.0, clock=clock)


async def announce(client: RedisClient, incarnation: str, role: Role, beats: int = 0) -> None:
    await Registry(client).announce(NodeRecord(incarnation, incarnation, role, beats=beats))


async def pass_time(reaper: Reaper, clock: Clock, seconds: float = 65.0) -> Reaped:
    """Sweep every 5 seconds; what the last sweep did."""
    reaped = await reaper.sweep()
    for _ in range(int(seconds / 5)):
        clock.now += 5
        reaped = Reaped(
            reaped.incarnations + (swept := await reaper.sweep()).incarnations,
            reaped.requests + swept.requests,
        )
    return reaped


async def test_a_dead_node_leaves_nothing_and_what_it_had_not_claimed_is_given_back(
    redis_client: RedisClient,
) -> None:
    clock, requests = Clock(), Requests(redis_client)
    reaper = a_reaper(redis_client, clock)
    await announce(redis_client, "p-1", Role.PREFILL)
    await requests.accept(a_dispatch("r-1"), "p-1")
    await requests.accept(a_dispatch("r-2"), "p-1")
    await requests.claim("r-2", 1, "p-1")
    reaped: list[str] = []
    await reaper.sweep()
    for _ in range(12):
        clock.now += 5
        await announce(redis_client, "gateway-1", Role.GATEWAY, int(clock.now))
        reaped.extend((await reaper.sweep()).incarnations)
    assert reaped == ["p-1"]
    assert await requests.locate([("r-1", 1, 0), ("r-2", 1, 0)]) == [
        Where(Place.RETURNED),
        Where(Place.CLAIMED, "p-1"),
    ]
    assert await redis_client.command("KEYS", "pdq:*:p-1") == []
    assert "p-1" not in (await Registry(redis_client).snapshot()).ages


async def test_open_requests_of_a_dead_gateway_are_failed_and_their_loads_taken_back(
    redis_client: RedisClient,
) -> None:
    clock, requests = Clock(), Requests(redis_client)
    reaper = a_reaper(redis_client, clock)
    await announce(redis_client, "gateway-1", Role.GATEWAY)
    await requests.accept(a_dispatch("r-1", choices=(0, 1)), "p-1")
    await requests.finish("r-1", 1, (0,), finish_reason="stop")
    await requests.accept(a_dispatch("r-2", gateway="gateway-2"), "p-1")
    for beats in range(12):
        await pass_time(reaper, clock, 5)
        await announce(redis_client, "gateway-2", Role.GATEWAY, beats)
        await announce(redis_client, "p-1", Role.PREFILL, beats)
    reaped = await pass_time(reaper, clock, 5)
    record = await requests.get("r-1")
    assert record is not None
    assert [(c.state, c.error) for c in record.choices] == [
        (State.FINISHED, ""),
        (State.FAILED, GATEWAY_LOST),
    ]
    assert record.state is State.FAILED
    other = await requests.get("r-2")
    assert other is not None
    assert other.state is State.QUEUED
    assert await requests.loads(["p-1"]) == {"p-1": Load(1, 5)}
    assert await requests.open_requests("gateway-1") == set()
    assert "gateway-1" not in (await Registry(redis_client).snapshot()).ages
    assert "gateway-2" in (await Registry(redis_client).snapshot()).ages
    assert reaped.incarnations in ((), ("gateway-1",))


async def test_a_node_that_beats_is_never_reaped(redis_client: RedisClient) -> None:
    clock, reaper = Clock(), None
    reaper = a_reaper(redis_client, clock)
    for beats in range(60):
        await announce(redis_client, "p-1", Role.PREFILL, beats)
        assert await reaper.sweep() == Reaped()
        clock.now += 5


async def test_time_without_redis_and_time_asleep_start_the_watch_anew(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock()
    reaper = a_reaper(redis_client, clock)
    await announce(redis_client, "p-1", Role.PREFILL)
    assert await pass_time(reaper, clock, 55) == Reaped()

    async def away(*_: object, **__: object) -> None:
        raise ServiceUnavailable("Redis cannot be reached")

    with monkeypatch.context() as patch:
        patch.setattr(redis_client, "command", away)
        with pytest.raises(ServiceUnavailable):
            await reaper.sweep()
    assert await pass_time(reaper, clock, 55) == Reaped()
    clock.now += 1000  # the reaper itself was stopped
    assert await reaper.sweep() == Reaped()
    assert await pass_time(reaper, clock, 55) == Reaped()
    assert (await pass_time(reaper, clock, 10)).incarnations == ("p-1",)


async def test_one_reaper_at_a_time(redis_client: RedisClient) -> None:
    clock = Clock()
    first, second = (a_reaper(redis_client, clock, name) for name in ("one", "two"))
    await announce(redis_client, "p-1", Role.PREFILL)
    lock = redis_client.keys.reaper_lock()
    await redis_client.command("SET", lock, "two", "PX", 60_000)
    assert await pass_time(first, clock) == Reaped()
    assert (await pass_time(second, clock)).incarnations == ("p-1",)
    assert await redis_client.command("GET", lock) is None, "given back"


async def test_traces_of_names_nobody_announced_are_found(redis_client: RedisClient) -> None:
    """An attempt that was accepted for a node that had just left."""
    clock, requests = Clock(), Requests(redis_client)
    await requests.accept(a_dispatch(), "p-gone")
    await redis_client.command("HSET", redis_client.keys.load("p-odd"), "requests", 1)
    await redis_client.command("EXPIRE", redis_client.keys.load("p-odd"), 60)
    reaped = await pass_time(a_reaper(redis_client, clock), clock)
    assert set(reaped.incarnations) == {"p-gone", "p-odd", "gateway-1"}
    keys = {text(key) for key in await redis_client.command("KEYS", "*")}
    assert keys == {
        redis_client.keys.request("r-1"),
        redis_client.keys.requests(),
        redis_client.keys.schema(),
    }


async def test_a_gateway_taken_for_dead_may_still_finish_its_request(redis_client: RedisClient) -> None:
    clock, requests = Clock(), Requests(redis_client)
    await announce(redis_client, "gateway-1", Role.GATEWAY)
    await requests.accept(a_dispatch(), "p-1")
    await pass_time(a_reaper(redis_client, clock), clock)
    assert await requests.finish("r-1", 1, (0,), finish_reason="stop", generated=3)
    record = await requests.get("r-1")
    assert record is not None
    assert record.state is State.FINISHED
    assert await leaked_keys(redis_client) == []


async def test_ids_of_expired_records_leave_the_list_of_recent_requests(redis_client: RedisClient) -> None:
    clock, requests = Clock(), Requests(redis_client)
    await requests.accept(a_dispatch("r-1"), "p-1")
    await requests.accept(a_dispatch("r-2"), "p-1")
    await redis_client.command("DEL", redis_client.keys.request("r-1"))
    await pass_time(a_reaper(redis_client, clock), clock)
    index = await redis_client.command("ZRANGE", redis_client.keys.requests(), 0, -1)
    assert index == [b"r-2"]


async def test_loads_are_counted_anew_from_what_is_open(redis_client: RedisClient) -> None:
    clock, requests = Clock(), Requests(redis_client)
    reaper = a_reaper(redis_client, clock)
    await requests.accept(a_dispatch("r-1", choices=(0, 1)), "p-1")
    await requests.accept(a_dispatch("r-1", attempt=2, choices=(1,), prompt=9), "p-2")
    await requests.accept(a_dispatch("r-2"), "p-1")
    await requests.advance("r-2", 1, (0,), State.DECODING, node="d-1")
    await requests.accept(a_dispatch("r-gone"), "p-3")
    right = {"p-1": Load(1, 5), "p-2": Load(1, 9), "d-1": Load(1, 0), "p-3": Load()}
    await redis_client.command("DEL", redis_client.keys.request("r-gone"))
    for node in ("p-1", "d-1"):
        await redis_client.command("HINCRBY", redis_client.keys.load(node), "requests", 3)
    for beats in range(14):
        await reaper.sweep()
        clock.now += 5
        for name in (*right, "gateway-1"):
            await announce(redis_client, name, Role.GATEWAY, beats)
    assert await requests.loads([*right]) == right
