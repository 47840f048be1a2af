"""One link with all that can happen on it next: a few prompts, two blocks each, three of room.

A `System` is a driver without a clock or chance of its own: `steps` and `faults` say what can happen
next, `take` lets it, `view` says what distinguishes where it stands from elsewhere. Time passes only
when nothing else can happen (a decoding sequence may go on); a timer that is over before is a fault.

What is left out of a view, and why two states that differ only in it have the same future:
the reasons in aborts (nobody decides by them); numbers of blocks (which free block is taken goes by
what it holds); times but for how far off they are, and only where a timer looks at them; what a
finished handoff came to. A message that cannot change anything any more is taken off the network.
"""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple, cast

from common.kv_layout import Fingerprint
from common.wire.message import HandoffKey, Message
from common.wire.messages import MESSAGES, Abort, Grant
from kv_transfer import handoff, intake
from kv_transfer import lease as lease_module
from kv_transfer.lease import Lease, Leases
from kv_transfer.ports import Adopted, Copy, Outcome, Piece, ReadyBlock, Reservation, TransferSettings
from tests.support.protocol.driver import Driver, Node, Prefill, Running
from tests.support.protocol.model import BLOCK, FINGERPRINT, Pool, identities, require
from tests.support.protocol.snapshots import HASHES, VALUES, keep_by_code, keep_by_number, number_of

LINK = "link"
PROMPTS = {"a": (1, 2, 3), "b": (1, 2, 4, 5)}  # a full block and a tail; two full blocks
ROOM = 3
SETTINGS = TransferSettings(
    credits=2, repeat=1.0, answer=6.0, patience=2.5, quiet=2.5, remembered=64, copy_blocks=1
)
TICK = 1.0
GRANTED = (intake.State.RECEIVING, intake.State.COMMITTING)


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


class Choice(NamedTuple):
    kind: str
    what: Any
    request: str = ""  # whose; "" for what concerns all


class System(Driver):
    def __init__(self, prompts: int, *, digests: bool = True) -> None:
        super().__init__(SETTINGS, digests=digests)
        self.source = Node("source", self, 2 * prompts)
        self.target = Node("target", self, ROOM)
        self.nodes = [self.source, self.target]
        self.source.intake, self.target.handoff = NO_INTAKE, NO_HANDOFF
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
        self.work: dict[str, Prefill] = {}
        for name in list(PROMPTS)[:prompts]:
            tokens = PROMPTS[name]
            prefill = Prefill(name, 1, tokens, self.source, self.target, 0)
            taken = self.source.pool.take(identities(tokens), len(tokens) // BLOCK)
            assert taken is not None
            prefill.blocks, prefill.missing = taken
            self.work[name] = prefill

    # What can happen next

    def steps(self) -> list[Choice]:
        """What happens without any fault. Empty: all is over."""
        found = [Choice("role", name, name) for name, p in self.work.items() if not p.released]
        found += [Choice("deliver", i, request) for i, request in self._on_the_way()]
        found += [Choice("copied", i, running.copy.key.request) for i, running in enumerate(self.copies)]
        found += [Choice("rewritten", slot, self._whose(slot)) for slot in self._reusable()]
        if self._is_half_down():
            found.append(Choice("down", 0 if LINK in self.source.open else 1))
        if not found and not self.is_idle():
            found.append(Choice("tick", None))
        found += [Choice("decoded", name, name) for name in self.decoding]
        return found

    def faults(self) -> list[Choice]:
        found = []
        for i, request in self._on_the_way():
            found += [Choice("lost", i, request), Choice("doubled", i, request)]
        if self.digests:  # nothing else notices that
            found += [
                Choice("corrupted", i, running.copy.key.request) for i, running in enumerate(self.copies)
            ]
        for node, kind in ((self.source, "cancel_sending"), (self.target, "cancel_receiving")):
            end = node.handoff if node is self.source else node.intake
            found += [Choice(kind, key.request, key.request) for key in end.states()]
        for key, state in self.source.handoff.states().items():
            if state in handoff.AWAITING:
                found.append(Choice("repeat_due", key.request, key.request))
        for key, waits in self.target.intake.states().items():
            if waits is intake.State.WAITING:
                found.append(Choice("patience_over", key.request, key.request))
            elif waits in GRANTED:
                found.append(Choice("quiet_due", key.request, key.request))
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
        for name in self.work:
            key = HandoffKey(LINK, name, 1, 0)
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
        return next(name for name, prefill in self.work.items() if slot in prefill.blocks)

    # What happens

    def take(self, choice: Choice) -> None:
        getattr(self, "on_" + choice.kind)(choice.what)
        if self.net:
            self.net = [sent for sent in self.net if self._matters(*sent)]

    def on_role(self, name: str) -> None:
        prefill = self.work[name]
        if prefill.key is None and LINK not in self.source.open:
            prefill.over = True
        if prefill.over:
            self.let_go(prefill)
        elif prefill.key is None:
            self.offer(prefill, LINK)
        else:
            self.compute(prefill, prefill.computed + 1)
            if prefill.computed == len(prefill.blocks):
                self.finish(prefill)

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

    def on_repeat_due(self, name: str) -> None:
        self.source.handoff._links[LINK].entries[HandoffKey(LINK, name, 1, 0)].repeat_at = self.now
        self.tick(self.source)

    def on_patience_over(self, name: str) -> None:
        self.target.intake._links[LINK].entries[HandoffKey(LINK, name, 1, 0)].deadline = self.now
        self.tick(self.target)

    def on_quiet_due(self, name: str) -> None:
        entry = self.target.intake._links[LINK].entries[HandoffKey(LINK, name, 1, 0)]
        entry.heard_at = self.now - self.settings.quiet
        self.tick(self.target)

    def on_lost(self, index: int) -> None:
        del self.net[index]

    def on_doubled(self, index: int) -> None:
        self.net.append(self.net[index])

    def on_corrupted(self, index: int) -> None:
        running = self.copies[index]
        self.end_copy(running, (True,) * len(running.copy.pieces))

    def on_cancel_sending(self, name: str) -> None:
        key = HandoffKey(LINK, name, 1, 0)
        self.perform(self.source, self.source.handoff.cancel(key, "cancelled", now=self.now))

    def on_cancel_receiving(self, name: str) -> None:
        key = HandoffKey(LINK, name, 1, 0)
        self.perform(self.target, self.target.intake.cancel(key, "given_up", now=self.now))

    def forget(self) -> None:
        """This copy is not needed any more: its circles are cut, so that it goes at once."""
        self.__dict__.clear()

    # What the driver leaves to us

    def post(self, node: Node, message: Message) -> None:
        if isinstance(message, Abort):
            message = dataclasses.replace(message, reason="")
        self.net.append((node is self.source, number_of(message)))

    def copy_begun(self, running: Running) -> None: ...

    def decodes(self, node: Node, adopted: Adopted) -> None:
        self.decoding[adopted.key.request] = adopted

    def tear(self, link: str) -> None:
        if link in self.source.open:
            self.notice(self.source, link)

    def attempt_failed(self, prefill: Prefill) -> None: ...

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
        for prefill in self.work.values():
            if not prefill.released:
                for block in prefill.blocks:
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

    # Where it stands

    def view(self) -> object:
        sending = self.source.handoff._links.get(LINK)
        receiving = self.target.intake._links.get(LINK)
        orphans = self.target.intake._orphans
        independent = self.are_independent()
        users: list[list[tuple[str, int]]] = [[] for _ in range(ROOM)]
        parts: list[object] = []
        for name, prefill in self.work.items():
            key = HandoffKey(LINK, name, 1, 0)
            out = None if sending is None else sending.entries.get(key)
            into = orphans.get(key) if receiving is None else receiving.entries.get(key)
            answered = receiving is None or key in receiving.answers
            decoding = self.decoding.get(name)
            reservation = (into and into.reservation) or (decoding and decoding.reservation)
            if reservation:
                for index, block in enumerate(reservation.blocks):
                    users[block].append((name, index))
            if prefill.released and out is None and into is None and answered:
                parts.append(decoding is not None)
            else:
                parts.append(
                    (
                        prefill.computed,
                        prefill.key is None,
                        prefill.released,
                        prefill.over,
                        out and self._view_of_sending(out, key),
                        into and self._view_of_receiving(into),
                        answered and receiving and type(receiving.answers[key]),
                        decoding is not None,
                    )
                )
        pool, source = self.target.pool, self.source
        blocks = sorted(
            (pool.content[b], pool.references[b], b"" if independent else pool.identity[b], users[b])
            for b in range(ROOM)
            if pool.references[b] or not independent
        )
        waiting = self.target.intake._waiting
        order = sorted(waiting, key=lambda key: waiting[key].order) if len(waiting) > 1 else ()
        return (
            tuple(parts),
            repr(blocks),
            tuple(key.request for key in order),
            tuple(sorted((to_source, HASHES[number]) for to_source, number in self.net)),
            LINK in source.open,
            LINK in self.target.open,
            tuple(source.pool.references),
            tuple(source.pool.generation),
            tuple((r.copy.key.request, r.copy.pieces[0].index, r.found[0][0]) for r in self.copies),
            tuple((key.request, *lease.blocks) for key, lease in source.leases._open.items()),
        )

    def _view_of_sending(self, entry: handoff._Entry, key: HandoffKey) -> object:
        timed = entry.state in handoff.AWAITING
        return (
            entry.state.value,
            tuple(entry.ready),
            tuple(entry.wanted),
            entry.commit is not None,
            max(0.0, entry.repeat_at - self.now) if timed else 0.0,
            self.now - entry.heard_at if timed else 0.0,
            key in self.adoptions,
        )

    def _view_of_receiving(self, entry: intake._Entry) -> object:
        waits = entry.state is intake.State.WAITING
        return (
            entry.state.value,
            tuple(sorted(entry.unannounced)),
            tuple(piece.index for piece in entry.pieces),
            entry.copy is not None,
            entry.asked,
            max(0.0, entry.deadline - self.now) if waits else 0.0,
            self.now - entry.heard_at if entry.state in GRANTED else 0.0,
        )


NO_LOCK, UNCOUNTED = NoLock(), Uncounted()
NO_HANDOFF = NoHandoff(Leases(Pool(cast(Any, None), 0)), SETTINGS)
NO_INTAKE = NoIntake(Pool(cast(Any, None), 0), FINGERPRINT, SETTINGS)

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
    ]
)
keep_by_code(
    [
        System,
        Node,
        Pool,
        Prefill,
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
