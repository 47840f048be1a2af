"""The prefix index follows numbered events; gaps are closed by snapshots; order does not matter."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from common.wire.messages import CacheEvents
from gateway.prefix_index import PrefixIndex

BLOCKS = [bytes([n]) * 16 for n in range(8)]
A, B, C, D = BLOCKS[:4]


def test_leading_blocks_count_an_unbroken_chain_per_node() -> None:
    index = PrefixIndex()
    index.apply(CacheEvents("n1", 1, (A, B, C), ()))
    index.apply(CacheEvents("n2", 1, (A, C), ()))
    index.apply(CacheEvents("n3", 1, (B, C), ()))
    assert index.leading_blocks([A, B, C, D]) == {"n1": 3, "n2": 1}
    assert index.leading_blocks([]) == {}


def test_a_gap_asks_for_a_snapshot_and_holds_what_follows() -> None:
    index = PrefixIndex()
    index.apply(CacheEvents("n", 1, (A,), ()))
    index.apply(CacheEvents("n", 3, (C,), ()))
    assert index.wants_snapshot("n")
    assert index.blocks("n") == {A}
    index.load_snapshot("n", 2, [A, B])
    assert not index.wants_snapshot("n")
    assert index.blocks("n") == {A, B, C}


def test_a_lost_event_that_comes_late_closes_the_gap_by_itself() -> None:
    index = PrefixIndex()
    index.apply(CacheEvents("n", 2, (), (A,)))
    index.apply(CacheEvents("n", 1, (A, B), ()))
    assert not index.wants_snapshot("n")
    assert index.blocks("n") == {B}


def test_a_late_snapshot_changes_nothing() -> None:
    index = PrefixIndex()
    for number in (1, 2, 3):
        index.apply(CacheEvents("n", number, (BLOCKS[number],), ()))
    index.load_snapshot("n", 1, [D])
    assert index.blocks("n") == set(BLOCKS[1:4])


def test_a_forgotten_node_leaves_nothing_behind() -> None:
    index = PrefixIndex()
    index.apply(CacheEvents("n1", 1, (A, B), ()))
    index.apply(CacheEvents("n2", 1, (A,), ()))
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
        events.append(CacheEvents("n", number, (block,) if store else (), () if store else (block,)))
        states.append(frozenset(cache))
    arriving = data.draw(st.lists(st.sampled_from(events))) if events else []
    index = PrefixIndex()
    for event in arriving:
        index.apply(event)
    in_row = 0
    while any(event.number == in_row + 1 for event in arriving):
        in_row += 1
    assert index.blocks("n") == states[in_row]
    assert index.wants_snapshot("n") == any(event.number > in_row + 1 for event in arriving)
    index.load_snapshot("n", len(events), states[-1])
    assert index.blocks("n") == states[-1]
    assert not index.wants_snapshot("n")
