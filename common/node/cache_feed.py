"""Tells gateways what this node's prefix cache holds: numbered changes, or all of it.

Owns the numbers. Knows nothing of who listens: a gateway that misses a number asks for everything.
"""

from __future__ import annotations

from common.engine.core.block_pool import BlockPool, CacheEventKind
from common.wire.messages import CacheContent, CacheEvents


class CacheFeed:
    def __init__(self, node: str, pool: BlockPool) -> None:
        self._node, self._pool = node, pool
        self._number = 0  # of the last message
        self._seen = 0  # number of the last event of the pool

    def events(self) -> CacheEvents | None:
        """The changes since the last call, or None. Where the pool lost some, it skips a number, so that
        gateways see the gap."""
        events = self._pool.drain_events()
        if not events:
            return None
        self._number += 1 if events[0].number == self._seen + 1 else 2
        self._seen = events[-1].number
        last = {event.block_hash: event.kind for event in events}
        return CacheEvents(
            self._node,
            self._number,
            tuple(block for block, kind in last.items() if kind is CacheEventKind.STORED),
            tuple(block for block, kind in last.items() if kind is CacheEventKind.EVICTED),
        )

    def content(self) -> CacheContent:
        """Everything that is cached. Changes since the last message come with the next one, too."""
        return CacheContent(self._node, self._number, tuple(self._pool.snapshot().block_hashes))
