"""Drafts for the sequences of a step, of the source that promises most, as many as pay.

Owns what was measured of each sequence's drafts, and what all of them came to. Where drafts come from is a
`DraftSource`'s, how many pay is lengths.py's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from collections.abc import Sequence as AnySequence
from typing import TYPE_CHECKING, NamedTuple, Protocol

import numpy as np

from common.engine.interface import TO_BE_DRAFTED, DraftReport, StepResult
from common.engine.speculation.base import DraftCounts
from common.engine.speculation.guarded import Failures
from common.engine.speculation.lengths import (
    REHEARSED,
    Acceptance,
    RoundCosts,
    StepCosts,
    choose_lengths,
    gain,
)

if TYPE_CHECKING:
    from common.engine.core.sequence import Sequence
    from common.engine.core.step import Chunk, Step

MOST_SURE = 0.995  # of a draft: nobody knows more
ANY_TOKEN = 0  # in a rehearsal
CAUGHT_UP_AT_ONCE = 64  # positions that the draft model lacks of a sequence for which it guesses
PATIENCE = 64  # steps without a draft of the draft model, after which it leaves prompts alone


class DraftSource(Protocol):
    name: str
    prior: float  # how often a draft is right, before any was tried; 0 to 1
    by_model: bool  # the tokens are `TO_BE_DRAFTED`

    def draft(self, sequence: Sequence, count: int) -> list[int]:
        """Up to `count` tokens that may follow those of the sequence."""
        ...

    def ended(self, sequence: Sequence) -> None:
        """Forget what is kept for a sequence."""
        ...


class _Draft(NamedTuple):
    """Of one sequence for the next step."""

    sequence: Sequence
    source: DraftSource
    rate: float  # of its acceptance
    tokens: list[int]


class Drafting:
    """Implements `HostProposer`. `most` tokens for a sequence in a step; of equal sources the first."""

    def __init__(
        self,
        sources: AnySequence[DraftSource],
        most: int,
        costs: StepCosts | None = None,
        rounds: RoundCosts | None = None,
    ) -> None:
        """`rounds`: of the draft model, where one of the sources is one."""
        self.sources, self.most = sources, most
        self.name = "+".join(source.name for source in sources)
        self.counts = {source.name: DraftCounts(accepted_at=[0] * most) for source in sources}
        self._costs = costs or StepCosts()
        self._rounds = rounds or RoundCosts(0.0)
        self._priors = {source.name: Acceptance() for source in sources}  # of all sequences
        self._acceptance: dict[int, dict[str, Acceptance]] = {}  # by sequence id and source
        self._drafted_by: dict[int, str] = {}  # of the step under way: sequence id to source
        self._without_model = 0  # steps in a row
        self._rehearsed: list[int] | None = None  # drafts of a rehearsal
        self._model_failures = Failures("draft model")

    @property
    def is_on(self) -> bool:
        return bool(self.sources)

    @property
    def draft_model_pays(self) -> bool:
        return self._without_model < PATIENCE and not self._model_failures.too_many

    def rehearsals(self) -> Iterator[None]:
        """Each size twice, the larger ones first, for what is touched first takes longer; then the draft
        model."""
        runs = [[ANY_TOKEN] * (rows - 1) for _ in range(2) for rows in reversed(REHEARSED)]
        if any(source.by_model for source in self.sources):
            runs += [[TO_BE_DRAFTED] * min(2, self.most)] * 2
        try:
            for self._rehearsed in runs:
                yield
        finally:
            self._rehearsed = None

    def propose(self, sequences: AnySequence[Sequence]) -> None:
        if self._rehearsed is not None:
            for sequence in sequences:
                self._rehearse(sequence, self._rehearsed[: max(0, sequence.room_for_drafts)])
            return
        self._drafted_by.clear()
        count = len(sequences)
        round_cost = self._rounds.of(count, self._costs)
        share = round_cost / float(self._costs.of(np.array([count]))[0])
        drafts: list[_Draft] = []
        for sequence in sequences:
            sequence.draft_token_ids, sequence.catches_up = [], False
            if sequence.speculates and (draft := self._best(sequence, share)) is not None:
                drafts.append(draft)
        by_model = [draft.source.by_model for draft in drafts]
        lengths = choose_lengths(
            self._costs,
            [draft.rate for draft in drafts],
            [len(draft.tokens) for draft in drafts],
            count - len(drafts),
            by_model,
            round_cost,
        )
        # One at a time: whether its drafts are of use is known before the next one's turn.
        may_catch_up = True
        for draft, length in zip(drafts, lengths, strict=True):
            sequence = draft.sequence
            lacking = len(sequence.token_ids) - sequence.num_draft_computed if draft.source.by_model else 0
            if length and lacking <= CAUGHT_UP_AT_ONCE:
                sequence.draft_token_ids = draft.tokens[:length]
                self._drafted_by[sequence.sequence_id] = draft.source.name
            elif length and may_catch_up:
                sequence.catches_up, may_catch_up = True, False
        if any(by_model):
            used = any(length for length, of_model in zip(lengths, by_model, strict=True) if of_model)
            self._without_model = 0 if used else self._without_model + 1

    def _rehearse(self, sequence: Sequence, drafts: list[int]) -> None:
        if TO_BE_DRAFTED in drafts:  # no further than the draft model reaches
            (source,) = (source for source in self.sources if source.by_model)
            drafts = source.draft(sequence, len(drafts))
        sequence.draft_token_ids = drafts

    def _best(self, sequence: Sequence, share: float) -> _Draft | None:
        """The draft of which most is to be expected; `share`: of a step's time, that of a round of the draft
        model."""
        room = min(self.most, sequence.room_for_drafts)
        best, most = None, 0.0
        for source in self.sources if room > 0 else ():
            tokens = source.draft(sequence, room)
            if not tokens:
                continue
            known = self._acceptance.setdefault(sequence.sequence_id, {})
            acceptance = known.setdefault(source.name, Acceptance())
            rate = min(MOST_SURE, acceptance.rate(self._priors[source.name].rate(source.prior)))
            expected = gain(rate, len(tokens), share if source.by_model else 0.0)
            if best is None or expected > most:
                best, most = _Draft(sequence, source, rate, tokens), expected
        return best

    def observe(self, step: Step, result: StepResult) -> None:
        report = result.drafts
        if report is not None and report.error:
            self._model_fails(report.error)
        tokens, drafted_by = 0, Counter[str]()
        for chunk, kept in zip(step.sampling, result.accepted.tolist(), strict=True):
            if chunk.is_prompt or not chunk.sequence.speculates:
                continue
            tokens += kept
            source = self._source_of(chunk, report)
            for name, acceptance in self._acceptance.get(chunk.sequence.sequence_id, {}).items():
                of_it = name == source
                acceptance.observe(chunk.num_drafted if of_it else 0, max(0, kept - 1) if of_it else 0)
            if source:
                drafted_by[source] += chunk.num_drafted
                self._count(source, chunk.num_drafted, max(0, kept - 1))
        for name, prior in self._priors.items():
            if name not in drafted_by:
                prior.observe(0, 0)
        if step.num_prompt_tokens or not step.num_generated_tokens:
            return
        self._learn(step, result, tokens, drafted_by)

    def _source_of(self, chunk: Chunk, report: DraftReport | None) -> str:
        """Where the drafts of a chunk are from; "" where it has none, or some that stand in for what the
        draft model could not make."""
        name = chunk.sequence.sequence_id
        if not chunk.num_drafted or name not in self._drafted_by:
            return ""
        stand_in = report is not None and (report.error or name in report.faulty | report.forgotten)
        if stand_in and chunk.sequence.is_drafted_by_model:
            return ""
        return self._drafted_by[name]

    def _model_fails(self, error: str) -> None:
        self._model_failures.add("draft", error)
        for source in self.sources:
            if source.by_model:
                self.counts[source.name].failures += 1
        if self._model_failures.too_many:
            self.sources = [source for source in self.sources if not source.by_model]

    def _count(self, source: str, drafted: int, accepted: int) -> None:
        self._priors[source].observe(drafted, accepted)
        counts = self.counts[source]
        counts.drafts += 1
        counts.drafted += drafted
        counts.accepted += accepted
        for place in range(accepted):
            counts.accepted_at[place] += 1

    def _learn(self, step: Step, result: StepResult, tokens: int, drafted_by: Counter[str]) -> None:
        """What the parts of a step cost that only generates, and what its drafts have saved."""
        rows, chunks = step.num_generated_tokens, step.num_generated_chunks
        wanted, report, seconds = step.input.drafts, result.drafts, result.seconds
        if report is not None and wanted is not None:
            seconds -= report.seconds
            if wanted.num_generated == wanted.num_chunks and wanted.counts.any() and not report.error:
                members = int(np.count_nonzero(wanted.counts))
                self._rounds.took(members, report.seconds / int(wanted.counts.max()))
        if self._costs.took(rows, seconds) and drafted_by:
            plain, drafted = self._costs.of(np.array([chunks, rows])).tolist()
            saved = seconds * plain / drafted * tokens / chunks - result.seconds
            for source, count in drafted_by.items():
                self.counts[source].saved_s += saved * count / drafted_by.total()

    def ended(self, sequence: Sequence) -> None:
        self._acceptance.pop(sequence.sequence_id, None)
        for source in self.sources:
            source.ended(sequence)
