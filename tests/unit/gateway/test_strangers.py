"""What a peer says before the registry names it waits for that; who is never named is cut off."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from common.store.registry import NodeRecord, Role, Snapshot
from common.store.requests import Load
from common.wire.bus import LinkEvent, Received
from common.wire.message import Message
from common.wire.messages import Stage
from gateway.node_links import NodeLinks
from gateway.prefix_index import PrefixIndex
from gateway.strangers import READINGS, WAITING, WAITING_OF_ONE, Strangers
from tests.support.fake_cluster import until


class Scene:
    def __init__(self) -> None:
        self.nodes: set[str] = set()
        self.cut: list[str] = []
        self.strangers = Strangers(self.cut.append)

    def say(self, peer: str, number: int) -> None:
        word = Stage(peer, f"r{number}", 1, 0, "decoding", {}, 0)
        self.strangers.heard(Received(peer, "link", word))

    def read(self) -> list[tuple[str, str]]:
        """The registry is read: who is admitted, with the request that each of its words is about."""
        admitted = self.strangers.read(self.nodes.__contains__)
        return [(received.peer, received.message.request) for received in admitted]  # type: ignore[attr-defined]


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.mark.parametrize("readings", range(READINGS))
def test_what_a_node_said_before_it_was_named_is_heard_in_its_order(scene: Scene, readings: int) -> None:
    for number in range(3):
        scene.say("n1", number)
    for _ in range(readings):
        assert scene.read() == []
    scene.nodes.add("n1")
    assert scene.read() == [("n1", "r0"), ("n1", "r1"), ("n1", "r2")]
    assert (scene.cut, scene.strangers.dropped) == ([], 0)


def test_what_was_heard_is_not_heard_twice(scene: Scene) -> None:
    scene.say("n1", 0)
    scene.nodes.add("n1")
    scene.read()
    assert scene.read() == []


def test_who_is_not_named_in_time_is_cut_off_and_what_it_said_is_dropped(scene: Scene) -> None:
    scene.say("x", 0)
    for _ in range(READINGS - 1):
        scene.read()
        assert scene.cut == []
    assert scene.read() == []
    assert (scene.cut, scene.strangers.dropped) == (["x"], 1)
    scene.nodes.add("x")
    assert scene.read() == [], "what was dropped is gone"


def test_who_comes_back_after_that_has_its_time_anew(scene: Scene) -> None:
    scene.say("x", 0)
    for _ in range(READINGS):
        scene.read()
    scene.say("x", 1)
    for _ in range(READINGS - 1):
        assert scene.read() == []
    scene.nodes.add("x")
    assert scene.read() == [("x", "r1")]
    assert scene.cut == ["x"]


def test_time_begins_with_each_strangers_own_first_word(scene: Scene) -> None:
    scene.say("x", 0)
    scene.read()
    scene.say("y", 0)
    for _ in range(READINGS - 1):
        scene.read()
    assert scene.cut == ["x"]
    scene.read()
    assert scene.cut == ["x", "y"]


def test_one_that_talks_without_end_leaves_room_for_the_others(scene: Scene) -> None:
    for number in range(2 * WAITING):
        scene.say("loud", number)
    scene.say("n1", 0)
    scene.nodes |= {"n1", "loud"}
    heard = scene.read()
    assert ("n1", "r0") in heard
    assert len(heard) == WAITING_OF_ONE + 1
    assert scene.strangers.dropped == 2 * WAITING - WAITING_OF_ONE


def test_of_one_whose_later_words_found_no_room_the_first_ones_are_heard(scene: Scene) -> None:
    for number in range(2 * WAITING_OF_ONE):
        scene.say("loud", number)
    scene.nodes.add("loud")
    assert [about for _, about in scene.read()] == [f"r{n}" for n in range(WAITING_OF_ONE)]


def test_all_of_them_together_are_bounded_and_who_found_no_room_is_cut_off_too(scene: Scene) -> None:
    crowd = [f"x{number}" for number in range(3 * WAITING)]
    for peer in crowd:
        scene.say(peer, 0)
    assert scene.strangers.dropped == 2 * WAITING
    for _ in range(READINGS):
        scene.read()
    assert sorted(scene.cut) == sorted(crowd)


class Gateway:
    """The bus, the registry and the inbox of a `NodeLinks`."""

    incarnation = "g1"

    def __init__(self) -> None:
        self.said: asyncio.Queue[Received] = asyncio.Queue()
        self.named: asyncio.Queue[Snapshot] = asyncio.Queue()
        self.happened: list[str] = []

    async def receive(self) -> Received:
        return await self.said.get()

    async def next_event(self) -> LinkEvent:
        return await asyncio.Event().wait()  # type: ignore[return-value]

    async def watch(self, interval_s: float) -> AsyncIterator[Snapshot]:
        while True:
            yield await self.named.get()

    async def loads(self, nodes: list[str]) -> dict[str, Load]:
        return {}

    def peers(self) -> list[str]:
        return ["n1"]

    def link(self, peer: str) -> str:
        return "link"

    def disconnect(self, peer: str) -> None:
        raise AssertionError(f"{peer} was cut off")

    def on_message(self, node: str, message: Message) -> None:
        self.happened.append(f"heard {message.request}")  # type: ignore[attr-defined]

    def on_node_linked(self, node: str) -> None:
        self.happened.append(f"asked {node}")

    def on_nodes_changed(self) -> None:
        self.happened.append("nodes")

    def on_interval(self) -> None: ...


async def test_a_node_that_spoke_before_it_was_named_is_asked_for_what_there_was_no_room_for() -> None:
    gateway = Gateway()
    links = NodeLinks(gateway, gateway, gateway, PrefixIndex())  # type: ignore[arg-type]
    links.inbox = gateway  # type: ignore[assignment]
    running = asyncio.create_task(links.run())
    for number in range(WAITING_OF_ONE + 1):
        word = Stage("n1", f"r{number}", 1, 0, "decoding", {}, 0)
        gateway.said.put_nowait(Received("n1", "link", word))
    await until(gateway.said.empty)
    record = NodeRecord(incarnation="n1", name="n1", role=Role.UNIFIED)
    gateway.named.put_nowait(Snapshot({"n1": record}, {"n1": 0.0}, "generation"))
    await until(lambda: "nodes" in gateway.happened)
    running.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await running
    heard = [f"heard r{number}" for number in range(WAITING_OF_ONE)]
    assert gateway.happened == [*heard, "asked n1", "nodes"]
