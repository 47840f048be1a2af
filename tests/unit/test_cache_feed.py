"""A gateway that follows a node's cache feed knows its cache, gaps and lost events included."""

from __future__ import annotations

import random

from common.engine.core.block_pool import BlockPool
from common.errors import OutOfBlocks
from common.node.cache_feed import CacheFeed
from gateway.prefix_index import PrefixIndex


def churn(pool: BlockPool, chance: random.Random, held: list[int]) -> None:
    """One random change: a block is computed and published, or one is given back."""
    if held and chance.random() < 0.5:
        pool.release([held.pop(chance.randrange(len(held)))])
        return
    try:
        (block,) = pool.allocate(1)
    except OutOfBlocks:
        return
    pool.publish(block, chance.randbytes(16))
    held.append(block)


def test_the_index_equals_the_pool_whatever_was_lost() -> None:
    for seed in range(50):
        chance = random.Random(seed)
        pool = BlockPool(12, 16, max_pending_events=8)
        feed, index, held = CacheFeed("node", pool), PrefixIndex(), list[int]()
        for _ in range(60):
            for _ in range(chance.randrange(12)):
                churn(pool, chance, held)
            events = feed.events()
            if events is not None and chance.random() < 0.8:  # else lost on the way
                index.apply(events)
            if index.wants_snapshot("node"):
                content = feed.content()
                index.load_snapshot("node", content.number, content.blocks)
        content = feed.content()
        index.load_snapshot("node", content.number, content.blocks)
        assert index.blocks("node") == pool.snapshot().block_hashes
        for _ in range(5):
            churn(pool, chance, held)
        last = feed.events()
        if last is not None:
            index.apply(last)
        if not index.wants_snapshot("node"):
            assert index.blocks("node") == pool.snapshot().block_hashes


def test_a_gap_in_the_pools_events_is_a_gap_for_gateways() -> None:
    pool = BlockPool(12, 16, max_pending_events=2)
    feed = CacheFeed("node", pool)
    for block in pool.allocate(2):
        pool.publish(block, bytes([block]) * 16)
    first = feed.events()
    assert first is not None
    assert first.number == 1
    for block in pool.allocate(5):
        pool.publish(block, bytes([block]) * 16)
    second = feed.events()
    assert second is not None
    assert second.number == 3
    assert feed.events() is None
