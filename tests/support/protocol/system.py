"""One link with all that can happen on it next: a few choices, two blocks each, three of room.

A `System` is a driver without a clock or chance of its own: `steps` and `faults` say what can happen
next, `take` lets it, `view` (views.py) says what distinguishes where it stands from elsewhere. Time
passes only when nothing else can happen (a decoding sequence may go on); a timer that is over before is
a fault.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

from common.errors import DigestMismatch
from common.kv_layout import Fingerprint
from common.node.attempt import Attempt
from common.node.departure import OPENING, State
from common.node.sender import SPOILED, Departure
from common.wire.message import HandoffKey, Message
from common.wire.messages import MESSAGES, Abort, Grant
from kv_transfer import handoff, intake
from kv_transfer import lease as lease_module
from kv_transfer.lease import Lease, Leases
from kv_transfer.ports import Adopted, Copy, Outcome, Piece, ReadyBlock, Reservation, TransferSettings
from tests.support.protocol.driver import Driver, Node, Running
from tests.support.protocol.model import FINGERPRINT, Pool, require
from tests.support.protocol.sending import ModelSender, Role, Services, Timer, Work, no_time
from tests.support.protocol.snapshots import VALUES, keep_by_code, keep_by_number, number_of
from tests.support.protocol.views import GRANTED, LINK, ROOM, view_of

PROMPTS = {"a": (1, 2, 3), "b": (1, 2, 4, 5)}  # a full block and a tail; two full blocks
SETTINGS = TransferSettings(
    credits=2, repeat=1.0, answer=6.0, patience=2.5, quiet=2.5, remembered=64, copy_blocks=1
)
TICK = 1.0


class NoLock:
    """In place of a lock, because a lock has no copy."""

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Uncounted:
    """In place of counters, which would make states differ."""

    def __getitem__(self, name: str) -> int:
        return 0

    def __setitem__(self, name: str, value: int) -> None: ...


class NoHandoff(handoff.Handoff):
    """Of a node that sends nothing."""


class NoIntake(intake.Intake):
    """Of a node that receives nothing."""


class NoSender(ModelSender):
    """Of a node that sends nothing."""


class Choice(NamedTuple):
    kind: str
    what: Any
    request: str = ""  # whose; "" for what concerns all


class System(Driver):
    def __init__(self, works: Sequence[bool], *, digests: bool = True, tries: int = 1) -> None:
        """`works`: for each choice, whether it moves; `tries`: how often each may be offered."""
        super().__init__(SETTINGS, digests=digests)
        self.source = Node("source", self, 2 * len(works))
        self.target = Node("target", self, ROOM)
        self.nodes = [self.source, self.target]
        self.source.intake, self.target.handoff, self.target.sender = NO_INTAKE, NO_HANDOFF, NO_SENDER
        for node in self.nodes:
            node.leases._lock = NO_LOCK  # type: ignore[assignment]
        for end in (self.source.handoff, self.target.intake):
            end.counts = UNCOUNTED  # type: ignore[assignment]
        self.target.intake.open_link(LINK, SETTINGS.credits)
        self.source.handoff.open_link(LINK, SETTINGS.credits)
        self.ends[LINK] = self.source, self.target
        for node in self.nodes:
            node.open.add(LINK)
        self.net: list[tuple[bool, int]] = []  # to the source, or the target: number of a message
        self.decoding: dict[str, Adopted] = {}
        self.work: dict[str, Work] = {}
        self.slots: dict[str, tuple[int, ...]] = {}
        self.keys: dict[str, tuple[HandoffKey, ...]] = {}
        for name, moves in zip(PROMPTS, works, strict=False):
            self.work[name] = Work(name, 1, PROMPTS[name], self.source, self.target, 0, moves, tries)
            assert self.begin(self.work[name])
            self.slots[name] = tuple(self.work[name].block_table)
            self.keys[name] = tuple(HandoffKey(LINK, name, 1, 0, ask) for ask in range(1, tries + 1))

    # What can happen next

    def steps(self) -> list[Choice]:
        """What happens without any fault. Empty: all is over."""
        found = [Choice("act", name, name) for name, work in self.work.items() if self._may_act(work)]
        found += [Choice("opened", name, name) for name, work in self.work.items() if is_opening(work)]
        found += [Choice("deliver", i, request) for i, request in self._on_the_way()]
        found += [Choice("copied", i, running.copy.key.request) for i, running in enumerate(self.copies)]
        found += [Choice("rewritten", slot, self._whose(slot)) for slot in self._reusable()]
        if self._is_half_down():
            found.append(Choice("down", 0 if LINK in self.source.open else 1))
        if not found and not self.is_idle():
            found.append(Choice("tick", None))
        found += [Choice("decoded", name, name) for name in self.decoding]
        return found

    def _may_act(self, work: Work) -> bool:
        """Whether `act` does something: see there."""
        state = work.departure.state
        if work.moves:
            return state in (State.HERE, State.LINKED)
        return state is State.HELD or work.departure.is_computing

    def faults(self) -> list[Choice]:
        found = []
        for i, request in self._on_the_way():
            found += [Choice("lost", i, request), Choice("doubled", i, request)]
        if self.digests:  # nothing else notices that
            found += [
                Choice("corrupted", i, running.copy.key.request) for i, running in enumerate(self.copies)
            ]
        for name, work in self.work.items():
            if work.departure.is_wanted:
                found.append(Choice("gone", name, name))
            if is_opening(work):
                found.append(Choice("not_opened", name, name))
            if work.departure.timer is not None:
                found.append(Choice("no_grant", name, name))
            if work.moves and work.departure.state is State.LINKED:
                found.append(Choice("preempted", name, name))
        for key, state in self.source.handoff.states().items():
            if state in handoff.AWAITING:
                found.append(Choice("repeat_due", key, key.request))
        for key, waits in self.target.intake.states().items():
            found.append(Choice("given_up", key, key.request))
            if waits is intake.State.WAITING:
                found.append(Choice("patience_over", key, key.request))
            elif waits in GRANTED:
                found.append(Choice("quiet_due", key, key.request))
        if not self.target.intake._draining:
            found.append(Choice("drain", None))
        if LINK in self.source.open and LINK in self.target.open:
            found += [Choice("down", 0), Choice("down", 1)]
        return found

    def is_idle(self) -> bool:
        return not self.source.handoff.states() and not self.target.intake.states()

    def are_independent(self) -> bool:
        """Nothing that happens to one prompt can matter to another any more: nobody will ask for
        room again, and the link stands or is gone."""
        if self._is_half_down():
            return False
        link = self.target.intake._links.get(LINK)
        if link is None:
            return True
        for work in self.work.values():
            if work.tries and not work.is_over:
                return False
            key = work.departure.key
            if key is None:
                if not work.is_over:
                    return False
                continue
            entry = link.entries.get(key)
            if key not in link.answers if entry is None else entry.reservation is None:
                return False
        return True

    def _is_half_down(self) -> bool:
        return (LINK in self.source.open) != (LINK in self.target.open)

    def _on_the_way(self) -> list[tuple[int, str]]:
        """One index of each message that is on the network, and whose it is."""
        net = self.net
        return [
            (i, VALUES[number].key.request) for i, (_, number) in enumerate(net) if net.index(net[i]) == i
        ]

    def _reusable(self) -> list[int]:
        """Freed blocks of the source that the target reads, or will: they may be written anew."""
        pool = self.source.pool
        if all(pool.references):
            return []
        entries = [*self.target.intake._orphans.values()]
        if (link := self.target.intake._links.get(LINK)) is not None:
            entries += link.entries.values()
        named = {piece.slot for entry in entries for piece in entry.pieces}
        named.update(piece.slot for running in self.copies for piece in running.copy.pieces)
        return sorted(s for s in named if not pool.references[s] and pool.generation[s] == 2)

    def _whose(self, slot: int) -> str:
        return next(name for name, slots in self.slots.items() if slot in slots)

    # What happens

    def take(self, choice: Choice) -> None:
        getattr(self, "on_" + choice.kind)(choice.what)
        if self.net:
            self.net = [sent for sent in self.net if self._matters(*sent)]

    def on_act(self, name: str) -> None:
        self.act(self.work[name])

    def on_opened(self, name: str) -> None:
        work = self.work[name]
        self.source.sender.opened(work.departure, LINK if LINK in self.source.open else None)

    def on_not_opened(self, name: str) -> None:
        self.source.sender.opened(self.work[name].departure, None)

    def on_gone(self, name: str) -> None:
        self.end(self.work[name])

    def on_preempted(self, name: str) -> None:
        self.source.sender.stay(self.work[name].departure)

    def on_no_grant(self, name: str) -> None:
        departure = self.work[name].departure
        departure.timer = None
        self.source.sender.no_grant(departure)

    def on_drain(self, _: None) -> None:
        self.perform(self.target, self.target.intake.drain(self.now))

    def on_deliver(self, index: int) -> None:
        to_source, number = self.net.pop(index)
        self.deliver(self.source if to_source else self.target, VALUES[number])

    def on_copied(self, index: int) -> None:
        self.end_copy(self.copies[index])

    def on_rewritten(self, slot: int) -> None:
        pool = self.source.pool
        pool.begin_write(slot)
        pool.seal(slot, b"another's", False)

    def on_decoded(self, name: str) -> None:
        self.decoded(self.target, self.decoding.pop(name))

    def on_down(self, end: int) -> None:
        self.notice(self.nodes[end], LINK)

    def on_tick(self, _: None) -> None:
        self.now += TICK
        for node in self.nodes:
            self.tick(node)

    def on_repeat_due(self, key: HandoffKey) -> None:
        self.source.handoff._links[LINK].entries[key].repeat_at = self.now
        self.tick(self.source)

    def on_patience_over(self, key: HandoffKey) -> None:
        self.target.intake._links[LINK].entries[key].deadline = self.now
        self.tick(self.target)

    def on_quiet_due(self, key: HandoffKey) -> None:
        entry = self.target.intake._links[LINK].entries[key]
        entry.heard_at = self.now - self.settings.quiet
        self.tick(self.target)

    def on_given_up(self, key: HandoffKey) -> None:
        self.perform(self.target, self.target.intake.cancel(key, "given_up", now=self.now))

    def on_lost(self, index: int) -> None:
        del self.net[index]

    def on_doubled(self, index: int) -> None:
        self.net.append(self.net[index])

    def on_corrupted(self, index: int) -> None:
        running = self.copies[index]
        self.end_copy(running, (True,) * len(running.copy.pieces))

    def forget(self) -> None:
        """This copy is not needed any more: its circles are cut, so that it goes at once."""
        for part in (*self.nodes, *self.work.values()):
            part.__dict__.clear()
        self.__dict__.clear()

    # What the driver leaves to us

    def post(self, node: Node, message: Message) -> None:
        if isinstance(message, Abort):
            spoiled = node is self.source and message.reason in SPOILED
            message = dataclasses.replace(message, reason=DigestMismatch.code if spoiled else "")
        self.net.append((node is self.source, number_of(message)))

    def copy_begun(self, running: Running) -> None: ...

    def decodes(self, node: Node, adopted: Adopted) -> None:
        self.decoding[adopted.key.request] = adopted

    def tear(self, link: str) -> None:
        if link in self.source.open:
            self.notice(self.source, link)

    def link_wanted(self, work: Work) -> None: ...

    def may_act(self, work: Work) -> None: ...

    def waits_for_grant(self, work: Work) -> None: ...

    def work_over(self, work: Work) -> None: ...

    def arrange(self, pool: Pool, free: list[int]) -> None:
        """By what blocks hold: those that hold nothing are taken first."""
        free.sort(key=lambda block: (pool.identity[block], block), reverse=True)

    def _matters(self, to_source: bool, number: int) -> bool:
        """Whether a message can still change anything, whenever it is delivered."""
        message = VALUES[number]
        key = message.key
        link = self.source.handoff._links.get(LINK)
        sending = link is not None and key in link.entries
        if to_source:
            if link is None or not (sending or isinstance(message, Grant)):
                return False
        elif LINK not in self.target.open:
            return False
        return sending or not self._is_answered(key)

    def _is_answered(self, key: HandoffKey) -> bool:
        """Whether the target does nothing about a handoff any more but repeat its answer."""
        link = self.target.intake._links.get(LINK)
        return link is None or (key not in link.entries and key in link.answers)

    # What must hold everywhere

    def check(self) -> None:
        """Every reference is somebody's, and what is read is leased."""
        source, target = self.source, self.target
        held = [0] * source.pool.size
        for work in self.work.values():
            work.check()
            for block in (*work.block_table, *work.departure.held):
                held[block] += 1
        leased: set[int] = set()
        for lease in [*source.leases._open.values(), *source.leases._ending]:
            leased.update(lease.blocks)
            for block in lease.blocks:
                held[block] += 1
        require(held == source.pool.references, "leases left, or blocks without one")
        if LINK not in self.torn:
            require(
                all(p.slot in leased for running in self.copies for p in running.copy.pieces),
                "a copy of a block that is free",
            )
        held = [0] * target.pool.size
        for reservation in [*target.pool.reservations, *(a.reservation for a in self.decoding.values())]:
            for block in reservation.blocks:
                held[block] += 1
        require(held == target.pool.references, "blocks left in use")
        require(
            all(entry.reservation is None for entry in target.intake._waiting.values()),
            "an offer that waits holds something",
        )

    def view(self) -> object:
        """Where it stands."""
        return view_of(self)


def is_opening(work: Work) -> bool:
    return work.departure.state in OPENING


NO_LOCK, UNCOUNTED = NoLock(), Uncounted()
NO_HANDOFF = NoHandoff(Leases(Pool(cast(Any, None), 0)), SETTINGS)
NO_INTAKE = NoIntake(Pool(cast(Any, None), 0), FINGERPRINT, SETTINGS)
NO_SENDER = NoSender(cast(Any, None), cast(Any, None))

keep_by_number(
    [
        *MESSAGES.values(),
        HandoffKey,
        Copy,
        Piece,
        ReadyBlock,
        TransferSettings,
        Fingerprint,
        Outcome,
        handoff.State,
        intake.State,
        NoLock,
        Uncounted,
        NoHandoff,
        NoIntake,
        NoSender,
        Attempt,
        State,
        Timer,
    ]
)
keep_by_code(
    [
        System,
        Node,
        Pool,
        Work,
        Departure,
        ModelSender,
        Role,
        Services,
        no_time,
        Running,
        Reservation,
        Adopted,
        Lease,
        Leases,
        lease_module._nothing,
        handoff.Handoff,
        handoff._SendingLink,
        handoff._Entry,
        intake.Intake,
        intake._ReceivingLink,
        intake._Entry,
        collections.Counter,
        collections.OrderedDict,
        collections.deque,
    ]
)
assert Reservation.__eq__ is object.__eq__, "a reservation is one of a kind: copies keep that"
