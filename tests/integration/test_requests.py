"""Requests in a real Redis: accepted once, claimed once, merged forward, closed once."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.errors import ConfigError, ServiceUnavailable
from common.settings.config import RedisSettings
from common.store.client import RedisClient
from common.store.keys import INSPECT_TTL_S
from common.store.registry import NodeRecord, Registry, Role
from common.store.request_state import State
from common.store.requests import Claim, Load, Place, Requests, Where
from common.store.server import EmbeddedRedis
from common.wire.codec import decode
from tests.support.redis import a_dispatch, leaked_keys, wait_until

IDLE = Load()


@pytest.fixture
def requests(redis_client: RedisClient) -> Requests:
    return Requests(redis_client)


async def entries(client: RedisClient, node: str) -> list[Any]:
    found: list[Any] = await client.command("XRANGE", client.keys.stream(node), "-", "+")
    return found


# ── Accepting ────────────────────────────────────────────────────────────────────────────────────


async def test_accepting_writes_record_entry_load_and_open_request(
    requests: Requests, redis_client: RedisClient
) -> None:
    dispatch = a_dispatch(prompt=7)
    assert await requests.accept(dispatch, "p-1")
    record = await requests.get("r-1")
    assert record is not None
    assert (record.state, record.attempt, record.prompt_len, record.model) == (State.QUEUED, 1, 7, "tiny")
    assert record.accepted_at > 1_600_000_000_000
    assert record.attempts[0].node == "p-1"
    assert record.attempts[0].claim == ""
    ((_, fields),) = await entries(redis_client, "p-1")
    assert decode(fields[b"dispatch"]) == dispatch
    assert await requests.loads(["p-1", "p-2"]) == {"p-1": Load(1, 7), "p-2": IDLE}
    assert await requests.open_requests("gateway-1") == {"r-1"}


async def test_accepting_an_attempt_again_changes_nothing(
    requests: Requests, redis_client: RedisClient
) -> None:
    assert await requests.accept(a_dispatch(), "p-1")
    before = await requests.get("r-1")
    assert not await requests.accept(a_dispatch(), "p-1")
    assert not await requests.accept(a_dispatch(), "p-2")
    assert await requests.get("r-1") == before
    assert len(await entries(redis_client, "p-1")) == 1
    assert await requests.loads(["p-1", "p-2"]) == {"p-1": Load(1, 5), "p-2": IDLE}


async def test_an_attempt_that_ended_before_redis_saw_it_is_not_accepted_any_more(
    requests: Requests, redis_client: RedisClient
) -> None:
    await requests.accept(a_dispatch(), "p-1")
    await requests.finish("r-1", 2, (0,), finish_reason="stop")
    assert not await requests.accept(a_dispatch(attempt=2), "p-2")
    assert await entries(redis_client, "p-2") == []
    assert await requests.loads(["p-1", "p-2"]) == {"p-1": IDLE, "p-2": IDLE}


async def test_a_newer_attempt_takes_over_record_and_load(requests: Requests) -> None:
    await requests.accept(a_dispatch(), "p-1")
    await requests.claim("r-1", 1, "p-1")
    await requests.advance("r-1", 1, (0,), State.DECODING, node="d-1", seconds={"prefill": 1.0})
    assert await requests.accept(a_dispatch(attempt=2, prompt=9), "p-2")
    record = await requests.get("r-1")
    assert record is not None
    choice = record.choices[0]
    assert (choice.state, choice.attempt, choice.decode_node, choice.seconds) == (State.QUEUED, 2, "", {})
    loads = await requests.loads(["p-1", "d-1", "p-2"])
    assert loads == {"p-1": IDLE, "d-1": IDLE, "p-2": Load(1, 9)}
    assert not await requests.accept(a_dispatch(attempt=1), "p-1")


# ── Claiming ─────────────────────────────────────────────────────────────────────────────────────


async def test_of_many_claims_at_once_exactly_one_wins(requests: Requests) -> None:
    await requests.accept(a_dispatch(), "p-1")
    nodes = [f"p-{i}" for i in range(16)]
    answers = await asyncio.gather(*(requests.claim("r-1", 1, node) for node in nodes))
    assert sorted(answers) == [Claim.LOST] * 15 + [Claim.WON]
    record = await requests.get("r-1")
    assert record is not None
    assert record.attempts[0].claim == nodes[answers.index(Claim.WON)]
    assert record.state is State.PREFILLING
    assert record.choices[0].prefill_node == record.attempts[0].claim


async def test_a_repeated_claim_is_held_and_not_won_twice(requests: Requests) -> None:
    await requests.accept(a_dispatch(), "p-1")
    assert await requests.claim("r-1", 1, "p-1") is Claim.WON
    assert await requests.claim("r-1", 1, "p-1") is Claim.HELD


async def test_claims_and_places_tell_what_became_of_an_attempt(requests: Requests) -> None:
    assert await requests.claim("r-none", 1, "p-1") is Claim.UNKNOWN
    await requests.accept(a_dispatch(), "p-1")
    assert await requests.claim("r-1", 2, "p-1") is Claim.UNKNOWN
    await requests.accept(a_dispatch(attempt=2), "p-2")
    assert await requests.claim("r-1", 1, "p-1") is Claim.SUPERSEDED
    await requests.accept(a_dispatch("r-2"), "p-1")
    await requests.cancel("r-2", "client is gone")
    assert await requests.claim("r-2", 1, "p-1") is Claim.SUPERSEDED
    await requests.accept(a_dispatch("r-3"), "p-3")
    assert await requests.claim("r-3", 1, "p-3") is Claim.WON
    asked = [("r-1", 1, 0), ("r-1", 2, 0), ("r-2", 1, 0), ("r-3", 1, 0), ("r-none", 1, 0)]
    assert await requests.locate(asked) == [
        Where(Place.NOWHERE),
        Where(Place.QUEUED, "p-2"),
        Where(Place.NOWHERE),
        Where(Place.CLAIMED, "p-3"),
        Where(Place.UNKNOWN),
    ]


async def test_an_entry_goes_with_its_attempt(requests: Requests, redis_client: RedisClient) -> None:
    """What is cancelled or superseded before anybody claims it waits in no queue."""
    await requests.accept(a_dispatch("r-1"), "p-1")
    await requests.accept(a_dispatch("r-1", attempt=2), "p-2")
    assert await entries(redis_client, "p-1") == []
    await requests.cancel("r-1", "client is gone")
    assert await entries(redis_client, "p-2") == []
    assert await redis_client.command("KEYS", redis_client.keys.stream("*")) == [], "never opened"


# ── Merging ──────────────────────────────────────────────────────────────────────────────────────


async def test_late_writes_of_older_states_and_attempts_change_nothing(requests: Requests) -> None:
    await requests.accept(a_dispatch(), "p-1")
    await requests.accept(a_dispatch(attempt=2), "p-2")
    assert await requests.advance("r-1", 2, (0,), State.DECODING, node="d-2")
    before = await requests.get("r-1")
    assert not await requests.advance("r-1", 2, (0,), State.PREFILLING, node="")
    assert not await requests.advance("r-1", 1, (0,), State.DECODING, node="d-1", generated=99)
    assert not await requests.finish("r-1", 1, (0,), State.FAILED, error="link_lost")
    assert await requests.get("r-1") == before
    assert await requests.loads(["d-1", "d-2"]) == {"d-1": IDLE, "d-2": Load(1, 0)}


async def test_a_choice_that_moves_to_another_decode_node_takes_its_load_with_it(requests: Requests) -> None:
    await requests.accept(a_dispatch(), "p-1")
    assert await requests.advance("r-1", 1, (0,), State.DECODING, node="d-1")
    for _ in range(2):
        await requests.advance("r-1", 1, (0,), State.DECODING, node="d-2")
        assert await requests.loads(["d-1", "d-2"]) == {"d-1": IDLE, "d-2": Load(1, 0)}
    record = await requests.get("r-1")
    assert record is not None
    assert record.choices[0].decode_node == "d-2"
    assert await requests.finish("r-1", 1, (0,))
    await requests.advance("r-1", 1, (0,), State.DECODING, node="d-3")
    assert await requests.loads(["d-1", "d-2", "d-3"]) == dict.fromkeys(["d-1", "d-2", "d-3"], IDLE)


async def test_durations_that_come_late_are_still_merged(requests: Requests) -> None:
    await requests.accept(a_dispatch(), "p-1")
    await requests.advance("r-1", 1, (0,), State.DECODING, node="d-1", generated=4)
    assert not await requests.advance(
        "r-1", 1, (0,), State.HANDING_OFF, seconds={"prefill": 0.5}, generated=1, cached_tokens=16
    )
    record = await requests.get("r-1")
    assert record is not None
    choice = record.choices[0]
    assert choice.state is State.DECODING
    assert choice.seconds == {"prefill": 0.5}
    assert (choice.generated, choice.cached_tokens) == (4, 16)


WRITES = st.lists(
    st.tuples(
        st.integers(1, 3),  # attempt
        st.sampled_from([(0,), (1,), (0, 1)]),  # choices
        st.sampled_from([state for state in State if state is not State.QUEUED]),
    ),
    max_size=8,
)


@given(writes=WRITES, data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
async def test_writes_in_any_order_converge_and_leave_the_loads_right(
    redis_client: RedisClient, writes: list[tuple[int, tuple[int, ...], State]], data: st.DataObject
) -> None:
    await redis_client.command("FLUSHALL")
    requests = Requests(redis_client)
    orders = {"r-a": writes, "r-b": data.draw(st.permutations(writes + writes[:2]))}
    expected = dict.fromkeys((0, 1), (1, State.QUEUED))
    for request, order in orders.items():
        await requests.accept(a_dispatch(request, choices=(0, 1)), "p-1")
        ranks = [(0, 0), (0, 0)]
        for attempt, choices, state in order:
            write = requests.finish if state.terminal else requests.advance
            node = {} if state.terminal else {"node": f"n-{attempt}"}
            await write(request, attempt, choices, state, seconds={state.value: float(attempt)}, **node)
            record = await requests.get(request)
            assert record is not None
            now = [(choice.attempt, choice.state.rank) for choice in record.choices]
            assert all(new >= old for new, old in zip(now, ranks, strict=True))
            ranks = now
    for attempt, choices, state in writes:
        for choice in choices:
            expected[choice] = max(expected[choice], (attempt, state), key=lambda w: (w[0], w[1].rank))
    a, b = await requests.get_all(["r-a", "r-b"])
    assert a is not None
    assert b is not None
    assert {c.choice: (c.attempt, c.state) for c in a.choices} == expected
    assert a.state == b.state == min((c.state for c in a.choices), key=lambda state: state.rank)
    assert a.attempt == b.attempt
    assert [replace(c, at={}) for c in a.choices] == [replace(c, at={}) for c in b.choices]
    decoding = {c.decode_node for c in a.choices if c.state is State.DECODING}
    for node, load in (await requests.loads([f"n-{i}" for i in (1, 2, 3)])).items():
        count = sum(c.decode_node == node and c.state is State.DECODING for c in a.choices)
        assert load.requests == 2 * count, (node, decoding)
    open_now = await requests.open_requests("gateway-1")
    assert open_now == (set() if a.state.terminal else {"r-a", "r-b"})
    for request in ("r-a", "r-b"):
        await requests.cancel(request, "over")
    loads = await requests.loads(["p-1", "n-1", "n-2", "n-3"])
    assert set(loads.values()) == {IDLE}
    assert await requests.open_requests("gateway-1") == set()
    assert await leaked_keys(redis_client) == []


# ── Closing ──────────────────────────────────────────────────────────────────────────────────────


async def test_a_request_closes_with_its_last_choice(requests: Requests, redis_client: RedisClient) -> None:
    await requests.accept(a_dispatch(choices=(0, 1)), "p-1")
    await requests.claim("r-1", 1, "p-1")
    for choice in (0, 1):
        await requests.advance("r-1", 1, (choice,), State.DECODING, node="d-1")
    assert await requests.loads(["p-1", "d-1"]) == {"p-1": IDLE, "d-1": Load(2, 0)}
    assert await requests.finish("r-1", 1, (0,), finish_reason="stop", generated=8)
    assert await requests.open_requests("gateway-1") == {"r-1"}
    assert await requests.loads(["d-1"]) == {"d-1": Load(1, 0)}
    assert await requests.finish("r-1", 1, (1,), finish_reason="length", generated=16)
    assert not await requests.finish("r-1", 1, (1,), finish_reason="length", generated=16)
    record = await requests.get("r-1")
    assert record is not None
    assert record.state is State.FINISHED
    assert record.ended_at >= record.accepted_at
    assert [(c.finish_reason, c.generated) for c in record.choices] == [("stop", 8), ("length", 16)]
    assert await requests.open_requests("gateway-1") == set()
    assert await requests.loads(["p-1", "d-1"]) == {"p-1": IDLE, "d-1": IDLE}
    ttl = await redis_client.command("TTL", redis_client.keys.request("r-1"))
    assert 0 < ttl <= INSPECT_TTL_S


async def test_each_load_is_taken_back_exactly_once(requests: Requests) -> None:
    for request in ("r-1", "r-2"):
        await requests.accept(a_dispatch(request), "p-1")
        await requests.advance(request, 1, (0,), State.PREFILLING, node="p-1")
    await requests.advance("r-1", 1, (0,), State.DECODING, node="d-1")
    await requests.advance("r-2", 1, (0,), State.HANDING_OFF)
    for _ in range(2):
        await requests.advance("r-1", 1, (0,), State.DECODING, node="d-1")
    assert await requests.loads(["p-1", "d-1"]) == {"p-1": Load(1, 5), "d-1": Load(1, 0)}
    for _ in range(2):
        await requests.finish("r-1", 1, (0,))
    assert await requests.loads(["p-1", "d-1"]) == {"p-1": Load(1, 5), "d-1": IDLE}


async def test_one_choice_may_be_retried_while_the_other_goes_on(requests: Requests) -> None:
    await requests.accept(a_dispatch(choices=(0, 1)), "p-1")
    await requests.advance("r-1", 1, (0, 1), State.DECODING, node="d-1")
    await requests.accept(a_dispatch(attempt=2, choices=(1,)), "p-2")
    assert await requests.locate([("r-1", 1, 1), ("r-1", 2, 1)]) == [
        Where(Place.NOWHERE),
        Where(Place.QUEUED, "p-2"),
    ]
    assert await requests.finish("r-1", 1, (0, 1), generated=3)  # choice 1 of it is late
    record = await requests.get("r-1")
    assert record is not None
    assert [c.state for c in record.choices] == [State.FINISHED, State.QUEUED]
    assert record.state is State.QUEUED
    assert record.attempt == 2


async def test_a_failure_keeps_its_code_and_cancel_ends_what_is_open_only(requests: Requests) -> None:
    await requests.accept(a_dispatch(choices=(0, 1)), "p-1")
    await requests.finish("r-1", 1, (0,), State.FAILED, error="link_lost", message="d-1 is gone")
    assert await requests.cancel("r-1", "client is gone")
    assert not await requests.cancel("r-1", "client is gone")
    record = await requests.get("r-1")
    assert record is not None
    assert record.state is State.FAILED
    assert [(c.state, c.error, c.message) for c in record.choices] == [
        (State.FAILED, "link_lost", "d-1 is gone"),
        (State.CANCELLED, "request_aborted", "client is gone"),
    ]


async def test_writes_about_a_request_that_redis_does_not_know_leave_nothing(
    requests: Requests, redis_client: RedisClient
) -> None:
    assert not await requests.advance("r-9", 1, (0,), State.DECODING, node="d-1")
    assert not await requests.finish("r-9", 1, (0,))
    assert not await requests.cancel("r-9", "gone")
    assert not await redis_client.command("EXISTS", redis_client.keys.request("r-9"))
    assert await requests.get("r-9") is None


async def test_recent_requests_come_newest_first(requests: Requests) -> None:
    for number in range(3):
        await requests.accept(a_dispatch(f"r-{number}"), "p-1")
    newest = await requests.recent(2)
    assert len(newest) == 2
    assert newest[0].accepted_at >= newest[1].accepted_at
    assert {r.request for r in await requests.recent()} == {"r-0", "r-1", "r-2"}


async def test_dead_letters_are_kept_for_a_person(requests: Requests, redis_client: RedisClient) -> None:
    await requests.dead_letter(a_dispatch("r-1"), "killed p-1 while alone")
    await requests.dead_letter(a_dispatch("r-2", 3), "killed p-2 while alone")
    await redis_client.command("XADD", redis_client.keys.dead_letters(), "*", "dispatch", b"old")
    unreadable, newest, oldest = await requests.dead_letters()
    assert unreadable.dispatch is None
    assert (newest.request, newest.attempt, newest.reason) == ("r-2", 3, "killed p-2 while alone")
    assert oldest.dispatch == a_dispatch("r-1")


# ── Redis in trouble ─────────────────────────────────────────────────────────────────────────────


async def test_a_gateway_asserts_its_open_requests_after_redis_lost_everything(
    requests: Requests, redis_client: RedisClient, redis_server: EmbeddedRedis
) -> None:
    await requests.accept(a_dispatch(), "p-1")
    before = await redis_client.generation()
    assert await redis_client.generation() == before
    redis_server.restart()
    assert await redis_client.generation() != before
    assert await requests.locate([("r-1", 1, 0)]) == [Where(Place.UNKNOWN)]
    assert await requests.accept(a_dispatch(), "p-1", claimed_by="p-1")
    assert await requests.advance("r-1", 1, (0,), State.DECODING, node="d-1")
    record = await requests.get("r-1")
    assert record is not None
    assert record.attempts[0].claim == "p-1"
    assert await entries(redis_client, "p-1") == []
    assert await requests.loads(["p-1", "d-1"]) == {"p-1": IDLE, "d-1": Load(1, 0)}


async def test_flushing_redis_is_noticed_as_a_new_generation(redis_client: RedisClient) -> None:
    before = await redis_client.generation()
    await redis_client.command("FLUSHALL")
    assert await redis_client.generation() != before


async def test_an_operation_waits_for_a_redis_that_comes_back(
    requests: Requests, redis_server: EmbeddedRedis
) -> None:
    redis_server.kill()
    accepted = asyncio.create_task(requests.accept(a_dispatch(), "p-1"))
    await asyncio.to_thread(redis_server.start)
    assert await accepted


async def test_a_redis_that_stays_away_is_a_typed_error_in_time(
    redis_client: RedisClient, redis_server: EmbeddedRedis
) -> None:
    settings = RedisSettings(url=redis_server.url, timeout_s=0.5, retry_s=0.1)
    client = RedisClient(settings)
    redis_server.kill()
    try:
        with pytest.raises(ServiceUnavailable, match="cannot be reached"):
            await Requests(client).accept(a_dispatch(), "p-1")
    finally:
        redis_server.start()
        await client.close()


async def test_a_redis_without_memory_is_a_typed_error(requests: Requests, redis_client: RedisClient) -> None:
    await redis_client.command("CONFIG", "SET", "maxmemory", "1")
    try:
        with pytest.raises(ServiceUnavailable, match="out of memory"):
            await requests.accept(a_dispatch(), "p-1")
    finally:
        await redis_client.command("CONFIG", "SET", "maxmemory", "0")
    assert await requests.accept(a_dispatch(), "p-1")


async def test_what_was_accepted_goes_on_and_ends_without_memory(
    requests: Requests, redis_client: RedisClient
) -> None:
    registry = Registry(redis_client)
    await registry.snapshot()
    for name in ("r-1", "r-2"):
        await requests.accept(a_dispatch(name), "p-1")
    await redis_client.command("CONFIG", "SET", "maxmemory", "1")
    try:
        await registry.announce(NodeRecord("p-1", "p-1", Role.PREFILL))
        assert "p-1" in (await registry.snapshot()).records
        assert await requests.claim("r-1", 1, "p-1") is Claim.WON
        assert await requests.advance("r-1", 1, (0,), State.DECODING, node="d-1")
        assert await requests.finish("r-1", 1, (0,), finish_reason="stop")
        assert await registry.leave("p-1") == 1
        assert await requests.cancel("r-2", "client is gone")
        assert await requests.open_requests("gateway-1") == set()
        assert await requests.loads(["p-1", "d-1"]) == {"p-1": IDLE, "d-1": IDLE}
    finally:
        await redis_client.command("CONFIG", "SET", "maxmemory", "0")


async def test_a_read_only_redis_is_retried_until_it_is_not(
    requests: Requests, redis_client: RedisClient, redis_server: EmbeddedRedis
) -> None:
    port = redis_server.url.rsplit(":", 1)[1].split("/")[0]
    with EmbeddedRedis() as other:
        other_port = other.url.rsplit(":", 1)[1].split("/")[0]
        await redis_client.command("REPLICAOF", "127.0.0.1", other_port)
        accepted = asyncio.create_task(requests.accept(a_dispatch(), "p-1"))
        refused = RedisClient(RedisSettings(url=redis_server.url, retry_s=0.0))
        with pytest.raises(ServiceUnavailable):
            await refused.command("SET", "key", "value", "PX", 1000)
        await refused.close()
        assert not accepted.done(), port
        await redis_client.command("REPLICAOF", "NO", "ONE")
        assert await accepted


async def test_what_can_never_work_is_a_config_error(
    redis_client: RedisClient, redis_server: EmbeddedRedis
) -> None:
    with pytest.raises(ConfigError, match="PDQ_REDIS_URL"):
        RedisClient(RedisSettings())
    with pytest.raises(ConfigError, match="address"):
        RedisClient(RedisSettings(url="http://h"))
    wrong = RedisClient(RedisSettings(url=redis_server.url.replace("//", "//me:wrong@")))
    with pytest.raises(ConfigError, match="credentials"):
        await wrong.open()
    await wrong.close()
    await redis_client.command("SET", redis_client.keys.schema(), "another")
    with pytest.raises(ConfigError, match="schema another"):
        await redis_client.open()


async def test_an_old_server_is_refused_in_one_line(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = replace(await redis_client.server_info(), kind="redis", version="6.0.16")

    async def old() -> Any:
        return info

    monkeypatch.setattr(redis_client, "server_info", old)
    with pytest.raises(ConfigError, match=r"redis 6\.0\.16 is too old"):
        await redis_client.open()


async def test_a_redis_that_may_drop_keys_is_warned_about(
    redis_client: RedisClient, caplog: pytest.LogCaptureFixture
) -> None:
    await redis_client.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")
    try:
        await redis_client.open()
    finally:
        await redis_client.command("CONFIG", "SET", "maxmemory-policy", "noeviction")
    assert "redis.evicts" in caplog.text
    caplog.clear()
    await redis_client.open()
    assert "redis.evicts" not in caplog.text


# ── The leak checker itself ──────────────────────────────────────────────────────────────────────


async def test_the_leak_checker_finds_a_key_without_time_to_live(redis_client: RedisClient) -> None:
    await redis_client.command("SET", "pdq:stray", "1")
    await redis_client.command("SET", "pdq:mortal", "1", "EX", 60)
    assert await leaked_keys(redis_client) == ["pdq:stray"]
    await redis_client.command("DEL", "pdq:stray")
    await wait_until(lambda: True, "the condition that holds already")
