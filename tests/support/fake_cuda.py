"""A CUDA device without one: device memory is a file in memory, a handle names it by process.

A copy happens no earlier than its stream is asked about or waited for, so that code which forgets
to synchronise reads what was there before. `left` counts memory that was not given back, and streams
with copies that nobody waited for, or with work of another library that has not ended.
"""

from __future__ import annotations

import itertools
import mmap
import os
import weakref
from collections.abc import Callable

import numpy as np
import torch

from common.errors import LinkLost
from kv_transfer.cuda_runtime import HANDLE_BYTES, Stream


class FakeCuda:
    index = 0

    def __init__(self) -> None:
        self._maps: dict[int, tuple[mmap.mmap, int]] = {}  # address → mapping, own descriptor
        self._busy: dict[int, FakeStream] = {}  # streams with work that has not ended
        self._streams = weakref.WeakValueDictionary[int, FakeStream]()
        self._handles = itertools.count(1)

    @property
    def left(self) -> int:
        return len(self._maps) + sum(stream.is_left for stream in list(self._busy.values()))

    @property
    def is_busy(self) -> bool:
        return bool(self._busy)

    def _map(self, fd: int, length: int, own: int) -> int:
        mapping = mmap.mmap(fd, length)
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        self._maps[address] = mapping, own
        return address

    def malloc(self, length: int) -> int:
        fd = os.memfd_create("fake-device", os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
        return self._map(fd, length, fd)

    def free(self, address: int) -> None:
        _, fd = self._maps.pop(address)
        os.close(fd)

    def tensor(self, address: int, shape: tuple[int, int]) -> torch.Tensor:
        return torch.frombuffer(self._maps[address][0], dtype=torch.uint8).view(shape)

    def ipc_handle(self, address: int) -> bytes:
        mapping, fd = self._maps[address]
        return f"/proc/{os.getpid()}/fd/{fd} {len(mapping)}".encode().ljust(HANDLE_BYTES)

    def open_ipc(self, handle: bytes) -> int:
        path, length = handle.decode().split()
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise LinkLost(f"no such memory: {error}") from error
        try:
            return self._map(fd, int(length), -1)
        finally:
            os.close(fd)

    def close_ipc(self, address: int) -> None:
        del self._maps[address]

    def pinned(self, length: int) -> torch.Tensor:
        return torch.zeros(length, dtype=torch.uint8)

    def stream(self) -> Stream:
        return FakeStream(self, next(self._handles))

    def put(self, handle: int, work: Callable[[], bool]) -> None:
        """Queue work on a stream by its handle, as another library does."""
        self._streams[handle].put(work)


class FakeStream:
    def __init__(self, cuda: FakeCuda, handle: int) -> None:
        self.handle = handle
        self._cuda = cuda
        self._waiting: list[tuple[Callable[[], bool], bool]] = []  # work, whether it is a copy
        cuda._streams[handle] = self

    @property
    def is_left(self) -> bool:
        return any(is_copy or not work() for work, is_copy in self._waiting)

    def put(self, work: Callable[[], bool], *, is_copy: bool = False) -> None:
        """Queue work that says whether it has ended."""
        self._waiting.append((work, is_copy))
        self._cuda._busy[self.handle] = self

    def copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        def copied() -> bool:
            into.copy_(source)
            return True

        self.put(copied, is_copy=True)

    def synchronize(self) -> None:
        while not self.is_done():
            pass

    def is_done(self) -> bool:
        while self._waiting and self._waiting[0][0]():
            self._waiting.pop(0)
        if not self._waiting:
            self._cuda._busy.pop(self.handle, None)
        return not self._waiting
