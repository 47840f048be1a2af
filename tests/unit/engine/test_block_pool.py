"""The block pool against a plain model, and its promises one by one."""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from common.engine.core.block_pool import BlockPool, CacheEventKind
from common.errors import ConfigError, OutOfBlocks


def pool_of(num_blocks: int, **settings_: object) -> BlockPool:
    return BlockPool(num_blocks, 4, **settings_)  # type: ignore[arg-type]


def name(number: int) -> bytes:
    return number.to_bytes(16, "big")


def cached_chain(pool: BlockPool, *numbers: int) -> list[int]:
    """Publish a chain of blocks under these hashes and let go of it."""
    blocks = pool.allocate(len(numbers))
    for block_id, number in zip(blocks, numbers, strict=True):
        pool.publish(block_id, name(number))
    pool.release(blocks)
    return blocks


def test_allocation_is_all_or_nothing() -> None:
    pool = pool_of(3)
    pool.allocate(1)
    with pytest.raises(OutOfBlocks):
        pool.allocate(3)
    assert (pool.num_free, pool.num_used) == (2, 1)
    assert len(pool.allocate(2)) == 2


def test_unused_blocks_go_before_cached_ones() -> None:
    pool = pool_of(4)
    cached_chain(pool, 1, 2)
    pool.allocate(2)
    assert pool.num_evictions == 0
    pool.allocate(1)
    assert pool.num_evictions == 1


def test_what_is_forgotten_is_found_no_more_and_kept_by_its_holders() -> None:
    pool = BlockPool(2, 4)
    first, second = pool.allocate(2)
    pool.publish(first, b"first")
    pool.forget([b"first", b"unknown"])
    assert pool.lookup([b"first"]) == []
    assert [event.kind for event in pool.drain_events()] == [CacheEventKind.STORED, CacheEventKind.EVICTED]
    assert pool.references(first) == 1
    pool.publish(second, b"first")
    pool.release([first, second])
    assert pool.num_cached == 1
    pool.check()


def test_what_is_forgotten_and_held_by_nobody_is_free() -> None:
    freed: list[int] = []
    pool = BlockPool(2, 4, on_free=freed.extend)
    (block,) = pool.allocate(1)
    pool.publish(block, b"first")
    pool.release([block])
    pool.forget([b"first"])
    assert freed == [block]
    assert pool.num_free == 2
    pool.check()


def test_the_end_of_the_oldest_chain_is_evicted_first() -> None:
    pool = pool_of(4)
    cached_chain(pool, 1, 2)
    cached_chain(pool, 3, 4)
    pool.drain_events()
    pool.allocate(4)
    assert [event.block_hash for event in pool.drain_events()] == [name(i) for i in (2, 1, 4, 3)]


def test_a_match_makes_a_chain_young_again() -> None:
    pool = pool_of(4)
    cached_chain(pool, 1, 2)
    cached_chain(pool, 3, 4)
    pool.release(pool.match([name(1), name(2)]))
    pool.allocate(2)
    assert pool.lookup([name(3)]) == []
    assert len(pool.lookup([name(1), name(2)])) == 2


def test_match_takes_the_longest_cached_prefix_and_counts_it() -> None:
    pool = pool_of(4)
    first, second, _ = cached_chain(pool, 1, 2, 4)
    assert pool.match([name(1), name(2), name(3), name(4)]) == [first, second]
    assert [pool.references(block_id) for block_id in (first, second)] == [1, 1]
    assert (pool.num_queried_blocks, pool.num_hit_blocks) == (4, 2)


def test_the_first_block_under_a_hash_stays_canonical() -> None:
    pool = pool_of(2)
    first, second = pool.allocate(2)
    assert pool.publish(first, name(1)) == first
    assert pool.publish(second, name(1)) == first
    assert pool.publish(first, name(1)) == first
    assert pool.hash_of(second) is None
    assert len(pool.drain_events()) == 1
    pool.release([second])
    pool.release([first])
    assert pool.lookup([name(1)]) == [first]


def test_a_lease_keeps_a_block_that_its_sequence_released() -> None:
    pool = pool_of(1)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], name(1))
    pool.acquire(blocks)
    assert pool.is_shared(blocks[0])
    pool.release(blocks)
    with pytest.raises(OutOfBlocks):
        pool.allocate(1)
    pool.release(blocks)
    assert pool.allocate(1) == blocks


def test_content_is_reported_as_garbage_once_nobody_can_read_it() -> None:
    freed: list[int] = []
    pool = pool_of(2, on_free=freed.extend)
    published, plain = pool.allocate(2)
    pool.publish(published, name(1))
    pool.release([published, plain])
    assert freed == [plain]
    pool.allocate(2)
    assert freed == [plain, published]


def test_without_prefix_cache_nothing_is_found() -> None:
    pool = pool_of(2, enable_prefix_cache=False)
    cached_chain(pool, 1, 2)
    assert pool.match([name(1)]) == []
    assert (pool.num_cached, pool.drain_events()) == (0, [])
    pool.check()


def test_lost_events_show_as_a_gap() -> None:
    pool = pool_of(4, max_pending_events=2)
    cached_chain(pool, 1, 2, 3)
    assert [event.number for event in pool.drain_events()] == [2, 3]
    assert tuple(pool.snapshot()) == (3, {name(1), name(2), name(3)})


def test_slots_without_a_token_count_while_their_block_is_used() -> None:
    pool = pool_of(4)
    blocks = pool.allocate(3)
    assert pool.num_unfilled_slots == 12
    pool.fill(blocks, 0, 5)
    pool.fill(blocks, 3, 6)
    assert (pool.num_unfilled_slots, [pool.num_filled(b) for b in blocks]) == (6, [4, 2, 0])
    pool.acquire(blocks)  # whoever shares blocks shares their slots
    pool.release(blocks)
    assert pool.num_unfilled_slots == 6
    pool.publish(blocks[0], name(1))
    pool.release(blocks)
    assert pool.num_unfilled_slots == 0
    pool.match([name(1)])
    assert pool.num_unfilled_slots == 0
    pool.allocate(3)  # what was in them before does not count
    assert pool.num_unfilled_slots == 12
    pool.check()


@pytest.mark.parametrize(("num_blocks", "block_size"), [(0, 4), (4, 0)])
def test_a_pool_without_room_is_a_config_error(num_blocks: int, block_size: int) -> None:
    with pytest.raises(ConfigError):
        BlockPool(num_blocks, block_size)


def test_a_reference_too_few_is_caught() -> None:
    pool = pool_of(1)
    with pytest.raises(AssertionError):
        pool.release([0])
    with pytest.raises(AssertionError):
        pool.acquire([0])


class PoolAgainstModel(RuleBasedStateMachine):
    """Holders are lists of references; the model counts them and remembers what is cached."""

    def __init__(self) -> None:
        super().__init__()
        self.garbage = set(range(8))
        self.pool = BlockPool(8, 4, on_free=self.garbage.update)
        self.holders: list[list[int]] = []
        self.index: set[bytes] = set()  # what a gateway would know
        self.event_number = 0
        self.content: dict[int, bytes] = {}  # block: hash of what lies in it

    def holder(self, data: st.DataObject) -> list[int]:
        return self.holders[data.draw(st.integers(0, len(self.holders) - 1))]

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        used = {block_id for holder in self.holders for block_id in holder}
        if count > 8 - len(used):
            with pytest.raises(OutOfBlocks):
                self.pool.allocate(count)
            return
        blocks = self.pool.allocate(count)
        assert len(set(blocks)) == count
        assert not used & set(blocks), "a block in use was given away"
        assert self.garbage >= set(blocks), "content lost without a word"
        self.garbage -= set(blocks)
        for block_id in blocks:
            self.content.pop(block_id, None)
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def acquire(self, data: st.DataObject) -> None:
        blocks = list(self.holder(data))
        self.pool.acquire(blocks)
        self.holders.append(blocks)

    @precondition(lambda self: self.holders)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        blocks = self.holder(data)
        self.holders = [holder for holder in self.holders if holder is not blocks]
        self.pool.release(blocks)

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), number=st.integers(0, 5))
    def publish(self, data: st.DataObject, number: int) -> None:
        block_id = data.draw(st.sampled_from(sorted({b for h in self.holders for b in h})))
        if self.content.get(block_id, name(number)) != name(number):
            return  # it holds something else
        self.content[block_id] = name(number)
        canonical = self.pool.publish(block_id, name(number))
        assert self.content[canonical] == name(number)
        assert self.pool.lookup([name(number)]) == [canonical]

    @precondition(lambda self: any(self.holders))
    @rule(data=st.data(), end=st.integers(1, 12))
    def fill(self, data: st.DataObject, end: int) -> None:
        holder = self.holder(data)
        if holder:
            self.pool.fill(holder, 0, min(end, 4 * len(holder)))

    @rule(numbers=st.lists(st.integers(0, 5), max_size=3, unique=True))
    def match(self, numbers: list[int]) -> None:
        cached = self.pool.snapshot().block_hashes
        blocks = self.pool.match([name(number) for number in numbers])
        expected = 0
        while expected < len(numbers) and name(numbers[expected]) in cached:
            expected += 1
        assert [self.content[block_id] for block_id in blocks] == [
            name(number) for number in numbers[:expected]
        ]
        assert not self.garbage & set(blocks), "garbage was found in the cache"
        self.holders.append(blocks)

    @rule()
    def drain(self) -> None:
        for event in self.pool.drain_events():
            self.event_number += 1
            assert event.number == self.event_number
            if event.kind is CacheEventKind.STORED:
                assert event.block_hash not in self.index
                self.index.add(event.block_hash)
            else:
                self.index.remove(event.block_hash)
        assert tuple(self.pool.snapshot()) == (self.event_number, self.index)

    @invariant()
    def references_equal_holders(self) -> None:
        self.pool.check()
        counts = [0] * 8
        for holder in self.holders:
            for block_id in holder:
                counts[block_id] += 1
        assert [self.pool.references(block_id) for block_id in range(8)] == counts
        assert self.pool.num_used == sum(count > 0 for count in counts)


PoolAgainstModel.TestCase.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
TestPoolAgainstModel = PoolAgainstModel.TestCase
