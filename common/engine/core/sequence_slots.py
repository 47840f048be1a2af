"""Which sequence has which slot of the sampler: from its first sampled token, while it runs.

Owns the slots, what the sampler has to hear about them before the next step, and how a step's sampled
rows look to it. Knows nothing of logits or of when a sequence ends.
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence

import numpy as np

from common.engine.core.sequence import Sequence
from common.engine.core.step import Chunk
from common.engine.interface import SlotChanges, SlotOpening
from common.engine.sampling.records import SampleRows

_NOTHING = np.empty(0, np.int64)


class SequenceSlots:
    """`len()` is the number of slots that are held."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._free = list(range(count - 1, -1, -1))
        self._held: dict[int, int] = {}  # sequence id → slot
        self._reset = False
        self._closed: list[int] = []
        self._opened: list[SlotOpening] = []

    def __len__(self) -> int:
        return len(self._held)

    def changes(self) -> SlotChanges:
        """What the sampler has not heard of yet, for the next step."""
        changes = SlotChanges(self._reset, tuple(self._closed), tuple(self._opened))
        self._forget_changes(reset=False)
        return changes

    def reset(self) -> None:
        """A step has failed, and how much of its changes was made is unknown: every slot is given
        back, and filled anew from its sequence's tokens when that samples next."""
        self._free = list(range(self._count - 1, -1, -1))
        self._held.clear()
        self._forget_changes(reset=True)

    def take(self, sequence: Sequence) -> int:
        """The sequence's slot, filled when it had none."""
        slot = self._held.get(sequence.sequence_id)
        if slot is None:
            slot = self._held[sequence.sequence_id] = self._free.pop()
            prompt = generated = _NOTHING
            if sequence.params.has_penalties:
                tokens = np.array(sequence.token_ids, np.int64)
                prompt, generated = np.split(tokens, [sequence.prompt_len])
            opening = SlotOpening(
                slot,
                sequence.params,
                sequence.choice,
                tuple(sorted(sequence.stop_ids)),
                sequence.prompt_len,
                prompt,
                generated,
            )
            self._opened.append(opening)
        return slot

    def give_back(self, sequence: Sequence) -> None:
        """Free the sequence's slot, if it has one."""
        slot = self._held.pop(sequence.sequence_id, None)
        if slot is not None:
            self._closed.append(slot)
            self._free.append(slot)

    def rows(self, chunks: AnySequence[Chunk], sources: AnySequence[int]) -> SampleRows:
        """The last 1 + num_drafted rows of each chunk; `sources` are the rows of their logits."""
        counts = np.array([1 + chunk.num_drafted for chunk in chunks], np.int64)
        offsets = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        ends = np.array([chunk.end for chunk in chunks], np.int64)
        slots = np.array([self.take(chunk.sequence) for chunk in chunks], np.int64)
        drafted = [t for c in chunks for t in c.sequence.draft_token_ids[: c.num_drafted]]
        return SampleRows(
            slots=np.repeat(slots, counts),
            positions=np.repeat(ends - counts + 1, counts) + offsets,
            drafted=np.array(drafted, np.int64),
            draft_start=np.repeat(np.cumsum(counts - 1) - (counts - 1), counts),
            draft_length=offsets,
            sources=np.array(sources, np.int64),
        )

    def _forget_changes(self, *, reset: bool) -> None:
        self._reset = reset
        self._closed, self._opened = [], []
