"""What a proposer is: something that guesses the next tokens of sequences before a step.

A guess never changes the output: the engine samples every position with the noise of that
position and keeps a drafted token only where it equals the sampled one. A proposer is asked on the host,
between the end of one step and the plan of the next: it looks tokens up, or says how many the draft model is
to guess at the begin of that step, on the device (runner/draft_model.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from collections.abc import Sequence as AnySequence
from typing import TYPE_CHECKING, Protocol

from common.engine.interface import StepResult

if TYPE_CHECKING:
    from common.engine.core.sequence import Sequence
    from common.engine.core.step import Step


@dataclasses.dataclass(slots=True)
class DraftCounts:
    """Of one engine's life."""

    drafts: int = 0  # of a sequence, in a step
    drafted: int = 0  # tokens
    accepted: int = 0
    failures: int = 0  # of the draft model
    accepted_at: list[int] = dataclasses.field(default_factory=list)  # by the place in its draft
    saved_s: float = 0.0  # what the tokens would have taken one by one, as estimated, less what they took

    def add(self, other: DraftCounts) -> None:
        """All but the places."""
        self.drafts += other.drafts
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.failures += other.failures
        self.saved_s += other.saved_s


class HostProposer(Protocol):
    name: str

    @property
    def counts(self) -> Mapping[str, DraftCounts]:
        """By where drafts come from."""
        ...

    @property
    def is_on(self) -> bool:
        """Whether it may draft again: while it may, no step is planned ahead of another."""
        return True

    @property
    def draft_model_pays(self) -> bool:
        """Whether the draft model should compute prompts as they come, as far as is known."""
        ...

    def propose(self, sequences: AnySequence[Sequence]) -> None:
        """Set `draft_token_ids` of sequences that are decoding; leave it empty where no guess
        pays. Token ids must be in the vocabulary, or `TO_BE_DRAFTED`, all of a sequence's; the scheduler
        drops what does not fit."""
        ...

    def rehearsals(self) -> Iterator[None]:
        """Before the first request: for each value that it gives, have it propose for a sequence of no
        request, and observe the step. So it learns what steps cost."""
        return iter(())

    def observe(self, step: Step, result: StepResult) -> None:
        """A step was computed; its sequences have not taken its tokens yet."""

    def ended(self, sequence: Sequence) -> None:
        """Forget what is kept for a sequence."""
