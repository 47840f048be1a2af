"""Stops, deaths, partings and lost words, in virtual time: every request ends with the right tokens,
and nothing stays unacknowledged. The seed is the schedule: a failure names what happened."""

from __future__ import annotations

import pytest

from tests.support.streams.system import Schedule

SEEDS = 40


@pytest.mark.parametrize("first", range(0, SEEDS, 10))
def test_every_request_ends_right_whatever_happens_to_links(first: int) -> None:
    for seed in range(first, first + 10):
        Schedule(seed).run()
