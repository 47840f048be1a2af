"""The block pool: which block of KV memory is used by how many, and what is cached in it.

Owns: reference counts, the free list, the prefix cache (hash to block) with its eviction order, how far each
used block is filled, which blocks a draft model has filled, too, and the numbered events from which gateways
build their prefix index. Knows nothing of tensors, tokens or sequences: a reference may be a sequence's or
that of a lease of the transfer layer.

Every block is in exactly one of three places:

    free   no reference, no hash: content is garbage
    idle   no reference, published: content is cache, evicted least recently used first
    used   one reference or more, published or not

Every operation costs O(1) per block it names.
"""

from __future__ import annotations

import enum
from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from typing import NamedTuple

from common.errors import ConfigError, OutOfBlocks


class CacheEventKind(enum.Enum):
    STORED = "stored"
    EVICTED = "evicted"


class CacheEvent(NamedTuple):
    """A change of the set of cached hashes. Numbers are consecutive from 1; a reader that sees a
    gap takes a snapshot."""

    number: int
    kind: CacheEventKind
    block_hash: bytes


class CacheSnapshot(NamedTuple):
    """All cached hashes after event `number`."""

    number: int
    block_hashes: frozenset[bytes]


class BlockPool:
    """Blocks 0 to `num_blocks` - 1.

    `on_free` is called with the ids of blocks whose content has just become garbage, before
    anybody else can get them. Only the latest `max_pending_events` events wait for `drain_events`;
    older ones are lost, which their reader sees as a gap.
    """

    def __init__(
        self,
        num_blocks: int,
        block_size: int,
        *,
        enable_prefix_cache: bool = True,
        on_free: Callable[[Sequence[int]], None] | None = None,
        max_pending_events: int = 65536,
    ) -> None:
        if num_blocks < 1:
            raise ConfigError(f"a pool needs a block, got {num_blocks}", param="num_blocks")
        if block_size < 1:
            raise ConfigError(f"a block needs a position, got {block_size}", param="block_size")
        self.num_blocks = num_blocks
        self.block_size = block_size
        self.enable_prefix_cache = enable_prefix_cache
        self._on_free = on_free
        self._references = [0] * num_blocks
        self._hashes: list[bytes | None] = [None] * num_blocks
        self._free = list(range(num_blocks - 1, -1, -1))  # a stack
        self._idle: OrderedDict[int, None] = OrderedDict()  # oldest first
        self._filled = [0] * num_blocks  # slots of each used block that have a token
        self._num_filled = 0  # their sum
        self._drafted: set[int] = set()  # that hold a draft model's KV of all their positions, too
        self._by_hash: dict[bytes, int] = {}
        self._events: deque[CacheEvent] = deque(maxlen=max_pending_events)
        self._event_number = 0
        self.num_queried_blocks = 0  # hashes asked of `match`
        self.num_hit_blocks = 0  # and found
        self.num_evictions = 0

    @property
    def num_free(self) -> int:
        """Blocks that `allocate` can give: free and idle ones."""
        return len(self._free) + len(self._idle)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    @property
    def num_unfilled_slots(self) -> int:
        """Slots of used blocks that have no token: what is reserved and not used."""
        return self.num_used * self.block_size - self._num_filled

    @property
    def num_cached(self) -> int:
        """Published blocks, used or idle."""
        return len(self._by_hash)

    def blocks_for(self, num_positions: int) -> int:
        """How many blocks hold that many positions."""
        return -(-num_positions // self.block_size)

    def references(self, block_id: int) -> int:
        return self._references[block_id]

    def num_filled(self, block_id: int) -> int:
        """Slots of a used block that have a token; they are its first."""
        return self._filled[block_id]

    def is_shared(self, block_id: int) -> bool:
        """More than one holder: nobody may write into it."""
        return self._references[block_id] > 1

    def hash_of(self, block_id: int) -> bytes | None:
        """The hash under which this block is published."""
        return self._hashes[block_id]

    def allocate(self, count: int) -> list[int]:
        """`count` blocks with one reference each and undefined content, or `OutOfBlocks`."""
        if count > self.num_free:
            raise OutOfBlocks(f"{count} blocks wanted, {self.num_free} of {self.num_blocks} free")
        taken = [self._free.pop() for _ in range(min(count, len(self._free)))]
        if len(taken) < count:
            evicted = [self._evict_oldest() for _ in range(count - len(taken))]
            if self._on_free is not None:
                self._on_free(evicted)
            taken += evicted
        for block_id in taken:
            self._references[block_id] = 1
            self._filled[block_id] = 0
        self._drafted.difference_update(taken)
        return taken

    def acquire(self, block_ids: Iterable[int]) -> None:
        """One more reference to each block, which must be used or idle."""
        for block_id in block_ids:
            if self._references[block_id] == 0:
                assert block_id in self._idle, f"block {block_id} is free"
                del self._idle[block_id]
                self._num_filled += self._filled[block_id]
            self._references[block_id] += 1

    def release(self, block_ids: Sequence[int]) -> None:
        """Give back one reference to each block.

        Blocks come in the order of their chain. What becomes idle is younger than all that is
        idle already, the start of the chain youngest: without its start a chain is of no use, so
        its end is evicted first.
        """
        freed: list[int] = []
        for block_id in reversed(block_ids):
            assert self._references[block_id] > 0, f"block {block_id} has no reference"
            self._references[block_id] -= 1
            if self._references[block_id] > 0:
                continue
            self._num_filled -= self._filled[block_id]
            if self._hashes[block_id] is None:
                freed.append(block_id)
            else:
                self._idle[block_id] = None
        if freed:
            if self._on_free is not None:
                self._on_free(freed)
            self._free += freed

    def fill(self, block_ids: Sequence[int], start: int, end: int) -> None:
        """Positions [start, end), at least one, of a chain of used blocks have a token, and all those before
        them in the same block."""
        size, filled = self.block_size, self._filled
        last = (end - 1) // size
        for block_id in block_ids[start // size : last]:
            self._num_filled += size - filled[block_id]
            filled[block_id] = size
        gained = end - last * size - filled[block_ids[last]]
        if gained > 0:
            filled[block_ids[last]] += gained
            self._num_filled += gained

    def lookup(self, hashes: Iterable[bytes]) -> list[int]:
        """Blocks of the longest cached prefix of a chain. Takes nothing and changes nothing."""
        found: list[int] = []
        for block_hash in hashes:
            block_id = self._by_hash.get(block_hash)
            if block_id is None:
                break
            found.append(block_id)
        return found

    def published(self, block_hash: bytes) -> int | None:
        """The block that is found under a hash."""
        return self._by_hash.get(block_hash)

    def match(self, hashes: Sequence[bytes]) -> list[int]:
        """As `lookup`, with a reference to each block, and counted."""
        found = self.lookup(hashes)
        self.acquire(found)
        self.num_queried_blocks += len(hashes)
        self.num_hit_blocks += len(found)
        return found

    def has_room(self, hashes: Sequence[bytes], count: int, headroom: int = 0) -> bool:
        """Whether a prompt of `count` blocks, the first of which may be cached under these hashes, would
        leave `headroom` blocks free."""
        cached = self.lookup(hashes)
        idle = sum(block_id in self._idle for block_id in cached)  # free until they are acquired
        return count - len(cached) + idle + headroom <= self.num_free

    def publish(self, block_id: int, block_hash: bytes) -> int:
        """Make a used, full block findable; from now on nobody writes into it.

        Returns the block that is found under the hash: where another one was published first, it
        stays, and this one remains unpublished.
        """
        assert self._references[block_id] > 0, f"block {block_id} is not used"
        self.fill([block_id], 0, self.block_size)
        if not self.enable_prefix_cache:
            return block_id
        canonical = self._by_hash.setdefault(block_hash, block_id)
        if canonical == block_id and self._hashes[block_id] is None:
            self._hashes[block_id] = block_hash
            self._record(CacheEventKind.STORED, block_hash)
        assert canonical != block_id or self._hashes[block_id] == block_hash
        return canonical

    def forget(self, hashes: Iterable[bytes]) -> None:
        """What is published under these hashes is found no more; whoever holds it keeps it."""
        published = [self._by_hash[block_hash] for block_hash in hashes if block_hash in self._by_hash]
        for block_id in published:
            self._unpublish(block_id)
        freed = [block_id for block_id in published if block_id in self._idle]
        for block_id in freed:
            del self._idle[block_id]
        if freed and self._on_free is not None:
            self._on_free(freed)
        self._free += freed

    def mark_drafted(self, block_ids: Iterable[int]) -> None:
        """A draft model has computed all positions of these used blocks."""
        self._drafted.update(block_ids)

    def unmark_drafted(self, block_ids: Iterable[int]) -> None:
        """What a draft model has computed in these blocks is of no use."""
        self._drafted.difference_update(block_ids)

    def num_drafted(self, block_ids: Iterable[int]) -> int:
        """How many of these blocks, from the first on, hold a draft model's KV, too."""
        return sum(1 for _ in takewhile(self._drafted.__contains__, block_ids))

    def drain_events(self) -> list[CacheEvent]:
        """Events since the last call, in order."""
        events = list(self._events)
        self._events.clear()
        return events

    def snapshot(self) -> CacheSnapshot:
        """What is cached now; events up to its number are contained in it."""
        return CacheSnapshot(self._event_number, frozenset(self._by_hash))

    def check(self) -> None:
        """Prove the pool's invariants; O(num_blocks), for idle moments and tests."""
        free = set(self._free)
        assert len(free) == len(self._free), "a block is free twice"
        assert not free & self._idle.keys(), "a block is free and idle"
        for block_id, (count, block_hash) in enumerate(zip(self._references, self._hashes, strict=True)):
            if block_id in free:
                place = count == 0 and block_hash is None
            elif block_id in self._idle:
                place = count == 0 and block_hash is not None
            else:
                place = count > 0
            assert place, f"block {block_id}: {count} references, hash {block_hash!r}"
            if block_hash is not None:
                assert self._by_hash.get(block_hash) == block_id, f"block {block_id} is lost"
                assert self._filled[block_id] == self.block_size, f"block {block_id} is not full"
        used = (block_id for block_id, count in enumerate(self._references) if count)
        assert self._num_filled == sum(self._filled[block_id] for block_id in used), "slots are miscounted"
        assert len(self._by_hash) == sum(h is not None for h in self._hashes), "a stale hash"

    def _evict_oldest(self) -> int:
        block_id, _ = self._idle.popitem(last=False)
        self._unpublish(block_id)
        self.num_evictions += 1
        return block_id

    def _unpublish(self, block_id: int) -> None:
        block_hash = self._hashes[block_id]
        if block_hash is not None:
            self._hashes[block_id] = None
            del self._by_hash[block_hash]
            self._record(CacheEventKind.EVICTED, block_hash)

    def _record(self, kind: CacheEventKind, block_hash: bytes) -> None:
        self._event_number += 1
        self._events.append(CacheEvent(self._event_number, kind, block_hash))
