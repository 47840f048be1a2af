"""The test of the test: rules taken out of the protocol, one at a time. Each must be noticed.

The first group takes a rule out of the code that nodes run (any proof can use it); the second out of
the model's reader, for which tests over real transports have their own.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest

from common.node.departure import TABLE
from common.node.departure import Action as A
from common.node.departure import Event as E
from common.node.departure import State as S
from common.node.sender import Sender
from common.wire.messages import Release
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.lease import Leases
from tests.support.protocol.driver import Driver
from tests.support.protocol.sending import M, P, Work

# mypy: disable-error-code="no-untyped-def"


def failed_copy_counts_as_good(patch: pytest.MonkeyPatch) -> None:
    copied = Intake.copied
    patch.setattr(Intake, "copied", lambda self, number, _, *, now: copied(self, number, "", now=now))


def adopted_with_blocks_missing(patch: pytest.MonkeyPatch) -> None:
    committed = Intake._committed

    def hasty(self: Intake, entry, commit):
        entry.unannounced.clear()
        committed(self, entry, commit)

    patch.setattr(Intake, "_committed", hasty)


def lease_ends_with_commit(patch: pytest.MonkeyPatch) -> None:
    send = Handoff._send_commit

    def early(self: Handoff, entry, commit):
        send(self, entry, commit)
        self._leases.end(entry.key)

    patch.setattr(Handoff, "_send_commit", early)


def lease_ends_with_own_abort(patch: pytest.MonkeyPatch) -> None:
    send = Handoff._send_abort

    def early(self: Handoff, entry, reason):
        send(self, entry, reason)
        self._leases.end(entry.key)

    patch.setattr(Handoff, "_send_abort", early)


def lease_holds_no_reference(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Leases, "add", lambda *_: None)
    patch.setattr(Leases, "end", lambda *_: None)


def lease_outlives_its_link(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Handoff, "_lost", lambda *_: None)


def release_while_a_copy_runs(patch: pytest.MonkeyPatch) -> None:
    stop = Intake._stop_aborted

    def early(self: Intake, entry, abort):
        stop(self, entry, abort)
        self._answer(entry.key, Release(entry.key))

    patch.setattr(Intake, "_stop_aborted", early)


def reservation_ends_while_a_copy_runs(patch: pytest.MonkeyPatch) -> None:
    stop = Intake._stop

    def early(self: Intake, entry, outcome, reason):
        stop(self, entry, outcome, reason)
        entry.copy = None

    patch.setattr(Intake, "_stop", early)


def failed_intake_keeps_its_reservation(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Intake, "_discard", lambda *_: None)


def terminal_answers_are_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Intake, "_answer", lambda self, key, message: self._send(key, message))


# Of what stands above the handoffs of a node


def departure_gives_nothing_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Sender, "_release", lambda *_: None)


def departure_gives_back_twice(patch: pytest.MonkeyPatch) -> None:
    release = Sender._release

    def twice(self: Sender, departure):
        self._node.engine.pool.release(departure.held)
        release(self, departure)

    patch.setattr(Sender, "_release", twice)


def departure_gives_back_with_its_commit(patch: pytest.MonkeyPatch) -> None:
    committed = (S.COMMITTED, (A.HOLD, A.ANNOUNCE, A.COMMIT, A.RELEASE))
    patch.setitem(TABLE, (S.SENDING, E.COMPUTED), committed)
    patch.setattr(Work, "check", lambda _: None)  # by what follows, not by a look


def moves_on_references_of_its_own(patch: pytest.MonkeyPatch) -> None:
    """The sequence that was adopted is not ended here."""
    patch.setattr(Sender, "_finish", lambda *_: None)


def moves_while_it_runs(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TABLE, (S.LINKED, E.PAUSE), (S.PAUSED, (A.AWAIT_GRANT, A.OFFER, A.ANNOUNCE, A.COMMIT)))
    patch.setattr(Work, "check", lambda _: None)


def runs_on_once_it_is_granted(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TABLE, (S.PAUSED, E.GRANT), (S.GRANTED, (A.STOP_WAITING, A.RESUME)))
    patch.setattr(Work, "check", lambda _: None)


def refused_sequence_stays_paused(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TABLE, (S.GRANTED, E.REFUSED), (S.HERE, (A.SAY_REFUSED,)))


def timer_outlives_its_grant(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TABLE, (S.PAUSED, E.GRANT), (S.GRANTED, (A.SAY_GRANTED,)))
    patch.setattr(Work, "check", lambda _: None)


def withdrawn_counts_as_ended(patch: pytest.MonkeyPatch) -> None:
    patch.setitem(TABLE, (S.PAUSED, E.NO_GRANT), (S.HERE, (A.RESUME, A.WITHDRAW)))


def cancelled_counts_as_over(patch: pytest.MonkeyPatch) -> None:
    over = (S.OVER, (A.RELEASE, A.WITHDRAW, A.SAY_OVER))
    patch.setitem(TABLE, (S.COMMITTED, E.CANCEL), over)


# Of the model's reader


def no_generation_check(patch: pytest.MonkeyPatch) -> None:
    check = Driver.check_piece

    def without(self: Driver, piece, before, after, read):
        return check(self, piece, piece.generation, piece.generation, read)

    patch.setattr(Driver, "check_piece", without)


def no_second_look(patch: pytest.MonkeyPatch) -> None:
    """The seqlock without its end: a copy may tear."""
    check = Driver.check_piece

    def without(self: Driver, piece, before, after, read):
        return check(self, piece, before, before, read)

    patch.setattr(Driver, "check_piece", without)


def no_digest_check(patch: pytest.MonkeyPatch) -> None:
    check = Driver.check_piece

    def without(self: Driver, piece, before, after, read):
        return check(self, dataclasses.replace(piece, digest=b""), before, after, read)

    patch.setattr(Driver, "check_piece", without)


@dataclasses.dataclass(frozen=True)
class Mutation:
    """A rule taken out, as what it must be noticed, and under which of the random faults.

    Where digests are on they alone would hide a missing generation check.
    """

    take_out: Callable[[pytest.MonkeyPatch], None]
    faults: str
    noticed: tuple[str, ...]
    digests: bool = True
    moves: bool = P
    tries: int = 1

    @property
    def name(self) -> str:
        return self.take_out.__name__

    @property
    def pattern(self) -> str:
        return "|".join(self.noticed)


WRONG = ("a wrong block was published", "an adopted block has wrong content")
TOUCHED = (
    "freed a block that the peer is reading",
    "a leased block was reused",
    "a copy of a block that is free",
)

MUTATIONS = (
    Mutation(no_generation_check, "torn", WRONG, digests=False),
    Mutation(no_second_look, "torn", WRONG, digests=False),
    Mutation(no_digest_check, "torn", WRONG),
    Mutation(failed_copy_counts_as_good, "torn", WRONG),
    Mutation(adopted_with_blocks_missing, "lossy", WRONG),
    Mutation(lease_ends_with_commit, "cancelled", TOUCHED),
    Mutation(lease_ends_with_own_abort, "cancelled", TOUCHED),
    Mutation(lease_holds_no_reference, "cancelled", TOUCHED),
    Mutation(release_while_a_copy_runs, "cancelled", TOUCHED),
    Mutation(reservation_ends_while_a_copy_runs, "torn", ("freed a block into which a copy",)),
    Mutation(lease_outlives_its_link, "torn", ("leases left", "blocks left", "never ended")),
    Mutation(failed_intake_keeps_its_reservation, "cancelled", ("reservations left",)),
    Mutation(terminal_answers_are_forgotten, "lossy", ("adopted there, failed here", "adopted twice")),
    Mutation(departure_gives_nothing_back, "none", ("over, but holds",)),
    Mutation(departure_gives_back_twice, "none", ("released a block too often", *TOUCHED)),
    Mutation(departure_gives_back_with_its_commit, "torn", ("announces blocks that it does not",), tries=2),
    Mutation(moves_on_references_of_its_own, "none", ("over, but paused",), moves=M),
    Mutation(moves_while_it_runs, "none", ("while it runs",), moves=M),
    Mutation(runs_on_once_it_is_granted, "none", ("while it runs", "a leased block was reused"), moves=M),
    Mutation(refused_sequence_stays_paused, "torn", ("here, but paused",), moves=M),
    Mutation(timer_outlives_its_grant, "none", ("its timer runs from the offer",), moves=M),
    Mutation(withdrawn_counts_as_ended, "none", ("refused while", "one node is asked"), moves=M, tries=2),
    Mutation(cancelled_counts_as_over, "cancelled", ("a handoff ends once",)),
)
