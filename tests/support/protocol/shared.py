"""What processes that share a walk tell each other: who begins where, and what needs no second walk.

Both live in memory that forked processes have in common, without a lock: what is lost when two write at
once costs a second walk, and nothing else.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator

SLOTS = 1 << 23  # of 8 bytes; a power of two
PROBES = 32
ALL_BITS = (1 << 64) - 1


class Finished:
    """Hashes of states after which everything was walked: not those that a walk still stands in.

    No schedule without end is missed by going no further at one of these. Of all states of such a circle,
    take the one that was finished first. The walk that finished it had met the next one of the circle
    before, unfinished: either it stood in it, and has found the circle, or it walked it to the end, which
    was then finished earlier still.
    """

    def __init__(self, slots: int = SLOTS) -> None:
        self._last = slots - 1
        self._slots = memoryview(mmap.mmap(-1, 8 * slots)).cast("Q")  # 0: empty

    def add(self, state: int) -> None:
        state = state & ALL_BITS or 1
        for probe in range(state, state + PROBES):
            slot = probe & self._last
            if not self._slots[slot]:
                self._slots[slot] = state
                return

    def __contains__(self, state: int) -> bool:
        state = state & ALL_BITS or 1
        for probe in range(state, state + PROBES):
            found = self._slots[probe & self._last]
            if found == state:
                return True
            if not found:
                return False
        return False


class Turns:
    """Numbers below `count`, each of which one of the processes takes: it begins at its own share, and goes
    on with what the others have not begun."""

    def __init__(self, count: int) -> None:
        self._taken = memoryview(mmap.mmap(-1, max(1, count)))
        self._count = count

    def of(self, process: int, processes: int) -> Iterator[int]:
        first = self._count * process // processes
        for number in (*range(first, self._count), *range(first)):
            if not self._taken[number]:
                self._taken[number] = 1
                yield number
