"""The prefix index follows numbered events; gaps are closed by snapshots; order does not matter."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from gateway.prefix_index import CacheEvent, PrefixIndex

BLOCKS = [bytes([n]) * 16 for n in range(8)]
A, B, C, D = BLOCKS[:4]


def test_leading_blocks_count_an_unbroken_chain_per_node() -> None:
    index = PrefixIndex()
    index.apply("n1", CacheEvent(1, stored=(A, B, C)))
    index.apply("n2", CacheEvent(1, stored=(A, C)))
    index.apply("n3", CacheEvent(1, stored=(B, C)))
    assert index.leading_blocks([A, B, C, D]) == {"n1": 3, "n2": 1}
    assert index.leading_blocks([]) == {}


def test_a_gap_asks_for_a_snapshot_and_holds_what_follows() -> None:
    index = PrefixIndex()
    index.apply("n", CacheEvent(1, stored=(A,)))
    index.apply("n", CacheEvent(3, stored=(C,)))
    assert index.wants_snapshot("n")
    assert index.blocks("n") == {A}
    index.load_snapshot("n", 2, [A, B])
    assert not index.wants_snapshot("n")
    assert index.blocks("n") == {A, B, C}


def test_a_lost_event_that_comes_late_closes_the_gap_by_itself() -> None:
    index = PrefixIndex()
    index.apply("n", CacheEvent(2, evicted=(A,)))
    index.apply("n", CacheEvent(1, stored=(A, B)))
    assert not index.wants_snapshot("n")
    assert index.blocks("n") == {B}


def test_a_late_snapshot_changes_nothing() -> None:
    index = PrefixIndex()
    for number in (1, 2, 3):
        index.apply("n", CacheEvent(number, stored=(BLOCKS[number],)))
    index.load_snapshot("n", 1, [D])
    assert index.blocks("n") == set(BLOCKS[1:4])


def test_a_forgotten_node_leaves_nothing_behind() -> None:
    index = PrefixIndex()
    index.apply("n1", CacheEvent(1, stored=(A, B)))
    index.apply("n2", CacheEvent(1, stored=(A,)))
    index.forget("n1")
    assert index.leading_blocks([A, B]) == {"n2": 1}
    index.forget("n2")
    assert index.size == 0


@given(st.data())
def test_any_order_loss_and_duplication_converges_after_a_snapshot(data: st.DataObject) -> None:
    changes = st.lists(st.tuples(st.booleans(), st.sampled_from(BLOCKS)), max_size=12)
    cache: set[bytes] = set()
    events, states = [], [frozenset(cache)]
    for number, (store, block) in enumerate(data.draw(changes), start=1):
        (cache.add if store else cache.discard)(block)
        events.append(CacheEvent(number, (block,) if store else (), () if store else (block,)))
        states.append(frozenset(cache))
    arriving = data.draw(st.lists(st.sampled_from(events))) if events else []
    index = PrefixIndex()
    for event in arriving:
        index.apply("n", event)
    in_row = 0
    while any(event.number == in_row + 1 for event in arriving):
        in_row += 1
    assert index.blocks("n") == states[in_row]
    assert index.wants_snapshot("n") == any(event.number > in_row + 1 for event in arriving)
    index.load_snapshot("n", len(events), states[-1])
    assert index.blocks("n") == states[-1]
    assert not index.wants_snapshot("n")
