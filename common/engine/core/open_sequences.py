"""The open sequences of an engine: who waits, runs or is paused, in what order, and in which steps.

Owns: the states of sequences, and that each block of one is released once, never while a step that is under
way has it. Whose turn it is, and what a step is made of, is the scheduler's.
"""

from __future__ import annotations

import collections.abc
from bisect import bisect_left, insort
from collections import Counter
from collections.abc import Iterable
from itertools import chain
from operator import attrgetter

from common.engine.core.block_pool import BlockPool
from common.engine.core.sequence import Sequence, SequenceStatus
from common.engine.core.step import Step
from common.sampling import FinishReason

_order = attrgetter("order")


class OpenSequences:
    """`finish` and `abort` may be called at any time, `pause` and `finish(keep_blocks=True)` for a sequence
    that is in no step."""

    def __init__(self, pool: BlockPool) -> None:
        self.pool = pool
        self.num_preemptions = 0
        self._waiting: list[Sequence] = []  # both most important first
        self._running: list[Sequence] = []
        self._paused: set[Sequence] = set()
        self._requests: dict[str, dict[int, Sequence]] = {}
        self._steps: list[Step] = []  # under way, the older first

    @property
    def running(self) -> collections.abc.Sequence[Sequence]:
        """Most important first; a live view, not to be changed."""
        return self._running

    @property
    def waiting(self) -> collections.abc.Sequence[Sequence]:
        """Most important first; a live view, not to be changed."""
        return self._waiting

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_paused(self) -> int:
        return len(self._paused)

    @property
    def has_work(self) -> bool:
        return bool(self._running or self._waiting)

    def is_open(self, request_id: str) -> bool:
        """Whether any sequence of it has not ended."""
        return request_id in self._requests

    def pause(self, sequence: Sequence) -> None:
        """Leave a running sequence out of the next steps; its blocks and its slot stay its own."""
        assert not sequence.in_flight, "a step under way has it"
        _remove(self._running, sequence)
        sequence.draft_token_ids = []
        sequence.move_to(SequenceStatus.PAUSED)
        self._paused.add(sequence)

    def resume(self, sequence: Sequence) -> None:
        """Let a paused sequence take part again, from the next step on."""
        self._paused.remove(sequence)
        self._run(sequence)

    def finish(self, sequence: Sequence, reason: FinishReason, *, keep_blocks: bool = False) -> list[int]:
        """End a sequence; one that has ended already stays as it is.

        Its blocks are released, or with `keep_blocks` returned together with their references.
        """
        if sequence.status is SequenceStatus.FINISHED:
            return []
        members = self._requests[sequence.request_id]
        del members[sequence.sequence_id]
        if not members:
            del self._requests[sequence.request_id]
        kept: list[int] = []
        if sequence.status is SequenceStatus.WAITING:
            _remove(self._waiting, sequence)
        else:
            if sequence.status is SequenceStatus.PAUSED:
                self._paused.remove(sequence)
            else:
                _remove(self._running, sequence)
            if keep_blocks:
                assert not sequence.in_flight, "a step under way has it"
                kept, sequence.block_table = sequence.block_table, []
            else:
                self._release_blocks(sequence)
        sequence.move_to(SequenceStatus.FINISHED)
        sequence.finish_reason = reason
        sequence.draft_token_ids = []
        return kept

    def sequence(self, request_id: str, choice: int) -> Sequence | None:
        """What runs, waits or is paused for this choice; None for one that waits for its prompt."""
        members = self._requests.get(request_id, {}).values()
        return next((sequence for sequence in members if sequence.choice == choice), None)

    def abort(self, request_id: str, reason: FinishReason = FinishReason.CANCELLED) -> list[Sequence]:
        """Finish every sequence of a request; returns those that had not ended."""
        sequences = list(self._requests.get(request_id, {}).values())
        for sequence in sequences:
            self.finish(sequence, reason)
        return sequences

    def check_blocks(self, held_beside: Iterable[collections.abc.Sequence[int]]) -> None:
        """Prove that each is where its state says, and that its blocks have their references, with those
        that are held for nobody here; raises AssertionError."""
        held = Counter(chain.from_iterable(held_beside))
        for sequence in chain(self._running, self._paused):
            paused = sequence in self._paused
            assert sequence.status is (SequenceStatus.PAUSED if paused else SequenceStatus.RUNNING)
            assert self.pool.blocks_for(sequence.num_computed) <= len(sequence.block_table)
            held.update(sequence.block_table)
            filled = sum(map(self.pool.num_filled, sequence.block_table))
            assert filled >= sequence.num_computed, "slots with a token count as unfilled"
        for sequence in self._waiting:
            assert sequence.status is SequenceStatus.WAITING
            assert (sequence.block_table, sequence.num_computed) == ([], 0)
        for block_id, count in held.items():
            assert count <= self.pool.references(block_id), f"block {block_id} lacks references"
        registered = sum(len(members) for members in self._requests.values())
        assert registered == len(self._running) + len(self._paused) + len(self._waiting)

    # For the scheduler.

    def _register(self, sequence: Sequence) -> None:
        assert sequence.status is SequenceStatus.WAITING
        members = self._requests.setdefault(sequence.request_id, {})
        assert sequence.sequence_id not in members, f"sequence {sequence.sequence_id} twice"
        members[sequence.sequence_id] = sequence

    def _wait(self, sequence: Sequence) -> None:
        insort(self._waiting, sequence, key=_order)

    def _run(self, sequence: Sequence) -> None:
        sequence.move_to(SequenceStatus.RUNNING)
        insort(self._running, sequence, key=_order)

    def _preempt(self, sequence: Sequence) -> None:
        """Back to its place among the waiting, to recompute; full blocks remain as cache. A step that
        has it still gives it its token."""
        _remove(self._running, sequence)
        self._release_blocks(sequence)
        sequence.num_computed = sequence.num_published = sequence.num_draft_computed = 0
        sequence.draft_token_ids = []
        sequence.move_to(SequenceStatus.WAITING)
        self._wait(sequence)
        self.num_preemptions += 1

    def _release_blocks(self, sequence: Sequence) -> None:
        """At once, or when the last step that has it has ended."""
        if sequence.in_flight:
            self._steps[-1].holds.append(sequence.block_table)
        else:
            self.pool.release(sequence.block_table)
        sequence.block_table = []

    def _begin_step(self, step: Step) -> None:
        """What its sequences compute and get in it is under way."""
        self._steps.append(step)
        for chunk in step.chunks:
            chunk.sequence.in_flight += chunk.length
            chunk.sequence.pending += chunk.samples
            self.pool.fill(chunk.sequence.block_table, chunk.start, chunk.end - chunk.num_drafted)

    def _end_step(self, step: Step) -> None:
        if step.chunks:
            self._steps.remove(step)
        for chunk in step.chunks:
            chunk.sequence.in_flight -= chunk.length
            chunk.sequence.pending -= chunk.samples
        for chunk in step.forked:  # in no younger one
            chunk.sequence.in_flight = chunk.sequence.pending = 0

    def _release_holds(self, step: Step) -> None:
        for block_ids in step.holds:
            self.pool.release(block_ids)
        step.holds.clear()


def _remove(ordered: list[Sequence], sequence: Sequence) -> None:
    index = bisect_left(ordered, sequence.order, key=_order)
    assert ordered[index] is sequence
    del ordered[index]
