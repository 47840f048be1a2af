"""Every order of events, for small cases: prompts of two blocks, three blocks of room, faults.

Prompts that are computed (P), and running sequences that move (M). The largest case, two of them and two
faults, takes minutes: `make proof`.
"""

from __future__ import annotations

import random

import pytest

from common.node import departure
from tests.support.protocol.model import Violation
from tests.support.protocol.mutations import MUTATIONS, Mutation
from tests.support.protocol.search import explore
from tests.support.protocol.sending import M, P
from tests.support.protocol.snapshots import load, save
from tests.support.protocol.system import Choice, System
from tests.support.protocol.views import LINK
from tests.support.protocol.world import Faults, World


@pytest.mark.parametrize(("works", "faults"), [((P,), 0), ((M,), 0), ((P, M), 0)])
def test_every_order_of_events_ends_well(works: tuple[bool, ...], faults: int) -> None:
    found = explore(works, faults)
    assert found.states > 50
    assert found.ends > 0


def test_every_answer_of_the_table_of_departures_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """And no event comes that the table calls impossible: in every order with one fault and a second try,
    and in some random schedules with more faults."""
    met: set[tuple[departure.State, departure.Event]] = set()
    answer = departure.answer

    def noted(state: departure.State, event: departure.Event) -> object:
        met.add((state, event))
        return answer(state, event)

    monkeypatch.setattr(departure, "answer", noted)
    for moves in (P, M):
        assert explore((moves,), 1, tries=2).ends > 0
    cancels = Faults(cancel=1.0, refuse=0.5, drain=0.5)
    for seed in range(500):
        World(seed, cancels).run()
    of_a_hostile_peer = {(departure.State.PAUSED, departure.Event.SPOILED)}
    assert met == (departure.TABLE.keys() | departure.LATE.keys()) - of_a_hostile_peer


def test_without_digests_the_generations_alone_keep_every_order_right() -> None:
    assert explore((P,), 1, digests=False).ends > 0


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_rule_that_is_taken_out_is_noticed(monkeypatch: pytest.MonkeyPatch, mutation: Mutation) -> None:
    """Without a digest, where that would hide it; by one prompt, or by what two do to each other."""
    mutation.take_out(monkeypatch)
    with pytest.raises(Violation, match=mutation.pattern):
        explore((mutation.moves,), 2, digests=mutation.digests, tries=mutation.tries)


def test_a_copy_of_a_state_is_that_state_and_goes_its_own_way() -> None:
    """What the walk compares, and what it puts aside, is all there is."""
    system, copy = System((P, M)), System((P, M))
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


@pytest.mark.parametrize(("works", "faults"), [((P,), 1), ((M,), 1), ((P, M), 0)])
def test_what_is_found_does_not_depend_on_the_order_of_the_walk(
    monkeypatch: pytest.MonkeyPatch, works: tuple[bool, ...], faults: int
) -> None:
    """It would, if a view left out what matters: of two states that look alike only one is walked."""
    found = explore(works, faults, reduced=False)
    steps, rng = System.steps, random.Random(3)

    def shuffled(self: System) -> list[Choice]:
        choices = steps(self)
        rng.shuffle(choices)
        return choices

    monkeypatch.setattr(System, "steps", shuffled)
    assert explore(works, faults, reduced=False) == found


def test_several_processes_find_together_what_one_finds() -> None:
    one, several = explore((P,), 1), explore((P,), 1, processes=3)
    assert (several.states, several.ends) == (one.states, one.ends)


def test_a_schedule_without_end_is_found_by_several_processes_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of them walks which part of it."""
    steps = System.steps

    def with_a_step_that_leads_nowhere(self: System) -> list[Choice]:
        faulty = self.target.intake._draining and not self.is_idle()
        return [*steps(self), Choice("nothing", None)] if faulty else steps(self)

    monkeypatch.setattr(System, "steps", with_a_step_that_leads_nowhere)
    monkeypatch.setattr(System, "on_nothing", lambda *_: None, raising=False)
    with pytest.raises(Violation, match="a schedule without end"):
        explore((P,), 1, processes=2)


def test_the_reduction_leaves_out_interleavings_and_no_end() -> None:
    reduced, full = explore((P, M), 0), explore((P, M), 0, reduced=False)
    assert reduced.ends == full.ends
    assert reduced.states < full.states
