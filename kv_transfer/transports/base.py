"""What a transport is: a source that lets its pool be read, and readers that copy out of it.

    Source (sending node)                          Reader (receiving node, one per link)
    open_link(link) → proof   ──Hello.proofs──▶    opener(link, proof, own pool) → Reader
                                                   pull(pieces): copy, then prove each piece
    close_link(link)                               close()

The same rules hold for each, and one suite of tests checks them (tests/integration/test_transports):

- The reader pulls. Nobody writes into another process's pool.
- A piece counts as copied only if its generation was the announced, even one before AND after the
  bytes were read (`StaleBlock`), and its digest, where there is one, is right (`DigestMismatch`).
- Nothing staged grows with the prompt.
- After `close_link` returns, the source's memory is read over that link by nobody, or what is read
  cannot be proven (a mapping that cannot be revoked).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
import numpy.typing as npt

from common.errors import DigestMismatch, StaleBlock
from common.kv_layout import KVLayout
from kv_transfer.digests import ranges_digest, slab_digest
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.ports import Piece


class Source(Protocol):
    """The sending node's side of one transport, for all of its links."""

    @property
    def name(self) -> str: ...

    def open_link(self, link: str) -> bytes:
        """Make this node's pool readable over a new link; returns what proves it, for Hello."""

    def close_link(self, link: str) -> None:
        """Tear the link down; may be called for a link that was never opened or used."""

    def close(self) -> None:
        """Tear every link down and end all threads."""


class Reader(Protocol):
    """The receiving node's side of one link."""

    remark: str  # what `pdq nodes` says of the link beside its transport, mostly ""

    def pull(self, pieces: Sequence[Piece]) -> None:
        """Copy every piece into its block and prove it. Blocking: call it in a thread of its own.

        Raises `StaleBlock`, `DigestMismatch`, `LinkLost`, or `MalformedMessage` for a place that
        does not exist. After any of these the blocks' content is undefined.
        """

    def close(self) -> None:
        """End the link from this side; a pull that runs in another thread ends with `LinkLost`,
        or, where nothing can make it wait, by itself."""


class Target:
    """The receiving node's own pool, as readers write to it."""

    def __init__(self, memory: PoolMemory, layout: KVLayout) -> None:
        self.memory, self.layout = memory, layout

    def ranges(self, piece: Piece) -> list[tuple[int, int]]:
        """What of a slab is copied, as (offset, length): all, or a tail's filled positions."""
        if piece.fill:
            return list(self.layout.tail_ranges(piece.fill))
        return [(0, self.memory.slab_bytes)]

    def check(self, piece: Piece) -> None:
        """Compare a copied piece's digest with the promised one; `DigestMismatch`."""
        if not piece.digest:
            return
        [[slab]] = self.memory.to_host([piece.block])
        if piece.fill:
            found = ranges_digest(slab, self.layout.tail_ranges(piece.fill), piece.seed)
        else:
            found = slab_digest(slab, piece.seed)
        if found != piece.digest:
            raise DigestMismatch(f"block {piece.index} is not what its hash promises")


class Counted(Protocol):
    """A pool whose generations can be looked at: our own, or a peer's mapping."""

    @property
    def generations(self) -> npt.NDArray[np.int64]: ...


def require_still(pool: Counted, piece: Piece) -> None:
    """`StaleBlock` unless the piece's block has the announced, even generation now."""
    if pool.generations[piece.slot] != piece.generation or piece.generation % 2:
        raise StaleBlock(f"block {piece.index} was reused while it was being copied")


# Opens the reading end of a link from a Hello's proof: `LinkLost` or `MalformedMessage` says why it
# cannot be proven. Blocking.
Opener = Callable[[str, bytes, Target], Reader]
