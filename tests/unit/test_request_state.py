"""The tables of states: what may follow what."""

from __future__ import annotations

from itertools import pairwise

from common.store.request_state import NEXT, RANK, State


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
