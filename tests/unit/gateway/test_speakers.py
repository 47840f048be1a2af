"""What a node says of a choice that it does not have changes nothing."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from common.wire.message import Message
from common.wire.messages import Cancel, Failed, Stage, TokenRun, Tokens, TookOver
from gateway.dispatch import Dispatcher
from gateway.open_request import OpenRequest
from gateway.ports import DECODE, PREFILL
from gateway.speakers import MAX_EARLY
from tests.support.fake_cluster import FINGERPRINT, FakeCluster, until
from tests.unit.gateway.test_dispatch import TOKENS, WORK, collect, connect, expected

Words = Callable[[str, int, int], Message]
"""By whom, of which attempt, at which position."""

LIES: dict[str, Words] = {
    "Tokens": lambda node, attempt, position: Tokens(
        node, (TokenRun("r1", attempt, 0, position, (7, 7, 7), (), "stop"),)
    ),
    "Failed, for good": lambda node, attempt, _: Failed(node, "r1", attempt, 0, "never_fits", "no", False),
    "Failed": lambda node, attempt, _: Failed(node, "r1", attempt, 0, "overloaded", "no", True),
    "Stage": lambda node, attempt, _: Stage(node, "r1", attempt, 0, "prefilling", {"q": 9.0}, 99),
    "TookOver": lambda node, attempt, position: TookOver(node, "r1", attempt, 0, position),
}

OTHER_MODEL = dataclasses.replace(FINGERPRINT, model="another")


@dataclasses.dataclass
class Scene:
    """One request: decoded by `d1`, which waits after three tokens, prefilled by `p1`."""

    cluster: FakeCluster
    dispatcher: Dispatcher
    request: OpenRequest

    def state(self) -> object:
        """All that a word could have changed."""
        (choice,) = self.request.choices
        return (
            choice.holder,
            choice.heard,
            choice.held_from,
            dict(choice.owing),
            choice.tries,
            choice.stream.attempt,
            choice.stream.below,
            choice.done,
            self.request.failed,
            set(self.request.involved),
            self.request.cached_tokens,
            list(self.cluster.stages),
            len(self.cluster.dispatched),
            dict(self.cluster.ended),
            list(self.cluster.cancelled),
        )


@pytest.fixture
def cluster() -> FakeCluster:
    cluster = FakeCluster()
    cluster.add("p1", PREFILL)
    cluster.add("d1", DECODE).hold_at = 3
    return cluster


async def scene(cluster: FakeCluster, then: Callable[[Scene], None]) -> None:
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: request.choices[0].holder == "d1")
        await until(lambda: request.choices[0].stream.below == len(WORK.request.token_ids) + 3)
        cluster.add("d2", DECODE)
        cluster.add("alien", DECODE, fingerprint=OTHER_MODEL)
        then(Scene(cluster, dispatcher, request))
        cluster.release()
        assert await collect(request) == expected()


@pytest.mark.parametrize("lie", [lie for lie in LIES if lie != "TookOver"])
@pytest.mark.parametrize("liar", ["d2", "alien", "nobody"])
async def test_a_node_that_was_not_handed_a_choice_says_nothing_about_it(
    cluster: FakeCluster, liar: str, lie: str
) -> None:
    def then(now: Scene) -> None:
        before = now.state()
        now.dispatcher.on_message(liar, LIES[lie](liar, 1, now.request.choices[0].stream.below))
        assert now.state() == before

    await scene(cluster, then)


@pytest.mark.parametrize("liar", ["alien", "nobody"])
async def test_who_could_not_compute_a_choice_does_not_take_it_over(cluster: FakeCluster, liar: str) -> None:
    def then(now: Scene) -> None:
        before = now.state()
        now.dispatcher.on_message(liar, LIES["TookOver"](liar, 1, 99))
        assert now.state() == before

    await scene(cluster, then)


async def test_nobody_but_who_has_a_choice_says_that_another_took_it_over(cluster: FakeCluster) -> None:
    def then(now: Scene) -> None:
        before = now.state()
        for liar in ("d2", "alien", "nobody"):
            now.dispatcher.on_message(liar, TookOver("p1", "r1", 1, 0, 99))
            assert now.state() == before

    await scene(cluster, then)


@pytest.mark.parametrize("attempt", [2, 7])
@pytest.mark.parametrize("lie", LIES)
async def test_nobody_speaks_of_an_attempt_that_was_never_made(
    cluster: FakeCluster, lie: str, attempt: int
) -> None:
    def then(now: Scene) -> None:
        before = now.state()
        for liar in ("d1", "p1", "d2"):
            word = LIES[lie](liar, attempt, now.request.choices[0].stream.below)
            now.dispatcher.on_message(liar, word)
            assert now.state() == before

    await scene(cluster, then)


async def test_who_is_handed_a_choice_by_the_node_that_has_it_is_heard_from_then_on(
    cluster: FakeCluster,
) -> None:
    def then(now: Scene) -> None:
        (choice,) = now.request.choices
        now.dispatcher.on_message("d1", TookOver("d2", "r1", 1, 0, choice.stream.below))
        assert choice.holder == "d2"
        assert choice.speakers >= {"d1", "d2"}

    await scene(cluster, then)


def tokens(node: str, first: int, end: int = TOKENS) -> Tokens:
    """The right ones from `first` to `end`, counted after the prompt."""
    ids = tuple(expected()[0][first:end])
    why = "length" if end == TOKENS else ""
    return Tokens(node, (TokenRun("r1", 1, 0, len(WORK.request.token_ids) + first, ids, (), why),))


@contextlib.asynccontextmanager
async def first_token_is_there() -> AsyncIterator[Scene]:
    """`p1` has prefilled, and has the choice; `d1` was chosen to decode, and has said nothing."""
    cluster = FakeCluster()
    cluster.add("p1", PREFILL).hold_at = 0
    cluster.add("d1", DECODE)
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: request.choices[0].heard)
        dispatcher.on_message("p1", tokens("p1", 0, 1))
        yield Scene(cluster, dispatcher, request)


async def test_the_decode_node_that_the_gateway_chose_takes_over_by_its_own_word() -> None:
    """Its peer may die between its Ack and saying so."""
    async with first_token_is_there() as begun:
        cluster, dispatcher, request = begun.cluster, begun.dispatcher, begun.request
        (choice,) = request.choices
        dispatcher.on_message("d1", TookOver("d1", "r1", 1, 0, choice.stream.below))
        assert choice.holder == "d1"
        cluster.kill("p1")
        dispatcher.on_message("d1", tokens("d1", 1))
        assert await collect(request) == expected()
    assert len(cluster.dispatched) == 1


async def test_a_choice_that_moved_elsewhere_is_not_taken_by_who_was_chosen_first() -> None:
    async with first_token_is_there() as begun:
        cluster, dispatcher, request = begun.cluster, begun.dispatcher, begun.request
        (choice,) = request.choices
        cluster.add("d2", DECODE)
        dispatcher.on_message("p1", TookOver("d2", "r1", 1, 0, choice.stream.below))
        dispatcher.on_message("d1", TookOver("d1", "r1", 1, 0, choice.stream.below + 1))
        assert choice.holder == "d2"
        dispatcher.on_message("d2", tokens("d2", 1))
        assert await collect(request) == expected()


async def test_words_that_come_before_the_one_that_explains_them_count_as_soon_as_it_is_there(
    cluster: FakeCluster,
) -> None:
    """Two moves, of which the links bring the latest words first; nobody is asked again."""
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        (choice,) = request.choices
        first = len(WORK.request.token_ids) + 3
        await until(lambda: choice.holder == "d1" and choice.stream.below == first)
        cluster.add("d2", DECODE)
        cluster.add("d3", DECODE)
        words = [
            ("d3", TookOver("d3", "r1", 1, 0, first + 2)),
            ("d3", tokens("d3", 5)),
            ("d2", TookOver("d2", "r1", 1, 0, first)),
            ("d2", tokens("d2", 3, 5)),
            ("d2", TookOver("d3", "r1", 1, 0, first + 2)),
        ]
        for node, word in words:
            dispatcher.on_message(node, word)
            assert (choice.holder, choice.stream.below) == ("d1", first)
        dispatcher.on_message("d1", TookOver("d2", "r1", 1, 0, first))
        assert await collect(request) == expected()
    assert len(cluster.dispatched) == 1


async def test_a_choice_is_not_taken_over_by_waiting_for_the_death_of_who_has_it(
    cluster: FakeCluster,
) -> None:
    """It is retried; who said that it had it is told to stop."""
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        (choice,) = request.choices
        await until(lambda: choice.stream.below == len(WORK.request.token_ids) + 3)
        cluster.add("d2", DECODE)
        dispatcher.on_message("d2", TookOver("d2", "r1", 1, 0, choice.stream.below))
        lie = TokenRun("r1", 1, 0, choice.stream.below, (7, 7, 7), (), "")
        dispatcher.on_message("d2", Tokens("d2", (lie,)))
        cluster.kill("d1")
        assert request.attempt == 2
        assert choice.early == []
        assert ("d2", Cancel("g1", "r1", 1, "superseded", (0,))) in cluster.cancelled
        cluster.release()
        assert await collect(request) == expected()


async def test_words_that_nobody_explains_are_kept_up_to_a_bound(cluster: FakeCluster) -> None:
    def then(now: Scene) -> None:
        (choice,) = now.request.choices
        for _ in range(3 * MAX_EARLY):
            now.dispatcher.on_message("d2", LIES["Tokens"]("d2", 1, choice.stream.below))
        assert len(choice.early) == MAX_EARLY

    await scene(cluster, then)


async def test_an_entry_that_nobody_has_read_may_have_moved_to_a_node_of_the_same_kind() -> None:
    cluster = FakeCluster()
    cluster.add("u1").hold_at = 0
    heard: list[Any] = []
    cluster.deliver = lambda node, message: heard.append(message)  # type: ignore[method-assign]
    dispatcher = connect(cluster)
    async with dispatcher.run(WORK) as request:
        await until(lambda: heard)
        cluster.add("u2")
        cluster.add("alien", fingerprint=OTHER_MODEL)
        (choice,) = request.choices
        for node, holder in (("alien", "u1"), ("nobody", "u1"), ("u2", "u2")):
            dispatcher.on_message(node, LIES["Stage"](node, 1, 0))
            assert choice.holder == holder
        cluster.kill("u1")


@pytest.mark.parametrize("end", ["request", "attempt"])
async def test_who_was_not_heeded_is_told_when_that_is_over(cluster: FakeCluster, end: str) -> None:
    """It may have spoken the truth, before the registry named it: its tokens would stay with it."""
    other = "d2"

    def then(now: Scene) -> None:
        below = now.request.choices[0].stream.below
        now.dispatcher.on_message(other, LIES["Tokens"](other, 1, below + 1))
        assert not [ack for node, ack in cluster.acks if node == other]
        if end == "attempt":
            cluster.kill("d1")
            assert told(1, (0,))

    def told(attempt: int, choices: tuple[int, ...]) -> bool:
        return any(
            (node, word.attempt, word.choices) == (other, attempt, choices)
            for node, word in cluster.cancelled
        )

    await scene(cluster, then)
    if end == "request":
        assert told(1, ())
