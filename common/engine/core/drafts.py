"""What the draft model does in a step, and how far it has come with each sequence.

It computes what the model computes of a prompt, in the same step, so that it can guess from the first
token on, and its KV goes wherever the prompt's goes. Of a reply it computes what it needs to guess; where
nothing was guessed for a while it lacks positions, and computes them before it guesses again: a few of them
on the way, many in steps before (`Sequence.catches_up`). How many tokens are guessed is not decided here.
"""

from __future__ import annotations

from itertools import chain

import numpy as np

from common.engine.core.block_pool import BlockPool
from common.engine.core.sequence import Sequence, SequenceStatus
from common.engine.core.step import Chunk, Step
from common.engine.core.step_input import block_tables
from common.engine.interface import DraftFacts, DraftInput, DraftReport

FEW = 16  # positions of a sequence that are computed one by one, as generated ones are


def draft_input(step: Step, budget: int, max_len: int, *, prompts: bool) -> DraftInput | None:
    """`budget`: how many positions that were computed by the model before may be made up for in this step.
    `prompts`: whether prompts are computed as they come. `max_len`: beyond it nothing can be."""
    entries: list[tuple[int, Chunk, int, int]] = []  # chunk's index, chunk, start, end
    for index, chunk in enumerate(step.chunks):
        sequence = chunk.sequence
        if not sequence.draft_model_follows:
            continue
        end = min(chunk.end - chunk.num_drafted, max_len)
        start = sequence.num_draft_computed
        if not chunk.num_drafted and not sequence.catches_up and not (prompts and _is_recomputed(chunk)):
            continue
        if chunk.num_drafted and not sequence.is_drafted_by_model:
            continue
        if not chunk.num_drafted:
            late = max(0, chunk.start - start)
            end -= max(0, late - budget)
            budget -= min(late, budget)
        if start < end:
            entries.append((index, chunk, start, end))
    if not entries:
        return None
    entries.sort(key=lambda entry: entry[3] - entry[2] > FEW)
    num_generated = sum(end - start <= FEW for _, _, start, end in entries)
    sequences = [chunk.sequence for _, chunk, _, _ in entries]
    return DraftInput(
        num_generated=num_generated,
        starts=np.array([start for _, _, start, _ in entries], np.int64),
        lengths=np.array([end - start for _, _, start, end in entries], np.int64),
        token_ids=np.fromiter(
            chain.from_iterable(chunk.sequence.token_ids[start:end] for _, chunk, start, end in entries),
            np.int64,
        ),
        generated_tables=block_tables(sequences[:num_generated]),
        prompt_tables=block_tables(sequences[num_generated:]),
        chunks=np.array([index for index, _, _, _ in entries], np.int64),
        counts=np.array([chunk.num_drafted for _, chunk, _, _ in entries], np.int64),
    )


def _is_recomputed(chunk: Chunk) -> bool:
    """Whether a chunk is of what was known before: a prompt, or tokens that are replayed."""
    return chunk.is_prompt or chunk.length > 1 or not chunk.samples


def advance(step: Step, report: DraftReport, facts: DraftFacts, pool: BlockPool) -> None:
    """Take in what was computed, after the step's tokens were accepted."""
    wanted = step.input.drafts
    assert wanted is not None
    if report.error and not report.forgotten:
        return
    ends = wanted.starts + wanted.lengths
    if not facts.by_text:
        ends += np.maximum(wanted.counts - 1, 0)  # all drafts but the last were computed, too
    for index, end in zip(wanted.chunks.tolist(), ends.tolist(), strict=True):
        sequence = step.chunks[index].sequence
        if sequence.sequence_id in report.forgotten:
            sequence.num_draft_computed = 0
        elif sequence.sequence_id in report.faulty:
            give_up(sequence, pool)
        elif sequence.status is SequenceStatus.RUNNING:
            end = min(end, sequence.num_computed)
            if not facts.by_text:
                size = pool.block_size
                pool.mark_drafted(sequence.block_table[sequence.num_draft_computed // size : end // size])
            sequence.num_draft_computed = max(sequence.num_draft_computed, end)
    if facts.by_text:
        return
    for forked, parent in zip(step.forked, step.parents, strict=True):
        if forked.sequence.status is SequenceStatus.RUNNING:
            forked.sequence.num_draft_computed = parent.sequence.num_draft_computed


def give_up(sequence: Sequence, pool: BlockPool) -> None:
    """The draft model gives no numbers for what it is; nobody is to go on from it, nor from what it is a copy
    of."""
    pool.unmark_drafted(sequence.block_table + pool.lookup(sequence.block_hashes))
    sequence.num_draft_computed, sequence.draft_model_follows = 0, False
