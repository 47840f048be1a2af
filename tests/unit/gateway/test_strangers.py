"""What a peer says before the registry names it waits for that; who is never named is cut off."""

from __future__ import annotations

import pytest

from common.bus import Received
from common.messages import Stage
from gateway.strangers import READINGS, WAITING, WAITING_OF_ONE, Strangers


class Scene:
    def __init__(self) -> None:
        self.nodes: set[str] = set()
        self.cut: list[str] = []
        self.strangers = Strangers(self.cut.append)

    def say(self, peer: str, number: int) -> None:
        word = Stage(peer, f"r{number}", 1, 0, "decoding", {}, 0)
        self.strangers.heard(Received(peer, "link", word, ()))

    def read(self) -> list[tuple[str, str]]:
        """The registry is read: who is admitted, with the request that each of its words is about."""
        admitted = self.strangers.read(self.nodes.__contains__)
        return [(received.peer, received.message.request) for received in admitted]  # type: ignore[attr-defined]


@pytest.fixture
def scene() -> Scene:
    return Scene()


@pytest.mark.parametrize("readings", range(READINGS))
def test_what_a_node_said_before_it_was_named_is_heard_in_its_order(
    scene: Scene, readings: int
) -> None:
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


def test_all_of_them_together_are_bounded_and_who_found_no_room_is_cut_off_too(
    scene: Scene,
) -> None:
    crowd = [f"x{number}" for number in range(3 * WAITING)]
    for peer in crowd:
        scene.say(peer, 0)
    assert scene.strangers.dropped == 2 * WAITING
    for _ in range(READINGS):
        scene.read()
    assert sorted(scene.cut) == sorted(crowd)
