"""What pools and transports know of a CUDA device. `cuda_runtime.py` is one; another is in the tests."""

from __future__ import annotations

import enum
from typing import NamedTuple, Protocol

from torch import Tensor

from kv_transfer.copy_batch import CopyBatch

NAME_BYTES = 16  # of a device's place on the bus, as in 00000000:1b:00.0


class Between(enum.Enum):
    """Where the ends of a batch lie."""

    ONE_DEVICE = "one device"
    DEVICES = "devices"
    HOST = "host"  # pinned memory, and the device


class Pinned(NamedTuple):
    """Host memory that a device copies at full speed."""

    address: int
    view: memoryview


class Stream(Protocol):
    """Copies of one owner. `LinkLost` where the device fails."""

    @property
    def handle(self) -> int:
        """The cudaStream_t, for other libraries."""

    def copy(self, batch: CopyBatch, between: Between) -> None:
        """Start all copies of a batch, in any order. Both ends must stay as they are until `synchronize`.
        After an error some of them may run."""

    def synchronize(self) -> None:
        """Wait until all work of the stream has ended; releases the GIL."""

    def is_done(self) -> bool:
        """Whether all work of the stream has ended."""

    def close(self) -> None:
        """Give the stream back. It serves nobody again while it has work. May be called twice."""


class Cuda(Protocol):
    """One device. Addresses are numbers. Any thread may call."""

    index: int

    @property
    def name(self) -> bytes:
        """`NAME_BYTES` that are the same in every process that uses this device."""

    def malloc(self, length: int) -> int:
        """Zeroed device memory that has an IPC handle; `InsufficientMemory`."""

    def free(self, address: int) -> None:
        """Free what `malloc` gave. No other process may have it mapped: that is undefined. Waits for the
        device, so only for the end of a process."""

    def tensor(self, address: int, shape: tuple[int, int]) -> Tensor:
        """Device memory as uint8; whoever holds the tensor keeps the memory."""

    def ipc_handle(self, address: int) -> bytes:
        """64 bytes with which another process maps what `malloc` gave."""

    def open_ipc(self, handle: bytes) -> int:
        """Map another process's memory; `LinkLost`."""

    def close_ipc(self, address: int) -> None: ...

    def scratch(self, length: int) -> int:
        """Device memory of any content for a link; `InsufficientMemory`."""

    def give_scratch(self, address: int) -> None:
        """Give back what `scratch` gave, for the next link."""

    def pinned(self, length: int) -> Pinned:
        """At least so many pinned bytes of any content; `InsufficientMemory`."""

    def give_pinned(self, pinned: Pinned) -> None:
        """Give back what `pinned` gave; no copy may run into or out of it."""

    def stream(self) -> Stream: ...

    def give_way(self) -> None:
        """Keep the GIL in no call any more: this process has kernels that wait for a peer. A call that waits
        for the device, as a communicator's abort does, keeps others out of the driver; and only Python ends
        what the device waits for."""
