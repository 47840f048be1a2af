"""Which sequence has which slot of the sampler: from its first sampled token, while it runs.

Owns the slots, and how a step's sampled rows look to the sampler. Knows nothing of logits or of
when a sequence ends.
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence

import numpy as np

from common.engine.sampler import Sampler, SampleRows
from common.engine.sequence import Sequence
from common.engine.step import Chunk, Delivery


class SequenceSlots:
    """`len()` is the number of slots that are held."""

    def __init__(self, sampler: Sampler, count: int) -> None:
        self._sampler = sampler
        self._free = list(range(count - 1, -1, -1))
        self._held: dict[int, int] = {}  # sequence id → slot

    def __len__(self) -> int:
        return len(self._held)

    def take(self, sequence: Sequence) -> int:
        """The sequence's slot, filled when it had none."""
        slot = self._held.get(sequence.sequence_id)
        if slot is None:
            slot = self._free[-1]
            self._sampler.add(
                slot, sequence.params, sequence.choice, sorted(sequence.stop_ids),
                sequence.token_ids[: sequence.prompt_len],
                sequence.token_ids[sequence.prompt_len :],
            )  # fmt: skip
            self._held[sequence.sequence_id] = self._free.pop()
        return slot

    def give_back(self, sequence: Sequence) -> None:
        """Free the sequence's slot, if it has one."""
        slot = self._held.pop(sequence.sequence_id, None)
        if slot is not None:
            self._sampler.remove(slot)
            self._free.append(slot)

    def append(self, deliveries: AnySequence[Delivery]) -> None:
        """Tell the sampler what was accepted, for penalties."""
        slots = [self._held[delivery.sequence.sequence_id] for delivery in deliveries]
        counts = [len(delivery.token_ids) for delivery in deliveries]
        tokens = [token for delivery in deliveries for token in delivery.token_ids]
        if tokens:
            self._sampler.append(np.repeat(np.array(slots), counts), np.array(tokens))

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
