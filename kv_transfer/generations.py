"""The generations of a pool's blocks, in an anonymous file that a peer may map, and never write.

    [ header, one page | generations, int64 per block, whole pages | content ]

Owns the file, its mapping, the counters, and the read-only mapping of a peer's file. What the content
behind the counters is, if there is any, is the pool's to say. The file has no name (memfd): a killed
process leaves nothing behind. It is sealed against resizing, so that a reader cannot be made to
fault, and against further writable mappings, so that only the process that made it can ever write.

A generation is even while its block is still, odd while the block is being written. Every change of
content or owner passes through a new odd number. A copy is good if the same even number was there
before and after it.
"""

from __future__ import annotations

import contextlib
import fcntl
import mmap
import os
import struct

import numpy as np
import numpy.typing as npt

from common.errors import InsufficientMemory, MalformedMessage

_MAGIC = b"pdqpool2"
_HEADER = struct.Struct("<8sQQ")  # magic, number of blocks, bytes of content
_PAGE = mmap.PAGESIZE
_SEAL_FUTURE_WRITE = 0x0010  # linux/fcntl.h; absent from the fcntl module before Python 3.13
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | _SEAL_FUTURE_WRITE | fcntl.F_SEAL_SEAL
POPULATE_WRITE = 23  # linux/mman.h, Linux 5.14


def _content_offset(num_blocks: int) -> int:
    return _PAGE + -(-num_blocks * 8 // _PAGE) * _PAGE


class Generations:
    """The counters of this process's pool, and memory behind them."""

    def __init__(self, num_blocks: int, content_bytes: int = 0, *, warm: bool = False) -> None:
        """`warm` touches all pages here. Raises `InsufficientMemory`, and leaves nothing behind."""
        offset = _content_offset(num_blocks)
        length = offset + content_bytes
        try:
            self.fd = os.memfd_create("pdq-pool", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            with contextlib.ExitStack() as made:
                made.callback(os.close, self.fd)
                os.ftruncate(self.fd, length)
                mapping = mmap.mmap(self.fd, length)
                fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, _SEALS)
                _advise(mapping, mmap.MADV_HUGEPAGE)
                if warm:
                    _advise(mapping, POPULATE_WRITE)
                made.pop_all()
        except (OSError, ValueError) as error:
            raise InsufficientMemory(
                f"no memory for {num_blocks} blocks, {content_bytes} bytes: {error}"
            ) from error
        _HEADER.pack_into(mapping, 0, _MAGIC, num_blocks, content_bytes)
        self.numbers: npt.NDArray[np.int64] = np.frombuffer(mapping, np.int64, num_blocks, _PAGE)
        self.content = memoryview(mapping)[offset:]

    def begin_write(self, block: int) -> None:
        """Start to replace a block's content: a copy that anybody makes of it now will be stale."""
        generation = int(self.numbers[block])
        self.numbers[block] = generation + 1 + generation % 2

    def seal(self, block: int) -> int:
        """Mark the content as complete; returns the block's generation."""
        generation = int(self.numbers[block])
        generation += generation % 2
        self.numbers[block] = generation
        return generation

    def close(self) -> None:
        """Close the descriptor; the mapping goes with the last view of it."""
        os.close(self.fd)


class MappedGenerations:
    """A peer's file, mapped read-only. Reading stays safe when the peer dies or stops."""

    def __init__(self, fd: int) -> None:
        """Map `fd`, which stays the caller's; `MalformedMessage` if it is not a pool's file."""
        length = os.fstat(fd).st_size
        if fcntl.fcntl(fd, fcntl.F_GET_SEALS) & _SEALS != _SEALS or length < _PAGE:
            raise MalformedMessage("a pool's file must be sealed against resizing and writing")
        self._map = mmap.mmap(fd, length, mmap.MAP_SHARED, mmap.PROT_READ)
        self.num_blocks: int
        self.content_bytes: int
        magic, self.num_blocks, self.content_bytes = _HEADER.unpack_from(self._map)
        offset = _content_offset(self.num_blocks)
        if magic != _MAGIC or length != offset + self.content_bytes:
            self._map.close()
            raise MalformedMessage("not the file of a pool of this version")
        self.generations: npt.NDArray[np.int64] = np.frombuffer(self._map, np.int64, self.num_blocks, _PAGE)
        self.content = int(self.generations.ctypes.data) - _PAGE + offset  # its address

    def close(self) -> None:
        """Unmap; no copy may run."""
        del self.generations
        self._map.close()


def _advise(mapping: mmap.mmap, advice: int) -> None:
    """Ask for huge or warm pages; a kernel that cannot is no reason to fail."""
    try:
        mapping.madvise(advice)
    except (OSError, ValueError):
        return
