"""Both ends under a seeded virtual network and clock: what must hold, in any order of events.

`PDQ_SCHEDULES` asks for more schedules than `make test` runs; one that fails is repeated with
`World(seed, FAULTS[name]).run()`.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

import pytest
from handoff_world import SETTINGS, Faults, Violation, World

from common.messages import Release
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.ports import Outcome

SCHEDULES = int(os.environ.get("PDQ_SCHEDULES", "8000"))

FAULTS = {
    "none": Faults(),
    "lossy": Faults(loss=0.1, duplicate=0.1),
    "torn": Faults(tear=0.7, corrupt=0.02),
    "cancelled": Faults(duplicate=0.1, cancel=1.0),
    "all": Faults(
        loss=0.05, duplicate=0.1, tear=0.3, death=0.3, stop=0.3, cancel=0.5, corrupt=0.01
    ),
}


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
        world = World(seed, Faults(), nodes=2, pool=64, requests=4, both_ways=False).run()
        assert set(world.outcomes.values()) == {Outcome.ADOPTED}
        assert len(world.adoptions) == 4


def test_many_prompts_over_small_pools_in_both_directions_do_not_deadlock() -> None:
    """Pools that hold one prompt, nodes that all send to each other: patience ends every wait."""
    for seed in range(60):
        world = World(seed, Faults(), nodes=3, pool=4, requests=24, attempts=50).run()
        assert len({(key.request) for key in world.adoptions}) == 24


def test_small_prompts_do_not_pass_a_large_one_for_ever() -> None:
    for seed in range(60):
        world = World(seed, Faults(), nodes=2, pool=4, requests=12, attempts=50, both_ways=False)
        world.requests[0].token_ids = tuple(range(8))
        world.run()
        assert any(key.request == "r0" for key in world.adoptions)


# The test of the test: rules taken out, one at a time. Each must be noticed.


def no_generation_check(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(World, "check_piece", lambda *_: "")


def no_digest_check(patch: pytest.MonkeyPatch) -> None:
    check = World.check_piece

    def without(self: World, piece, before, after, read):  # type: ignore[no-untyped-def]
        return check(self, dataclasses.replace(piece, digest=b""), before, after, read)

    patch.setattr(World, "check_piece", without)


def lease_ends_with_commit(patch: pytest.MonkeyPatch) -> None:
    send = Handoff._send_commit

    def early(self: Handoff, entry, commit):  # type: ignore[no-untyped-def]
        send(self, entry, commit)
        self._leases.end(entry.key)

    patch.setattr(Handoff, "_send_commit", early)


def lease_ends_with_own_abort(patch: pytest.MonkeyPatch) -> None:
    send = Handoff._send_abort

    def early(self: Handoff, entry, reason):  # type: ignore[no-untyped-def]
        send(self, entry, reason)
        self._leases.end(entry.key)

    patch.setattr(Handoff, "_send_abort", early)


def lease_outlives_its_link(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Handoff, "_lost", lambda *_: None)


def release_while_a_copy_runs(patch: pytest.MonkeyPatch) -> None:
    stop = Intake._stop_aborted

    def early(self: Intake, entry, abort):  # type: ignore[no-untyped-def]
        stop(self, entry, abort)
        self._answer(entry.key, Release(*entry.key))

    patch.setattr(Intake, "_stop_aborted", early)


def reservation_ends_while_a_copy_runs(patch: pytest.MonkeyPatch) -> None:
    stop = Intake._stop

    def early(self: Intake, entry, outcome, reason):  # type: ignore[no-untyped-def]
        stop(self, entry, outcome, reason)
        entry.copy = None

    patch.setattr(Intake, "_stop", early)


def adopted_with_blocks_missing(patch: pytest.MonkeyPatch) -> None:
    committed = Intake._committed

    def hasty(self: Intake, entry, commit):  # type: ignore[no-untyped-def]
        entry.unannounced.clear()
        committed(self, entry, commit)

    patch.setattr(Intake, "_committed", hasty)


def failed_copy_counts_as_good(patch: pytest.MonkeyPatch) -> None:
    copied = Intake.copied
    patch.setattr(
        Intake, "copied", lambda self, number, _, *, now: copied(self, number, "", now=now)
    )


def terminal_answers_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Intake, "_answer", lambda self, key, message: self._send(key, message))


def failed_intake_keeps_its_reservation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Intake, "_discard", lambda *_: None)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A rule taken out, under which faults that matters, and as what it must be noticed."""

    take_out: Callable[[pytest.MonkeyPatch], None]
    faults: str
    noticed: tuple[str, ...]
    digests: bool = True


WRONG = ("a wrong block was published", "an adopted block has wrong content")
TOUCHED = ("freed a block that the peer is reading", "a leased block was reused")

MUTATIONS = [
    Mutation(no_generation_check, "torn", WRONG, digests=False),
    Mutation(no_digest_check, "torn", WRONG),
    Mutation(failed_copy_counts_as_good, "torn", WRONG),
    Mutation(adopted_with_blocks_missing, "lossy", WRONG),
    Mutation(lease_ends_with_commit, "none", TOUCHED),
    Mutation(lease_ends_with_own_abort, "cancelled", TOUCHED),
    Mutation(release_while_a_copy_runs, "cancelled", TOUCHED),
    Mutation(reservation_ends_while_a_copy_runs, "torn", ("freed a block into which a copy",)),
    Mutation(lease_outlives_its_link, "torn", ("leases left",)),
    Mutation(failed_intake_keeps_its_reservation, "cancelled", ("reservations left",)),
    Mutation(terminal_answers_are_forgotten, "lossy", ("adopted there, failed here",)),
]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.take_out.__name__)
def test_a_rule_that_is_taken_out_is_noticed(
    monkeypatch: pytest.MonkeyPatch, mutation: Mutation
) -> None:
    faults = FAULTS[mutation.faults]
    if not mutation.digests:
        faults = dataclasses.replace(faults, corrupt=0.0)
    mutation.take_out(monkeypatch)
    with pytest.raises(Violation, match="|".join(mutation.noticed)):
        run_schedules(3000, faults, mutation.digests)


def test_the_settings_of_the_tests_keep_patience_below_the_answer_time() -> None:
    assert SETTINGS.patience < SETTINGS.answer
