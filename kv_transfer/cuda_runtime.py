"""A CUDA device by libcudart: memory, streams of one owner each, copies by the batch.

Torch has no part in this: a pool that another process may map must be one plain `cudaMalloc`, for torch's
allocator hands out parts of larger pieces; torch's streams are shared by all who ask, so that to wait for
one is to wait for others' work; and its pinned memory asks the driver about events at moments that nobody
chooses. Three rules hold for every call:

- Nothing waits for the whole device: only for a stream that the caller alone has.
- Nothing that is forbidden while another thread captures a graph reaches that capture: each call runs in the
  relaxed capture mode, which ends with it.
- What a link needs (streams, pinned memory, scratch) is kept for the next link, since to free it would wait
  for the device. All of it stays until the process ends.

A batch is copied by one kernel inside a device; between devices, and to and from the host, by the copy
engines, in one call of the driver (since 12.8) or one after the other.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common.errors import ConfigError, InsufficientMemory, LinkLost, PdqError
from common.logs import get_logger
from kv_transfer.copy_batch import CopyBatch
from kv_transfer.cuda import NAME_BYTES, Between, Pinned, Stream
from kv_transfer.cuda_library import (
    DEFAULT_KIND,
    LAZY_PEER_ACCESS,
    NON_BLOCKING,
    NOT_READY,
    PORTABLE,
    RELAXED,
    CudaLibrary,
    IpcHandle,
)

log = get_logger("kv")

TABLE_COPIES = 4096  # of one launch of the kernel
SMALL_BYTES = 256 << 10  # between devices the kernel copies pieces that are smaller on average
CALL_COPIES = 512  # of one call that keeps the GIL
FIRST_LANES = 2  # made at the start: as many as one link uses at once
_LEAST_KEPT = 64 << 10  # bytes of the smallest piece of memory that is kept


Launch = Callable[[int, int, int, int], None]  # table, copies, bytes of the longest, stream


class CudaRuntime:
    """`Cuda` by libcudart. `ConfigError` where there is no such library or no device."""

    def __init__(self, index: int = 0, library: CudaLibrary | None = None) -> None:
        self.index = index
        self.library = library or CudaLibrary()
        count = ctypes.c_int()
        status = self.library.waits.cudaGetDeviceCount(ctypes.byref(count))
        self.library.check(ConfigError, "cudaGetDeviceCount", status)
        self.library.check(ConfigError, "cudaSetDevice", self.library.waits.cudaSetDevice(index))
        place = ctypes.create_string_buffer(64)
        with self.entered():
            self.call(ConfigError, "cudaDeviceGetPCIBusId", place, len(place), index)
        self.name = place.value[-NAME_BYTES:].ljust(NAME_BYTES)
        with self.entered():
            self.kernels = _load_kernels()
        self._lock = threading.Lock()
        self._free_lanes: list[_Lane] = []
        self._free_pinned: dict[int, list[int]] = {}  # bytes → addresses
        self._free_scratch: dict[int, list[int]] = {}
        self._scratch_bytes: dict[int, int] = {}  # address → bytes, of all there is
        self._setup = self.stream()  # for zeroes, by one thread at a time
        self._setup_lock = threading.Lock()
        for lane in [self._make_lane() for _ in range(FIRST_LANES)]:
            self.give_lane(lane)

    def entered(self) -> _Entered:
        """Around every call: this thread uses this device, and disturbs no other thread's capture."""
        return _Entered(self.library, self.index)

    def call(self, error: type[PdqError], function: str, *arguments: Any, quick: bool = False) -> None:
        functions = self.library.quick if quick else self.library.waits
        self.library.check(error, function, getattr(functions, function)(*arguments))

    # Memory

    def malloc(self, length: int) -> int:
        with self.entered():
            address = self._malloc(length)
            try:
                with self._setup_lock:
                    handle = self._setup.handle
                    self.call(InsufficientMemory, "cudaMemsetAsync", address, 0, length, handle)
                    self.call(InsufficientMemory, "cudaStreamSynchronize", handle)
            except BaseException:
                self.library.waits.cudaFree(address)
                raise
        return address

    def _malloc(self, length: int) -> int:
        address = ctypes.c_void_p()
        self.call(InsufficientMemory, "cudaMalloc", ctypes.byref(address), length)
        assert address.value is not None
        return address.value

    def free(self, address: int) -> None:
        with self.entered():
            self.call(LinkLost, "cudaFree", address)

    def tensor(self, address: int, shape: tuple[int, int]) -> Tensor:
        return torch.as_tensor(_DeviceArray(address, shape), device=torch.device("cuda", self.index))

    def ipc_handle(self, address: int) -> bytes:
        handle = IpcHandle()
        with self.entered():
            self.call(ConfigError, "cudaIpcGetMemHandle", ctypes.byref(handle), address)
        return bytes(handle)

    def open_ipc(self, handle: bytes) -> int:
        address = ctypes.c_void_p()
        theirs = IpcHandle.from_buffer_copy(handle)
        with self.entered():
            self.call(LinkLost, "cudaIpcOpenMemHandle", ctypes.byref(address), theirs, LAZY_PEER_ACCESS)
        assert address.value is not None
        return address.value

    def close_ipc(self, address: int) -> None:
        with self.entered():
            self.call(LinkLost, "cudaIpcCloseMemHandle", address)

    def scratch(self, length: int) -> int:
        size = _kept_bytes(length)
        with self._lock:
            if free := self._free_scratch.get(size):
                return free.pop()
        with self.entered():
            address = self._malloc(size)
        self._scratch_bytes[address] = size
        return address

    def give_scratch(self, address: int) -> None:
        with self._lock:
            self._free_scratch.setdefault(self._scratch_bytes[address], []).append(address)

    def pinned(self, length: int) -> Pinned:
        size = _kept_bytes(length)
        with self._lock:
            if free := self._free_pinned.get(size):
                return _pinned(free.pop(), size)
        address = ctypes.c_void_p()
        with self.entered():
            self.call(InsufficientMemory, "cudaHostAlloc", ctypes.byref(address), size, PORTABLE)
        assert address.value is not None
        return _pinned(address.value, size)

    def give_pinned(self, pinned: Pinned) -> None:
        with self._lock:
            self._free_pinned.setdefault(len(pinned.view), []).append(pinned.address)

    def give_way(self) -> None:
        self.library.give_way()

    # Streams

    def stream(self) -> Stream:
        with self._lock:
            lane = self._free_lanes.pop() if self._free_lanes else None
        return _Stream(self, lane or self._make_lane())

    def _make_lane(self) -> _Lane:
        handle = ctypes.c_void_p()
        with self.entered():
            self.call(LinkLost, "cudaStreamCreateWithFlags", ctypes.byref(handle), NON_BLOCKING)
        assert handle.value is not None
        return _Lane(handle.value, _Table(self) if self.kernels else None)

    def give_lane(self, lane: _Lane) -> None:
        """Keep a lane without work for the next stream."""
        with self._lock:
            self._free_lanes.append(lane)


class _Entered:
    """A thread's calls between `__enter__` and `__exit__`; not to be nested."""

    def __init__(self, library: CudaLibrary, device: int) -> None:
        self._library, self._device = library, device
        self._mode = ctypes.c_int(RELAXED)

    def __enter__(self) -> None:
        library = self._library
        library.check(LinkLost, "cudaSetDevice", library.quick.cudaSetDevice(self._device))
        self._exchange()

    def __exit__(self, *_: object) -> None:
        self._exchange()

    def _exchange(self) -> None:
        status = self._library.quick.cudaThreadExchangeStreamCaptureMode(ctypes.byref(self._mode))
        self._library.check(LinkLost, "cudaThreadExchangeStreamCaptureMode", status)


class _Lane(NamedTuple):
    """What a stream needs, kept from one owner to the next."""

    handle: int
    table: _Table | None


class _Stream:
    """A lane in one owner's hands."""

    def __init__(self, cuda: CudaRuntime, lane: _Lane) -> None:
        self._cuda, self._lane = cuda, lane
        self._is_closed, self._is_idle = False, False

    @property
    def handle(self) -> int:
        self._is_idle = False  # whoever asks may give it work
        return self._lane.handle

    def copy(self, batch: CopyBatch, between: Between) -> None:
        assert not self._is_closed
        if not len(batch):
            return
        self._is_idle = False
        small = between is Between.DEVICES and batch.num_bytes < SMALL_BYTES * len(batch)
        if self._lane.table is not None and (between is Between.ONE_DEVICE or small):
            for start in range(0, len(batch), TABLE_COPIES):
                self._launch(self._lane.table, batch.part(slice(start, start + TABLE_COPIES)))
        else:
            merged = batch.merged()
            for start in range(0, len(merged), CALL_COPIES):
                self._enqueue(merged.part(slice(start, start + CALL_COPIES)))

    def _launch(self, table: _Table, batch: CopyBatch) -> None:
        if not table.has_room(len(batch)):
            self.synchronize()
        with self._cuda.entered():
            table.launch(self._cuda, batch, self._lane.handle)

    def _enqueue(self, batch: CopyBatch) -> None:
        library, handle = self._cuda.library, self._lane.handle
        with self._cuda.entered():
            if library.has_batches:
                parts = [np.ascontiguousarray(part) for part in (batch.into, batch.source, batch.lengths)]
                into, source, lengths = (part.ctypes.data for part in parts)
                status = library.copy_batch(into, source, lengths, len(batch), handle)
                library.check(LinkLost, "cudaMemcpyBatchAsync", status)
                return
            copy = library.quick.cudaMemcpyAsync
            arguments = (part.tolist() for part in (batch.into, batch.source, batch.lengths))
            for into, source, length in zip(*arguments, strict=True):
                if status := copy(into, source, length, DEFAULT_KIND, handle):
                    library.check(LinkLost, "cudaMemcpyAsync", status)

    def synchronize(self) -> None:
        assert not self._is_closed
        with self._cuda.entered():
            self._cuda.call(LinkLost, "cudaStreamSynchronize", self._lane.handle)
        self._ended()

    def is_done(self) -> bool:
        assert not self._is_closed
        library = self._cuda.library
        with self._cuda.entered():
            status = library.quick.cudaStreamQuery(self._lane.handle)
            if status == NOT_READY:
                library.quick.cudaGetLastError()
                return False
            library.check(LinkLost, "cudaStreamQuery", status)
        self._ended()
        return True

    def _ended(self) -> None:
        self._is_idle = True
        if self._lane.table is not None:
            self._lane.table.used = 0

    def close(self) -> None:
        if not self._is_closed:
            is_free = self._is_idle or self.is_done()
            self._is_closed = True
            if is_free:
                self._cuda.give_lane(self._lane)


class _Table:
    """The kernel's list of copies, in pinned memory and on the device. Launches that have not ended have
    their own parts of it."""

    def __init__(self, cuda: CudaRuntime) -> None:
        self.used = 0  # int64s
        self._room = 3 * TABLE_COPIES
        pinned = cuda.pinned(8 * self._room)
        self._host, self._address = np.frombuffer(pinned.view, np.int64), pinned.address
        self._device = cuda.scratch(8 * self._room)

    def has_room(self, copies: int) -> bool:
        return self.used + 3 * copies <= self._room

    def launch(self, cuda: CudaRuntime, batch: CopyBatch, stream: int) -> None:
        count, at = len(batch), self.used
        rows = self._host[at : at + 3 * count].reshape(3, count)
        rows[0], rows[1], rows[2] = batch.into, batch.source, batch.lengths
        wide = not int(np.bitwise_or.reduce(self._host[at : at + 3 * count])) % 16
        self.used += 3 * count
        here, there = self._address + 8 * at, self._device + 8 * at
        arguments = (there, here, 24 * count, DEFAULT_KIND, stream)
        cuda.call(LinkLost, "cudaMemcpyAsync", *arguments, quick=True)
        assert cuda.kernels is not None
        try:
            cuda.kernels[wide](there, count, int(rows[2].max()), stream)
        except RuntimeError as error:
            raise LinkLost(f"cuda: {error}") from error


def _load_kernels() -> dict[bool, Launch] | None:
    """By whether they are wide; None where triton cannot compile here. They are loaded now, because a
    capture forbids it."""
    try:
        from kv_transfer.device_copy import compiled

        return {wide: compiled(wide=wide) for wide in (True, False)}
    except Exception as error:  # a compiler's; the copy engines do the same, slower
        log.warning("copies.without_kernel", error=error)
        return None


def _kept_bytes(length: int) -> int:
    """The size of memory in which `length` bytes fit and which others can use afterwards."""
    return max(_LEAST_KEPT, 1 << (length - 1).bit_length())


def _pinned(address: int, length: int) -> Pinned:
    return Pinned(address, memoryview((ctypes.c_char * length).from_address(address)).cast("B"))


class _DeviceArray:
    """Device memory as torch takes it over without a copy."""

    def __init__(self, address: int, shape: tuple[int, int]) -> None:
        self.__cuda_array_interface__ = {
            "data": (address, False),
            "shape": shape,
            "typestr": "|u1",
            "version": 3,
        }
