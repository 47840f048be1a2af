"""A CUDA device without one, which says so when it is used in a way that the real one does not define.

Device memory is a file in memory, a handle names it by process. A copy happens no earlier than its stream is
asked about or waited for, the copies of a batch in an order of chance, so that code which forgets to
synchronise reads what was there before, and code which relies on an order fails. What is undefined on a
device is a *fault*: memory freed that another process has mapped (each mapping holds a lock on the file), or
that a copy under way uses; copies out of or into memory that nobody has; targets of one batch that overlap; a
stream given back with copies that run. Faults are raised where they happen, and kept in `faults`, because
a transport's thread may swallow what is raised there.

`left` counts what was not given back, and streams with work that has not ended.
"""

from __future__ import annotations

import ctypes
import fcntl
import itertools
import mmap
import os
import random
import threading
from collections.abc import Callable
from typing import NamedTuple, NoReturn

import numpy as np
import torch

from common.errors import LinkLost
from kv_transfer.copy_batch import CopyBatch
from kv_transfer.cuda import NAME_BYTES, Between, Pinned, Stream
from kv_transfer.cuda_library import HANDLE_BYTES

GARBAGE, GIVEN_BACK = 0xA5, 0xEE  # in pinned and scratch memory


class Memory(NamedTuple):
    mapping: mmap.mmap
    length: int
    fd: int  # -1: none
    is_host: bool


class FakeCuda:
    index = 0

    def __init__(self, name: bytes = b"0000:1b:00.0", seed: int = 0) -> None:
        self.name = name.ljust(NAME_BYTES)
        self.faults: list[str] = []
        self.batches: list[tuple[Between, int]] = []  # one for each call: where, and how many copies
        self.fails_after: int | None = None  # copies of the next batch that start before the device fails
        self.gives_way = False
        self._memory: dict[int, Memory] = {}
        self._streams: dict[int, FakeStream] = {}  # that were not given back
        self._handles = itertools.count(1)
        self._random = random.Random(seed)
        self._lock = threading.Lock()

    @property
    def left(self) -> int:
        return len(self._memory) + len(self._streams)

    @property
    def is_busy(self) -> bool:
        return any(stream.waiting for stream in list(self._streams.values()))

    def fault(self, what: str) -> NoReturn:
        self.faults.append(what)
        raise AssertionError(what)

    # Memory

    def _map(self, fd: int, length: int, *, is_host: bool = False, fill: int | None = None) -> int:
        mapping = mmap.mmap(fd, length)
        content = np.frombuffer(mapping, np.uint8)
        if fill is not None:
            content[:] = fill
        address = content.ctypes.data
        self._memory[address] = Memory(mapping, length, fd, is_host)
        return address

    def _unmap(self, address: int, *, fill: int | None = None) -> None:
        memory = self._memory.get(address)
        if memory is None:
            self.fault("memory was given back twice, or never was")
        for stream in list(self._streams.values()):
            for batch in stream.batches():
                for start in (*batch.into.tolist(), *batch.source.tolist()):
                    if address <= start < address + memory.length:
                        self.fault("memory was given back while a copy uses it")
        if fill is not None:
            np.frombuffer(memory.mapping, np.uint8)[:] = fill
        del self._memory[address]
        if memory.fd >= 0:
            os.close(memory.fd)

    def malloc(self, length: int) -> int:
        fd = os.memfd_create("fake-device", os.MFD_CLOEXEC)
        os.ftruncate(fd, length)
        return self._map(fd, length)

    def free(self, address: int) -> None:
        if address in self._memory:
            try:
                fcntl.flock(self._memory[address].fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                self.fault("memory was freed that another process has mapped")
        self._unmap(address)

    def tensor(self, address: int, shape: tuple[int, int]) -> torch.Tensor:
        rows, columns = shape
        memory = torch.frombuffer(self._memory[address].mapping, dtype=torch.uint8)
        return memory[: rows * columns].view(shape)

    def ipc_handle(self, address: int) -> bytes:
        memory = self._memory[address]
        return f"/proc/{os.getpid()}/fd/{memory.fd} {memory.length}".encode().ljust(HANDLE_BYTES)

    def open_ipc(self, handle: bytes) -> int:
        path, length = handle.decode().split()
        try:
            fd = os.open(path, os.O_RDWR | os.O_CLOEXEC)
        except OSError as error:
            raise LinkLost(f"no such memory: {error}") from error
        fcntl.flock(fd, fcntl.LOCK_SH)
        return self._map(fd, int(length))

    def close_ipc(self, address: int) -> None:
        self._unmap(address)

    def scratch(self, length: int) -> int:
        return self._map(-1, length, fill=GARBAGE)

    def give_scratch(self, address: int) -> None:
        self._unmap(address, fill=GIVEN_BACK)

    def pinned(self, length: int) -> Pinned:
        address = self._map(-1, length, is_host=True, fill=GARBAGE)
        return Pinned(address, memoryview(self._memory[address].mapping))

    def give_pinned(self, pinned: Pinned) -> None:
        self._unmap(pinned.address, fill=GIVEN_BACK)

    def give_way(self) -> None:
        self.gives_way = True

    def require(self, address: int, length: int) -> Memory:
        """The memory in which a range lies; a fault if there is none."""
        for start, memory in list(self._memory.items()):
            if start <= address and address + length <= start + memory.length:
                return memory
        return self.fault("a copy leaves the memory that it was made for, or outlives it")

    # Streams

    def stream(self) -> Stream:
        stream = FakeStream(self, next(self._handles))
        self._streams[stream.handle] = stream
        return stream

    def put(self, handle: int, work: Callable[[], bool]) -> None:
        """Queue work on a stream by its handle, as another library does."""
        self._streams[handle].waiting.append(work)

    def check(self, batch: CopyBatch, between: Between) -> None:
        for into, source, length in zip(batch.into, batch.source, batch.lengths, strict=True):
            if length <= 0:
                self.fault("a copy of nothing")
            ends = [self.require(int(into), int(length)), self.require(int(source), int(length))]
            if sum(end.is_host for end in ends) != (between is Between.HOST):
                self.fault(f"a batch between {between.value} has an end elsewhere")
        order = np.argsort(batch.into)
        if (batch.into[order][:-1] + batch.lengths[order][:-1] > batch.into[order][1:]).any():
            self.fault("targets of one batch overlap")

    def shuffled(self, batch: CopyBatch) -> CopyBatch:
        with self._lock:
            return batch.part(np.array(self._random.sample(range(len(batch)), len(batch)), np.int64))


class FakeStream:
    def __init__(self, cuda: FakeCuda, handle: int) -> None:
        self.handle = handle
        self._cuda = cuda
        self._is_closed = False
        self.waiting: list[Callable[[], bool] | CopyBatch] = []  # work says whether it has ended

    def batches(self) -> list[CopyBatch]:
        return [work for work in list(self.waiting) if isinstance(work, CopyBatch)]

    def copy(self, batch: CopyBatch, between: Between) -> None:
        cuda = self._cuda
        if self._is_closed:
            cuda.fault("a copy on a stream that was given back")
        if not len(batch):
            return
        cuda.check(batch, between)
        cuda.batches.append((between, len(batch)))
        batch = cuda.shuffled(batch)
        fails_after, cuda.fails_after = cuda.fails_after, None
        self.waiting.append(batch if fails_after is None else batch.part(slice(fails_after)))
        if fails_after is not None:
            raise LinkLost("the device failed in a batch")

    def synchronize(self) -> None:
        while not self.is_done():
            pass

    def is_done(self) -> bool:
        while self.waiting:
            work = self.waiting[0]
            if isinstance(work, CopyBatch):
                self._run(work)
            elif not work():
                return False
            self.waiting.pop(0)
        return True

    def _run(self, batch: CopyBatch) -> None:
        for into, source, length in zip(
            batch.into.tolist(), batch.source.tolist(), batch.lengths.tolist(), strict=True
        ):
            for address in (into, source):
                self._cuda.require(address, length)
            ctypes.memmove(into, source, length)

    def close(self) -> None:
        if self._is_closed:
            return
        if self.batches():
            self._cuda.fault("a stream was given back while its copies run")
        self._is_closed = True
        del self._cuda._streams[self.handle]
