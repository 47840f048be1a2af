"""Every order of events, for small cases: two prompts of two blocks, three blocks of room, faults.

A breadth-first walk over all states of both ends, the messages between them (any may be delivered
next: reordering is free), the copies that run, and the faults still allowed. States are compared
by what matters in them, so that orders which lead to the same place are walked once.
`PDQ_EXHAUSTIVE=1` adds faults for two prompts (one: minutes; two: an hour or two).
"""

from __future__ import annotations

import contextlib
import io
import os
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
from handoff_world import BLOCK, FINGERPRINT, RUBBISH, Violation, identities, offer_of, require

from common.messages import Message, Offer
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.lease import Leases
from kv_transfer.ports import (
    Adopted,
    Copy,
    Ended,
    Key,
    Outcome,
    Piece,
    ReadyBlock,
    Reservation,
    Send,
    Teardown,
    TransferSettings,
)

LINK = "link"
PROMPTS = {"a": (1, 2, 3), "b": (1, 2, 4, 5)}  # a full block and a tail; two full blocks
ROOM = 3
SETTINGS = TransferSettings(
    credits=2, repeat=1.0, answer=6.0, patience=2.5, quiet=2.5, remembered=64, copy_blocks=1
)
TICK = 1.0
MOST_TICKS = 16


class NullLock(contextlib.nullcontext[None]):
    """In place of a lock, because a lock has no copy."""


class Room:
    """The receiving pool: content per block, all or nothing, a prefix cache."""

    def __init__(self) -> None:
        self.content = [RUBBISH] * ROOM
        self.held = [0] * ROOM
        self.cached: dict[bytes, int] = {}
        self.reserved: list[tuple[int, ...]] = []

    def reserve(self, offer: Offer) -> Reservation | None:
        wanted = identities(offer.token_ids, offer.prompt_len)
        found = [self.cached.get(identity) for identity in wanted]
        if found[0] is None:
            found = [None] * len(wanted)
        free = [b for b in range(ROOM) if not self.held[b] and b not in found]
        missing = [i for i, block in enumerate(found) if block is None]
        if len(free) < len(missing):
            return None
        blocks = tuple(block if block is not None else free.pop(0) for block in found)
        for i in missing:
            self.cached = {k: b for k, b in self.cached.items() if b != blocks[i]}
            self.content[blocks[i]] = RUBBISH
        for block in blocks:
            self.held[block] += 1
        self.reserved.append(blocks)
        return Reservation(blocks, tuple(missing))

    def landed(self, reservation: Reservation, piece: Piece) -> None:
        require(reservation.blocks in self.reserved, "landed in a reservation that is over")
        require(self.content[piece.block] == piece.seed, "a wrong block landed")
        if not piece.fill:
            self.cached.setdefault(piece.seed, piece.block)

    def adopt(self, reservation: Reservation) -> None:
        self.reserved.remove(reservation.blocks)

    def discard(self, reservation: Reservation) -> None:
        self.reserved.remove(reservation.blocks)
        self.release(reservation.blocks)

    def release(self, blocks: tuple[int, ...]) -> None:
        for block in blocks:
            self.held[block] -= 1


class Slots:
    """The sending pool: slot 2i is request i's first block, 2i+1 its second; counts references."""

    def __init__(self, prompts: int) -> None:
        self.held = [1] * (2 * prompts)
        self.reading: list[int] = []  # slots in a running copy whose link this end still holds

    def acquire(self, blocks: list[int]) -> None:
        for block in blocks:
            self.held[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.held[block] -= 1
            require(self.held[block] or block not in self.reading, "freed while the peer reads it")


class System:
    """Both ends and all that is between them; `choices` and `take` walk it."""

    def __init__(self, prompts: int, faults: int) -> None:
        self.now = 0.0
        self.faults = faults
        self.slots, self.room = Slots(prompts), Room()
        leases = Leases(self.slots)
        leases._lock = NullLock()  # type: ignore[assignment]
        self.handoff = Handoff(leases, SETTINGS)
        self.intake = Intake(self.room, FINGERPRINT, SETTINGS)
        self.intake.open_link(LINK, 2)
        self.handoff.open_link(LINK, 2)
        self.names = list(PROMPTS)[:prompts]
        self.step = dict.fromkeys(self.names, 0)  # 0 offer, 1 a block, 2 the other, and over
        self.net: list[tuple[str, Message]] = []  # to which end, what
        self.copies: dict[int, Copy] = {}
        self.link = {"source": True, "target": True}
        self.outcomes: dict[str, Outcome] = {}
        self.adopted: dict[str, tuple[int, ...]] = {}
        self.decoded: list[str] = []
        self.ticks = 0

    # What can happen next

    def choices(self) -> Iterator[tuple[str, Any]]:
        quiet = True
        for name in self.names:
            if self.step[name] < 3:
                quiet = False
                yield "role", name
        for i, message in enumerate(self.net):
            if message not in self.net[:i]:
                quiet = False
                yield "deliver", i
                if self.faults:
                    yield "lose", i
                    yield "duplicate", i
        for number in self.copies:
            quiet = False
            yield "copied", number
            if self.faults:
                yield "corrupted", number
        for name in self.adopted:
            if name not in self.decoded:
                quiet = False
                yield "decoded", name
        for end in ("source", "target"):
            if self.link[end] and not all(self.link.values()):
                quiet = False
                yield "down", end
        if self.faults:
            for name in self.names:
                if self.step[name] and name not in self.outcomes:
                    yield "cancel_sending", name
                    yield "cancel_receiving", name
            if all(self.link.values()):
                yield "down", "source"
                yield "down", "target"
        if quiet and not self.is_quiet():
            yield "tick", None

    def is_quiet(self) -> bool:
        return not self.handoff.states() and not self.intake.states()

    def take(self, choice: tuple[str, Any]) -> None:
        kind, what = choice
        getattr(self, "on_" + kind)(what)

    # Events

    def key(self, name: str) -> Key:
        return Key(LINK, name, 1, 0)

    def on_role(self, name: str) -> None:
        step, tokens = self.step[name], PROMPTS[name]
        self.step[name] += 1
        first = 2 * list(PROMPTS).index(name)
        if self.link["source"] and step == 0:
            self.send(self.handoff.offer(offer_of(LINK, name, 1, tokens), now=self.now))
        elif self.link["source"]:
            identity = identities(tokens, len(tokens))[step - 1]
            block = ReadyBlock(step - 1, first + step - 1, 2, identity)
            self.send(self.handoff.ready(self.key(name), [block], now=self.now))
            if step == 2:
                self.send(self.handoff.finished(
                    self.key(name), position=len(tokens), first_token=7, logprobs=None,
                    now=self.now,
                ))  # fmt: skip
        if step == 2:
            self.slots.release([first, first + 1])

    def on_deliver(self, index: int) -> None:
        to, message = self.net.pop(index)
        if self.link[to]:
            end = self.handoff if to == "source" else self.intake
            self.perform(
                end.receive(message, now=self.now), "target" if to == "source" else "source"
            )

    def on_lose(self, index: int) -> None:
        self.faults -= 1
        del self.net[index]

    def on_duplicate(self, index: int) -> None:
        self.faults -= 1
        self.net.append(self.net[index])

    def on_copied(self, number: int, error: str = "") -> None:
        copy = self.copies.pop(number)
        for piece in copy.pieces:
            if piece.slot in self.slots.reading:
                self.slots.reading.remove(piece.slot)
            blocks = [b for reserved in self.room.reserved for b in reserved]
            require(piece.block in blocks, "copied into a block that is not reserved any more")
            self.room.content[piece.block] = RUBBISH if error else piece.digest
        self.perform(self.intake.copied(number, error, now=self.now))

    def on_corrupted(self, number: int) -> None:
        self.faults -= 1
        self.on_copied(number, "digest_mismatch")

    def on_decoded(self, name: str) -> None:
        self.decoded.append(name)
        self.room.release(self.adopted[name])
        self.perform(self.intake.room_changed(self.now))

    def on_cancel_sending(self, name: str) -> None:
        self.faults -= 1
        self.send(self.handoff.cancel(self.key(name), "cancelled", now=self.now))

    def on_cancel_receiving(self, name: str) -> None:
        self.faults -= 1
        self.perform(self.intake.cancel(self.key(name), "given_up", now=self.now))

    def on_down(self, end: str) -> None:
        self.faults -= all(self.link.values())
        self.link[end] = False
        if end == "source":
            self.slots.reading.clear()
            self.send(self.handoff.link_lost(LINK, now=self.now))
        else:
            self.perform(self.intake.link_lost(LINK, now=self.now))

    def on_tick(self, _: object) -> None:
        self.ticks += 1
        require(self.ticks < MOST_TICKS, "stuck: something never ends")
        self.now += TICK
        self.send(self.handoff.tick(self.now))
        self.perform(self.intake.tick(self.now))

    def send(self, effects: list[Any]) -> None:
        """What the source wants done; `perform` is for the target."""
        self.perform(effects, "target")

    def perform(self, effects: list[Any], to: str = "source") -> None:
        for effect in effects:
            if isinstance(effect, Send):
                self.net.append((to, effect.message))
            elif isinstance(effect, Copy):
                self.copies[effect.number] = effect
                if self.link["source"]:
                    self.slots.reading.extend(piece.slot for piece in effect.pieces)
                    for piece in effect.pieces:
                        require(self.slots.held[piece.slot], "a copy of a block that is free")
            elif isinstance(effect, Adopted):
                require(effect.key.request not in self.adopted, "adopted twice")
                self.adopted[effect.key.request] = effect.reservation.blocks
                wanted = identities(effect.offer.token_ids, effect.offer.prompt_len)
                found = tuple(self.room.content[b] for b in effect.reservation.blocks)
                require(found == wanted, "adopted with wrong content")
            elif isinstance(effect, Ended) and effect.sending:
                name = effect.key.request
                require(name not in self.outcomes, "ended twice")
                self.outcomes[name] = effect.outcome
                agreed = (effect.outcome is Outcome.ADOPTED) == (name in self.adopted)
                require(agreed or effect.outcome is Outcome.LINK_LOST, "the ends disagree")
            elif isinstance(effect, Teardown):
                self.on_down("source")
                self.on_down("target")

    def check_quiet(self) -> None:
        require(self.is_quiet(), f"left: {self.handoff.states()} {self.intake.states()}")
        require(not any(self.handoff._leases.count().values()), "leases left")
        require(not any(self.slots.held), "source blocks left")
        require(not any(self.room.held) and not self.room.reserved, "room left")

    # Snapshots

    def view(self) -> object:
        """What distinguishes this state from another."""
        sending = [
            (e.key.request, e.state, sorted(e.ready), e.wanted, e.commit is not None,
             e.repeat_at - self.now, e.heard_at - self.now, e.reason)
            for link in self.handoff._links.values() for e in link.entries.values()
        ]  # fmt: skip
        entries = [e for link in self.intake._links.values() for e in link.entries.values()]
        receiving = [
            (e.key.request, e.state, e.reservation and e.reservation.blocks,
             sorted(e.unannounced), tuple(p.index for p in e.pieces),
             e.copy and tuple(p.index for p in e.copy.pieces), e.asked, e.reason,
             e.deadline - self.now, e.heard_at - self.now)
            for e in [*entries, *self.intake._orphans.values()]
        ]  # fmt: skip
        answers = [
            (key.request, type(answer).__name__)
            for link in self.intake._links.values() for key, answer in link.answers.items()
        ]  # fmt: skip
        order = sorted(self.intake._waiting.values(), key=lambda entry: entry.order)
        return (
            repr(sorted(sending, key=str)), repr(sorted(receiving, key=str)), repr(sorted(answers)),
            tuple(e.key.request for e in order), tuple(sorted(map(repr, self.net))),
            tuple(sorted(self.step.items())), tuple(self.slots.held), tuple(self.room.held),
            tuple(self.room.content), tuple(sorted(self.room.cached.items())), self.faults,
            tuple(sorted(self.adopted)), tuple(sorted(self.decoded)), tuple(self.link.values()),
            tuple(sorted((k, v.value) for k, v in self.outcomes.items())), self.ticks,
        )  # fmt: skip


class Snapshots:
    """Copies of systems. Messages never change, so that copies share them."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.numbers: dict[Message, int] = {}

    def save(self, system: System) -> bytes:
        file = io.BytesIO()
        pickler = pickle.Pickler(file, protocol=5)
        pickler.persistent_id = self.number  # type: ignore[method-assign]
        pickler.dump(system)
        return file.getvalue()

    def load(self, data: bytes) -> System:
        unpickler = pickle.Unpickler(io.BytesIO(data))
        unpickler.persistent_load = self.messages.__getitem__  # type: ignore[assignment]
        system: System = unpickler.load()
        return system

    def number(self, value: object) -> int | None:
        if not isinstance(value, Message):
            return None
        if value not in self.numbers:
            self.numbers[value] = len(self.messages)
            self.messages.append(value)
        return self.numbers[value]


def explore(prompts: int, faults: int) -> tuple[int, int]:
    """Walk everything; returns the number of states and of ends that are quiet."""
    snapshots = Snapshots()
    start = System(prompts, faults)
    level = [snapshots.save(start)]
    seen = {hash(start.view())}
    states, ends = 0, 0
    while level:
        following: list[bytes] = []
        for data in level:
            states += 1
            system = snapshots.load(data)
            choices = list(system.choices())
            if not choices:
                ends += 1
                system.check_quiet()
            for number, choice in enumerate(choices):
                if number:
                    system = snapshots.load(data)
                try:
                    system.take(choice)
                except Violation as violation:
                    raise AssertionError(f"after {choice}: {violation}\n{system.view()}") from None
                view = hash(system.view())
                if view not in seen:
                    seen.add(view)
                    following.append(snapshots.save(system))
        level = following
    return states, ends


CASES = [(1, 1), (1, 2), (2, 0)]
if os.environ.get("PDQ_EXHAUSTIVE"):
    CASES += [(2, 1), (2, 2)]


@pytest.mark.parametrize(("prompts", "faults"), CASES)
@pytest.mark.timeout(3600)
def test_every_order_of_events_ends_well(prompts: int, faults: int) -> None:
    states, ends = explore(prompts, faults)
    print(f"{prompts} prompts, {faults} faults: {states} states, {ends} quiet ends")
    assert ends > 0


assert BLOCK == 2
