"""How much of a GPU's memory one process may take: `gpu_memory_utilization`, as vLLM means it.

A share of *all* memory, not of what happens to be free: two processes that start at the same moment see
the same free bytes, and would both take them. What is free only says whether the share can be had.
Knows bytes, and no device.
"""

from __future__ import annotations

from common.errors import InsufficientMemory

GIB = 1 << 30


class MemoryShare:
    """The share of one process. `others`: further processes may take and give back memory of the same
    GPU meanwhile, so that what is missing from the free memory need not be ours."""

    def __init__(self, utilization: float, total: int, free: int, *, others: bool) -> None:
        """`free` of `total` bytes, before this process takes any; `InsufficientMemory` if that is less
        than its share."""
        self._granted, self._free_before, self._others = int(total * utilization), free, others
        if self._granted > free:
            raise InsufficientMemory(
                f"gpu_memory_utilization {utilization:g} is {self._granted / GIB:.1f} GiB of a GPU of "
                f"{total / GIB:.1f} GiB, of which {free / GIB:.1f} GiB are free; lower "
                "--gpu-memory-utilization, or end what has the rest",
                param="gpu_memory_utilization",
            )

    def left(self, free: int, own: int) -> int:
        """Bytes that this process may still take, while `free` are free and its allocator holds `own`.

        Alone on its GPU it counts whatever is gone since it began, libraries' memory too.
        """
        taken = own if self._others else max(0, self._free_before - free)
        return max(0, min(free, self._granted - taken))
