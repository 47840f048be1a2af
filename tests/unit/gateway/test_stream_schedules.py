"""Stops, deaths, partings and lost words, in virtual time: every request ends with the right tokens,
nothing stays unacknowledged, and no acknowledgement is forgotten.

`make proof` runs thousands, and takes each rule out; one that fails is repeated with
`Schedule(seed).run()`, and names what happened.
"""

from __future__ import annotations

import pytest

from tests.support.streams.mutations import noticed
from tests.support.streams.system import Schedule

SCHEDULES = 40


def test_every_request_ends_right_whatever_happens_to_links() -> None:
    for seed in range(SCHEDULES):
        Schedule(seed).run()


@pytest.mark.parametrize("seconds", [1, 4, 7, 12, 30])
@pytest.mark.parametrize("who", ["gateway", "node"])
def test_who_is_stopped_and_goes_on_costs_time_and_nothing_else(who: str, seconds: int) -> None:
    for seed in range(3):
        Schedule(seed, faults=[f"stop {who}"], lasting=seconds).run()


@pytest.mark.parametrize("rule", ["a gateway never asks", "a node sends nothing again"])
def test_a_rule_that_is_taken_out_is_missed(rule: str) -> None:
    assert noticed(rule, 10 * SCHEDULES) is not None
