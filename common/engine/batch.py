"""From a step's chunks to the rows that the model computes: one ragged batch.

Owns the order of rows and their padding (`Rows`), and which rows are sampled. Knows nothing of why
the scheduler chose these chunks.

    rows      [ generated … | padding | prompt … | padding ]
    sampled   for each chunk that samples, in order, its last 1 + num_drafted rows
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence as AnySequence
from itertools import chain, repeat

import numpy as np
import torch
from numpy.typing import NDArray

from common.engine.backends.base import RowPlan, Rows
from common.engine.sequence import Sequence
from common.engine.step import Chunk


@dataclasses.dataclass(frozen=True, slots=True)
class Batch:
    """`sampled[i]` is the row, among `rows`, whose logits choose a token; chunk order."""

    rows: Rows
    sampled: NDArray[np.int64]
    first_rows: tuple[int, ...]  # of each chunk, in the step's order


def build_batch(
    chunks: AnySequence[Chunk], block_size: int, plan: RowPlan, device: torch.device
) -> Batch:
    """Generated chunks must come before prompt chunks, as `Step.chunks` has them."""
    generated = [chunk for chunk in chunks if not chunk.is_prompt]
    prompts = [chunk for chunk in chunks if chunk.is_prompt]
    num_generated = sum(chunk.length for chunk in generated)
    border = plan.padded_generated(num_generated)
    total = border + plan.padded_prompt(sum(chunk.length for chunk in prompts))
    token_ids, positions = np.zeros(total, np.int64), np.zeros(total, np.int64)
    slots = np.full(total, -1, np.int64)

    tables, lengths = _tables(generated), np.empty(num_generated, np.int32)
    prompt_chunks: list[tuple[int, int, int]] = []
    tiles: list[tuple[int, int, int, int]] = []
    first_rows: list[int] = []
    sampled: list[int] = []
    row = 0
    for chunk in chunks:
        if chunk.is_prompt and not prompt_chunks:
            row = border
        end = row + chunk.length
        table = np.asarray(chunk.sequence.block_table, np.int64)
        here = np.arange(chunk.start, chunk.end)
        token_ids[row:end] = _tokens(chunk.sequence, chunk)
        positions[row:end] = here
        slots[row:end] = table[here // block_size] * block_size + here % block_size
        first_rows.append(row)
        if chunk.is_prompt:
            for offset in range(0, chunk.length, plan.query_tile):
                count = min(plan.query_tile, chunk.length - offset)
                tiles.append((row + offset, count, chunk.start + offset, len(prompt_chunks)))
            prompt_chunks.append((row, chunk.length, chunk.start))
        else:
            lengths[row:end] = here + 1
        if chunk.samples:
            sampled.extend(range(end - 1 - chunk.num_drafted, end))
        row = end

    def put(array: NDArray[np.generic]) -> torch.Tensor:
        return torch.from_numpy(array).to(device)

    rows = Rows(
        token_ids=put(token_ids),
        positions=put(positions),
        slots=put(slots),
        num_generated=num_generated,
        padded_generated=border,
        generated_tables=put(
            np.repeat(tables, [chunk.length for chunk in generated], axis=0)
            if num_generated != len(generated)
            else tables
        ),
        generated_lengths=put(lengths),
        prompt_chunks=tuple(prompt_chunks),
        prompt_tiles=put(np.asarray(tiles, np.int32).reshape(len(tiles), 4)),
        prompt_tables=put(_tables(prompts)),
    )
    return Batch(rows, np.asarray(sampled, np.int64), tuple(first_rows))


def _tokens(sequence: Sequence, chunk: Chunk) -> list[int]:
    known = sequence.token_ids[chunk.start : chunk.end]
    return known + sequence.draft_token_ids[: chunk.num_drafted] if chunk.num_drafted else known


def _tables(chunks: AnySequence[Chunk]) -> NDArray[np.int32]:
    """Block tables side by side, `[chunks, longest]`, filled up with 0."""
    longest = max((len(chunk.sequence.block_table) for chunk in chunks), default=0)
    flat = chain.from_iterable(
        chain(chunk.sequence.block_table, repeat(0, longest - len(chunk.sequence.block_table)))
        for chunk in chunks
    )
    return np.fromiter(flat, np.int32, len(chunks) * longest).reshape(len(chunks), longest)
