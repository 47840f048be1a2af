"""Pinned memory for steps under way: a step has its own until it has ended, and gives it back.

Owns what is free. Whoever took it knows when the device reads and writes it no more.
"""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
from numpy.typing import NDArray

from common.engine.devices.queue import DeviceQueue

AT_ONCE = 3  # steps: one is computed, one waits, one is laid out


class Pinned:
    """Host memory that a device copies by itself, as large as was needed so far."""

    def __init__(self, queue: DeviceQueue, num_bytes: int) -> None:
        self._queue = queue
        self.tensor = queue.pinned(num_bytes)

    def reserve(self, num_bytes: int) -> None:
        """At least so many bytes; what was in them is gone."""
        if num_bytes > len(self.tensor):
            self.tensor = self._queue.pinned(max(num_bytes, 2 * len(self.tensor)))

    @property
    def array(self) -> NDArray[np.uint8]:
        found: NDArray[np.uint8] = self.tensor.numpy()
        return found


@dataclasses.dataclass(frozen=True, slots=True)
class StepMemory:
    upload: Pinned
    filled: Pinned  # what is known when the KV lies in its blocks
    results: Pinned


class StepMemories:
    """`take` and `give_back` by any thread."""

    def __init__(self, queue: DeviceQueue, upload_bytes: int, result_bytes: int) -> None:
        """So many bytes are enough as a rule."""
        self._queue, self._sizes = queue, (upload_bytes, result_bytes, result_bytes)
        self._free = [self._make() for _ in range(AT_ONCE)]
        self._lock = threading.Lock()

    def _make(self) -> StepMemory:
        return StepMemory(*(Pinned(self._queue, size) for size in self._sizes))

    def take(self) -> StepMemory:
        with self._lock:
            if self._free:
                return self._free.pop()
        return self._make()

    def give_back(self, memory: StepMemory) -> None:
        with self._lock:
            self._free.append(memory)
