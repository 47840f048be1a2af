"""Work for a device that computes while the host goes on: what a host may ask of it, and nothing more.

A queue takes work in order, and whoever gives it work goes on at once. Hence two rules for all who do:

    what the device reads or writes stays as it is until an event that was recorded behind it has come;
    what the device has written is read by the host behind such an event, or behind `synchronize`.

Owns the contract. `cuda/queue.py` keeps it with a stream of CUDA; tests/support/fake_accelerator.py keeps it
by computing on the CPU as late, or in as odd an order, as the contract allows.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol

from torch import Tensor

Work = Callable[[], object]
"""Gives the device something to do; what it returns is dropped. Called once, now or later, in any thread: it
looks at nothing that changes meanwhile, and gives results by writing into tensors or objects of its own."""


class Event(Protocol):
    """A place in a queue, between what was given before and what is given later."""

    def is_done(self) -> bool:
        """Whether everything before it has ended. Does not wait."""
        ...

    def wait(self) -> None:
        """Block the calling thread, asleep and without the interpreter's lock, until everything before it has
        ended. Raises what the device says has failed."""
        ...


class Graph(Protocol):
    """Work that was recorded once: the same kernels on the same memory, whenever it is replayed."""


class DeviceQueue(Protocol):
    """For one thread that gives work; events may be waited for, and `synchronize` called, by any."""

    def run(self, work: Work) -> None:
        """Work that may also wait for this queue itself, where a decision is the host's."""
        ...

    def here(self) -> AbstractContextManager[None]:
        """What this thread asks the device for without a queue, such as memory that grows, comes in the order
        of this one."""
        ...

    def copy(self, into: Tensor, source: Tensor) -> None:
        """Between device memory and memory from `pinned`, contiguous and of one size."""
        ...

    def record(self) -> Event: ...

    def wait_for(self, event: Event) -> None:
        """What is given later begins after this event of another queue. The host does not wait."""
        ...

    def capture(self, work: Work) -> Graph:
        """Record `work` without computing it. It must have run once before, and must not wait, allocate
        pinned memory, or look at what the device computes. Graphs of one queue share the memory of what is
        between: one's results outlive it only where it copies them."""
        ...

    def replay(self, graph: Graph) -> None: ...

    def synchronize(self) -> None:
        """Wait until everything that this queue was given has ended, well or not; other queues are not
        waited for. Raises what the device says has failed: then it computes nothing any more."""
        ...

    def peak_of(self, give: Callable[[], object]) -> int:
        """Call `give`, which gives work, and wait for that: how many bytes of device memory it had at most,
        beside those that were in use before. At load only."""
        ...

    def pinned(self, num_bytes: int) -> Tensor:
        """Host memory that the device copies by itself, uint8 `[num_bytes]`, as it comes. May be slow."""
        ...

    def zeros(self, num_bytes: int) -> Tensor:
        """Device memory, uint8 `[num_bytes]`, at an address that graphs may keep. At load only."""
        ...
