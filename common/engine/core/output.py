"""What comes out of an engine: per step, or of a whole request.

Owns the records only; engine_core.py fills them. Positions are absolute.
"""

from __future__ import annotations

import dataclasses

from common.engine.core.sequence import Sequence
from common.engine.sampling.records import TokenLogprob
from common.errors import PdqError
from common.sampling import FinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class StepOutput:
    """What one sequence got from one step; `token_ids[i]` is at absolute `position + i`."""

    request_id: str
    choice: int
    position: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]  # empty, or one per token
    finish_reason: FinishReason | None
    sequence: Sequence
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None  # with the first choice's first
    error: PdqError | None = None
    drafted: int = 0  # tokens that were guessed for the step
    accepted: int = 0  # the first so many of `token_ids` were among them


@dataclasses.dataclass(frozen=True, slots=True)
class Completion:
    """One choice of one prompt, complete. `text` is None when the model has no tokenizer."""

    index: int
    choice: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None
    finish_reason: FinishReason
    text: str | None
