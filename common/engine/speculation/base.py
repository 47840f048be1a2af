"""What a proposer is: something that guesses the next tokens of sequences before a step.

A guess never changes the output: the engine samples every position with the noise of that
position and keeps a drafted token only where it equals the sampled one. There are two places for it:

- on the host, between the end of one step and the plan of the next (`HostProposer`): looking things up;
- on the device, within a step, after its tokens were sampled (`DeviceProposer`): computing.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from collections.abc import Sequence as AnySequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from common.engine.interface import StepInput
from common.engine.sampling.records import SampleOutput

if TYPE_CHECKING:
    from torch import Tensor

    from common.engine.core.sequence import Sequence
    from common.engine.core.step import Step


@dataclasses.dataclass(slots=True)
class DraftCounts:
    """Of one engine's life."""

    drafts: int = 0  # of a sequence, in a step
    drafted: int = 0  # tokens
    accepted: int = 0
    accepted_at: list[int] = dataclasses.field(default_factory=list)  # by the place in its draft
    saved_s: float = 0.0  # what the tokens would have taken one by one, as estimated, less what they took


class HostProposer(Protocol):
    name: str
    counts: DraftCounts

    def propose(self, sequences: AnySequence[Sequence]) -> None:
        """Set `draft_token_ids` of sequences that are decoding; leave it empty where no guess
        pays. Token ids must be in the vocabulary; the scheduler drops what does not fit."""
        ...

    def observe(self, step: Step, kept: NDArray[np.int64], seconds: float) -> None:
        """A step was computed: how many tokens each of its `sampling` chunks got, `[chunks]`, the one
        after its drafts included."""

    def ended(self, sequence: Sequence) -> None:
        """Forget what is kept for a sequence."""


class DeviceProposer(Protocol):
    def propose(
        self, step: StepInput, hidden: Tensor, sampled: SampleOutput, accepted: NDArray[np.int64]
    ) -> Mapping[int, tuple[int, ...]]:
        """By sequence id, what follows the last token that the step gives a sequence: the first
        `accepted` of its rows count. `hidden` `[rows, hidden]` are the states of the sampled rows. In
        the runner's thread."""
        ...
