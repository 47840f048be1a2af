"""A CUDA device without one: device memory is a file in memory, a handle names it by process.

A copy happens no earlier than its stream is asked about or waited for, so that code which forgets
to synchronise reads what was there before. `left` counts what was not given back.
"""

from __future__ import annotations

import ctypes
import itertools
import mmap
import os
from collections.abc import Callable

import numpy as np
import torch

from common.errors import LinkLost
from kv_transfer.cuda_runtime import HANDLE_BYTES


class FakeCuda:
    def __init__(self) -> None:
        self._maps: dict[int, tuple[mmap.mmap, int]] = {}  # address → mapping, own descriptor
        self._pinned: dict[int, np.ndarray] = {}
        self._streams: dict[int, list[Callable[[], bool]]] = {}
        self._numbers = itertools.count(1)

    @property
    def left(self) -> int:
        return len(self._maps) + len(self._pinned) + len(self._streams)

    def _map(self, fd: int, length: int, own: int) -> int:
        mapping = mmap.mmap(fd, length)
        address = np.frombuffer(mapping, np.uint8).ctypes.data
        self._maps[address] = mapping, own
        return address

    def malloc(self, device: int, length: int) -> int:
        fd = os.memfd_create("fake-device", os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
        return self._map(fd, length, fd)

    def free(self, device: int, address: int) -> None:
        _, fd = self._maps.pop(address)
        os.close(fd)

    def tensor(self, device: int, address: int, shape: tuple[int, int]) -> torch.Tensor:
        return torch.frombuffer(self._maps[address][0], dtype=torch.uint8).view(shape)

    def ipc_handle(self, device: int, address: int) -> bytes:
        mapping, fd = self._maps[address]
        return f"/proc/{os.getpid()}/fd/{fd} {len(mapping)}".encode().ljust(HANDLE_BYTES)

    def open_ipc(self, device: int, handle: bytes) -> int:
        path, length = handle.decode().split()
        try:
            fd = os.open(path, os.O_RDWR)
        except OSError as error:
            raise LinkLost(f"no such memory: {error}") from error
        try:
            return self._map(fd, int(length), -1)
        finally:
            os.close(fd)

    def close_ipc(self, device: int, address: int) -> None:
        del self._maps[address]

    def pinned(self, length: int) -> int:
        memory = np.zeros(length, np.uint8)
        self._pinned[memory.ctypes.data] = memory
        return memory.ctypes.data

    def free_pinned(self, address: int) -> None:
        del self._pinned[address]

    def stream(self, device: int) -> int:
        number = next(self._numbers)
        self._streams[number] = []
        return number

    def destroy(self, device: int, stream: int) -> None:
        assert self.is_done(device, stream), "work of a stream was never waited for"
        del self._streams[stream]

    def copy(self, device: int, stream: int, target: int, source: int, length: int) -> None:
        def copied() -> bool:
            ctypes.memmove(target, source, length)
            return True

        self.put(stream, copied)

    def put(self, stream: int, work: Callable[[], bool]) -> None:
        """Queue work that says whether it has ended."""
        self._streams[stream].append(work)

    def synchronize(self, device: int, stream: int) -> None:
        while not self.is_done(device, stream):
            pass

    def is_done(self, device: int, stream: int) -> bool:
        waiting = self._streams[stream]
        while waiting and waiting[0]():
            waiting.pop(0)
        return not waiting
