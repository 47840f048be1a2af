"""The tables of states: what may follow what, and that merging does not depend on the order."""

from __future__ import annotations

from functools import reduce
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from common.store.request_state import NEXT, RANK, State, merge

WRITES = st.lists(st.tuples(st.integers(1, 3), st.sampled_from(State)), min_size=1, max_size=12)


def test_every_state_has_its_row_and_every_row_leads_upwards() -> None:
    assert set(NEXT) == set(RANK) == set(State)
    for state, successors in NEXT.items():
        assert all(successor.rank > state.rank for successor in successors)


def test_the_whole_way_is_legal_and_nothing_follows_an_end() -> None:
    way = [State.QUEUED, State.PREFILLING, State.HANDING_OFF, State.DECODING, State.FINISHED]
    assert all(later in NEXT[earlier] for earlier, later in pairwise(way))
    ends = {state for state in State if state.terminal}
    assert ends == {State.FINISHED, State.FAILED, State.CANCELLED}
    assert all(ends <= NEXT[state] for state in State if not state.terminal)


@given(writes=WRITES, data=st.data())
def test_writes_converge_in_any_order_and_repetition(
    writes: list[tuple[int, State]], data: st.DataObject
) -> None:
    again = data.draw(st.permutations(writes + writes[:3]))
    assert reduce(merge, again) == reduce(merge, writes)


@given(writes=WRITES)
def test_no_write_takes_a_record_back(writes: list[tuple[int, State]]) -> None:
    record = writes[0]
    for write in writes:
        merged = merge(record, write)
        assert (merged[0], merged[1].rank) >= (record[0], record[1].rank)
        record = merged
