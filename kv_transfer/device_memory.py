"""A block pool on a GPU, as peers read it: slabs in device memory, generations in host memory.

Owns the device allocation, the way of its bytes to and from host memory, and nothing else; the
generations are a `PoolMemory` without slabs, whose file a peer maps as it does for `shm`. Digests
are not computed here (README, decisions): a block must be sealed only after the step that wrote it
has ended on the device.
"""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Iterable, Sequence

from kv_transfer.cuda_runtime import Cuda
from kv_transfer.pool_memory import PoolMemory, copy_bytes


class DevicePoolMemory(PoolMemory):
    """`num_blocks` slabs in one plain allocation on a device."""

    def __init__(self, num_blocks: int, slab_bytes: int, device: int, cuda: Cuda) -> None:
        super().__init__(num_blocks, 0)  # the file: generations only
        self.slab_bytes, self.device, self.cuda = slab_bytes, device, cuda
        self.device_index = device
        self._bounce: Staging | None = None
        self._lock = threading.Lock()  # of the bounce buffer
        with contextlib.ExitStack() as made:
            made.callback(super().close)
            self.address = cuda.malloc(device, num_blocks * slab_bytes)
            made.callback(cuda.free, device, self.address)
            self.slabs = cuda.tensor(device, self.address, (num_blocks, slab_bytes))
            made.pop_all()

    def seal(
        self, block: int, seed: bytes = b"", fill_ranges: Sequence[tuple[int, int]] = ()
    ) -> int:
        """As for host memory, without a digest."""
        return super().seal(block)

    def slab(self, block: int) -> memoryview:
        """A copy of one slab in host memory."""
        with self._lock:
            staging = self._staging()
            staging.load([0], [self.slab_address(block)])
            return memoryview(bytes(staging.view(0)))

    def put(self, block: int, ranges: Iterable[tuple[int, int]], source: int) -> None:
        """Copy host bytes to a slab, through pinned memory; done when this returns."""
        ranges = list(ranges)
        with self._lock:
            staging = self._staging()
            copy_bytes(staging.address(0), source, sum(length for _, length in ranges))
            staging.store(self.slab_address(block), ranges)

    def _staging(self) -> Staging:
        if self._bounce is None:
            self._bounce = Staging(self, 1)
        return self._bounce

    def close(self) -> None:
        """Give everything back; no tensor over `slabs` may be used after this."""
        if self._bounce is not None:
            self._bounce.close()
            self._bounce = None
        del self.slabs
        self.cuda.free(self.device_index, self.address)
        super().close()


class Staging:
    """`count` pinned host buffers of one slab each, and a stream that fills them."""

    def __init__(self, memory: DevicePoolMemory, count: int) -> None:
        self._cuda, self._device, self._slab_bytes = (
            memory.cuda,
            memory.device_index,
            memory.slab_bytes,
        )
        self.count = count
        self._stream = self._cuda.stream(self._device)
        try:
            self._address = self._cuda.pinned(count * self._slab_bytes)
        except BaseException:
            self._cuda.destroy(self._device, self._stream)
            raise

    def address(self, buffer: int) -> int:
        return self._address + buffer * self._slab_bytes

    def view(self, buffer: int) -> memoryview:
        """The bytes of one buffer, in place."""
        content = (ctypes.c_uint8 * self._slab_bytes).from_address(self.address(buffer))
        return memoryview(content).cast("B")

    def load(self, buffers: Sequence[int], slabs: Sequence[int]) -> None:
        """Fill buffers with the slabs at these device addresses; done when this returns."""
        for buffer, slab in zip(buffers, slabs, strict=True):
            self._cuda.copy(
                self._device, self._stream, self.address(buffer), slab, self._slab_bytes
            )
        self._cuda.synchronize(self._device, self._stream)

    def store(self, slab: int, ranges: Iterable[tuple[int, int]]) -> None:
        """Copy the first buffer, which holds the ranges in one piece, to their places in a slab."""
        source = self._address
        for offset, length in ranges:
            self._cuda.copy(self._device, self._stream, slab + offset, source, length)
            source += length
        self._cuda.synchronize(self._device, self._stream)

    def close(self) -> None:
        """Give the memory back; no view may be used after this."""
        try:
            self._cuda.destroy(self._device, self._stream)
        finally:
            self._cuda.free_pinned(self._address)
