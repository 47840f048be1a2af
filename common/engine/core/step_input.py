"""From a step as the scheduler made it, of live sequences, to what the runner is given: plain arrays.

Knows nothing of why the scheduler chose these chunks, or of what a device makes of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Sequence as AnySequence
from itertools import chain, repeat

import numpy as np
from numpy.typing import NDArray

from common.engine.core.sequence import Sequence
from common.engine.core.sequence_slots import SequenceSlots
from common.engine.core.step import Chunk, Step
from common.engine.interface import DraftInput, ScoredChunk, StepInput


def step_input(
    step: Step,
    slots: SequenceSlots,
    number: int,
    before: Step | None = None,
    drafts: DraftInput | None = None,
) -> StepInput:
    """Takes a sampler slot for each sequence that samples its first token. `before`: the step under way,
    whose tokens this one goes on from."""
    chunks, num_generated = step.chunks, step.num_generated_chunks
    rows = {}  # of `before`, by the sequence that they are sampled for
    if before is not None:
        sequences = (chunk.sequence for chunk in before.sampling)
        rows = dict(zip(sequences, before.sampled_rows(), strict=True))
    sampled = slots.rows(step.sampling, step.sampled_sources())
    return StepInput(
        number=number,
        copies=tuple(step.copies),
        slots=slots.changes(),
        sequence_ids=_numbers(chunk.sequence.sequence_id for chunk in chunks),
        num_generated=num_generated,
        starts=_numbers(chunk.start for chunk in chunks),
        lengths=_numbers(chunk.length for chunk in chunks),
        num_drafted=_numbers(chunk.num_drafted for chunk in chunks),
        samples=np.array([chunk.samples for chunk in chunks], np.bool_),
        token_ids=np.fromiter(
            chain.from_iterable(_tokens(chunk, rows) for chunk in chunks), np.int64, step.num_tokens
        ),
        generated_tables=block_tables([chunk.sequence for chunk in chunks[:num_generated]]),
        prompt_tables=block_tables([chunk.sequence for chunk in chunks[num_generated:]]),
        sampled=sampled,
        scored=tuple(_scored(chunks)),
        drafts=drafts,
    )


def _numbers(values: Iterable[int]) -> NDArray[np.int64]:
    return np.array(list(values), np.int64)


def _tokens(chunk: Chunk, rows: Mapping[Sequence, int]) -> list[int]:
    sequence = chunk.sequence
    known = sequence.token_ids[chunk.start : chunk.end]
    if len(known) < chunk.length - chunk.num_drafted:
        known.append(-1 - rows[sequence])
    return known + sequence.draft_token_ids[: chunk.num_drafted] if chunk.num_drafted else known


def block_tables(sequences: AnySequence[Sequence]) -> NDArray[np.int32]:
    """Side by side, `[sequences, longest]`, filled up with 0."""
    tables = [sequence.block_table for sequence in sequences]
    longest = max(map(len, tables), default=0)
    flat = chain.from_iterable(chain(table, repeat(0, longest - len(table))) for table in tables)
    return np.fromiter(flat, np.int32, len(tables) * longest).reshape(len(tables), longest)


def _scored(chunks: AnySequence[Chunk]) -> Iterator[ScoredChunk]:
    """The prompt chunks of sequences that ask for it, before their first token."""
    for index, chunk in enumerate(chunks):
        sequence, top = chunk.sequence, chunk.sequence.params.prompt_logprobs
        if top is None or not chunk.is_prompt or sequence.num_generated:
            continue
        end = min(chunk.end + 1, sequence.prompt_len)
        targets = np.array(sequence.token_ids[chunk.start + 1 : end], np.int64)
        yield ScoredChunk(index, top, targets)
