"""The prefill role against a scripted transfer layer: what it does when the other end fails it."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from typing import Any

import pytest

from common.engine import Engine
from common.errors import LinkLost
from common.messages import Failed, Message, Offer, TookOver
from common.queue import Entry
from common.registry import NodeRecord, NodeState, Role, Snapshot
from kv_transfer.ports import Ended, Key, Outcome
from prefill_node import role as prefill
from tests.support.engines import poisoned_engine
from tests.support.redis import a_dispatch


class Transfer:
    """Both `Links` and its `handoff`: notes what is offered, and ends it as the test says."""

    def __init__(self) -> None:
        self.handoff = self
        self.offers: list[Offer] = []
        self.announced: list[int] = []  # indexes of blocks, in the order they were
        self.committed: list[Key] = []
        self.ended: list[Ended] = []  # what the next `perform` finds out
        self.role: prefill.PrefillRole
        self.unreachable: set[str] = set()

    async def open(self, peer: str) -> str:
        if peer in self.unreachable:
            raise LinkLost("nobody there")
        return f"link-{peer}"

    def offer(self, offer: Offer, **_: float) -> None:
        self.offers.append(offer)

    def ready(self, key: Key, blocks: list[int], *, now: float) -> None:
        self.announced += blocks

    def finished(self, key: Key, **_: Any) -> None:
        self.committed.append(key)

    def cancel(self, key: Key, reason: str, *, now: float) -> None: ...

    def perform(self, effects: object) -> None:
        ended, self.ended = self.ended, []
        for effect in ended:
            self.role.sent(effect)


class Node:
    """What the role uses of `common.node.runtime.Node`."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.kv = self
        self.links = Transfer()
        self.said: list[Message] = []
        self.deleted: list[Entry] = []
        self.peers = Snapshot({}, {}, "")
        self.tasks: list[asyncio.Task[None]] = []

    def ready_blocks(
        self, sequence: object, table: list[int], start: int, end: int, computed: int
    ) -> list[int]:
        assert len(table) >= end
        return list(range(start, end))

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> None:
        self.tasks.append(asyncio.create_task(coroutine))

    def connect(self, peer: str, endpoint: str) -> None: ...

    def send(self, gateway: str, message: Message) -> None:
        self.said.append(message)

    def failed(self, gateway: str, key: Any, error: Any, *, retryable: bool) -> None:
        self.said.append(Failed("p", *key, error.code, str(error), retryable))

    def done(self, entry: Entry) -> None:
        self.deleted.append(entry)

    def push_tokens(self, runs: object) -> None: ...

    def stage(self, *_: object) -> None: ...

    def prompt_begins(self, *_: object) -> None: ...

    def wake(self) -> None: ...

    def decode_nodes(self, *names: str) -> None:
        records = {n: NodeRecord(n, n, Role.DECODE, NodeState.READY) for n in names}
        self.peers = Snapshot(records, dict.fromkeys(names, 0.0), "")


@pytest.fixture(scope="module")
def engine() -> Engine:
    return poisoned_engine()


@pytest.fixture
def node(engine: Engine) -> Iterator[Node]:
    node = Node(engine)
    yield node
    engine.check_idle()


@pytest.fixture
def role(node: Node) -> prefill.PrefillRole:
    node.links.role = prefill.PrefillRole(node)  # type: ignore[arg-type]
    return node.links.role


def an_entry() -> Entry:
    return Entry("1-0", a_dispatch(prompt=20))


async def step(node: Node, role: prefill.PrefillRole) -> None:
    """One step of the engine, with its offers opened meanwhile."""
    planned = node.engine.begin_step()
    assert planned is not None
    role.step_begins(planned)
    await opened(node)
    role.step_ended(planned, node.engine.end_step(planned, node.engine.compute(planned)))
    await opened(node)


async def opened(node: Node) -> None:
    while node.tasks:
        tasks, node.tasks = node.tasks, []
        await asyncio.gather(*tasks)


def key(peer: str) -> Key:
    return Key(f"link-{peer}", "r-1", 1, 0)


def ended(peer: str, outcome: Outcome, reason: str = "") -> Ended:
    return Ended(key(peer), True, outcome, reason)


async def test_it_says_who_took_over_for_that_node_may_be_dead_already(
    node: Node, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    await step(node, role)
    assert node.links.committed == [key("d1")]
    role.sent(ended("d1", Outcome.ADOPTED))
    assert node.said == [TookOver("d1", "r-1", 1, 0, 21)]
    assert role.num_open == 0


async def test_what_is_queued_again_while_or_after_it_is_here_is_computed_once(
    node: Node, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    again = an_entry()
    role.accept(again)
    assert node.deleted == [again]
    await step(node, role)
    role.sent(ended("d1", Outcome.ADOPTED))
    role.accept(again)
    assert not node.engine.has_work
    assert len(node.links.offers) == 1


async def test_the_last_blocks_are_announced_before_the_first_token_is_there(
    node: Node, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    planned = node.engine.begin_step()
    assert planned is not None
    role.step_begins(planned)
    await opened(node)
    blocks = node.engine.pool.blocks_for(20)
    assert 20 % node.engine.layout.block_size, "the prompt has a tail"

    computed = node.engine.compute(planned, lambda: role.step_filled(role.handed_over(planned)))
    assert node.links.announced == list(range(blocks))
    assert node.links.committed == []
    role.step_ended(planned, node.engine.end_step(planned, computed))
    assert node.links.announced == list(range(blocks)), "no block is announced twice"
    assert node.links.committed == [key("d1")]
    role.sent(ended("d1", Outcome.ADOPTED))


async def test_of_a_request_that_is_cancelled_meanwhile_nothing_more_is_announced(
    node: Node, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    planned = node.engine.begin_step()
    assert planned is not None
    role.step_begins(planned)
    await opened(node)
    chunks, cached = role.handed_over(planned), list(node.links.announced)
    role.cancel("r-1", 1, "the client went away")
    role.step_filled(chunks)
    assert node.links.announced == cached
    role.step_ended(planned, node.engine.end_step(planned, node.engine.compute(planned)))
    role.sent(ended("d1", Outcome.CANCELLED))
    assert role.num_open == 0


async def test_a_link_that_is_found_down_by_sending_over_it_is_no_crash(
    node: Node, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1", "d2")
    role.accept(an_entry())
    planned = node.engine.begin_step()
    assert planned is not None
    role.step_begins(planned)
    await opened(node)
    (first,) = node.links.offers
    node.links.ended = [Ended(Key(first.link, "r-1", 1, 0), True, Outcome.LINK_LOST, "link_lost")]
    role.step_ended(planned, node.engine.end_step(planned, node.engine.compute(planned)))
    await opened(node)
    assert {offer.link for offer in node.links.offers} == {"link-d1", "link-d2"}
    (committed,) = node.links.committed
    assert committed.link != first.link
    role.sent(Ended(committed, True, Outcome.ADOPTED, ""))


async def test_where_all_are_full_the_gateway_hears_at_once_that_there_is_no_room(
    node: Node, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    role.accept(an_entry())
    await step(node, role)
    role.sent(ended("d1", Outcome.DENIED, "out_of_blocks"))
    (failed,) = node.said
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("out_of_blocks", True)
    assert role.num_open == 0


async def test_a_prompt_without_a_decode_node_waits_for_one(
    node: Node, role: prefill.PrefillRole
) -> None:
    node.decode_nodes("d1")
    node.links.unreachable = {"d1"}
    role.accept(an_entry())
    await step(node, role)
    assert node.links.offers == []
    node.decode_nodes("d1", "d2")
    role.peers_changed()
    await opened(node)
    role.peers_changed()
    assert node.links.committed == [key("d2")]
    role.sent(ended("d2", Outcome.ADOPTED))


async def test_it_does_not_wait_for_long(
    node: Node, role: prefill.PrefillRole, monkeypatch: pytest.MonkeyPatch
) -> None:
    role.accept(an_entry())
    await step(node, role)
    role.peers_changed()
    assert node.said == []
    monkeypatch.setattr(prefill, "NO_DECODE_NODE_S", 0.0)
    role.peers_changed()
    (failed,) = node.said
    assert isinstance(failed, Failed)
    assert (failed.code, failed.retryable) == ("service_unavailable", True)
    assert role.num_open == 0
