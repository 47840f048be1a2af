"""Which rows are sampled together where there are more than one call takes, and from which logits.

Rows that share logits, or verify drafts of one slot, stay together; rows are taken in the order of their
logits, so that a call needs no others than its own. Knows numbers only.
"""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray

from common.engine.sampling.records import SampleRows


@dataclasses.dataclass(frozen=True, slots=True)
class Group:
    """Half-open: of the rows in their new order, and of the positions whose logits they need."""

    first_row: int
    end_row: int
    first_position: int
    end_position: int


def grouped(rows: SampleRows, most: int) -> tuple[NDArray[np.int64], list[Group]]:
    """The new order of `rows`, and its groups, none of which has more than `most` rows or positions. Every
    row has a source; a run of rows that verify drafts has at most `most`."""
    assert rows.sources is not None
    assert rows.draft_length is not None
    starts = np.flatnonzero(rows.draft_length == 0)
    ends = np.append(starts[1:], len(rows.slots))
    runs = np.argsort(rows.sources[starts], kind="stable")
    order = (
        np.concatenate([np.arange(starts[run], ends[run]) for run in runs]) if len(runs) else np.empty(0, int)
    )
    groups: list[Group] = []
    first = end = low = high = 0
    for run in runs.tolist():
        length = int(ends[run] - starts[run])
        source, last = int(rows.sources[starts[run]]), int(rows.sources[ends[run] - 1]) + 1
        if end > first and (end + length - first > most or max(high, last) - low > most):
            groups.append(Group(first, end, low, high))
            first = end
        if first == end:
            low = high = source
        end, high = end + length, max(high, last)
    if end > first:
        groups.append(Group(first, end, low, high))
    return order.astype(np.int64), groups
