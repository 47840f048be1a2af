"""What a proposer is: something that guesses the next tokens of sequences before a step.

A guess never changes the output: the engine samples every position with the noise of that
position and keeps a drafted token only where it equals the sampled one.
"""

from __future__ import annotations

from collections.abc import Sequence as AnySequence
from typing import Protocol

from common.engine.sequence import Sequence


class Proposer(Protocol):
    def propose(self, sequences: AnySequence[Sequence]) -> None:
        """Set `draft_token_ids` of sequences that are decoding; leave it empty where no guess
        pays. Token ids must be in the vocabulary; the scheduler drops what does not fit."""
        ...
