"""A reader of a pool whose blocks have another size than ours: it wraps a reader of any transport.

The wrapped reader pulls the sender's slabs, as they are, into a few scratch slabs of the sender's
size, and proves each there: generation before and after, digest over the whole. Only then are the
positions copied on to the blocks of ours that they belong to. So conversion costs one more copy in
memory, no transport knows of it, and what failed its proof reaches no block of ours.

Scratch memory lies where our pool does, and is bounded by `SCRATCH_BYTES` for each link, or one
slab where that is larger, whatever the prompt.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import threading
from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from common.errors import LinkLost
from common.kv_layout import KVLayout
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Opener, Reader, Target

SCRATCH_BYTES = 8 << 20


class ConvertingReader:
    """Slabs of a peer's size into blocks of ours."""

    def __init__(self, reader: Reader, scratch: Target, target: Target) -> None:
        """Takes over `reader`, which writes to `scratch`, and the memory of that."""
        self._reader, self._scratch = reader, scratch
        self.remark = reader.remark
        self._lock = threading.Lock()  # held by whoever uses the scratch slabs
        self._closed = False
        self._spread: _SpreadOnDevice | _SpreadInHost
        if isinstance(target.memory, DevicePoolMemory):
            self._spread = _SpreadOnDevice(scratch, target, target.memory)
        else:
            self._spread = _SpreadInHost(scratch, target)

    @classmethod
    def open(
        cls, opener: Opener, link: str, proof: bytes, target: Target, block_size: int
    ) -> ConvertingReader:
        """Open the reading end as `opener` does, of a pool with blocks of `block_size` positions."""
        layout = target.layout.with_block_size(block_size)
        count = max(1, SCRATCH_BYTES // layout.slab_bytes)
        with contextlib.ExitStack() as made:
            memory = _memory_beside(target.memory, count, layout.slab_bytes)
            made.callback(memory.close)
            scratch = Target(memory, layout)
            reader = opener(link, proof, scratch)
            made.callback(reader.close)
            converting = cls(reader, scratch, target)
            made.pop_all()
        return converting

    def pull(self, pieces: Sequence[Piece]) -> None:
        slabs = self._scratch.memory.num_blocks
        for first in range(0, len(pieces), slabs):
            batch = pieces[first : first + slabs]
            with self._lock:
                if self._closed:
                    raise LinkLost("the link was closed")
                self._reader.pull(
                    [dataclasses.replace(piece, block=slab) for slab, piece in enumerate(batch)]
                )
                self._spread.spread(batch)

    def close(self) -> None:
        try:
            self._reader.close()  # ends a pull that runs
        finally:
            with self._lock:
                if not self._closed:
                    self._closed = True
                    self._spread.close()
                    self._scratch.memory.close()


class _SpreadInHost:
    """Copies positions from scratch slab i, of the i-th piece, to where its spans say."""

    def __init__(self, scratch: Target, target: Target) -> None:
        self._views = [
            (_positions(scratch, first, count), _positions(target, first, count))
            for first, count in _alike(target.layout)
        ]

    def spread(self, pieces: Sequence[Piece]) -> None:
        for slab, piece in enumerate(pieces):
            for block, at, start, length in piece.spans:
                for source, into in self._views:
                    into[block, :, at : at + length] = source[slab, :, start : start + length]

    def close(self) -> None:
        """Let go of the memory."""
        self._views.clear()


class _SpreadOnDevice:
    """The same on a CUDA device, on a stream of its own, which is waited for."""

    def __init__(self, scratch: Target, target: Target, memory: DevicePoolMemory) -> None:
        self._cuda, self._device = memory.cuda, memory.device_index
        self._scratch, self._target = scratch, target
        self._stream: int | None = None  # made for the first piece

    def spread(self, pieces: Sequence[Piece]) -> None:
        ours = self._target.layout
        pairs = list(zip(self._scratch.layout.segments, ours.segments, strict=True))
        if self._stream is None:
            self._stream = self._cuda.stream(self._device)
        try:
            for slab, piece in enumerate(pieces):
                source = self._scratch.memory.slab_address(slab)
                for block, at, start, length in piece.spans:
                    into = self._target.memory.slab_address(block)
                    for their, our in pairs:
                        row = our.num_bytes // ours.block_size
                        self._cuda.copy(
                            self._device, self._stream, into + our.offset + at * row,
                            source + their.offset + start * row, length * row,
                        )  # fmt: skip
        finally:  # also of a pull that fails, no copy outlives it
            self._cuda.synchronize(self._device, self._stream)

    def close(self) -> None:
        if self._stream is not None:
            self._cuda.destroy(self._device, self._stream)


def _memory_beside(memory: PoolMemory, count: int, slab_bytes: int) -> PoolMemory:
    """Slabs of another size where those of `memory` lie; `InsufficientMemory`."""
    if isinstance(memory, DevicePoolMemory):
        return DevicePoolMemory(count, slab_bytes, memory.device_index, memory.cuda)
    return PoolMemory(count, slab_bytes, warm=False)


def _alike(layout: KVLayout) -> Iterator[tuple[int, int]]:
    """(first, count) of segments in a row whose positions have equally many bytes."""
    first = 0
    for _, segments in itertools.groupby(layout.segments, lambda segment: segment.num_bytes):
        count = len(list(segments))
        yield first, count
        first += count


def _positions(target: Target, first: int, count: int) -> npt.NDArray[np.uint8]:
    """View `[slabs, count, block_size, bytes of a position]` of `count` segments in a row."""
    layout, memory = target.layout, target.memory
    segments = layout.segments[first : first + count]
    row = segments[0].num_bytes // layout.block_size
    length = sum(segment.num_bytes for segment in segments)
    slabs: npt.NDArray[np.uint8] = memory.slabs.numpy()
    view = slabs[:, segments[0].offset :][:, :length]
    return view.reshape(memory.num_blocks, count, layout.block_size, row)
