"""The memory of a block pool: one anonymous file that a peer may map, and never write.

    [ header, one page | generations, int64 per block, whole pages | slabs, block-major ]

Owns: the file, its mapping, the generation counters, and the read-only mapping of a peer's file.
Knows nothing of which block is in use. The file has no name (memfd): nothing is left behind by a
killed process. It is sealed against resizing, so that a reader cannot be made to fault, and
against further writable mappings, so that only the creating process can ever write.

Generations, per block: even is still, odd is being written; every change of content or owner
passes through a new odd value. A copy is good if the same even value was there before and after.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import struct
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from common.errors import InsufficientMemory, MalformedMessage
from kv_transfer.digests import ranges_digest, slab_digest

_MAGIC = b"pdqpool1"
_HEADER = struct.Struct("<8sQQ")  # magic, number of blocks, bytes of a slab
_PAGE = mmap.PAGESIZE
_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; absent from the fcntl module before Python 3.13
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL


def _offsets(num_blocks: int, slab_bytes: int) -> tuple[int, int, int]:
    """Where generations and slabs begin, and the length of the file."""
    slabs = _PAGE + -(-num_blocks * 8 // _PAGE) * _PAGE
    return _PAGE, slabs, slabs + num_blocks * slab_bytes


class PoolMemory:
    """Memory for `num_blocks` slabs in this process, ready to be shared.

    `slabs` is a uint8 tensor `[num_blocks, slab_bytes]`, `generations` an int64 array
    `[num_blocks]`. Pages are touched at the start where `warm`, so that no request pays for it.
    """

    device: int | None = None  # the CUDA device that the slabs lie on: device_memory.py

    def __init__(self, num_blocks: int, slab_bytes: int, *, warm: bool = True) -> None:
        self.num_blocks, self.slab_bytes = num_blocks, slab_bytes
        generations, slabs, length = _offsets(num_blocks, slab_bytes)
        try:
            self.fd = os.memfd_create("pdq-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with contextlib.ExitStack() as made:
                made.callback(os.close, self.fd)
                os.ftruncate(self.fd, length)
                self._map = mmap.mmap(self.fd, length)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
                _advise(self._map, mmap.MADV_HUGEPAGE)
                if warm:
                    _advise(self._map, _POPULATE_WRITE)
                made.pop_all()
        except (OSError, ValueError) as error:
            raise InsufficientMemory(
                f"no memory for {num_blocks} blocks of {slab_bytes} bytes: {error}"
            ) from error
        _HEADER.pack_into(self._map, 0, _MAGIC, num_blocks, slab_bytes)
        self.generations: npt.NDArray[np.int64] = np.frombuffer(
            self._map, np.int64, num_blocks, generations
        )
        content = np.frombuffer(self._map, np.uint8, num_blocks * slab_bytes, slabs)
        self.slabs = torch.from_numpy(content).view(num_blocks, slab_bytes)
        self.view = memoryview(self._map)[slabs:]
        self.address = self.slabs.data_ptr()
        self.digests: list[bytes] = [b""] * num_blocks

    def begin_write(self, block: int) -> None:
        """The block gets another content: whoever copies it now will find its copy stale."""
        generation = int(self.generations[block])
        self.generations[block] = generation + 1 + generation % 2
        self.digests[block] = b""

    def seal(
        self, block: int, seed: bytes = b"", fill_ranges: Sequence[tuple[int, int]] = ()
    ) -> int:
        """The content is complete; returns the block's generation.

        With a `seed` (block hash, or `tail_seed` and the ranges of the filled positions) its
        digest is computed here, once, and kept in `digests`.
        """
        if seed:
            slab = self.slab(block)
            self.digests[block] = (
                ranges_digest(slab, fill_ranges, seed) if fill_ranges else slab_digest(slab, seed)
            )
        generation = int(self.generations[block])
        generation += generation % 2
        self.generations[block] = generation
        return generation

    def slab(self, block: int) -> memoryview:
        """The bytes of one slab, in place."""
        return self.view[block * self.slab_bytes : (block + 1) * self.slab_bytes]

    def slab_address(self, block: int) -> int:
        return self.address + block * self.slab_bytes

    def put(self, block: int, ranges: Iterable[tuple[int, int]], source: int) -> None:
        """Copy host bytes, which lie in one piece at `source`, to the (offset, length) of a slab."""
        into = self.slab_address(block)
        for offset, length in ranges:
            copy_bytes(into + offset, source, length)
            source += length

    def warm(self, limit: int) -> None:
        """Touch the first `limit` bytes of slabs, piece by piece. Blocking, for a thread of its own;
        content stays as it is, whoever writes meanwhile."""
        start = self.address // _PAGE * _PAGE
        length = min(limit, self.num_blocks * self.slab_bytes)
        for offset in range(0, length, _WARM_PIECE):
            if _madvise(start + offset, min(_WARM_PIECE, length - offset), _POPULATE_WRITE):
                return  # a kernel that cannot

    def close(self) -> None:
        """Close the descriptor; the mapping goes when the last tensor over it does."""
        os.close(self.fd)


class MappedPool:
    """A peer's pool, mapped read-only. Reading stays safe when the peer dies or stops."""

    def __init__(self, fd: int) -> None:
        """Map `fd`, which stays the caller's; `MalformedMessage` if it is not a pool's file."""
        length = os.fstat(fd).st_size
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or length < _PAGE:
            raise MalformedMessage("a pool's file must be sealed against resizing and writing")
        self._map = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ)
        self.num_blocks: int
        self.slab_bytes: int
        magic, self.num_blocks, self.slab_bytes = _HEADER.unpack_from(self._map)
        generations, slabs, expected = _offsets(self.num_blocks, self.slab_bytes)
        if magic != _MAGIC or length != expected:
            self._map.close()
            raise MalformedMessage("not the file of a pool of this version")
        self.generations: npt.NDArray[np.int64] = np.frombuffer(
            self._map, np.int64, self.num_blocks, generations
        )
        self.address = int(self.generations.ctypes.data) - generations + slabs

    def slab_address(self, block: int) -> int:
        return self.address + block * self.slab_bytes

    def close(self) -> None:
        """Unmap; no copy may run."""
        del self.generations
        self._map.close()


_POPULATE_WRITE = 23  # linux/mman.h, Linux 5.14
_WARM_PIECE = 4 << 20  # bytes that one system call touches


def _advise(mapping: mmap.mmap, advice: int) -> None:
    """Ask for huge or warm pages; a kernel that cannot is no reason to fail."""
    try:
        mapping.madvise(advice)
    except (OSError, ValueError):
        return


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


def copy_ranges(target: int, source: int, ranges: Iterable[tuple[int, int]]) -> None:
    """Copy the (offset, length) pieces of one slab."""
    for offset, length in ranges:
        _copy(target + offset, source + offset, length)
