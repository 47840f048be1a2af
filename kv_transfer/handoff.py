"""The sending end of a handoff. Read it side by side with intake.py; README.md has the rules.

Owns what was offered, announced and committed on each link, the credits of each link, and the
leases on the blocks that the peer may read. It has no I/O, clock or tensor of its own: calls and
messages go in, effects come out (ports.py). `now` is any monotonic time in seconds.
"""

from __future__ import annotations

import collections
import dataclasses
import enum
import heapq
from collections.abc import Iterable, Sequence

from common.wire.message import HandoffKey, HandoffMessage, Message
from common.wire.messages import Abort, Ack, Blocks, Commit, Deny, Grant, Offer, Release, Tail, TokenLogprobs
from kv_transfer.lease import Leases
from kv_transfer.ports import Effect, Ended, Granted, Outcome, ReadyBlock, Send, Teardown, TransferSettings


class State(enum.Enum):
    WAITING = "waiting"  # for a credit; the peer knows nothing yet
    OFFERED = "offered"  # Offer is out
    SENDING = "sending"  # granted: we announce computed blocks, the peer reads them
    COMMITTED = "committed"  # Commit is out
    WITHDRAWING = "withdrawing"  # Abort is out before anything was announced
    ABORTING = "aborting"  # Abort is out; the peer may still be reading
    ENDED = "ended"  # the lease has ended; nothing is remembered


class Event(enum.Enum):
    CREDIT = "credit"
    READY = "ready"  # blocks were computed
    FINISHED = "finished"  # all blocks were computed, and the first token is sampled
    CANCEL = "cancel"
    REPEAT = "repeat"  # no answer for a while
    GRANT = "Grant"
    DENY = "Deny"
    ACK = "Ack"
    ABORT = "Abort"
    RELEASE = "Release"
    LINK_LOST = "link lost"


S, E = State, Event

# (state, event) → (next state, action). An event without an entry is late or a duplicate: it is
# counted and ignored.
TABLE: dict[tuple[State, Event], tuple[State, str]] = {
    (S.WAITING, E.CREDIT): (S.OFFERED, "send_offer"),
    (S.WAITING, E.READY): (S.WAITING, "keep_blocks"),
    (S.WAITING, E.FINISHED): (S.WAITING, "keep_commit"),
    (S.WAITING, E.CANCEL): (S.ENDED, "cancelled"),
    (S.WAITING, E.LINK_LOST): (S.ENDED, "lost"),
    #
    (S.OFFERED, E.READY): (S.OFFERED, "keep_blocks"),
    (S.OFFERED, E.FINISHED): (S.OFFERED, "keep_commit"),
    (S.OFFERED, E.REPEAT): (S.OFFERED, "send_offer"),
    (S.OFFERED, E.GRANT): (S.SENDING, "granted"),
    (S.OFFERED, E.DENY): (S.ENDED, "denied"),
    (S.OFFERED, E.ABORT): (S.ENDED, "failed"),
    (S.OFFERED, E.CANCEL): (S.WITHDRAWING, "send_abort"),
    (S.OFFERED, E.LINK_LOST): (S.ENDED, "lost"),
    #
    (S.SENDING, E.READY): (S.SENDING, "announce_new"),
    (S.SENDING, E.FINISHED): (S.COMMITTED, "send_commit"),
    (S.SENDING, E.GRANT): (S.SENDING, "announce_again"),
    (S.SENDING, E.ABORT): (S.ENDED, "failed"),
    (S.SENDING, E.CANCEL): (S.ABORTING, "send_abort"),
    (S.SENDING, E.LINK_LOST): (S.ENDED, "lost"),
    #
    (S.COMMITTED, E.REPEAT): (S.COMMITTED, "send_commit"),
    (S.COMMITTED, E.GRANT): (S.COMMITTED, "announce_again"),
    (S.COMMITTED, E.ACK): (S.ENDED, "adopted"),
    (S.COMMITTED, E.ABORT): (S.ENDED, "failed"),
    (S.COMMITTED, E.CANCEL): (S.ABORTING, "send_abort"),
    (S.COMMITTED, E.LINK_LOST): (S.ENDED, "lost"),
    #
    (S.WITHDRAWING, E.REPEAT): (S.WITHDRAWING, "send_abort"),
    (S.WITHDRAWING, E.RELEASE): (S.ENDED, "cancelled"),
    (S.WITHDRAWING, E.DENY): (S.ENDED, "cancelled"),
    (S.WITHDRAWING, E.ABORT): (S.ENDED, "cancelled"),
    (S.WITHDRAWING, E.LINK_LOST): (S.ENDED, "lost"),
    #
    (S.ABORTING, E.REPEAT): (S.ABORTING, "send_abort"),
    (S.ABORTING, E.RELEASE): (S.ENDED, "cancelled"),
    (S.ABORTING, E.ABORT): (S.ENDED, "cancelled"),
    (S.ABORTING, E.ACK): (S.ENDED, "adopted"),
    (S.ABORTING, E.LINK_LOST): (S.ENDED, "lost"),
}

EVENT_OF = {Grant: E.GRANT, Deny: E.DENY, Ack: E.ACK, Abort: E.ABORT, Release: E.RELEASE}

AWAITING = frozenset({S.OFFERED, S.COMMITTED, S.WITHDRAWING, S.ABORTING})  # an answer is due


@dataclasses.dataclass(slots=True, eq=False)
class _Entry:
    key: HandoffKey
    offer: Offer
    born: float
    state: State = State.WAITING
    ready: dict[int, ReadyBlock] = dataclasses.field(default_factory=dict)
    wanted: frozenset[int] = frozenset()
    commit: Commit | None = None
    has_credit: bool = False
    reason: str = ""
    repeat_at: float = 0.0
    heard_at: float = 0.0

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the whole prompt, tail included."""
        return len(self.offer.block_hashes) + (self.offer.tail_fill > 0)


@dataclasses.dataclass(slots=True, eq=False)
class _SendingLink:
    credits: int  # free ones
    entries: dict[HandoffKey, _Entry] = dataclasses.field(default_factory=dict)
    queue: list[tuple[int, float, int, HandoffKey]] = dataclasses.field(default_factory=list)
    torn: bool = False  # a teardown was asked for


class Handoff:
    """All handoffs that a node sends. Each public method returns the effects to perform, in order."""

    def __init__(self, leases: Leases, settings: TransferSettings) -> None:
        self.counts: collections.Counter[str] = collections.Counter()  # of what changed nothing
        self._leases = leases
        self._settings = settings
        self._links: dict[str, _SendingLink] = {}
        self._effects: list[Effect] = []
        self._number = 0
        self._now = 0.0

    # What the node does

    def open_link(self, link: str, credits: int) -> None:
        self._links[link] = _SendingLink(credits)

    def offer(self, offer: Offer, *, now: float, waited: float = 0.0) -> list[Effect]:
        """Offer a prompt on `offer.key.link`. `waited` is the time in seconds since it was accepted.

        A link carries as many handoffs at once as it has credits; the others wait, oldest first.
        Raises `KeyError` if the link is not open any more.
        """
        self._now = now
        link = self._links[offer.key.link]
        key = offer.key
        assert key not in link.entries, f"offered twice: {key}"
        link.entries[key] = _Entry(key, offer, now - waited)
        self._number += 1
        heapq.heappush(link.queue, (offer.request.priority, now - waited, self._number, key))
        self._use_credits(link)
        return self._take()

    def ready(self, key: HandoffKey, blocks: Sequence[ReadyBlock], *, now: float) -> list[Effect]:
        """Report blocks (or the tail) that are computed and do not change any more. The lease holds
        them from now on.

        Does nothing for a handoff that has ended: the caller learns that from `Ended`.
        """
        return self._call(key, E.READY, blocks, now)

    def finished(
        self,
        key: HandoffKey,
        *,
        position: int,
        first_token: int,
        logprobs: TokenLogprobs | None,
        draft_positions: int = 0,
        now: float,
    ) -> list[Effect]:
        """Report that every block was `ready`, and that the first token was sampled at `position`."""
        entry = self._entry(key)
        blocks = 0 if entry is None else entry.num_blocks
        commit = Commit(key, position, first_token, logprobs, blocks, draft_positions)
        return self._call(key, E.FINISHED, commit, now)

    def cancel(self, key: HandoffKey, reason: str, *, now: float) -> list[Effect]:
        """Give up a handoff. Its blocks stay leased until the peer says that it has stopped reading."""
        return self._call(key, E.CANCEL, reason, now)

    def receive(self, message: HandoffMessage, *, now: float) -> list[Effect]:
        """Handle a Grant, Deny, Ack, Abort or Release from the peer of `message.key.link`."""
        self._now = now
        key = message.key
        if message.key.link not in self._links:
            self.counts["late_link"] += 1
        elif (entry := self._entry(key)) is not None:
            entry.heard_at = now
            self._step(entry, EVENT_OF[type(message)], message)
        elif isinstance(message, Grant):
            self._send(key, Abort(key, "unknown"))
        else:
            self.counts["late"] += 1
        return self._take()

    def tick(self, now: float) -> list[Effect]:
        """Repeat unanswered messages. Ask for the teardown of links that have been silent too long."""
        self._now = now
        for name, link in self._links.items():
            for entry in list(link.entries.values()):
                if entry.state not in AWAITING:
                    continue
                if now - entry.heard_at >= self._settings.answer and not link.torn:
                    link.torn = True
                    self._effects.append(Teardown(name, "no_answer"))
                if now >= entry.repeat_at:
                    self._step(entry, E.REPEAT)
        return self._take()

    def link_lost(self, link: str, *, now: float) -> list[Effect]:
        """End every handoff of a link that is torn down: the peer can read nothing over it any more, or
        cannot prove what it reads."""
        self._now = now
        lost = self._links.pop(link, None)
        if lost is not None:
            lost.queue.clear()
            for entry in list(lost.entries.values()):
                self._step(entry, E.LINK_LOST)
        return self._take()

    def states(self) -> dict[HandoffKey, State]:
        """State of each open handoff, for `pdq` and tests."""
        return {key: e.state for link in self._links.values() for key, e in link.entries.items()}

    # The table's driver

    def _entry(self, key: HandoffKey) -> _Entry | None:
        link = self._links.get(key.link)
        return None if link is None else link.entries.get(key)

    def _call(self, key: HandoffKey, event: Event, argument: object, now: float) -> list[Effect]:
        self._now = now
        if (entry := self._entry(key)) is not None:
            self._step(entry, event, argument)
        return self._take()

    def _step(self, entry: _Entry, event: Event, argument: object = None) -> None:
        transition = TABLE.get((entry.state, event))
        if transition is None:
            self.counts["ignored"] += 1
            return
        before = entry.state
        entry.state, action = transition
        if entry.state is not before:
            entry.repeat_at = self._now + self._settings.repeat
            entry.heard_at = self._now
        getattr(self, "_" + action)(entry, argument)

    def _take(self) -> list[Effect]:
        effects, self._effects = self._effects, []
        return effects

    def _send(self, key: HandoffKey, message: Message) -> None:
        self._effects.append(Send(key.link, message))

    def _use_credits(self, link: _SendingLink) -> None:
        while link.credits and link.queue:
            entry = link.entries.get(heapq.heappop(link.queue)[-1])
            if entry is not None and entry.state is S.WAITING:
                link.credits -= 1
                entry.has_credit = True
                self._step(entry, E.CREDIT)

    # Actions: messages

    def _send_offer(self, entry: _Entry, _: object) -> None:
        entry.repeat_at = self._now + self._settings.repeat
        if not entry.offer.waited_ms:
            waited_ms = max(1, round((self._now - entry.born) * 1000))
            entry.offer = dataclasses.replace(entry.offer, waited_ms=waited_ms)
        self._send(entry.key, entry.offer)

    def _send_commit(self, entry: _Entry, commit: object) -> None:
        entry.repeat_at = self._now + self._settings.repeat
        if commit is not None:
            self._keep_commit(entry, commit)
        assert entry.commit is not None
        self._send(entry.key, entry.commit)

    def _send_abort(self, entry: _Entry, reason: object) -> None:
        entry.repeat_at = self._now + self._settings.repeat
        if isinstance(reason, str):
            entry.reason = reason
        self._send(entry.key, Abort(entry.key, entry.reason))

    # Actions: blocks

    def _keep_blocks(self, entry: _Entry, blocks: object) -> None:
        assert isinstance(blocks, (list, tuple))
        new = [block for block in blocks if block.index not in entry.ready]
        self._leases.add(entry.key, [block.slot for block in new])
        entry.ready.update((block.index, block) for block in new)

    def _keep_commit(self, entry: _Entry, commit: object) -> None:
        assert isinstance(commit, Commit)
        assert len(entry.ready) == entry.num_blocks, "finished before all blocks were ready"
        entry.commit = commit

    def _granted(self, entry: _Entry, grant: object) -> None:
        assert isinstance(grant, Grant)
        entry.wanted = frozenset(grant.missing)
        self._effects.append(Granted(entry.key, grant.missing))
        self._announce(entry, entry.wanted)
        if entry.commit is not None:
            self._step(entry, E.FINISHED, entry.commit)

    def _announce_new(self, entry: _Entry, blocks: object) -> None:
        self._keep_blocks(entry, blocks)
        assert isinstance(blocks, (list, tuple))
        self._announce(entry, entry.wanted.intersection(block.index for block in blocks))

    def _announce_again(self, entry: _Entry, grant: object) -> None:
        assert isinstance(grant, Grant)
        self._announce(entry, entry.wanted.intersection(grant.missing))

    def _announce(self, entry: _Entry, indexes: Iterable[int]) -> None:
        """Send the places of the blocks of `indexes` that are computed."""
        ready, offer = entry.ready, entry.offer
        tail_index = len(offer.block_hashes)
        places = [ready[index] for index in sorted(indexes) if index in ready]
        full = [place for place in places if place.index != tail_index]
        if full:
            self._send(
                entry.key,
                Blocks(
                    entry.key,
                    tuple(place.index for place in full),
                    tuple(place.slot for place in full),
                    tuple(place.generation for place in full),
                    tuple(place.digest for place in full if place.digest),
                ),
            )
        if len(full) < len(places):
            tail, fill = places[-1], offer.tail_fill
            parent = offer.block_hashes[-1] if offer.block_hashes else b""
            self._send(
                entry.key,
                Tail(
                    entry.key,
                    tail.index,
                    parent,
                    offer.request.token_ids[-fill:],
                    fill,
                    tail.slot,
                    tail.generation,
                    tail.digest,
                ),
            )

    # Actions: the end. A terminal answer of the peer, or the teardown of the link, leads to each

    def _adopted(self, entry: _Entry, _: object) -> None:
        self._end(entry, Outcome.ADOPTED, "")

    def _denied(self, entry: _Entry, answer: object) -> None:
        assert isinstance(answer, Deny)
        self._end(entry, Outcome.DENIED, answer.reason)

    def _failed(self, entry: _Entry, answer: object) -> None:
        assert isinstance(answer, Abort)
        self._end(entry, Outcome.FAILED, answer.reason)

    def _cancelled(self, entry: _Entry, reason: object) -> None:
        self._end(entry, Outcome.CANCELLED, entry.reason or str(reason))

    def _lost(self, entry: _Entry, _: object) -> None:
        self._end(entry, Outcome.LINK_LOST, "link_lost")

    def _end(self, entry: _Entry, outcome: Outcome, reason: str) -> None:
        self._leases.end(entry.key)
        self._effects.append(Ended(entry.key, True, outcome, reason))
        link = self._links.get(entry.key.link)
        if link is not None:
            del link.entries[entry.key]
            link.credits += entry.has_credit
            self._use_credits(link)
