"""Copies that a device is asked for at once: where from, where to, how long.

Owns the arithmetic of addresses, over whole arrays: a step of Python for each piece would take longer than
its bytes. The copies of one batch happen in any order, so no target may overlap another or a source. Knows
no device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

Addresses = npt.NDArray[np.int64]


@dataclasses.dataclass(frozen=True, slots=True)
class CopyBatch:
    """`lengths[i]` bytes from `source[i]` to `into[i]`, all int64 `[n]`; a length is never 0."""

    into: Addresses
    source: Addresses
    lengths: Addresses

    @classmethod
    def of_ranges(
        cls, into: npt.ArrayLike, source: npt.ArrayLike, ranges: Sequence[tuple[int, int]]
    ) -> CopyBatch:
        """The same (offset, length) ranges of slabs that begin at `into` and `source`."""
        into, source = np.asarray(into, np.int64), np.asarray(source, np.int64)
        if len(ranges) == 1:
            offset, length = ranges[0]
            lengths = np.full(len(into), length, np.int64)
            return cls(into + offset, source + offset, lengths) if offset else cls(into, source, lengths)
        offsets, lengths = np.asarray(ranges, np.int64).reshape(-1, 2).T
        targets = into[:, None] + offsets
        return cls(
            targets.ravel(),
            (source[:, None] + offsets).ravel(),
            np.broadcast_to(lengths, targets.shape).ravel(),
        )

    @classmethod
    def joined(cls, batches: Iterable[CopyBatch]) -> CopyBatch:
        parts = list(batches)
        if len(parts) == 1:
            return parts[0]
        empty = np.empty(0, np.int64)
        return cls(
            np.concatenate([empty, *(part.into for part in parts)]),
            np.concatenate([empty, *(part.source for part in parts)]),
            np.concatenate([empty, *(part.lengths for part in parts)]),
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def part(self, which: Any) -> CopyBatch:
        """Those that an index of numpy selects."""
        return CopyBatch(self.into[which], self.source[which], self.lengths[which])

    @property
    def num_bytes(self) -> int:
        return int(self.lengths.sum())

    def merged(self) -> CopyBatch:
        """As few copies as do the same, in ascending order of targets: neighbours at both ends become one."""
        if len(self) < 2:
            return self
        order = np.argsort(self.into)
        into, source, lengths = self.into[order], self.source[order], self.lengths[order]
        apart = (into[:-1] + lengths[:-1] != into[1:]) | (source[:-1] + lengths[:-1] != source[1:])
        first = np.flatnonzero(np.concatenate([[True], apart]))
        return CopyBatch(into[first], source[first], np.add.reduceat(lengths, first))
