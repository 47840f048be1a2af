"""A step: what the engine runs at once, and what comes out of it.

Owns the records that pass between scheduler and engine. Ranges are half-open, positions absolute.
"""

from __future__ import annotations

import dataclasses

from common.engine.sequence import Sequence
from common.sampling import FinishReason


@dataclasses.dataclass(frozen=True, slots=True)
class Chunk:
    """Positions [start, start + length) of one sequence, all prompt or all generated."""

    sequence: Sequence
    start: int
    length: int
    num_drafted: int  # the last ones, whose tokens are `sequence.draft_token_ids`
    is_prompt: bool
    samples: bool  # reaches the end of what is known: its last 1 + num_drafted rows are sampled

    @property
    def end(self) -> int:
        return self.start + self.length


@dataclasses.dataclass(slots=True)
class Step:
    """What the engine runs at once: at most one chunk of a sequence, generated ones first."""

    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    forked: list[Chunk] = dataclasses.field(default_factory=list)  # computed by their parent's
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # before all else
    preempted: list[Sequence] = dataclasses.field(default_factory=list)
    num_generated_chunks: int = 0
    num_generated_tokens: int = 0  # drafted ones included
    num_prompt_tokens: int = 0

    @property
    def num_tokens(self) -> int:
        return self.num_generated_tokens + self.num_prompt_tokens

    def append(self, chunk: Chunk) -> None:
        if chunk.is_prompt:
            self.chunks.append(chunk)
            self.num_prompt_tokens += chunk.length
        else:
            self.chunks.insert(self.num_generated_chunks, chunk)
            self.num_generated_chunks += 1
            self.num_generated_tokens += chunk.length


@dataclasses.dataclass(frozen=True, slots=True)
class Delivery:
    """What a sequence got from a step."""

    sequence: Sequence
    position: int  # absolute, of the first of the tokens
    token_ids: list[int]
    finish_reason: FinishReason | None
