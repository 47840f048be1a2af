"""How many rows a recorded step has: few sizes, to which steps are filled up."""

from __future__ import annotations

import dataclasses

SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 160, 192, 224, 256)
STRIDE = 64  # beyond those
MOST = 1024  # rows: a larger step gains nothing from being recorded


@dataclasses.dataclass(frozen=True, slots=True)
class Buckets:
    """`most_rows`: of one sequence, a token and the drafts behind it."""

    sizes: tuple[int, ...]  # ascending
    most_rows: int

    @classmethod
    def up_to(cls, sequences: int, most_rows: int, most: int, multiple: int = 1) -> Buckets:
        """For steps of so many sequences; never of more than `most` rows, always of a `multiple`."""
        largest = min(sequences * most_rows, most, MOST)
        steps = (*SIZES, *range(SIZES[-1] + STRIDE, MOST + 1, STRIDE))
        filled = {-(-size // multiple) * multiple for size in (*(s for s in steps if s < largest), largest)}
        return cls(tuple(sorted(filled)), most_rows)

    def padded(self, rows: int) -> int | None:
        """The smallest bucket for so many rows, if there is one."""
        return next((size for size in self.sizes if size >= rows), None)
