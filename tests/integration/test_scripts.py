"""Every Lua script of the project, run by a real Redis, and the types that go in and come out."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from common.store.client import RedisClient
from common.store.gpu_scripts import Held, Hold, HoldGpu, ReleaseGpu
from common.store.keys import Key, Keys
from common.store.lua import Script
from common.store.node_record import BEAT
from common.store.queue import NodeQueue, QueueLength, queue_lengths
from common.store.queue_scripts import DropEntries, GiveBack, MoveUnread, QueueLengths
from common.store.registry_scripts import AnnounceNode, ReadBeats, ReleaseLock, RemoveNode, TakeLock
from common.store.request_scripts import (
    AcceptAttempt,
    AddDeadLetter,
    ClaimAttempt,
    LocateChoices,
    MergeChoices,
    RecountLoads,
)
from common.store.request_state import Claim, Place, State
from common.store.requests import Requests
from tests.support.redis import Traffic, a_dispatch

ROOT = Path(__file__).resolve().parents[2]
KEYS = Keys()
RECORD, LOAD, OPEN = KEYS.request(""), KEYS.load(""), KEYS.open_requests("")

# Each in turn against a Redis in which request r-1 waits in the stream of node a, and the stream of
# node b is open.
EXAMPLES: list[tuple[Script[Any], Any]] = [
    (
        AcceptAttempt(
            record=KEYS.request("r-2"),
            stream=KEYS.stream("b"),
            recent=KEYS.requests(),
            load_stem=LOAD,
            open_stem=OPEN,
            request="r-2",
            attempt=1,
            choices=[0, 1],
            node="b",
            tokens=3,
            dispatch=b"\x00\xff",
            claimed_by="",
            fields={"gateway": "g-1", "model": "tiny"},
        ),
        True,
    ),
    (
        ClaimAttempt(
            record=KEYS.request("r-1"),
            load_stem=LOAD,
            open_stem=OPEN,
            request="r-1",
            attempt=1,
            incarnation="a",
        ),
        Claim.WON,
    ),
    (
        LocateChoices(records=[KEYS.request("r-1"), KEYS.request("r-9")], attempts=[1, 1], choices=[0, 0]),
        [(Place.QUEUED, "a"), (Place.UNKNOWN, "")],
    ),
    (
        MergeChoices(
            record=KEYS.request("r-1"),
            load_stem=LOAD,
            open_stem=OPEN,
            request="r-1",
            attempt=None,
            choices=[],
            state=State.DECODING,
            node="b",
            maxima={"generated": 3, "seconds.queue": "0.5"},
            ending={},
        ),
        1,
    ),
    (
        RecountLoads(
            open_requests=[KEYS.open_requests("gateway-1")],
            loads=[KEYS.load("a")],
            record_stem=RECORD,
            load_stem=LOAD,
            most=10,
        ),
        0,
    ),
    (TakeLock(lock=KEYS.reaper_lock(), name="x", ttl_ms=1000), True),
    (ReleaseLock(lock=KEYS.reaper_lock(), name="x"), False),
    (
        AnnounceNode(
            node=KEYS.node("a"),
            beat=KEYS.beat("a"),
            nodes=KEYS.nodes(),
            incarnation="a",
            whole=True,
            fields={"name": "a"},
            identity="d",
            numbers=["1"] * len(BEAT),
        ),
        True,
    ),
    (ReadBeats(nodes=KEYS.nodes(), beat_stem=KEYS.beat("")), "{}"),
    (
        RemoveNode(
            node=KEYS.node("a"),
            beat=KEYS.beat("a"),
            nodes=KEYS.nodes(),
            stream=KEYS.stream("a"),
            load=KEYS.load("a"),
            incarnation="a",
            record_stem=RECORD,
            load_stem=LOAD,
        ),
        1,
    ),
    (
        MoveUnread(
            source=KEYS.stream("a"),
            target=KEYS.stream("b"),
            count=5,
            node="b",
            record_stem=RECORD,
            load_stem=LOAD,
        ),
        1,
    ),
    (
        GiveBack(
            stream=KEYS.stream("a"), target=KEYS.stream("b"), node="b", record_stem=RECORD, load_stem=LOAD
        ),
        1,
    ),
    (DropEntries(stream=KEYS.stream("a"), record_stem=RECORD, load_stem=LOAD, ids=["1-1", "1-2"]), 2),
    (
        HoldGpu(
            gpu=KEYS.gpu("host", "uuid"),
            since=KEYS.gpus_since(),
            holder="a",
            shared=False,
            permille=900,
            how=Hold.CLAIM,
            ttl_ms=15_000,
            settle_ms=10_000,
            kept_s=60,
        ),
        (Held.FRESH, []),
    ),
    (ReleaseGpu(gpu=KEYS.gpu("host", "uuid"), holder="a"), False),
    (QueueLengths(streams=[KEYS.stream("a"), KEYS.stream("z")]), [(1, 0), (0, 0)]),
]


def scripts_of_the_project() -> set[type[Script[Any]]]:
    """Those of every file that declares any, whoever imports it."""
    for path in (ROOT / "common").rglob("*.py"):
        if "import Script" in path.read_text(encoding="utf-8"):
            importlib.import_module(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return {script for script in Script.__subclasses__() if script.__module__.startswith("common.")}


def test_every_script_of_the_project_is_run_here() -> None:
    shown = {type(call) for call, _ in EXAMPLES}
    assert shown | {AddDeadLetter} == scripts_of_the_project()


@pytest.mark.parametrize(("call", "answer"), EXAMPLES, ids=[type(call).__name__ for call, _ in EXAMPLES])
async def test_a_script_does_what_it_says(
    redis_client: RedisClient, call: Script[Any], answer: object
) -> None:
    for node in "ab":
        await NodeQueue(redis_client, node).open()
    await Requests(redis_client).accept(a_dispatch(), "a")
    assert await redis_client.call(call) == answer


async def test_a_dead_letter_is_answered_with_its_id(redis_client: RedisClient) -> None:
    letters = KEYS.dead_letters()
    found = await redis_client.call(
        AddDeadLetter(dead_letters=letters, fields={"request": "r", "attempt": 1, "data": b"\xff"})
    )
    ((written, fields),) = await redis_client.command("XRANGE", letters, "-", "+")
    assert written.decode() == found
    assert fields == {b"request": b"r", b"attempt": b"1", b"data": b"\xff"}


# ── Types ────────────────────────────────────────────────────────────────────────────────────────

LIBRARY = """
local function joined(items) return table.concat(items, '|') end
"""


class Echo(Script[list[str]], library=LIBRARY):
    """What Lua makes of each field, in words."""

    first: Key
    others: Sequence[Key]
    more: Sequence[Key]
    name: str
    count: int
    loud: bool
    wanted: int | None
    data: bytes
    numbers: Sequence[int]
    flags: Sequence[bool]
    words: Sequence[str]
    fields: Mapping[str, str | int | bytes]

    LUA = """
local loudness = {}
for i, flag in ipairs(flags) do loudness[i] = tostring(flag) end
local sum = 0
for _, number in ipairs(numbers) do sum = sum + number end
return {first, joined(others), joined(more), name, tostring(count + 1), tostring(loud),
        tostring(wanted), tostring(#data), tostring(sum), joined(loudness), joined(words),
        joined(fields)}
"""


def an_echo(**changes: Any) -> Echo:
    values: dict[str, Any] = {
        "first": Key("k1"),
        "others": [Key("k2"), Key("k3")],
        "more": [Key("k4")],
        "name": "é 'x'",
        "count": 41,
        "loud": False,
        "wanted": 7,
        "data": b"\x00\xff\n",
        "numbers": [1, -2, 5],
        "flags": [True, False],
        "words": ["", "one"],
        "fields": {"a": 1, "b": b"y"},
    }
    return Echo(**(values | changes))


async def test_lua_finds_every_field_under_its_name_and_with_its_type(redis_client: RedisClient) -> None:
    assert await redis_client.call(an_echo()) == [
        "k1",
        "k2|k3",
        "k4",
        "é 'x'",
        "42",
        "false",
        "7",
        "3",
        "4",
        "true|false",
        "|one",
        "a|1|b|y",
    ]


async def test_lists_may_be_empty_and_a_number_absent(redis_client: RedisClient) -> None:
    empty: dict[str, Any] = {
        "others": [],
        "numbers": [],
        "flags": [],
        "words": [],
        "fields": {},
        "wanted": None,
    }
    assert await redis_client.call(an_echo(**empty, loud=True)) == [
        "k1",
        "",
        "k4",
        "é 'x'",
        "42",
        "true",
        "nil",
        "3",
        "0",
        "",
        "",
        "",
    ]


async def test_a_script_takes_one_round_trip_and_comes_back_after_redis_forgot_it(
    redis_client: RedisClient,
) -> None:
    async def commands(work: Callable[[], Any]) -> set[str]:
        traffic = Traffic(redis_client)
        async with traffic:
            await work()
        return {name for name in traffic.commands if name.startswith(("eval", "script"))}

    async def ask() -> None:
        assert await queue_lengths(redis_client, ["z"]) == [QueueLength(0, 0)]

    await redis_client.command("SCRIPT", "FLUSH")
    assert await commands(ask) == {"evalsha", "eval"}
    assert await commands(ask) == {"evalsha"}
