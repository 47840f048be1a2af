"""A block pool on a GPU, as peers read it: slabs in device memory, generations in host memory.

Owns the device allocation and the way of its bytes to and from host memory, which is pinned. Digests
are not computed here (README, decisions). A block must be sealed only after the step that wrote it has
ended on the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence

from common.kv_layout import KVLayout
from kv_transfer.cuda_runtime import Cuda
from kv_transfer.generations import Generations
from kv_transfer.pool_memory import PoolMemory, Ranges, position_views
from kv_transfer.ports import Span

STAGED_BYTES = 8 << 20  # of slabs that are in host memory at once, or one slab


class DevicePoolMemory:
    """`num_blocks` slabs in one plain allocation on a device."""

    def __init__(
        self, num_blocks: int, slab_bytes: int, cuda: Cuda, staged_bytes: int = STAGED_BYTES
    ) -> None:
        self._staged_bytes = staged_bytes
        self.num_blocks, self.slab_bytes = num_blocks, slab_bytes
        self.cuda = cuda
        with contextlib.ExitStack() as made:
            self._counters = Generations(num_blocks)
            made.callback(self._counters.close)
            self._base = cuda.malloc(num_blocks * slab_bytes)
            made.callback(cuda.free, self._base)
            self.slabs = cuda.tensor(self._base, (num_blocks, slab_bytes))
            made.pop_all()
        self.fd, self.generations = self._counters.fd, self._counters.numbers
        self.digests = [b""] * num_blocks

    def address(self, block: int) -> int:
        return self._base + block * self.slab_bytes

    def begin_write(self, block: int) -> None:
        self._counters.begin_write(block)

    def seal(self, block: int, seed: bytes = b"", ranges: Sequence[tuple[int, int]] = ()) -> int:
        """As for host memory, without a digest."""
        return self._counters.seal(block)

    def to_host(self, blocks: Sequence[int]) -> Iterator[list[memoryview]]:
        if not blocks:
            return
        count = min(len(blocks), max(1, self._staged_bytes // self.slab_bytes))
        staged = self.cuda.pinned(count * self.slab_bytes).view(count, self.slab_bytes)
        stream = self.cuda.stream()
        for start in range(0, len(blocks), count):
            some = blocks[start : start + count]
            try:
                for row, block in zip(staged, some, strict=False):
                    stream.copy(row, self.slabs[block])
            finally:  # also of a failure, no copy outlives it
                stream.synchronize()
            yield [row.numpy().data for row in staged[: len(some)]]

    @contextlib.contextmanager
    def from_host(self, block: int, ranges: Ranges) -> Iterator[list[memoryview]]:
        ranges = list(ranges)
        lengths = [length for _, length in ranges]
        staged = self.cuda.pinned(sum(lengths)).split_with_sizes(lengths)
        yield [piece.numpy().data for piece in staged]
        stream = self.cuda.stream()
        try:
            for (offset, length), piece in zip(ranges, staged, strict=True):
                stream.copy(self.slabs[block, offset : offset + length], piece)
        finally:
            stream.synchronize()

    def beside(self, num_blocks: int, slab_bytes: int) -> PoolMemory:
        return DevicePoolMemory(num_blocks, slab_bytes, self.cuda)

    def copy_positions(
        self, layout: KVLayout, source: PoolMemory, source_layout: KVLayout, spans: Iterable[tuple[int, Span]]
    ) -> None:
        views = list(
            zip(position_views(source.slabs, source_layout), position_views(self.slabs, layout), strict=True)
        )
        stream = self.cuda.stream()
        try:
            for slab, (block, at, start, length) in spans:
                for theirs, ours in views:
                    stream.copy(ours[block, :, at : at + length], theirs[slab, :, start : start + length])
        finally:
            stream.synchronize()

    def close(self) -> None:
        del self.slabs
        self.cuda.free(self._base)
        self._counters.close()
