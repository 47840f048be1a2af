"""Where the blocks of an offered prompt go in this node's pool: block by block, or position by position.

Owns the arithmetic of a link whose ends have other block sizes (`Conversion`), beside that of one
whose ends agree (`SameBlocks`). The sender's blocks are numbered, announced, hashed and proven in
its size; this node's pool is reserved, filled and published in its own. Positions of the prompt
are what both have in common. Knows no bytes: those are moved by transports/converting.py.

Delta is off where blocks are converted. The sender's hashes name no block of this node, so every
block is reserved new and wanted. The hashes of what lands are computed here, from the token ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

from common.messages import Offer
from kv_transfer.ports import Piece, Reservation, Span


class Placement(Protocol):
    """One prompt. Indexes are the sender's, except where it says otherwise."""

    @property
    def offer(self) -> Offer:
        """The offer in blocks of this node, to reserve room for."""

    def adopted(self) -> Offer:
        """The offer in blocks of this node, with the hashes under which the full ones were
        published: all are here."""

    def wanted(self, reservation: Reservation) -> set[int]:
        """Indexes that must come."""

    def place(self, index: int, reservation: Reservation) -> tuple[int, tuple[Span, ...]]:
        """`Piece.block` and `Piece.spans` of an index."""

    def landed(self, piece: Piece) -> Iterator[Piece]:
        """The blocks of this node that are whole now that this piece is here: each as the piece
        that made it whole, with index, block, fill and hash of ours. A piece lands once."""


class SameBlocks:
    """Both ends have blocks of one size."""

    def __init__(self, offer: Offer) -> None:
        self.offer = offer

    def adopted(self) -> Offer:
        return self.offer

    def wanted(self, reservation: Reservation) -> set[int]:
        return set(reservation.missing)

    def place(self, index: int, reservation: Reservation) -> tuple[int, tuple[Span, ...]]:
        return reservation.blocks[index], ()

    def landed(self, piece: Piece) -> Iterator[Piece]:
        yield piece


class Conversion:
    """The sender has blocks of another size."""

    def __init__(self, offer: Offer, theirs: int, ours: int, hashes: Sequence[bytes]) -> None:
        """`theirs`, `ours`: positions in a block of the sender, of this node; `hashes` of the prompt's
        full blocks in ours."""
        length = len(offer.token_ids)
        self._theirs, self._ours, self._length = theirs, ours, length
        self._hashes = hashes
        self._lacking = [min(ours, length - first) for first in range(0, length, ours)]
        # A hash in an offer is a block that the pool may take from its cache: here, none.
        self.offer = dataclasses.replace(offer, block_hashes=(), tail_fill=length % ours)

    def adopted(self) -> Offer:
        return dataclasses.replace(self.offer, block_hashes=tuple(self._hashes))

    def wanted(self, reservation: Reservation) -> set[int]:
        return set(range(-(-self._length // self._theirs)))

    def place(self, index: int, reservation: Reservation) -> tuple[int, tuple[Span, ...]]:
        first = index * self._theirs
        end = min(first + self._theirs, self._length)
        spans, position = [], first
        while position < end:
            into, at = divmod(position, self._ours)
            length = min(self._ours - at, end - position)
            spans.append(Span(reservation.blocks[into], at, position - first, length))
            position += length
        return spans[0].block, tuple(spans)

    def landed(self, piece: Piece) -> Iterator[Piece]:
        position = piece.index * self._theirs
        for span in piece.spans:
            index = position // self._ours
            position += span.length
            self._lacking[index] -= span.length
            assert self._lacking[index] >= 0, f"block {index} was filled twice"
            if not self._lacking[index]:
                is_tail = index == len(self._hashes)
                yield dataclasses.replace(
                    piece, index=index, block=span.block, digest=b"", spans=(),
                    fill=self._length % self._ours if is_tail else 0,
                    seed=b"" if is_tail else self._hashes[index],
                )  # fmt: skip
