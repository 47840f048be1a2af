"""The receiving end of a handoff. Read it side by side with handoff.py; README.md has the rules.

Owns the offers that wait, the reservations, the blocks that are announced, being copied or landed,
and the terminal answers of each link. It has no I/O, clock or tensor of its own: calls and messages
go in, effects come out (ports.py). `now` is any monotonic time in seconds.

A reservation is this end's lease: it is adopted as a whole, or discarded when no copy into it runs.
"""

from __future__ import annotations

import collections
import dataclasses
import enum

from common.errors import NeverFits, ProtocolError
from common.kv_layout import Fingerprint
from common.wire.message import HandoffKey, HandoffMessage, Message
from common.wire.messages import Abort, Ack, Blocks, Commit, Deny, Grant, Offer, Release, Tail
from kv_transfer import claims
from kv_transfer.conversion import Conversion, Placement, SameBlocks
from kv_transfer.ports import (
    Adopted,
    ContinueCheck,
    Copy,
    Effect,
    Ended,
    IntakePool,
    Outcome,
    Piece,
    Reservation,
    Send,
    TransferSettings,
)


class State(enum.Enum):
    WAITING = "waiting"  # offered; holds nothing until there is room for all of it
    RECEIVING = "receiving"  # granted: room is reserved, announced blocks are copied
    COMMITTING = "committing"  # Commit has arrived, some blocks have not
    STOPPING = "stopping"  # given up; a copy may still run into the reserved blocks
    ENDED = "ended"  # holds nothing; the terminal answer is remembered


class Event(enum.Enum):
    OFFER = "Offer"
    BLOCKS = "Blocks"
    TAIL = "Tail"
    COMMIT = "Commit"
    ABORT = "Abort"
    ROOM = "room"  # reserved
    DENY = "deny"  # never fits, malformed, draining, over the credits, or waited too long
    COPIED = "copied"  # one copy ended well
    FAIL = "fail"  # a copy ended badly, or the peer broke a rule
    COMPLETE = "complete"  # committed, and every block has landed
    IDLE = "idle"  # stopping, and no copy runs
    QUIET = "quiet"  # no message for a while
    CANCEL = "cancel"
    LINK_LOST = "link lost"


S, E = State, Event

# (state, event) → (next state, action). An event without an entry is late or a duplicate: it is
# counted and ignored.
TABLE: dict[tuple[State, Event], tuple[State, str]] = {
    (S.WAITING, E.ROOM): (S.RECEIVING, "send_grant"),
    (S.WAITING, E.DENY): (S.ENDED, "deny"),
    (S.WAITING, E.ABORT): (S.ENDED, "withdrawn"),
    (S.WAITING, E.CANCEL): (S.ENDED, "deny"),
    (S.WAITING, E.LINK_LOST): (S.ENDED, "lost"),
    #
    (S.RECEIVING, E.OFFER): (S.RECEIVING, "send_grant"),
    (S.RECEIVING, E.BLOCKS): (S.RECEIVING, "announced"),
    (S.RECEIVING, E.TAIL): (S.RECEIVING, "tail_announced"),
    (S.RECEIVING, E.COPIED): (S.RECEIVING, "land"),
    (S.RECEIVING, E.QUIET): (S.RECEIVING, "send_grant"),
    (S.RECEIVING, E.COMMIT): (S.COMMITTING, "committed"),
    (S.RECEIVING, E.FAIL): (S.STOPPING, "stop_failed"),
    (S.RECEIVING, E.CANCEL): (S.STOPPING, "stop_cancelled"),
    (S.RECEIVING, E.ABORT): (S.STOPPING, "stop_aborted"),
    (S.RECEIVING, E.LINK_LOST): (S.STOPPING, "stop_lost"),
    #
    (S.COMMITTING, E.BLOCKS): (S.COMMITTING, "announced"),
    (S.COMMITTING, E.TAIL): (S.COMMITTING, "tail_announced"),
    (S.COMMITTING, E.COPIED): (S.COMMITTING, "land"),
    (S.COMMITTING, E.COMMIT): (S.COMMITTING, "send_grant"),
    (S.COMMITTING, E.QUIET): (S.COMMITTING, "send_grant"),
    (S.COMMITTING, E.COMPLETE): (S.ENDED, "adopt"),
    (S.COMMITTING, E.FAIL): (S.STOPPING, "stop_failed"),
    (S.COMMITTING, E.CANCEL): (S.STOPPING, "stop_cancelled"),
    (S.COMMITTING, E.ABORT): (S.STOPPING, "stop_aborted"),
    (S.COMMITTING, E.LINK_LOST): (S.STOPPING, "stop_lost"),
    #
    (S.STOPPING, E.COPIED): (S.STOPPING, "land"),
    (S.STOPPING, E.FAIL): (S.STOPPING, "nothing"),
    (S.STOPPING, E.ABORT): (S.STOPPING, "asked"),
    (S.STOPPING, E.LINK_LOST): (S.STOPPING, "nothing"),
    (S.STOPPING, E.IDLE): (S.ENDED, "discard"),
}

EVENT_OF = {Offer: E.OFFER, Blocks: E.BLOCKS, Tail: E.TAIL, Commit: E.COMMIT, Abort: E.ABORT}


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    key: HandoffKey
    offer: Offer
    placement: Placement
    order: tuple[int, float, int]  # among waiting offers: priority, birth, arrival
    deadline: float  # until when it may wait
    heard_at: float
    state: State = State.WAITING
    check: claims.Check | None = None  # of the offer, until it is complete
    reservation: Reservation | None = None
    unannounced: set[int] = dataclasses.field(default_factory=set)
    pieces: collections.deque[Piece] = dataclasses.field(default_factory=collections.deque)
    copy: Copy | None = None  # the only copy that runs into this reservation
    commit: Commit | None = None
    committed_at: float = 0.0
    outcome: Outcome = Outcome.FAILED
    reason: str = ""
    asked: bool = False  # the peer sent Abort


@dataclasses.dataclass(slots=True, eq=False)
class _ReceivingLink:
    credits: int  # in all
    fingerprint: Fingerprint  # the peer's: ours, but for the block size and the draft model
    entries: dict[HandoffKey, _Entry] = dataclasses.field(default_factory=dict)
    answers: collections.OrderedDict[HandoffKey, Message] = dataclasses.field(
        default_factory=collections.OrderedDict
    )


class Intake:
    """All handoffs that a node receives. Each public method returns the effects to perform, in order."""

    def __init__(self, pool: IntakePool, fingerprint: Fingerprint, settings: TransferSettings) -> None:
        self.counts: collections.Counter[str] = collections.Counter()  # of what changed nothing
        self._pool = pool
        self._fingerprint = fingerprint
        self._settings = settings
        self._links: dict[str, _ReceivingLink] = {}
        self._orphans: dict[HandoffKey, _Entry] = {}  # their link is gone, a copy still runs
        self._waiting: dict[HandoffKey, _Entry] = {}
        self._copying: dict[int, _Entry] = {}
        self._effects: list[Effect] = []
        self._number = 0
        self._now = 0.0
        self._draining = False

    # What the node does

    def open_link(self, link: str, credits: int, theirs: Fingerprint | None = None) -> None:
        """`theirs` is the peer's fingerprint, whose KV this node can use; None means the same as ours."""
        self._links[link] = _ReceivingLink(credits, theirs or self._fingerprint)

    def receive(self, message: HandoffMessage, *, now: float) -> list[Effect]:
        """Handle an Offer, Blocks, Tail, Commit or Abort from the peer of `message.key.link`."""
        self._now = now
        link = self._links.get(message.key.link)
        if link is None:
            self.counts["late_link"] += 1
            return self._take()
        key = message.key
        entry = link.entries.get(key)
        if entry is not None:
            entry.heard_at = now
            self._step(entry, EVENT_OF[type(message)], message)
        elif (answer := link.answers.get(key)) is not None:
            self._send(key, answer)
        elif isinstance(message, Offer):
            self._consider(link, key, message)
        elif isinstance(message, Abort):
            self._answer(key, Release(key))
        else:
            self._answer(key, Abort(key, "unknown"))
        return self._take()

    def copied(self, number: int, error: str, *, now: float) -> list[Effect]:
        """Report the end of copy `number`. `error` is "" if every piece has arrived and is checked,
        else the error's code.

        The driver reports each Copy effect exactly once, even after its link was lost.
        """
        self._now = now
        entry = self._copying.pop(number)
        copy, entry.copy = entry.copy, None
        self._step(entry, E.FAIL if error else E.COPIED, error or copy)
        return self._take()

    def room_changed(self, now: float) -> list[Effect]:
        """Grant the oldest waiting offers: the pool has more room than before."""
        self._now = now
        self._admit()
        return self._take()

    def continue_check(self, now: float) -> list[Effect]:
        """Check the next piece of the oldest unchecked offer, as `ContinueCheck` asks for."""
        self._now = now
        for entry in self._waiting.values():
            link = self._links.get(entry.key.link)
            if entry.check is not None and link is not None:
                self._check(entry, link)
                break
        return self._take()

    def cancel(self, key: HandoffKey, reason: str, *, now: float) -> list[Effect]:
        """Give up a handoff that is not adopted yet. Its reservation ends when no copy runs."""
        self._now = now
        link = self._links.get(key.link)
        if link is not None and (entry := link.entries.get(key)) is not None:
            self._step(entry, E.CANCEL, reason)
        return self._take()

    def drain(self, now: float) -> list[Effect]:
        """Deny every new offer from now on. Granted handoffs go on."""
        self._now = now
        self._draining = True
        for entry in list(self._waiting.values()):
            self._step(entry, E.DENY, "draining")
        return self._take()

    def tick(self, now: float) -> list[Effect]:
        """Deny offers that waited too long. Ask about granted handoffs that went quiet."""
        self._now = now
        for entry in [entry for entry in self._waiting.values() if now >= entry.deadline]:
            self._step(entry, E.DENY, "out_of_blocks")
        self._admit()
        for link in self._links.values():
            for entry in list(link.entries.values()):
                granted = entry.state in (S.RECEIVING, S.COMMITTING)
                if granted and now - entry.heard_at >= self._settings.quiet:
                    entry.heard_at = now
                    self._step(entry, E.QUIET)
        return self._take()

    def link_lost(self, link: str, *, now: float) -> list[Effect]:
        """End every handoff of a link that is down: nothing more arrives, and no answer is possible."""
        self._now = now
        lost = self._links.pop(link, None)
        if lost is not None:
            self._orphans.update(lost.entries)
            for entry in list(lost.entries.values()):
                self._step(entry, E.LINK_LOST)
            self._admit()
        return self._take()

    def states(self) -> dict[HandoffKey, State]:
        """State of each open handoff, including those that a lost link left behind, for `pdq` and
        tests."""
        live = {key: e.state for link in self._links.values() for key, e in link.entries.items()}
        return live | {key: entry.state for key, entry in self._orphans.items()}

    def offered(self) -> dict[HandoffKey, Offer]:
        """Offer of each open handoff, except those that a lost link left behind."""
        return {key: e.offer for link in self._links.values() for key, e in link.entries.items()}

    # The table's driver

    def _step(self, entry: _Entry, event: Event, argument: object = None) -> None:
        transition = TABLE.get((entry.state, event))
        if transition is None:
            self.counts["ignored"] += 1
            return
        entry.state, action = transition
        getattr(self, "_" + action)(entry, argument)
        if entry.state is S.ENDED:
            self._forget(entry)
        else:
            self._follow_up(entry)

    def _follow_up(self, entry: _Entry) -> None:
        """Take the steps that follow from an entry's state without any further message."""
        if entry.state is S.STOPPING and entry.copy is None:
            self._step(entry, E.IDLE)
        elif entry.state in (S.RECEIVING, S.COMMITTING) and entry.copy is None:
            if entry.pieces:
                self._start_copy(entry)
            elif entry.state is S.COMMITTING and not entry.unannounced:
                self._step(entry, E.COMPLETE)

    def _take(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def _send(self, key: HandoffKey, message: Message) -> None:
        self._effects.append(Send(key.link, message))

    def _answer(self, key: HandoffKey, message: Message) -> None:
        """Send a terminal answer now, and again to every later message about this handoff."""
        link = self._links.get(key.link)
        if link is None:
            return
        link.answers[key] = message
        while len(link.answers) > self._settings.remembered:
            link.answers.popitem(last=False)
        self._send(key, message)

    def _forget(self, entry: _Entry) -> None:
        if self._waiting.pop(entry.key, None) is not None:
            self._pool.withdraw(entry.placement.offer)
        self._orphans.pop(entry.key, None)
        link = self._links.get(entry.key.link)
        if link is not None:
            link.entries.pop(entry.key, None)

    # Offers and room

    def _consider(self, link: _ReceivingLink, key: HandoffKey, offer: Offer) -> None:
        """Deny a new offer that can have no room, or let it wait for its turn."""
        self._number += 1
        order = (offer.request.priority, self._now - offer.waited_ms / 1000, self._number)
        deadline = self._now + self._settings.patience
        entry = _Entry(key, offer, SameBlocks(offer), order, deadline, self._now)
        over = len(link.entries) >= link.credits
        link.entries[key] = self._waiting[key] = entry
        if self._draining or over:
            self._step(entry, E.DENY, "draining" if self._draining else "overloaded")
        else:
            entry.check = claims.Check(offer, link.fingerprint, self._fingerprint)
            self._check(entry, link)

    def _check(self, entry: _Entry, link: _ReceivingLink) -> None:
        """Check the next piece of an offer. An offer gets no room until it is checked to its end."""
        assert entry.check is not None
        try:
            done = entry.check.advance()
        except ProtocolError:
            self._step(entry, E.DENY, "malformed")
            return
        if not done:
            self._effects.append(ContinueCheck())
            return
        if entry.check.converted is not None:
            theirs, ours = link.fingerprint.block_size, self._fingerprint.block_size
            entry.placement = Conversion(entry.offer, theirs, ours, entry.check.converted)
        entry.check = None
        self._admit()

    def _admit(self) -> None:
        """Reserve all or nothing for the waiting offers, in their order. An offer that does not fit
        holds up the rest, so that small prompts cannot overtake a large one for ever."""
        while self._waiting:
            entry = min(self._waiting.values(), key=lambda waiting: waiting.order)
            if entry.check is not None:
                return
            try:
                entry.reservation = self._pool.reserve(entry.placement.offer)
            except NeverFits:
                self._step(entry, E.DENY, "never_fits")
                continue
            if entry.reservation is None:
                return
            del self._waiting[entry.key]
            entry.unannounced = entry.placement.wanted(entry.reservation)
            self._step(entry, E.ROOM)

    # Actions: messages

    def _send_grant(self, entry: _Entry, _: object) -> None:
        self._send(entry.key, Grant(entry.key, tuple(sorted(entry.unannounced))))

    def _committed(self, entry: _Entry, commit: object) -> None:
        assert isinstance(commit, Commit)
        if not claims.commits_all(entry.offer, commit):
            self._step(entry, E.FAIL, "protocol_error")
            return
        if self._links[entry.key.link].fingerprint.draft != self._fingerprint.draft:
            commit = dataclasses.replace(commit, draft_positions=0)  # of another draft model: it stayed there
        entry.commit, entry.committed_at = commit, self._now
        if entry.unannounced:
            self._send_grant(entry, None)

    # Actions: blocks

    def _announced(self, entry: _Entry, blocks: object) -> None:
        assert isinstance(blocks, Blocks)
        try:
            places = claims.full_blocks(entry.offer, blocks)
        except ProtocolError as error:
            self._step(entry, E.FAIL, error.code)
        else:
            self._expect(entry, places)

    def _tail_announced(self, entry: _Entry, tail: object) -> None:
        assert isinstance(tail, Tail)
        fingerprint = self._links[entry.key.link].fingerprint
        try:
            place = claims.tail_block(entry.offer, tail, fingerprint)
        except ProtocolError as error:
            self._step(entry, E.FAIL, error.code)
        else:
            self._expect(entry, [place])

    def _expect(self, entry: _Entry, places: list[claims.Announced]) -> None:
        assert entry.reservation is not None
        for at in places:
            if at.index in entry.unannounced:
                entry.unannounced.remove(at.index)
                block, spans = entry.placement.place(at.index, entry.reservation)
                entry.pieces.append(
                    Piece(at.index, at.slot, at.generation, block, at.fill, at.digest, at.seed, spans)
                )

    def _start_copy(self, entry: _Entry) -> None:
        count = min(len(entry.pieces), self._settings.copy_blocks)
        self._number += 1
        pieces = tuple(entry.pieces.popleft() for _ in range(count))
        entry.copy = Copy(entry.key, self._number, pieces)
        self._copying[self._number] = entry
        self._effects.append(entry.copy)

    def _land(self, entry: _Entry, copy: object) -> None:
        assert isinstance(copy, Copy)
        assert entry.reservation is not None
        for piece in copy.pieces:
            for whole in entry.placement.landed(piece):
                self._pool.landed(entry.reservation, whole)

    # Actions: the end

    def _adopt(self, entry: _Entry, _: object) -> None:
        assert entry.reservation is not None
        assert entry.commit is not None
        self._pool.adopt(entry.reservation)
        self._answer(entry.key, Ack(entry.key))
        waited = self._now - entry.committed_at
        offer = entry.placement.adopted()
        self._effects.append(Adopted(entry.key, offer, entry.commit, entry.reservation, waited))

    def _deny(self, entry: _Entry, reason: object) -> None:
        self._answer(entry.key, Deny(entry.key, str(reason)))
        self._effects.append(Ended(entry.key, False, Outcome.DENIED, str(reason)))

    def _withdrawn(self, entry: _Entry, abort: object) -> None:
        assert isinstance(abort, Abort)
        self._answer(entry.key, Release(entry.key))
        self._effects.append(Ended(entry.key, False, Outcome.FAILED, abort.reason))

    def _lost(self, entry: _Entry, _: object) -> None:
        self._effects.append(Ended(entry.key, False, Outcome.LINK_LOST, "link_lost"))

    def _stop(self, entry: _Entry, outcome: Outcome, reason: str) -> None:
        entry.outcome, entry.reason = outcome, reason
        entry.pieces.clear()

    def _stop_failed(self, entry: _Entry, code: object) -> None:
        self._stop(entry, Outcome.FAILED, str(code))

    def _stop_cancelled(self, entry: _Entry, reason: object) -> None:
        self._stop(entry, Outcome.CANCELLED, str(reason))

    def _stop_aborted(self, entry: _Entry, abort: object) -> None:
        assert isinstance(abort, Abort)
        entry.asked = True
        self._stop(entry, Outcome.FAILED, abort.reason)

    def _asked(self, entry: _Entry, _: object) -> None:
        entry.asked = True

    def _nothing(self, entry: _Entry, _: object) -> None: ...

    def _stop_lost(self, entry: _Entry, _: object) -> None:
        self._stop(entry, Outcome.LINK_LOST, "link_lost")

    def _discard(self, entry: _Entry, _: object) -> None:
        assert entry.reservation is not None
        assert entry.copy is None
        self._pool.discard(entry.reservation)
        key = entry.key
        self._answer(key, Release(key) if entry.asked else Abort(key, entry.reason))
        self._effects.append(Ended(entry.key, False, entry.outcome, entry.reason))
        self._admit()
