"""A reader of a pool with another block size than ours. It wraps a reader of any transport.

The wrapped reader pulls the sender's slabs unchanged into a few scratch slabs of the sender's size,
and proves each there: the generation before and after, the digest over the whole slab. Only then are
the positions copied to our blocks. So conversion costs one more copy in memory, no transport knows of
it, and a slab that fails its proof reaches no block of ours.

Scratch memory lies where our pool lies. Each link has `SCRATCH_BYTES` of it at most, or one slab
where that is larger.
"""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Sequence

from common.errors import LinkLost
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Opener, Reader, Target

SCRATCH_BYTES = 8 << 20


class ConvertingReader:
    """Slabs of a peer's size into blocks of ours."""

    def __init__(self, reader: Reader, scratch: Target, target: Target) -> None:
        """Takes over `reader`, which writes to `scratch`, and the memory of `scratch`."""
        self._reader, self._scratch, self._target = reader, scratch, target
        self.remark = reader.remark
        self._lock = threading.Lock()  # held by whoever uses the scratch slabs
        self._closed = False

    @classmethod
    def open(
        cls,
        opener: Opener,
        link: str,
        proof: bytes,
        target: Target,
        block_size: int,
        scratch_bytes: int = SCRATCH_BYTES,
    ) -> ConvertingReader:
        """Open the reading end with `opener`, for a pool with blocks of `block_size` positions."""
        layout = target.layout.with_block_size(block_size)
        count = max(1, scratch_bytes // layout.slab_bytes)
        with contextlib.ExitStack() as made:
            memory = target.memory.beside(count, layout.slab_bytes)
            made.callback(memory.close)
            scratch = Target(
                memory,
                layout,
                source_slab_bytes=0 if target.with_draft else target.source_slab_bytes,
                with_draft=target.with_draft,
            )
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
                self._spread(batch)

    def _spread(self, pieces: Sequence[Piece]) -> None:
        """Copy the positions of each piece from its scratch slab to the places that its spans name."""
        ours, scratch = self._target, self._scratch
        spans = [(slab, span) for slab, piece in enumerate(pieces) for span in piece.spans]
        ours.memory.copy_positions(ours.layout, scratch.memory, scratch.layout, spans)

    def close(self) -> None:
        try:
            self._reader.close()  # ends a pull that runs
        finally:
            with self._lock:
                if not self._closed:
                    self._closed = True
                    self._scratch.memory.close()
