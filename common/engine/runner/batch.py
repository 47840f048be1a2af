"""From a step's chunks to the rows that the model computes: one ragged batch, still on the host.

Owns the order of rows and their padding, and which rows are sampled. Knows nothing of sequences, of why
the scheduler chose these chunks, or of what a device makes of the rows.

    rows      [ generated … | padding | prompt … | padding ]
    sampled   for each chunk that samples, in order, its last 1 + num_drafted rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from common.engine.interface import StepInput


@dataclasses.dataclass(frozen=True, slots=True)
class RowPlan:
    """How many rows one matrix product takes, so that its kernel never depends on the batch.

    Prompt rows go in calls of exactly `prompt_rows` (the last one filled up); generated rows in
    calls of at most `generated_rows`, each a multiple of `generated_multiple`.
    """

    prompt_rows: int
    generated_rows: int
    generated_multiple: int
    query_tile: int  # positions per unit of prompt attention; leaves no trace in the bits

    def slices(self, rows: int, padded_generated: int) -> Iterator[slice]:
        """The calls that `rows` rows take: half-open, in order, all of them."""
        for start in range(0, padded_generated, self.generated_rows):
            yield slice(start, min(start + self.generated_rows, padded_generated))
        for start in range(padded_generated, rows, self.prompt_rows):
            yield slice(start, start + self.prompt_rows)

    def padded_generated(self, rows: int) -> int:
        return -(-rows // self.generated_multiple) * self.generated_multiple

    def padded_prompt(self, rows: int) -> int:
        return -(-rows // self.prompt_rows) * self.prompt_rows


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a step. `devices.device.Rows` has them as a device wants them."""

    token_ids: NDArray[np.int64]  # [rows]; 0 in padding
    positions: NDArray[np.int64]  # [rows], absolute; 0 in padding
    slots: NDArray[np.int64]  # [rows]: block * block_size + offset; -1 in padding
    num_generated: int  # rows, without padding
    padded_generated: int  # where the prompt rows begin
    generated_tables: NDArray[np.int32]  # [num_generated, blocks]
    generated_lengths: NDArray[np.int32]  # [num_generated]: positions that each row sees
    prompt_chunks: tuple[tuple[int, int, int], ...]  # first row, rows, first position
    prompt_tiles: NDArray[np.int32]  # [tiles, 4]: first row, rows, first position, prompt chunk
    prompt_tables: NDArray[np.int32]  # [prompt chunks, blocks]
    first_rows: NDArray[np.int64]  # [chunks]
    sampled: NDArray[np.int64]  # rows whose logits choose a token, in the order of chunks


def lay_out(step: StepInput, block_size: int, plan: RowPlan) -> Batch:
    generated = step.num_generated
    lengths, ends = step.lengths, np.cumsum(step.lengths)
    num_generated = int(lengths[:generated].sum())
    num_prompt = len(step.token_ids) - num_generated
    border = plan.padded_generated(num_generated)
    shift = border - num_generated  # of the prompt rows, for the padding before them
    first_rows = ends - lengths
    first_rows[generated:] += shift

    known = np.concatenate(
        (np.arange(num_generated), np.arange(num_prompt) + border), dtype=np.int64
    )  # the rows that are no padding
    chunk_of = np.repeat(np.arange(step.num_chunks), lengths)
    here = (
        np.arange(len(known)) - np.repeat(ends - lengths, lengths) + np.repeat(step.starts, lengths)
    )
    at = here // block_size
    blocks = np.concatenate(
        (
            step.generated_tables[chunk_of[:num_generated], at[:num_generated]],
            step.prompt_tables[chunk_of[num_generated:] - generated, at[num_generated:]],
        )
    ).astype(np.int64)

    total = border + plan.padded_prompt(num_prompt)
    token_ids, positions = np.zeros(total, np.int64), np.zeros(total, np.int64)
    slots = np.full(total, -1, np.int64)
    token_ids[known], positions[known] = step.token_ids, here
    slots[known] = blocks * block_size + here % block_size

    prompts = range(generated, step.num_chunks)
    prompt_chunks = tuple(
        (int(first_rows[chunk]), int(lengths[chunk]), int(step.starts[chunk])) for chunk in prompts
    )
    tiles = [
        (row + offset, min(plan.query_tile, length - offset), start + offset, index)
        for index, (row, length, start) in enumerate(prompt_chunks)
        for offset in range(0, length, plan.query_tile)
    ]
    counts = np.where(step.samples, 1 + step.num_drafted, 0)
    sampled_before = np.repeat(np.cumsum(counts) - counts, counts)
    sampled_from = np.repeat(first_rows + lengths - counts, counts)
    return Batch(
        token_ids=token_ids,
        positions=positions,
        slots=slots,
        num_generated=num_generated,
        padded_generated=border,
        generated_tables=(
            np.repeat(step.generated_tables, lengths[:generated], axis=0)
            if num_generated != generated
            else step.generated_tables
        ),
        generated_lengths=(here[:num_generated] + 1).astype(np.int32),
        prompt_chunks=prompt_chunks,
        prompt_tiles=np.array(tiles, np.int32).reshape(len(tiles), 4),
        prompt_tables=step.prompt_tables,
        first_rows=first_rows,
        sampled=sampled_from + np.arange(counts.sum()) - sampled_before,
    )
