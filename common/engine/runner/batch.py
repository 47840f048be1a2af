"""From a step's chunks to the rows that the model computes: one ragged batch, still on the host.

Owns the order of rows and their padding, and which rows are sampled. Knows nothing of sequences, of why
the scheduler chose these chunks, or of what a device makes of the rows.

    rows      [ generated … | padding | prompt … | padding ]
    sampled   for each chunk, in order, as many of its last rows as are asked for
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from common.engine.devices.rows import RowPlan, Rows
from common.engine.interface import Chunks


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """The rows of a step, on the host, and where the runner finds a chunk's among them."""

    rows: Rows
    first_rows: NDArray[np.int64]  # [chunks]
    sampled: NDArray[np.int64]  # rows whose logits choose a token, in the order of chunks


def lay_out(step: Chunks, num_sampled: NDArray[np.int64], block_size: int, plan: RowPlan) -> Batch:
    """`num_sampled` `[chunks]`: of how many of its last positions each is sampled."""
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
    here = np.arange(len(known)) - np.repeat(ends - lengths, lengths) + np.repeat(step.starts, lengths)
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

    runs = list(zip(first_rows.tolist(), lengths.tolist(), step.starts.tolist(), strict=True))
    wide, wider = step.generated_tables.shape[1], step.prompt_tables.shape[1]
    table_starts = [wide * chunk for chunk in range(generated)]
    table_starts += [wide * generated + wider * chunk for chunk in range(step.num_chunks - generated)]
    small = min(plan.generated_tile, plan.query_tile)
    sizes = [small] * generated + [plan.query_tile] * (step.num_chunks - generated)
    tiles = [
        (row + offset, min(size, length - offset), start + offset, table)
        for (row, length, start), table, size in zip(runs, table_starts, sizes, strict=True)
        for offset in range(0, length, size)
    ]
    sampled_before = np.repeat(np.cumsum(num_sampled) - num_sampled, num_sampled)
    sampled_from = np.repeat(first_rows + lengths - num_sampled, num_sampled)
    rows = Rows(
        token_ids=torch.from_numpy(token_ids),
        positions=torch.from_numpy(positions),
        slots=torch.from_numpy(slots),
        num_generated=num_generated,
        padded_generated=border,
        prompt_chunks=tuple(runs[generated:]),
        tiles=torch.from_numpy(np.array(tiles, np.int32).reshape(len(tiles), 4)),
        num_generated_tiles=int((-(-lengths[:generated] // small)).sum()),
        tables=torch.from_numpy(np.concatenate((step.generated_tables.ravel(), step.prompt_tables.ravel()))),
    )
    return Batch(rows, first_rows, sampled_from + np.arange(len(sampled_from)) - sampled_before)
