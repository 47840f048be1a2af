"""Where the blocks of an offered prompt go in this node's pool: block by block, or position by position.

Owns the arithmetic of links whose ends have different block sizes (`Conversion`) and of links whose
ends agree (`SameBlocks`). The sender numbers, announces, hashes and proves blocks of its own size;
this node reserves, fills and publishes blocks of its own. Both have the positions of the prompt in
common. transports/converting.py moves the bytes.

Delta is off where blocks are converted: the sender's hashes name no block of this node, so this node
reserves and wants every block. It computes the hashes of what lands from the token ids.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Protocol

from common.wire.messages import Offer
from kv_transfer.ports import Piece, Reservation, Span


class Placement(Protocol):
    """Places of one prompt. Indexes count the sender's blocks unless a method says otherwise."""

    @property
    def offer(self) -> Offer:
        """The offer in blocks of this node, to reserve room for."""

    def adopted(self) -> Offer:
        """The offer in blocks of this node, all of which have landed, with the hashes under which the
        full ones were published."""

    def wanted(self, reservation: Reservation) -> set[int]:
        """Indexes of the blocks that the sender must send."""

    def place(self, index: int, reservation: Reservation) -> tuple[int, tuple[Span, ...]]:
        """`Piece.block` and `Piece.spans` of an index."""

    def landed(self, piece: Piece) -> Iterator[Piece]:
        """Blocks of this node that this piece completes, each as a piece with this node's index,
        block, fill and hash. Each piece lands once."""


class SameBlocks:
    """Both ends have the same block size."""

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
    """The sender has another block size."""

    def __init__(self, offer: Offer, theirs: int, ours: int, hashes: Sequence[bytes]) -> None:
        """`theirs` and `ours` are the positions in a block of the sender and of this node; `hashes` are
        those of the prompt's full blocks of this node."""
        length = len(offer.request.token_ids)
        self._theirs, self._ours, self._length = theirs, ours, length
        self._hashes = hashes
        self._lacking = [min(ours, length - first) for first in range(0, length, ours)]
        # The pool may take from its cache what an offer has hashes of: here, nothing.
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
                    piece,
                    index=index,
                    block=span.block,
                    digest=b"",
                    spans=(),
                    fill=self._length % self._ours if is_tail else 0,
                    seed=b"" if is_tail else self._hashes[index],
                )
