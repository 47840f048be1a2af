"""The memory of a block pool: slabs, one per block, with a generation and a digest each.

`PoolMemory` is what transports know of it, wherever the slabs lie: `HostPoolMemory` here keeps them in
a file that a peer may map, `device_memory.py` on a GPU. Knows nothing of which block is in use.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import mmap
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from common.kv_layout import ALIGNMENT, KVLayout
from kv_transfer.cuda import Cuda
from kv_transfer.digests import ranges_digest, slab_digest
from kv_transfer.generations import POPULATE_WRITE, Generations
from kv_transfer.ports import Span

Ranges = Iterable[tuple[int, int]]  # (offset, length) in a slab
Place = tuple[int, Sequence[tuple[int, int]]]  # a block, and ranges of its slab


class PoolMemory(Protocol):
    """Memory for `num_blocks` slabs of `slab_bytes`. `generations` are int64 `[num_blocks]`, in the
    file `fd`, which a peer may map; `slabs` is a uint8 tensor `[num_blocks, slab_bytes]`."""

    num_blocks: int
    slab_bytes: int
    fd: int
    slabs: Tensor
    generations: npt.NDArray[np.int64]
    digests: list[bytes]  # b"" for a block that has none
    at_once: int  # places that `from_host` is to be asked for at once

    @property
    def cuda(self) -> Cuda | None:
        """The device that the slabs lie on; None: host memory."""

    def address(self, block: int) -> int:
        """The address of a block's slab; on the device, where the slabs lie on one."""

    def begin_write(self, block: int) -> None:
        """Start to replace a block's content: a copy that anybody makes of it now will be stale."""

    def seal(self, block: int, seed: bytes = b"", ranges: Sequence[tuple[int, int]] = ()) -> int:
        """Mark the content as complete; returns the block's generation.

        With a `seed` (block hash, or `tail_seed`) its digest is computed here, once, where the slabs lie in
        host memory: of `ranges`, as `KVLayout.ranges` gives them, or of the whole slab.
        """

    def to_host(self, blocks: Sequence[int]) -> Iterable[Sequence[memoryview]]:
        """Lend the slabs in host memory, a batch at a time. A batch may be gone when the next is taken."""

    def from_host(self, places: Sequence[Place]) -> AbstractContextManager[list[list[memoryview]]]:
        """Lend host memory for one place or more: for each the views of its ranges. The slabs have what was
        written there when the context ends; after an error their content is undefined."""

    def beside(self, num_blocks: int, slab_bytes: int) -> PoolMemory:
        """Make other slabs where these lie; `InsufficientMemory`."""

    def copy_positions(
        self, layout: KVLayout, source: PoolMemory, source_layout: KVLayout, spans: Iterable[tuple[int, Span]]
    ) -> None:
        """Copy positions of slabs of `source`, which is `beside` this one, to blocks of this one: for
        each (slab, span). The layouts differ in their block size alone. Done when this returns."""

    def close(self) -> None:
        """Give everything back; no tensor over `slabs` may be used after this."""


class HostPoolMemory:
    """Slabs in host memory, in the file of the generations: a peer that maps it reads them too."""

    cuda: Cuda | None = None
    at_once = 1  # a slab is digested while it is in cache

    def __init__(self, num_blocks: int, slab_bytes: int, *, warm: bool = True) -> None:
        """`warm` touches all pages here, so that no request pays for it."""
        self.num_blocks, self.slab_bytes = num_blocks, slab_bytes
        self._counters = Generations(num_blocks, num_blocks * slab_bytes, warm=warm)
        self.fd, self.generations = self._counters.fd, self._counters.numbers
        content = torch.from_numpy(np.frombuffer(self._counters.content, np.uint8))
        self.slabs = content.view(num_blocks, slab_bytes)
        self._base = self.slabs.data_ptr()
        self.digests = [b""] * num_blocks

    def address(self, block: int) -> int:
        return self._base + block * self.slab_bytes

    def slab(self, block: int) -> memoryview:
        """The bytes of one slab, in place."""
        return self._counters.content[block * self.slab_bytes :][: self.slab_bytes]

    def begin_write(self, block: int) -> None:
        self._counters.begin_write(block)
        self.digests[block] = b""

    def seal(self, block: int, seed: bytes = b"", ranges: Sequence[tuple[int, int]] = ()) -> int:
        if seed:
            slab = self.slab(block)
            self.digests[block] = ranges_digest(slab, ranges, seed) if ranges else slab_digest(slab, seed)
        return self._counters.seal(block)

    def to_host(self, blocks: Sequence[int]) -> Iterable[Sequence[memoryview]]:
        return [[self.slab(block) for block in blocks]]

    @contextlib.contextmanager
    def from_host(self, places: Sequence[Place]) -> Iterator[list[list[memoryview]]]:
        yield [
            [self.slab(block)[offset : offset + length] for offset, length in ranges]
            for block, ranges in places
        ]

    def beside(self, num_blocks: int, slab_bytes: int) -> PoolMemory:
        return HostPoolMemory(num_blocks, slab_bytes, warm=False)

    def copy_positions(
        self, layout: KVLayout, source: PoolMemory, source_layout: KVLayout, spans: Iterable[tuple[int, Span]]
    ) -> None:
        of_theirs = _positions(source.slabs.numpy(), source_layout)
        views = list(zip(of_theirs, _positions(self.slabs.numpy(), layout), strict=True))
        for slab, (block, at, start, length) in spans:
            for theirs, ours in views:
                ours[block, :, at : at + length] = theirs[slab, :, start : start + length]

    def warm(self, limit: int) -> None:
        """Touch the first `limit` bytes of slabs, piece by piece. Blocking, for a thread of its own;
        content stays as it is, whoever writes meanwhile."""
        start = self._base // mmap.PAGESIZE * mmap.PAGESIZE
        length = min(limit, self.num_blocks * self.slab_bytes)
        for offset in range(0, length, _WARM_PIECE):
            if _madvise(start + offset, min(_WARM_PIECE, length - offset), POPULATE_WRITE):
                return  # a kernel that cannot

    def close(self) -> None:
        """Close the file; the mapping goes when the last tensor over it does."""
        self._counters.close()


def _positions(slabs: npt.NDArray[np.uint8], layout: KVLayout) -> Iterator[npt.NDArray[np.uint8]]:
    """Views `[num_blocks, segments, block_size, bytes of a position]` of all slabs, one for each row of
    segments whose positions have equally many bytes."""
    for num_bytes, group in itertools.groupby(layout.segments, lambda segment: segment.num_bytes):
        segments = list(group)
        pitch = -(-num_bytes // ALIGNMENT) * ALIGNMENT  # from one to the next
        offset, row = segments[0].offset, num_bytes // layout.block_size
        part = slabs[:, offset : offset + len(segments) * pitch].reshape(len(slabs), len(segments), pitch)
        yield part[:, :, :num_bytes].reshape(len(slabs), len(segments), layout.block_size, row)


_WARM_PIECE = 4 << 20  # bytes that one system call touches

# The C function itself: calling it releases the GIL, so that the event loop runs meanwhile.
_copy: Any = ctypes.CFUNCTYPE(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t)(
    ("memmove", ctypes.CDLL(None))
)

_madvise: Any = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)(
    ("madvise", ctypes.CDLL(None))
)


def copy_bytes(target: int, source: int, length: int) -> None:
    """Copy between addresses of this process that the caller keeps alive."""
    _copy(target, source, length)


def copy_ranges(target: int, source: int, ranges: Ranges) -> None:
    """Copy the (offset, length) pieces of one slab."""
    for offset, length in ranges:
        _copy(target + offset, source + offset, length)
