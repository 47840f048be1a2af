"""Leases of the sending side: which blocks a peer may read, and when their references go back.

Invariant: a block's references go back only when its lease has ended (by a terminal answer of the
peer, or the teardown of its link) AND no thread of a transport touches it for that link any more (it
does while it sends). Nothing here knows time: no timer can end a lease.

A transport's thread may call `touch` and `untouch`; the rest belongs to the driver's thread.
"""

from __future__ import annotations

import collections
import dataclasses
import threading
from collections.abc import Callable, Sequence

from common.wire.message import HandoffKey
from kv_transfer.ports import BlockReferences


@dataclasses.dataclass(slots=True, eq=False)
class Lease:
    """The blocks of one handoff, in the order they were added; one reference held on each."""

    link: str
    blocks: list[int] = dataclasses.field(default_factory=list)


def _nothing() -> None: ...


class Leases:
    """All leases of one node. `wake` asks the driver's thread to call `collect` soon."""

    def __init__(self, pool: BlockReferences, wake: Callable[[], object] = _nothing) -> None:
        self.wake = wake
        self._pool = pool
        self._lock = threading.Lock()
        self._open: dict[HandoffKey, Lease] = {}
        self._leased: dict[str, collections.Counter[int]] = {}  # link → block → open leases
        self._touched: dict[str, collections.Counter[int]] = {}  # link → block → touches
        self._ending: list[Lease] = []  # ended, but touched

    def add(self, key: HandoffKey, blocks: Sequence[int]) -> None:
        """Put blocks under the lease of `key`, with a reference on each."""
        self._pool.acquire(blocks)
        with self._lock:
            lease = self._open.get(key)
            if lease is None:
                lease = self._open[key] = Lease(key.link)
            lease.blocks.extend(blocks)
            self._leased.setdefault(key.link, collections.Counter()).update(blocks)

    def end(self, key: HandoffKey) -> None:
        """End a lease: the peer gave its terminal answer, or its link is down. Ending it twice does
        nothing."""
        with self._lock:
            lease = self._open.pop(key, None)
            if lease is None:
                return
            leased = self._leased[lease.link]
            for block in lease.blocks:
                leased[block] -= 1
                if not leased[block]:
                    del leased[block]
            if not leased:
                del self._leased[lease.link]
            self._ending.append(lease)
        self.collect()

    def touch(self, link: str, blocks: Sequence[int]) -> bool:
        """Keep `blocks` in place until `untouch`. Returns False, and keeps none, unless all of them are
        leased to this link."""
        if not blocks:
            return True
        with self._lock:
            leased = self._leased.get(link)
            if leased is None or not all(block in leased for block in blocks):
                return False
            self._touched.setdefault(link, collections.Counter()).update(blocks)
            return True

    def untouch(self, link: str, blocks: Sequence[int]) -> None:
        if not blocks:
            return
        with self._lock:
            touched = self._touched[link]
            for block in blocks:
                touched[block] -= 1
                if not touched[block]:
                    del touched[block]
            if not touched:
                del self._touched[link]
            waiting = bool(self._ending)
        if waiting:
            self.wake()

    def collect(self) -> None:
        """Give back the references of ended leases that nothing touches."""
        with self._lock:
            free = [lease for lease in self._ending if not self._is_touched(lease)]
            self._ending = [lease for lease in self._ending if lease not in free]
        for lease in free:
            self._pool.release(lease.blocks)

    def _is_touched(self, lease: Lease) -> bool:
        touched = self._touched.get(lease.link)
        return touched is not None and any(block in touched for block in lease.blocks)

    def count(self) -> dict[str, int]:
        """Gauges, all zero when idle: open leases, leases that wait for a touch, touched blocks."""
        with self._lock:
            return {
                "open": len(self._open),
                "ending": len(self._ending),
                "touched": sum(len(touched) for touched in self._touched.values()),
            }
