"""A block pool on a GPU, as peers read it: slabs in device memory, generations in host memory.

Owns the device allocation, who else has it mapped, and the way of its bytes to and from host memory, which
is pinned. Each batch of slabs is one batch of copies. Digests are not computed here (README, decisions). A
block must be sealed only after the step that wrote it has ended on the device.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator, Sequence

import numpy as np

from common.kv_layout import KVLayout
from common.logs import get_logger
from kv_transfer.copy_batch import CopyBatch
from kv_transfer.cuda import Between, Cuda
from kv_transfer.generations import Generations
from kv_transfer.mappings import Mappings
from kv_transfer.pool_memory import Place, PoolMemory
from kv_transfer.ports import Span

log = get_logger("kv")

STAGED_BYTES = 8 << 20  # of slabs that are in host memory at once, or one slab
UNMAP_S = 2.0  # at the end, for those who have the pool mapped


class DevicePoolMemory:
    """`num_blocks` slabs in one plain allocation on a device."""

    def __init__(
        self,
        num_blocks: int,
        slab_bytes: int,
        cuda: Cuda,
        staged_bytes: int = STAGED_BYTES,
        *,
        is_scratch: bool = False,
    ) -> None:
        """Scratch slabs have any content, cannot be mapped, and their memory is used again."""
        self.num_blocks, self.slab_bytes = num_blocks, slab_bytes
        self.at_once = max(1, staged_bytes // slab_bytes)
        self.cuda = cuda
        self.mappings = Mappings()
        self._is_scratch = is_scratch
        with contextlib.ExitStack() as made:
            self._counters = Generations(num_blocks)
            made.callback(self._counters.close)
            length = num_blocks * slab_bytes
            self._base = cuda.scratch(length) if is_scratch else cuda.malloc(length)
            made.callback(cuda.give_scratch if is_scratch else cuda.free, self._base)
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
        slab_bytes = self.slab_bytes
        with contextlib.ExitStack() as lent:
            staged = self.cuda.pinned(min(len(blocks), self.at_once) * slab_bytes)
            lent.callback(self.cuda.give_pinned, staged)
            for start in range(0, len(blocks), self.at_once):
                some = np.asarray(blocks[start : start + self.at_once], np.int64)
                into = staged.address + np.arange(len(some)) * slab_bytes
                source = self._base + some * slab_bytes
                self._copy(CopyBatch.of_ranges(into, source, [(0, slab_bytes)]), Between.HOST)
                starts = range(0, len(some) * slab_bytes, slab_bytes)
                yield [staged.view[at : at + slab_bytes] for at in starts]

    @contextlib.contextmanager
    def from_host(self, places: Sequence[Place]) -> Iterator[list[list[memoryview]]]:
        rows = [
            (self.address(block) + offset, length) for block, ranges in places for offset, length in ranges
        ]
        into, lengths = np.array(rows, np.int64).reshape(-1, 2).T
        ends = np.cumsum(lengths)
        staged = self.cuda.pinned(int(ends[-1]))
        try:
            views = [staged.view[end - length : end] for end, length in zip(ends, lengths, strict=True)]
            first = np.cumsum([0, *[len(ranges) for _, ranges in places]])
            yield [views[start:end] for start, end in itertools.pairwise(first)]
            self._copy(CopyBatch(into, staged.address + ends - lengths, lengths), Between.HOST)
        finally:
            self.cuda.give_pinned(staged)

    def _copy(self, batch: CopyBatch, between: Between) -> None:
        """Copy a batch and wait for it. No copy outlives this, even where it fails."""
        with contextlib.closing(self.cuda.stream()) as stream:
            try:
                stream.copy(batch, between)
            finally:
                stream.synchronize()

    def beside(self, num_blocks: int, slab_bytes: int) -> PoolMemory:
        return DevicePoolMemory(num_blocks, slab_bytes, self.cuda, is_scratch=True)

    def copy_positions(
        self, layout: KVLayout, source: PoolMemory, source_layout: KVLayout, spans: Iterable[tuple[int, Span]]
    ) -> None:
        rows = [(slab, *span) for slab, span in spans]
        slabs, blocks, ats, starts, lengths = np.array(rows, np.int64).reshape(-1, 5).T[:, :, None]
        theirs, ours, row = np.array(
            [
                (one.offset, other.offset, other.num_bytes // layout.block_size)
                for one, other in zip(source_layout.segments, layout.segments, strict=True)
            ],
            np.int64,
        ).T
        into = self._base + blocks * self.slab_bytes + ours + ats * row
        out_of = source.address(0) + slabs * source.slab_bytes + theirs + starts * row
        batch = CopyBatch(into.ravel(), out_of.ravel(), (lengths * row).ravel())
        self._copy(batch, Between.ONE_DEVICE)

    def close(self) -> None:
        """The allocation stays, until this process ends, where somebody may still have it mapped."""
        if not hasattr(self, "slabs"):
            return
        del self.slabs
        self._counters.close()
        if self._is_scratch:
            self.cuda.give_scratch(self._base)
        elif self.mappings.wait(UNMAP_S):
            self.cuda.free(self._base)
        else:
            log.warning("pool.kept", reason="others may have it mapped", others=self.mappings.sweep())
        self.mappings.close()
