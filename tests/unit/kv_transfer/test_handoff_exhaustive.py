"""Every order of events, for small cases: prompts of two blocks, three blocks of room, faults.

The largest case, two prompts and two faults, takes minutes: `make proof`.
"""

from __future__ import annotations

import random

import pytest

from tests.support.protocol.model import Violation
from tests.support.protocol.mutations import MUTATIONS, Mutation
from tests.support.protocol.search import explore
from tests.support.protocol.snapshots import load, save
from tests.support.protocol.system import LINK, Choice, System


@pytest.mark.parametrize(("prompts", "faults"), [(1, 0), (1, 1), (2, 0)])
def test_every_order_of_events_ends_well(prompts: int, faults: int) -> None:
    found = explore(prompts, faults)
    assert found.states > 50
    assert found.ends > 0


def test_without_digests_the_generations_alone_keep_every_order_right() -> None:
    assert explore(1, 1, digests=False).ends > 0


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_rule_that_is_taken_out_is_noticed(monkeypatch: pytest.MonkeyPatch, mutation: Mutation) -> None:
    """Without a digest, where that would hide it; by one prompt, or by what two do to each other."""
    mutation.take_out(monkeypatch)
    with pytest.raises(Violation, match=mutation.pattern):
        explore(1, 2, digests=mutation.digests)


def test_a_copy_of_a_state_is_that_state_and_goes_its_own_way() -> None:
    """What the walk compares, and what it puts aside, is all there is."""
    system, copy = System(2), System(2)
    while steps := system.steps():
        copy = load(save(system))
        assert copy.view() == system.view()
        copy.take(steps[-1])
        again = load(save(system))
        assert again.view() == system.view(), "a copy shares something with what it was made of"
        system.take(steps[-1])
        assert system.view() == copy.view()
    assert set(system.adoptions) == set(copy.adoptions)
    assert LINK in system.source.open


@pytest.mark.parametrize(("prompts", "faults"), [(1, 1), (2, 0)])
def test_what_is_found_does_not_depend_on_the_order_of_the_walk(
    monkeypatch: pytest.MonkeyPatch, prompts: int, faults: int
) -> None:
    """It would, if a view left out what matters: of two states that look alike only one is walked."""
    found = explore(prompts, faults, reduced=False)
    steps, rng = System.steps, random.Random(3)

    def shuffled(self: System) -> list[Choice]:
        choices = steps(self)
        rng.shuffle(choices)
        return choices

    monkeypatch.setattr(System, "steps", shuffled)
    assert explore(prompts, faults, reduced=False) == found


def test_the_reduction_leaves_out_interleavings_and_no_end() -> None:
    reduced, full = explore(2, 0), explore(2, 0, reduced=False)
    assert reduced.ends == full.ends
    assert reduced.states < full.states
