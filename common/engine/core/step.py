"""A step: what the engine runs at once, and what comes out of it.

Owns the records that pass between scheduler and core; they hold live sequences, and do not leave the
host (interface.py has what does). Ranges are half-open, positions absolute.
"""

from __future__ import annotations

import dataclasses
from itertools import accumulate

from common.engine.core.sequence import Sequence
from common.engine.interface import StepInput
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


@dataclasses.dataclass(slots=True, eq=False)
class Step:
    """What the engine runs at once: at most one chunk of a sequence, generated ones first."""

    chunks: list[Chunk] = dataclasses.field(default_factory=list)
    forked: list[Chunk] = dataclasses.field(default_factory=list)  # computed by their parent's
    parents: list[Chunk] = dataclasses.field(default_factory=list)  # of each of `forked`
    copies: list[tuple[int, int]] = dataclasses.field(default_factory=list)  # before all else
    preempted: list[Sequence] = dataclasses.field(default_factory=list)
    holds: list[list[int]] = dataclasses.field(default_factory=list)  # references that end with it
    num_generated_chunks: int = 0
    num_generated_tokens: int = 0  # drafted ones included
    num_prompt_tokens: int = 0
    input: StepInput = dataclasses.field(init=False, repr=False)  # what the runner gets; made by the core

    @property
    def num_tokens(self) -> int:
        return self.num_generated_tokens + self.num_prompt_tokens

    @property
    def has_drafts(self) -> bool:
        return any(chunk.num_drafted for chunk in self.chunks)

    @property
    def sampling(self) -> list[Chunk]:
        """The chunks of which tokens are chosen, in the order of their rows."""
        return [chunk for chunk in self.chunks if chunk.samples] + self.forked

    def sampled_rows(self) -> list[int]:
        """Where the rows of each of `sampling` begin."""
        ends = accumulate((1 + chunk.num_drafted for chunk in self.sampling), initial=0)
        return list(ends)[:-1]

    def sampled_sources(self) -> list[int]:
        """For each sampled row, which of the positions of `chunks` that sample has its logits: a fork
        has its parent's."""
        rows = {id(chunk): row for chunk, row in zip(self.sampling, self.sampled_rows(), strict=True)}
        own = sum(1 + chunk.num_drafted for chunk in self.chunks if chunk.samples)
        return [*range(own), *(rows[id(parent)] for parent in self.parents)]

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
    drafted: int  # tokens that were guessed for it
    accepted: int  # the first so many of `token_ids` were among them
