"""The entries of a node on a real Redis: none is lost when it ends, and none stays when it is over."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import signal
from collections.abc import AsyncIterator, Iterable
from types import SimpleNamespace
from typing import Any

import pytest

import common.node.entries
from common.errors import ServiceUnavailable
from common.kv_layout import HASHED_AT_ONCE, HashChain
from common.node.entries import Entries
from common.node.peers import Peers
from common.settings.config import RedisSettings
from common.store.client import RedisClient
from common.store.queue import Entry, NodeQueue, QueueLength, move_unread, queue_lengths
from common.store.registry import NodeRecord, NodeState, Role, Snapshot
from common.store.requests import Place, Requests, Where
from common.store.server import EmbeddedRedis
from common.wire.messages import Dispatch
from tests.support.fake_cluster import FINGERPRINT
from tests.support.hashes import chain_hashes
from tests.support.redis import a_dispatch, redis_client, redis_server, wait_until

__all__ = ["redis_client", "redis_server"]


class FakeNode:
    """What `Entries` uses of a node and its role."""

    incarnation = "p-1"
    state = NodeState.READY

    def __init__(self, redis: RedisClient, *others: str) -> None:
        self.redis = redis
        self.gateways: Any = self
        self.engine = SimpleNamespace(has_work=False, fingerprint=FINGERPRINT, description=SimpleNamespace())
        self.peers = Peers(self.incarnation, Role.PREFILL, FINGERPRINT)
        fields = dataclasses.asdict(FINGERPRINT)
        records = {
            name: NodeRecord(name, name, Role.PREFILL, NodeState.READY, **fields)
            for name in (self.incarnation, *others)
        }
        self.peers.read(Snapshot(records, {}, ""))
        self.room = 8
        self.accepted: list[Dispatch] = []
        self.hashes: list[tuple[bytes, ...]] = []  # of what was accepted

    def capacity(self) -> int:
        return self.room

    def accept(self, entry: Entry) -> None:
        self.accepted.append(entry.dispatch)
        self.hashes.append(entry.block_hashes)

    def connect(self, peer: str, endpoint: str) -> None: ...

    def wake(self) -> None: ...


@contextlib.asynccontextmanager
async def taking(node: FakeNode, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Entries]:
    entries = Entries(node, node, node.redis)  # type: ignore[arg-type]
    monkeypatch.setattr(entries, "_is_for_our_model", lambda _: True)
    await entries.open()
    loop = asyncio.create_task(entries.take())
    yield entries
    loop.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await loop


def begin_to_end(node: FakeNode, entries: Entries) -> None:
    node.state = NodeState.DRAINING
    entries.stop()


async def test_a_pull_under_way_when_the_node_begins_to_end_is_given_back(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = FakeNode(redis_client, "p-2")
    await NodeQueue(redis_client, "p-2").open()
    await Requests(redis_client).accept(a_dispatch(), "p-2")
    moved, answered = asyncio.Event(), asyncio.Event()

    async def slow(client: RedisClient, source: str, target: str, count: int) -> int:
        number = await move_unread(client, source, target, count)
        moved.set()
        await answered.wait()
        return number

    monkeypatch.setattr(common.node.entries, "move_unread", slow)
    async with taking(node, monkeypatch) as entries:
        await moved.wait()
        begin_to_end(node, entries)
        answered.set()
        await wait_until(lambda: entries.settled, "the node knows all it has")
        assert node.accepted == []
        assert await queue_lengths(redis_client, ["p-1", "p-2"]) == [QueueLength(0, 0), QueueLength(1, 0)]


async def test_a_long_prompt_is_hashed_a_piece_at_a_time_before_the_role_has_it(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    node, pieces = FakeNode(redis_client), 0
    advance = HashChain.advance

    def counted(chain: HashChain) -> bool:
        nonlocal pieces
        pieces += 1
        return advance(chain)

    dispatch = a_dispatch(prompt=3 * HASHED_AT_ONCE)
    async with taking(node, monkeypatch):
        monkeypatch.setattr(HashChain, "advance", counted)
        await Requests(redis_client).accept(dispatch, "p-1")
        await wait_until(lambda: bool(node.accepted), "the entry is taken")
    monkeypatch.undo()
    assert pieces == 3
    size, root = FINGERPRINT.block_size, dispatch.request.cache_root(FINGERPRINT)
    assert node.hashes == [
        tuple(chain_hashes(root, dispatch.request.token_ids, size, dispatch.request.prompt_len))
    ]


@pytest.mark.parametrize("others", [(), ("p-2",)], ids=["nobody else", "another node"])
async def test_what_comes_to_a_node_that_ends_is_given_back_at_once(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch, others: tuple[str, ...]
) -> None:
    requests = Requests(redis_client)
    node = FakeNode(redis_client, *others)
    node.room = 0
    for name in others:
        await NodeQueue(redis_client, name).open()
    async with taking(node, monkeypatch) as entries:
        await requests.accept(a_dispatch("r-1"), "p-1")
        begin_to_end(node, entries)
        await wait_until(lambda: entries.settled, "the node knows all it has")
        await requests.accept(a_dispatch("r-2"), "p-1")  # of a gateway that has not heard yet
        asked = [("r-1", 1, 0), ("r-2", 1, 0)]
        expected = Where(Place.QUEUED, "p-2") if others else Where(Place.RETURNED)

        async def given_back() -> bool:
            return await requests.locate(asked) == [expected] * 2

        await wait_until(given_back, "both were given back")
    assert node.accepted == []


async def test_what_was_claimed_when_the_node_begins_to_end_reaches_its_role(
    redis_client: RedisClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    node = FakeNode(redis_client)
    claimed, answered = asyncio.Event(), asyncio.Event()
    real = Requests.claim

    async def slow(self: Requests, *arguments: Any) -> Any:
        answer = await real(self, *arguments)
        claimed.set()
        await answered.wait()
        return answer

    monkeypatch.setattr(Requests, "claim", slow)
    async with taking(node, monkeypatch) as entries:
        await Requests(redis_client).accept(a_dispatch(), "p-1")
        await claimed.wait()
        begin_to_end(node, entries)
        answered.set()
        await wait_until(lambda: entries.settled, "the node knows all it has")
        assert node.accepted == [a_dispatch()]


async def test_an_entry_that_is_over_goes_however_long_redis_is_away(
    redis_client: RedisClient, redis_server: EmbeddedRedis, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = RedisClient(RedisSettings(url=redis_server.url, timeout_s=0.1, retry_s=0.0))
    node = FakeNode(client)
    taken: list[Entry] = []
    monkeypatch.setattr(node, "accept", taken.append)
    async with taking(node, monkeypatch) as entries:
        entries.redis_pause_s = 0.01
        deleting = asyncio.create_task(entries.delete())
        await Requests(redis_client).accept(a_dispatch(), "p-1")
        await wait_until(lambda: bool(taken), "it was taken")
        refused: list[object] = []
        real = NodeQueue.done

        async def noting(self: NodeQueue, over: Iterable[Entry]) -> None:
            try:
                await real(self, over)
            except ServiceUnavailable as error:
                refused.append(error)
                raise

        monkeypatch.setattr(NodeQueue, "done", noting)
        os.kill(redis_server.pid, signal.SIGSTOP)
        try:
            entries.done(taken[0])
            await wait_until(lambda: len(refused) >= 3, "it was tried again and again")
        finally:
            os.kill(redis_server.pid, signal.SIGCONT)

        async def gone() -> bool:
            return await queue_lengths(redis_client, ["p-1"]) == [QueueLength(0, 0)]

        await wait_until(gone, "it was deleted")
        deleting.cancel()
        await asyncio.gather(deleting, return_exceptions=True)
    await client.close()
