"""Running sequences that move to other decode nodes, while this one drains.

Owns which sequence is offered to which node, and when it pauses; its states are those of
common/node/departure.py. A sequence moves as a prompt does: positions with KV are offered, and its last
token, which has none yet, is the commit's. Nothing else is its state: the sampler's counts come from the
token ids. A few move at a time, so that each pauses for its own copy only and the others decode meanwhile.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping

from common.engine.core.sequence import Sequence, SequenceStatus
from common.errors import PdqError, TransferError
from common.logs import get_logger
from common.node.attempt import Attempt
from common.node.departure import State
from common.node.ports import NodeServices
from common.node.sender import Departure, Sender
from common.store.registry import NodeRecord

log = get_logger("moves")

AT_ONCE = 4


class Moves:
    """Implements `Owner`. Calls `moved(attempt, choice)` for each choice that another node has adopted,
    and `give_up(attempt, error)` for each attempt that must not go on here either."""

    grant_s = 0.5  # a paused sequence waits this long for room elsewhere, then it goes on here

    def __init__(
        self,
        node: NodeServices,
        attempts: Mapping[str, Attempt],
        moved: Callable[[Attempt, int], None],
        give_up: Callable[[Attempt, PdqError], None],
    ) -> None:
        self._node = node
        self._attempts = attempts
        self._moved, self._give_up = moved, give_up
        self._sender = Sender(node, self)
        self._begun = False
        self._departures: dict[tuple[str, int], Departure] = {}  # by the engine's id, and choice
        self._full: set[str] = set()  # nodes that had no room, until their records are read again
        self._took: dict[str, str] = {}  # attempt → the node that has another choice of it
        self._promised: Counter[str] = Counter()  # blocks asked of a node since its record was read
        self._asked: Counter[str] = Counter()  # sequences, likewise

    @property
    def attempts(self) -> set[str]:
        """The attempts, by the engine's id, of which a choice is on its way."""
        return {name for (name, _), departure in self._departures.items() if not departure.is_idle}

    def begin(self) -> None:
        """From now on, move everything that runs here."""
        self._begun = True
        self._look()

    def step_ended(self) -> None:
        for departure in list(self._departures.values()):
            if departure.sequence.status is SequenceStatus.FINISHED:
                self._sender.cancel(departure, "finished")
            elif departure.state is State.LINKED:
                self.linked(departure)
        self._look()

    def peers_changed(self) -> None:
        """Ask nodes that refused again: they may have room now, and nobody else may be left."""
        for departure in self._departures.values():
            departure.refused.clear()
        self._full.clear()
        self._promised.clear()
        self._asked.clear()
        self._look()

    def cancel(self, attempt: Attempt, reason: str, choice: int | None = None) -> None:
        """The attempt, or one choice of it, has ended in the engine: end its departures."""
        for (name, index), departure in list(self._departures.items()):
            if name == attempt.engine_id and choice in (None, index):
                self._sender.cancel(departure, reason)

    def _look(self) -> None:
        """Begin to move the sequences for which some node seems to have room."""
        if not self._begun:
            return
        under_way = self.attempts
        for sequence in sorted(self._node.engine.scheduler.running, key=self._asks):
            if len(under_way) >= AT_ONCE:
                return
            attempt = self._attempts.get(sequence.request_id)
            if attempt is None or not _can_move(attempt, sequence):
                continue
            if attempt.engine_id in under_way:
                continue  # choices one after the other: the prompt they share is sent once
            key = (attempt.engine_id, sequence.choice)
            departure = self._departures.setdefault(key, Departure(attempt, sequence))
            if self._sender.ask(departure):
                under_way.add(attempt.engine_id)

    def _asks(self, sequence: Sequence) -> int:
        """How often a sequence was offered: the one with the fewest offers goes next."""
        departure = self._departures.get((sequence.request_id, sequence.choice))
        return 0 if departure is None else departure.asks

    def is_to_pause(self, sequence: Sequence) -> bool:
        """Whether a link is open for it, so that it pauses as soon as no step has it."""
        departure = self._departures.get((sequence.request_id, sequence.choice))
        return departure is not None and departure.state is State.LINKED

    # What the sender asks and says.

    def choose(self, departure: Departure) -> tuple[str, str] | None:
        """The node that has another choice of this attempt, or else the one with the most free
        positions, of those that seem to have room."""
        node, attempt = self._node, departure.attempt.engine_id
        length = len(departure.sequence.token_ids)
        candidates = [
            record
            for record in node.peers.decoding(self._full | departure.refused)
            if node.peers.is_alike(record) and self._has_room(record, length)
        ]
        if not candidates:
            return None
        best = max(
            candidates,
            key=lambda record: (
                record.incarnation == self._took.get(attempt),
                (record.free_blocks - self._promised[record.incarnation]) * record.block_size,
            ),
        )
        self._promised[best.incarnation] += -(-length // best.block_size)
        self._asked[best.incarnation] += 1
        return best.incarnation, best.endpoint

    def _has_room(self, record: NodeRecord, length: int) -> bool:
        """Whether the node has room by its record; only its answer to the offer is sure."""
        running = record.running + record.waiting + record.reserved + self._asked[record.incarnation]
        free = record.free_blocks - self._promised[record.incarnation]
        blocks = -(-length // record.block_size)
        return running < record.max_num_seqs and blocks + running <= free

    def linked(self, departure: Departure) -> None:
        """Pause a sequence that is in no step, and offer it as it is; `step_ended` looks again."""
        sequence = departure.sequence
        if sequence.in_flight:
            return
        if _can_move(departure.attempt, sequence):
            self._sender.pause(departure)
        else:  # it was preempted
            self._sender.stay(departure)

    def await_grant(self, departure: Departure) -> None:
        loop = asyncio.get_running_loop()
        departure.timer = loop.call_later(self.grant_s, self._withdraw, departure)

    def _withdraw(self, departure: Departure) -> None:
        log.info("move.withdrawn", request=departure.attempt.request.id, peer=departure.peer)
        self._full.add(departure.peer)
        self._sender.no_grant(departure)

    def granted(self, departure: Departure) -> None:
        """Nothing to do: the other node may adopt it at any time."""

    def adopted(self, departure: Departure) -> None:
        sequence, attempt = departure.sequence, departure.attempt
        self._took[attempt.engine_id] = departure.peer
        log.info(
            "sequence.moved",
            request=attempt.request.id,
            attempt=attempt.number,
            choice=sequence.choice,
            peer=departure.peer,
            position=departure.length + 1,
            paused_ms=round((time.monotonic() - departure.paused_at) * 1000, 1),
        )
        self._moved(attempt, sequence.choice)

    def refused(self, departure: Departure) -> None:
        if departure.found_full:
            self._full.add(departure.peer)
            departure.found_full = False
        self._look()

    def spoiled(self, departure: Departure) -> None:
        self._give_up(departure.attempt, TransferError(f"its blocks: {departure.reason}"))

    def over(self, departure: Departure) -> None:
        del self._departures[departure.attempt.engine_id, departure.sequence.choice]
        self._look()


def _can_move(attempt: Attempt, sequence: Sequence) -> bool:
    """Whether a sequence lacks the KV of its last token only, and this node made that token: then each
    takeover of an attempt is at a later position than the one before."""
    return (
        sequence.status is SequenceStatus.RUNNING
        and sequence.is_decoding
        and len(sequence.token_ids) > attempt.arrived.get(sequence.choice, sequence.prompt_len)
    )
