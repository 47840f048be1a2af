"""The table of what leaves a node: complete, true to the README, and how events that meet are kept apart."""

from __future__ import annotations

import itertools
from pathlib import Path

import pytest

import common.node
from common.node import departure
from common.node.departure import (
    ENDED_HERE,
    HOLDING,
    IDLE,
    LATE,
    STANDING,
    TABLE,
    Action,
    Departures,
    Event,
    State,
    answer,
)
from common.node.sender import Sender

README = Path(common.node.__file__).with_name("README.md").read_text()


def test_every_state_answers_every_event_or_says_why_it_never_comes() -> None:
    assert not TABLE.keys() & LATE.keys()
    for state, event in itertools.product(State, Event):
        if (state, event) in TABLE or (state, event) in LATE:
            assert answer(state, event) == TABLE.get((state, event), (state, ()))
        else:
            with pytest.raises(AssertionError, match=departure.IMPOSSIBLE[event]):
                answer(state, event)


def test_every_action_is_performed_by_the_sender() -> None:
    used = {action for _, actions in TABLE.values() for action in actions}
    assert used == set(Action)
    for action in Action:
        assert callable(getattr(Sender, "_" + action.value))


def test_the_readme_has_the_table_of_the_code() -> None:
    rows = [
        f"| {state.value} | {event.value} | {after.value} | "
        f"{', '.join(action.value.replace('_', ' ') for action in actions)} |"
        for (state, event), (after, actions) in TABLE.items()
    ]
    assert "\n".join(rows) in README


@pytest.mark.parametrize("pair", TABLE, ids=lambda pair: f"{pair[0].value}: {pair[1].value}")
def test_references_are_taken_on_the_way_into_a_state_that_has_them_and_given_back_on_the_way_out(
    pair: tuple[State, Event],
) -> None:
    before, event = pair
    after, actions = TABLE[pair]
    assert (Action.HOLD in actions) == (after in HOLDING and before not in HOLDING)
    assert (Action.RELEASE in actions) == (before in HOLDING and after not in HOLDING)
    assert (Action.PAUSE in actions) == (after in STANDING and before not in STANDING)
    ends_standing = before in STANDING and after not in STANDING and event is not Event.CANCEL
    assert (Action.RESUME in actions or Action.FINISH in actions) == ends_standing


@pytest.mark.parametrize("state", State)
def test_whatever_is_wanted_can_be_cancelled_and_then_nobody_has_its_blocks(state: State) -> None:
    after, _ = answer(state, Event.CANCEL)
    assert after in ENDED_HERE


def test_the_owner_hears_of_an_end_exactly_when_it_is_over() -> None:
    for after, actions in TABLE.values():
        assert (Action.SAY_OVER in actions) == (after is State.OVER)
        assert Action.SAY_OVER not in actions[:-1], "nothing follows it"
        assert (Action.SAY_REFUSED in actions or Action.SAY_SPOILED in actions) <= (after in IDLE)


class Noted(Departures):
    """Notes its actions; while it opens a link, its owner cancels."""

    state = State.HERE

    def __init__(self) -> None:
        super().__init__()
        self.noted: list[str] = []

    def _open_link(self, departure: Noted) -> None:
        self.take(departure, Event.CANCEL)
        self.noted.append(f"opens while {departure.state.value}")

    def _say_over(self, departure: Noted) -> None:
        self.noted.append("over")


def test_what_happens_during_an_action_happens_after_it() -> None:
    one = Noted()
    one.take(one, Event.ASK)
    assert one.noted == ["opens while opening"]
    assert one.state is State.UNWANTED
    one.take(one, Event.OPENED)
    assert one.noted[1:] == ["over"]
