"""How a step becomes arrays: which rows are sampled together, and where a bucket's arrays lie."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.engine.runner.sampling_groups import grouped
from common.engine.runner.step_arrays import ALIGNED, StepArrays
from common.engine.runner.step_layout import PartSizes, add_part
from common.engine.sampling.records import SampleRows


def sample_rows(sources: list[list[int]]) -> SampleRows:
    """A run of rows for each list."""
    lengths = [list(range(len(run))) for run in sources]
    flat = np.array([source for run in sources for source in run], np.int64)
    return SampleRows(
        slots=np.arange(len(flat)),
        positions=np.arange(len(flat)),
        drafted=np.empty(0, np.int64),
        draft_start=np.zeros(len(flat), np.int64),
        draft_length=np.array([place for run in lengths for place in run], np.int64),
        sources=flat,
    )


@given(
    runs=st.lists(st.integers(1, 4), max_size=12),
    forks=st.lists(st.integers(0, 30), max_size=12),
    most=st.integers(4, 9),
)
@settings(max_examples=200, deadline=None)
def test_groups_hold_whole_runs_and_all_the_logits_they_need(
    runs: list[int], forks: list[int], most: int
) -> None:
    starts = np.cumsum([0, *runs]).tolist()
    own = [list(range(start, start + length)) for start, length in zip(starts, runs, strict=False)]
    sources = own + [[fork % starts[-1]] for fork in forks if starts[-1]]
    rows = sample_rows(sources)
    order, groups = grouped(rows, most)
    assert sorted(order.tolist()) == list(range(len(rows.slots)))
    assert rows.sources is not None
    assert rows.draft_length is not None
    seen = 0
    for group in groups:
        assert group.first_row == seen
        seen = group.end_row
        members = order[group.first_row : group.end_row]
        assert 1 <= len(members) <= most
        assert group.end_position - group.first_position <= most
        assert rows.draft_length[members[0]] == 0, "a run is cut"
        assert group.first_position <= rows.sources[members].min()
        assert rows.sources[members].max() < group.end_position
    assert seen == len(rows.slots)


@pytest.mark.parametrize("padded", [1, 3, 16])
def test_a_buckets_arrays_lie_at_the_same_offsets_whatever_else_is_in_a_step(padded: int) -> None:
    alone, beside = StepArrays(), StepArrays()
    add_part(alone, "generated", PartSizes.of_bucket(padded, 1000))
    add_part(beside, "generated", PartSizes.of_bucket(padded, 7))
    add_part(beside, "rest", PartSizes(5, 2, 9, 1, 1, 0))
    for name, place in alone.places.items():
        assert beside.places[name].offset == place.offset
        assert place.offset % ALIGNED == 0
    ends = [place.end for place in beside.places.values()]
    begins = [place.offset for place in beside.places.values()][1:]
    assert all(end <= begin for end, begin in zip(ends, begins, strict=False)), "arrays overlap"
