"""What a node owes to a gateway is sent, said again, answered for, or given up; never forgotten."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from common.errors import LinkLost
from common.node.gateways import LAST_WORDS, Gateways
from common.node.token_stream import RESENT_AT_ONCE, ChoiceKey
from common.wire.message import Message
from common.wire.messages import Failed, HoldsQuery, TokenRun, Tokens, TokensAck, TookOver

KEY = ChoiceKey("r1", 1, 0)


class Node:
    """Bus and role in one, with one gateway; `linked` is the number of links with it."""

    def __init__(self) -> None:
        self.linked = 1
        self.sent: list[Message] = []
        self.held: set[ChoiceKey] = set()
        self.freed: list[str] = []
        self.gateways = Gateways("n1", self)
        self.gateways.attempts = self

    def send(self, peer: str, message: Message) -> None:
        if not self.linked:
            raise LinkLost(f"no link with {peer}")
        self.sent.append(message)

    def link(self, peer: str) -> str | None:
        return "a link" if self.linked else None

    def holds(self, key: ChoiceKey) -> bool:
        return key in self.held

    def gateway_linked(self, gateway: str) -> None: ...

    def gateway_lost(self, gateway: str) -> None:
        self.freed.append(gateway)

    def push(self, *positions: int) -> None:
        self.gateways.tokens.push([("g1", run(position)) for position in positions])

    def asked(self, below: int, key: ChoiceKey = KEY) -> list[Message]:
        self.sent.clear()
        self.gateways.asked("g1", HoldsQuery("g1", ((*key, below),)))
        return self.sent


def run(position: int) -> TokenRun:
    return TokenRun(*KEY, position, (7,), (), "")


def not_held(key: ChoiceKey = KEY) -> Failed:
    return Failed("n1", *key, "not_held", "this node has nothing of it", True)


@pytest.fixture
def node() -> Node:
    return Node()


@pytest.fixture
def no_grace(node: Node) -> None:
    node.gateways.grace_s = 0.0


def test_what_is_asked_for_and_not_here_is_said_to_be_not_held(node: Node) -> None:
    assert node.asked(20) == [not_held()]


def test_what_is_computed_here_needs_no_answer(node: Node) -> None:
    node.held.add(KEY)
    assert node.asked(20) == []


def test_a_question_acknowledges_and_the_rest_is_sent_again(node: Node) -> None:
    node.push(20)
    node.push(21)
    assert node.asked(21) == [Tokens("n1", (run(21),))]
    assert node.asked(22) == [not_held()], "and what was acknowledged is never sent again"


@pytest.mark.parametrize("word", [Failed("n1", *KEY, "no_token", "…", False), TookOver("d", *KEY, 5)])
def test_the_last_word_about_a_choice_is_said_again_to_who_asks(node: Node, word: Any) -> None:
    node.gateways.end("g1", word)
    assert node.asked(20) == [word]


def test_who_handed_on_and_lost_what_it_owed_does_not_point_at_the_next(node: Node) -> None:
    """The next one's tokens begin at 25: what comes before them, nobody has."""
    node.gateways.end("g1", TookOver("d1", *KEY, 25))
    assert node.asked(25) == [TookOver("d1", *KEY, 25)]
    assert node.asked(24) == [not_held()]


def test_last_words_do_not_grow_without_end(node: Node) -> None:
    for number in range(LAST_WORDS + 1):
        node.gateways.end("g1", Failed("n1", f"r{number}", 1, 0, "link_lost", "", True))
    first, second = ChoiceKey("r0", 1, 0), ChoiceKey("r1", 1, 0)
    assert node.asked(0, first) == [not_held(first)]
    assert node.asked(0, second) == [Failed("n1", *second, "link_lost", "", True)]


def test_on_a_new_link_what_is_not_acknowledged_goes_again_in_pieces(node: Node) -> None:
    node.push(*range(RESENT_AT_ONCE + 1))
    node.gateways.acknowledged("g1", TokensAck("g1", ((*KEY, 1),)))
    node.push(1000)
    node.sent.clear()
    node.gateways.linked("g1")
    pieces = [[r.position for r in m.runs] for m in node.sent if isinstance(m, Tokens)]
    assert pieces == [[*range(1, RESENT_AT_ONCE + 1)], [1000]]


def test_another_gateway_acknowledges_nothing_and_is_sent_nothing(node: Node) -> None:
    node.push(20)
    node.gateways.acknowledged("g2", TokensAck("g1", ((*KEY, 21),)))
    node.gateways.tokens.forget("g2", KEY.request, KEY.attempt)
    assert node.gateways.tokens.num_unacknowledged == 1
    node.sent.clear()
    node.gateways.asked("g2", HoldsQuery("g1", ((*KEY, 20),)))
    assert node.sent == [not_held()]


def test_when_one_of_two_links_ends_what_it_lost_goes_over_the_other(node: Node) -> None:
    node.push(20)
    node.sent.clear()
    node.gateways.unlinked("g1")
    assert node.sent == [Tokens("n1", (run(20),))]


async def test_what_cannot_be_sent_is_kept_for_a_while_and_no_longer(node: Node, no_grace: None) -> None:
    """Also where no link ever ended, because there never was one."""
    node.linked = 0
    node.push(20)
    assert (node.freed, node.gateways.tokens.num_unacknowledged) == ([], 1)
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert (node.freed, node.gateways.tokens.num_unacknowledged) == (["g1"], 0)


async def test_a_gateway_that_comes_back_in_time_is_not_given_up(node: Node, no_grace: None) -> None:
    node.linked = 0
    node.gateways.unlinked("g1")
    node.linked = 1
    node.gateways.linked("g1")
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    assert node.freed == []
