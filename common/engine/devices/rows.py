"""The rows of one step, as every device sees them, and how many of them one product takes.

Knows nothing of sequences, nor of how chunks become rows (runner/batch.py).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True, slots=True)
class RowPlan:
    """How many rows one matrix product takes, so that its kernel never depends on the batch.

    Prompt rows go in calls of exactly `prompt_rows` (the last one filled up); generated rows in
    calls of at most `generated_rows`, each a multiple of `generated_multiple`. Where all are 1, a product
    takes any rows at once.
    """

    prompt_rows: int
    generated_rows: int
    generated_multiple: int
    query_tile: int  # positions per unit of attention; leaves no trace in the bits
    generated_tile: int = 1 << 20  # of generated ones, where it takes fewer

    @property
    def takes_any(self) -> bool:
        """Products whose rows never depend on each other: in any calls, without padding."""
        return self.prompt_rows == self.generated_rows == 1

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
class Rows:
    """The rows of one step, in the order `[generated, padding, prompt, padding]`: laid out on the
    host, then taken to a device by `Backend.prepare`. Without a queue `tiles` stay on the host."""

    token_ids: Tensor  # int64 [rows]; 0 in padding
    positions: Tensor  # int64 [rows], absolute; 0 in padding
    slots: Tensor  # int64 [rows]: block * block_size + offset; -1 in padding
    num_generated: int  # without padding
    padded_generated: int  # where the prompt rows begin
    prompt_chunks: tuple[tuple[int, int, int], ...]  # first row, rows, first position
    tiles: Tensor  # int32 [tiles, 4], generated first: first row, rows, first position, where in `tables`
    num_generated_tiles: int
    tables: Tensor  # int32: block ids of the sequences, one after the other

    @property
    def num_rows(self) -> int:
        return self.token_ids.shape[0]

    def to(self, device: torch.device) -> Rows:
        """Without a copy where the device is the host."""
        return dataclasses.replace(
            self,
            token_ids=self.token_ids.to(device),
            positions=self.positions.to(device),
            slots=self.slots.to(device),
            tables=self.tables.to(device),
        )
