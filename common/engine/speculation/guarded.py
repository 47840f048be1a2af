"""A proposer whose errors cost drafts, never a request.

Owns the count of its failures, and when they are so many that it is asked no more.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Sequence as AnySequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from common.engine.interface import TO_BE_DRAFTED, StepResult
from common.engine.speculation.base import DraftCounts, HostProposer
from common.logs import get_logger

if TYPE_CHECKING:
    from common.engine.core.sequence import Sequence
    from common.engine.core.step import Step

log = get_logger("speculation")

MOST_FAILURES = 10  # of a proposer in an engine's life, after which it is off


class Failures:
    """Of one proposer. The first is logged with its traceback, the last with the word that it is off."""

    def __init__(self, proposer: str) -> None:
        self.count = 0
        self._proposer = proposer

    @property
    def too_many(self) -> bool:
        return self.count >= MOST_FAILURES

    @contextmanager
    def borne(self, during: str) -> Iterator[None]:
        """Count and swallow what is raised inside."""
        try:
            yield
        except Exception as error:
            self.add(during, repr(error), error)

    def add(self, during: str, what: str, error: Exception | None = None) -> None:
        self.count += 1
        if self.count == 1:
            log.error("proposer.failed", proposer=self._proposer, during=during, error=what, exc_info=error)
        if self.count == MOST_FAILURES:
            log.error("proposer.off", proposer=self._proposer, failures=self.count, error=what)


class GuardedProposer:
    """Implements `HostProposer` by another one, `inner`."""

    def __init__(self, inner: HostProposer, vocab_size: int, *, draft_positions: int = 0) -> None:
        """`draft_positions`: of a sequence, that a draft model can compute; 0 without one."""
        self.inner, self.name = inner, inner.name
        self.failures = Failures(inner.name)
        self._vocab_size, self._draft_positions = vocab_size, draft_positions

    @property
    def counts(self) -> Mapping[str, DraftCounts]:
        return self.inner.counts

    @property
    def draft_model_pays(self) -> bool:
        return self.is_on and self.inner.draft_model_pays

    @property
    def is_on(self) -> bool:
        return self.inner.is_on and not self.failures.too_many

    def propose(self, sequences: AnySequence[Sequence]) -> None:
        """No drafts where it fails, or where a draft is no token: it would fail the step of everybody."""
        if not self.is_on:
            return
        with self.failures.borne("propose"):
            self.inner.propose(sequences)
            for sequence in sequences:
                self._check(sequence, sequence.draft_token_ids)
            return
        for sequence in sequences:
            sequence.draft_token_ids, sequence.catches_up = [], False

    def _check(self, sequence: Sequence, drafts: list[int]) -> None:
        if type(drafts) is not list:
            raise TypeError(f"drafts are a list, not {drafts!r}")
        if not drafts:
            return
        reached = len(sequence.token_ids) + len(drafts) - 1
        by_model = sequence.draft_model_follows and reached <= self._draft_positions
        if by_model and drafts == [TO_BE_DRAFTED] * len(drafts):
            return
        for token in drafts:
            if type(token) is not int or not 0 <= token < self._vocab_size:
                raise ValueError(f"{token!r} was drafted, and tokens are in [0, {self._vocab_size})")

    def rehearsals(self) -> Iterator[None]:
        if self.is_on:
            with self.failures.borne("rehearsals"):
                yield from self.inner.rehearsals()

    def observe(self, step: Step, result: StepResult) -> None:
        if self.is_on:
            with self.failures.borne("observe"):
                self.inner.observe(step, result)

    def ended(self, sequence: Sequence) -> None:
        with self.failures.borne("ended"):
            self.inner.ended(sequence)
