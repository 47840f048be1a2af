"""Running sequences that move to other decode nodes, while this one drains.

Owns which sequence is offered to which node, when it pauses, and that it goes on here when nobody
takes it. For each:

    running ──a node seems to have room──▶ a link is opened ──end of a step──▶ paused, offered
       ▲                                                                          │
       ├──────────── denied, failed, link lost, no grant in time ◀────────────────┤
                                                             adopted ◀────────────┘
                                              the other node goes on, here it ends

A sequence moves as a prompt does: positions with KV are offered, and its last token, which has none
yet, is the commit's. Nothing else is its state: the sampler's counts come from the token ids. A few
move at a time, so that each pauses for its own copy only and the others decode meanwhile.
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
from common.node.handover import Handover, Handovers
from common.node.ports import NodeServices
from common.sampling import FinishReason
from common.store.registry import NodeRecord

log = get_logger("moves")

AT_ONCE = 4
GRANT_S = 0.5  # a paused sequence waits this long for room elsewhere, then it goes on here


class Moves:
    """Implements `Owner`. `moved(attempt, choice)` hears of each choice that another node has,
    `give_up(attempt, error)` of each attempt that must not go on here either."""

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
        self._sending = Handovers(node, self)
        self._begun = False
        self._handovers: dict[tuple[str, int], Handover] = {}  # by the engine's id, and choice
        self._links: dict[Handover, str] = {}  # open, for sequences that are in a step still
        self._timers: dict[Handover, asyncio.TimerHandle] = {}  # until a grant
        self._paused_at: dict[Handover, float] = {}
        self._full: set[str] = set()  # nodes that had no room, until their records are read again
        self._took: dict[str, str] = {}  # attempt → the node that has another choice of it
        self._promised: Counter[str] = Counter()  # blocks asked of a node since its record was read
        self._asked: Counter[str] = Counter()  # sequences, likewise

    @property
    def attempts(self) -> set[str]:
        """Those, by the engine's id, of which something is on its way."""
        return {name for (name, _), handover in self._handovers.items() if handover.peer}

    def begin(self) -> None:
        """From now on everything that runs here is to run elsewhere."""
        self._begun = True
        self._look()

    def step_ended(self) -> None:
        self._pause_opened()
        self._look()

    def peers_changed(self) -> None:
        """What a node refused once it may take now; nobody else may be left to ask."""
        for handover in self._handovers.values():
            handover.refused.clear()
        self._full.clear()
        self._promised.clear()
        self._asked.clear()
        self._look()

    def cancel(self, attempt: Attempt, reason: str, choice: int | None = None) -> None:
        """The attempt, or one choice of it, has ended in the engine: give up what is on its way of
        it."""
        for (name, index), handover in list(self._handovers.items()):
            if name != attempt.engine_id or choice not in (None, index):
                continue
            if handover.peer and not handover.cancelled:
                self._links.pop(handover, None)
                self._sending.cancel(handover, reason)

    def _look(self) -> None:
        """Begin to move what can move, as far as some node seems to have room for it."""
        if not self._begun:
            return
        for key, handover in list(self._handovers.items()):
            if handover.sequence.status is SequenceStatus.FINISHED and not handover.peer:
                del self._handovers[key]
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
            handover = self._handovers.setdefault(key, Handover(attempt, sequence, 0))
            if self._sending.offer(handover):
                under_way.add(attempt.engine_id)

    def _asks(self, sequence: Sequence) -> int:
        """How often it was offered: where there is no room, each waits in vain in its turn."""
        handover = self._handovers.get((sequence.request_id, sequence.choice))
        return 0 if handover is None else handover.asks

    def is_to_pause(self, sequence: Sequence) -> bool:
        """Whether a link is open for it, so that it pauses as soon as no step has it."""
        return any(handover.sequence is sequence for handover in self._links)

    def _pause_opened(self) -> None:
        """Between steps: what has a link is paused, and offered as it is now."""
        for handover, link in list(self._links.items()):
            sequence = handover.sequence
            if sequence.in_flight:
                continue
            del self._links[handover]
            if not _can_move(handover.attempt, sequence):  # it ended, or was preempted
                handover.peer = ""
                continue
            self._node.engine.scheduler.pause(sequence)
            self._paused_at[handover] = time.monotonic()
            handover.length, handover.is_complete = sequence.num_computed, True
            loop = asyncio.get_running_loop()
            self._timers[handover] = loop.call_later(GRANT_S, self._withdraw, handover)
            self._sending.send_offer(handover, link)

    def _withdraw(self, handover: Handover) -> None:
        """No room in time. Nothing was committed, so that nobody can have adopted it."""
        log.info("move.withdrawn", request=handover.attempt.request.id, peer=handover.peer)
        self._full.add(handover.peer)
        self._go_on(handover)
        self._sending.cancel(handover, "no room in time")

    def _go_on(self, handover: Handover) -> None:
        """The sequence runs here again, from where it paused."""
        timer = self._timers.pop(handover, None)
        if timer is not None:
            timer.cancel()
        self._paused_at.pop(handover, None)
        handover.is_complete = False
        if handover.sequence.status is SequenceStatus.PAUSED:
            self._node.kv.go_on_writing(handover.sequence)
            self._node.engine.scheduler.resume(handover.sequence)
        self._node.wake()

    # What the handovers ask and say.

    def choose(self, handover: Handover) -> tuple[str, str] | None:
        """Of the nodes that seem to have room: the one that has another choice of this attempt,
        else the one with the most free positions."""
        node, attempt = self._node, handover.attempt.engine_id
        length = len(handover.sequence.token_ids)
        candidates = [
            record
            for record in node.peers.decoding(self._full | handover.refused)
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
        """As its record says; the node itself says it for sure."""
        running = record.running + record.waiting + record.reserved + self._asked[record.incarnation]
        free = record.free_blocks - self._promised[record.incarnation]
        blocks = -(-length // record.block_size)
        return running < record.max_num_seqs and blocks + running <= free

    def opened(self, handover: Handover, link: str) -> None:
        self._links[handover] = link
        self._pause_opened()

    def granted(self, handover: Handover) -> None:
        timer = self._timers.pop(handover, None)
        if timer is not None:
            timer.cancel()

    def adopted(self, handover: Handover) -> None:
        """It runs elsewhere: its blocks stay here as prefix cache only."""
        sequence, attempt = handover.sequence, handover.attempt
        del self._handovers[attempt.engine_id, sequence.choice]
        self._took[attempt.engine_id] = handover.peer
        paused_s = time.monotonic() - self._paused_at.pop(handover)
        log.info(
            "sequence.moved",
            request=attempt.request.id,
            attempt=attempt.number,
            choice=sequence.choice,
            peer=handover.peer,
            position=handover.length + 1,
            paused_ms=round(paused_s * 1000, 1),
        )
        node = self._node
        node.engine.pool.release(node.engine.finish(sequence, FinishReason.CANCELLED))
        self._moved(attempt, sequence.choice)
        self._look()

    def refused(self, handover: Handover, peer: str) -> None:
        if handover.found_full:
            self._full.add(peer)
            handover.found_full = False
        self._go_on(handover)
        if handover.spoiled:
            error = TransferError(f"its blocks: {handover.spoiled}")
            self._give_up(handover.attempt, error)
        self._look()

    def dropped(self, handover: Handover) -> None:
        """It was aborted here, or withdrawn; another node may be asked if it runs still."""
        self._go_on(handover)
        handover.refused.add(handover.peer)
        handover.peer, handover.key, handover.cancelled = "", None, False
        self._look()


def _can_move(attempt: Attempt, sequence: Sequence) -> bool:
    """Whether it lacks the KV of its last token only, and that token is from here: so that each
    takeover of an attempt is at a later position than the one before."""
    return (
        sequence.status is SequenceStatus.RUNNING
        and sequence.is_decoding
        and len(sequence.token_ids) > attempt.arrived.get(sequence.choice, sequence.prompt_len)
    )
