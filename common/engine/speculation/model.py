"""Drafts of a draft model: it guesses them itself, at the begin of the step that verifies them.

Owns for whom it can guess, and how far.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from common.engine.interface import TO_BE_DRAFTED

if TYPE_CHECKING:
    from common.engine.core.sequence import Sequence


class ModelSource:
    """Implements `DraftSource`. `max_model_len`: positions of a sequence that the draft model computes."""

    name = "draft"
    prior = 0.6  # of a token of a draft model, how often it is right
    by_model = True

    def __init__(self, max_model_len: int) -> None:
        self._max_model_len = max_model_len

    def draft(self, sequence: Sequence, count: int) -> list[int]:
        if not sequence.draft_model_follows:
            return []
        return [TO_BE_DRAFTED] * min(count, self._max_model_len - len(sequence.token_ids) + 1)

    def ended(self, sequence: Sequence) -> None:
        """Nothing is kept."""
