"""What a transport is: a source that lets its pool be read, and readers that copy out of it.

    Source (sending node)                          Reader (receiving node, one per link)
    open_link(link) → proof   ──Hello.proofs──▶    opener(link, proof, own pool) → Reader
                                                   pull(pieces): copy, then prove each piece
    close_link(link)                               close()

The same rules hold for each, and one suite of tests checks them (tests/integration/test_transports):

- The reader pulls. Nobody writes into another process's pool.
- A piece counts as copied only if its generation was the announced, even one before AND after the
  bytes were read (`StaleBlock`), and its digest, if it has one, is right (`DigestMismatch`).
- Staged memory does not grow with the prompt.
- After `close_link` returns, nobody reads the source's memory over that link, or nobody can prove what
  they read (a mapping cannot be revoked).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from common.errors import DigestMismatch, MalformedMessage, StaleBlock
from common.kv_layout import KVLayout
from kv_transfer.digests import ranges_digest
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.ports import Piece


class Source(Protocol):
    """The sending node's side of one transport, for all of its links."""

    @property
    def name(self) -> str: ...

    def open_link(self, link: str) -> bytes:
        """Make this node's pool readable over a new link. Returns the proof for Hello."""

    def close_link(self, link: str) -> None:
        """Tear down the link, which may never have been opened or used."""

    def close(self) -> None:
        """Tear down every link and end all threads."""


class Reader(Protocol):
    """The receiving node's side of one link."""

    remark: str  # what `pdq nodes` adds to the link's reason, mostly ""

    def pull(self, pieces: Sequence[Piece]) -> None:
        """Copy every piece into its block and prove it. Blocking: call it in a thread of its own.

        Raises `StaleBlock`, `DigestMismatch`, `LinkLost`, or `MalformedMessage` for a place that does not
        exist. After any of these the blocks' content is undefined.
        """

    def close(self) -> None:
        """End the link from this side. A pull that runs in another thread ends with `LinkLost`, or by
        itself where nothing can make it wait."""


class Target:
    """The receiving node's own pool, which readers write to, and how long the slabs are that they read.

    Where the ends have different draft models, or one has none, only what `layout` describes is copied: the
    model's own part, which lies at the start of the slabs of both.
    """

    def __init__(
        self, memory: PoolMemory, layout: KVLayout, *, source_slab_bytes: int = 0, with_draft: bool = True
    ) -> None:
        """`source_slab_bytes`: of the peer's slabs; 0 means that they are like those of `memory`. Without
        `with_draft` the source is to leave out its draft model's part, and `layout` has none."""
        assert with_draft or not layout.num_draft
        self.memory, self.layout, self.with_draft = memory, layout, with_draft
        self.source_slab_bytes = source_slab_bytes or memory.slab_bytes
        self._checked = layout.without_draft
        self._ranges: dict[int, list[tuple[int, int]]] = {}  # by fill

    def without_draft(self, source_slab_bytes: int) -> Target:
        """For a peer that has another draft model, or none."""
        layout = self.layout.without_draft
        return Target(self.memory, layout, source_slab_bytes=source_slab_bytes, with_draft=False)

    def ranges(self, piece: Piece) -> list[tuple[int, int]]:
        """The (offset, length) parts of a slab to copy: all of it, or a tail's filled positions."""
        return self.ranges_of(piece.fill)

    def ranges_of(self, fill: int) -> list[tuple[int, int]]:
        """As of a piece with so many filled positions; 0: the whole slab."""
        found = self._ranges.get(fill)
        if found is None:
            found = self._ranges[fill] = self.layout.ranges(fill)
        return found

    def check(self, piece: Piece) -> None:
        """Compare the digest of a copied piece with the promised one; `DigestMismatch`."""
        if not piece.digest:
            return
        for [slab] in self.memory.to_host([piece.block]):
            if ranges_digest(slab, self._checked.ranges(piece.fill), piece.seed) != piece.digest:
                raise DigestMismatch(f"block {piece.index} is not what its hash promises")


class Counted(Protocol):
    """A pool whose generations can be read: our own, or a peer's mapping."""

    @property
    def generations(self) -> npt.NDArray[np.int64]: ...


def require_unchanged(pool: Counted, piece: Piece) -> None:
    """`StaleBlock` unless the piece's block has the announced, even generation now."""
    if pool.generations[piece.slot] != piece.generation or piece.generation % 2:
        raise StaleBlock(f"block {piece.index} was reused while it was being copied")


class Places:
    """Where many pieces lie, as arrays: int64 `[n]`. What looks at each of them does so at once."""

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self._pieces = pieces
        try:
            rows = np.array([(p.slot, p.block, p.generation, p.fill) for p in pieces], np.int64)
        except OverflowError as error:
            raise MalformedMessage("no pool has such a block", param="slots") from error
        self.slots, self.blocks, self.generations, self.fills = rows.reshape(-1, 4).T
        self._are_even = not (np.bitwise_or.reduce(self.generations) & 1)

    def are_inside(self, num_blocks: int) -> bool:
        """Whether a pool of so many blocks has all slots."""
        return not len(self._pieces) or bool(0 <= self.slots.min() <= self.slots.max() < num_blocks)

    def require_unchanged(self, pool: Counted) -> None:
        """As the function, for all of them."""
        wrong = pool.generations[self.slots] != self.generations
        if not self._are_even:
            wrong |= self.generations % 2 != 0
        if wrong.any():
            piece = self._pieces[int(wrong.argmax())]
            raise StaleBlock(f"block {piece.index} was reused while it was being copied")

    def by_fill(self) -> Iterator[tuple[int, Any]]:
        """Each number of filled positions, 0 for whole slabs, and an index of the pieces that have it."""
        if not self.fills.any():
            yield 0, slice(None)
            return
        for fill in np.unique(self.fills).tolist():
            yield fill, self.fills == fill


# Opens the reading end of a link with the proof of a Hello. Blocking. `LinkLost` or `MalformedMessage`
# says why the proof fails.
Opener = Callable[[str, bytes, Target], Reader]
