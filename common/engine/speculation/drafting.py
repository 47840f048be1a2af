"""Drafts of a source for the sequences of a step, as many as pay.

Owns what was measured of each sequence's drafts, and what all of them came to. Where the drafts come from is
a `DraftSource`'s, how many pay is lengths.py's.
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from common.engine.speculation.base import DraftCounts
from common.engine.speculation.lengths import Acceptance, StepCosts, choose_lengths

if TYPE_CHECKING:
    from common.engine.core.sequence import Sequence
    from common.engine.core.step import Step

MOST_SURE = 0.995  # of a draft: nobody knows more


class DraftSource(Protocol):
    name: str
    prior: float  # how often a draft is right, before any was tried; 0 to 1

    def draft(self, sequence: Sequence, count: int) -> list[int]:
        """Up to `count` tokens that may follow those of the sequence."""
        ...

    def ended(self, sequence: Sequence) -> None:
        """Forget what is kept for a sequence."""
        ...


class Drafting:
    """Implements `HostProposer`. `most` tokens for a sequence in a step."""

    def __init__(self, source: DraftSource, most: int, costs: StepCosts | None = None) -> None:
        self.source, self.most, self.name = source, most, source.name
        self.counts = DraftCounts(accepted_at=[0] * most)
        self._costs = costs or StepCosts()
        self._prior = Acceptance()  # of the drafts of all sequences
        self._acceptance: dict[int, Acceptance] = {}  # by sequence id

    def propose(self, sequences: AnySequence[Sequence]) -> None:
        drafts: list[tuple[Sequence, list[int]]] = []
        for sequence in sequences:
            room = sequence.room_for_drafts
            sequence.draft_token_ids = []
            if room > 0 and sequence.speculates:
                drafts.append((sequence, self.source.draft(sequence, min(self.most, room))))
        prior = self._prior.rate(self.source.prior)
        known = [self._acceptance.setdefault(s.sequence_id, Acceptance()) for s, _ in drafts]
        rates = [min(MOST_SURE, acceptance.rate(prior)) for acceptance in known]
        lengths = choose_lengths(
            self._costs, rates, [len(draft) for _, draft in drafts], len(sequences) - len(drafts)
        )
        for (sequence, draft), length in zip(drafts, lengths, strict=True):
            sequence.draft_token_ids = draft[:length]

    def observe(self, step: Step, kept: NDArray[np.int64], seconds: float) -> None:
        counts, tokens = self.counts, 0
        for chunk, count in zip(step.sampling, kept.tolist(), strict=True):
            accepted = max(0, count - 1)
            if chunk.is_prompt or not chunk.sequence.speculates:
                continue
            acceptance = self._acceptance.get(chunk.sequence.sequence_id)
            if acceptance is not None:  # it has not been aborted
                acceptance.observe(chunk.num_drafted, accepted)
            tokens += count
            if chunk.num_drafted:
                self._prior.observe(chunk.num_drafted, accepted)
                counts.drafts += 1
                counts.drafted += chunk.num_drafted
                counts.accepted += accepted
                for place in range(accepted):
                    counts.accepted_at[place] += 1
        if step.num_prompt_tokens or not step.num_generated_tokens:
            return
        rows, chunks = step.num_generated_tokens, step.num_generated_chunks
        if self._costs.took(rows, seconds) and step.has_drafts:
            plain, drafted = self._costs.of(np.array([chunks, rows])).tolist()
            counts.saved_s += seconds * (plain / drafted * tokens / chunks - 1)

    def ended(self, sequence: Sequence) -> None:
        self._acceptance.pop(sequence.sequence_id, None)
        self.source.ended(sequence)
