"""Both ends under a seeded virtual network and clock: what must hold, in any order of events.

`make proof` runs them for a minute; one that fails is repeated with
`World(seed, FAULTS[name]).run()`.
"""

from __future__ import annotations

import dataclasses

import pytest

from tests.support.protocol.mutations import MUTATIONS, Mutation
from tests.support.protocol.world import FAULTS, SETTINGS, Faults, World

SCHEDULES = 5000


def run_schedules(count: int, faults: Faults, digests: bool) -> None:
    for seed in range(count):
        World(seed, faults, digests=digests).run()


@pytest.mark.parametrize("faults", FAULTS)
def test_every_schedule_keeps_every_promise(faults: str) -> None:
    for seed in range(SCHEDULES // len(FAULTS)):
        try:
            World(seed, FAULTS[faults]).run()
        except Exception as error:
            raise AssertionError(f"World({seed}, FAULTS[{faults!r}]) failed: {error}") from error


def test_without_digests_the_generations_alone_keep_torn_links_right() -> None:
    faults = dataclasses.replace(FAULTS["all"], corrupt=0.0)
    run_schedules(SCHEDULES // 10, faults, digests=False)


def test_without_faults_every_prompt_arrives_at_the_first_attempt() -> None:
    for seed in range(200):
        world = World(seed, Faults(), nodes=2, pool=64, requests=4, both_ways=False, moving=0.0).run()
        assert world.all_adopted()
        assert len(world.adoptions) == 4


def test_many_prompts_over_small_pools_in_both_directions_do_not_deadlock() -> None:
    """Pools that hold one prompt, nodes that all send to each other: patience ends every wait."""
    for seed in range(60):
        world = World(seed, Faults(), nodes=3, pool=4, requests=24, attempts=50).run()
        assert len(world.completed()) == 24


def test_small_prompts_do_not_pass_a_large_one_for_ever() -> None:
    for seed in range(60):
        world = World(seed, Faults(), nodes=2, pool=4, requests=12, attempts=50, both_ways=False)
        world.requests["r0"].token_ids = tuple(range(8))
        assert "r0" in world.run().completed()


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.name)
def test_a_rule_that_is_taken_out_is_noticed(monkeypatch: pytest.MonkeyPatch, mutation: Mutation) -> None:
    faults = FAULTS[mutation.faults]
    if not mutation.digests:
        faults = dataclasses.replace(faults, corrupt=0.0)
    mutation.take_out(monkeypatch)
    with pytest.raises(AssertionError, match=mutation.pattern):
        run_schedules(3000, faults, mutation.digests)


def test_the_settings_of_the_tests_keep_patience_below_the_answer_time() -> None:
    assert SETTINGS.patience < SETTINGS.answer
