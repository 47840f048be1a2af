"""What a sequence's blocks must hold, and a block pool in which that is one value per block.

A block's content is its identity: the hash of its token chain, or what stands for a tail. So every
copy, and every block that a sequence reads, can be checked against token ids.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Protocol

from common.kv_layout import Fingerprint, root_hash
from common.sampling import SamplingParams
from common.wire.message import HandoffKey
from common.wire.messages import Offer
from kv_transfer.digests import tail_seed
from kv_transfer.ports import Piece, Reservation
from tests.support.asked import a_request
from tests.support.hashes import chain_hashes

BLOCK = 2
FINGERPRINT = Fingerprint("model", "rev", "layout", "numerics", BLOCK)
ROOT = root_hash(FINGERPRINT)
PARAMS = SamplingParams()
RUBBISH = b"rubbish".ljust(16)


class Violation(AssertionError):
    """Something that must always hold did not."""


def require(condition: object, what: str) -> None:
    if not condition:
        raise Violation(what)


@functools.cache
def identities(token_ids: tuple[int, ...]) -> tuple[bytes, ...]:
    """What the blocks of a prompt must contain; the tail last."""
    hashes = chain_hashes(ROOT, token_ids, BLOCK, len(token_ids))
    if fill := len(token_ids) % BLOCK:
        hashes.append(tail_seed(hashes[-1] if hashes else ROOT, token_ids[-fill:]))
    return tuple(hashes)


@functools.cache
def offer_of(key: HandoffKey, token_ids: tuple[int, ...]) -> Offer:
    count, fill = divmod(len(token_ids), BLOCK)
    hashes = identities(token_ids)[:count]
    request = a_request(token_ids, PARAMS, key.request, gateway="gateway")
    return Offer(key, request, hashes, fill, 0)


class Watcher(Protocol):
    """Who is told what a pool does."""

    def freed(self, pool: Pool, block: int, /) -> None: ...

    def room_changed(self, pool: Pool, /) -> None: ...

    def landing(self, pool: Pool, block: int, /) -> bool:
        """Whether a copy into this block runs."""

    def arrange(self, pool: Pool, free: list[int], /) -> None:
        """Put free blocks in the order of their use, last first."""


class Pool:
    """Blocks that hold one value each. Freed blocks stay cached until they are used again."""

    def __init__(self, watcher: Watcher, size: int) -> None:
        self.watcher, self.size = watcher, size
        self.content: list[bytes] = [RUBBISH] * size
        self.generation = [0] * size
        self.references = [0] * size
        self.identity: list[bytes] = [b""] * size  # what it is cached as
        self.cached: dict[bytes, int] = {}
        self.reservations: list[Reservation] = []

    def take(self, wanted: tuple[bytes, ...], full: int) -> tuple[list[int], list[int]] | None:
        """(blocks, missing indexes) for identities, of which the first `full` may be cached."""
        blocks: list[int] = []
        for identity in wanted[:full]:
            block = self.cached.get(identity)
            if block is None:
                break
            blocks.append(block)
        references, found = self.references, len(blocks)
        free = [b for b in range(self.size) if not references[b] and b not in blocks]
        if len(wanted) - found > len(free):
            return None
        self.watcher.arrange(self, free)
        blocks += [free.pop() for _ in range(len(wanted) - found)]
        for block in blocks:
            references[block] += 1
        for block in blocks[found:]:
            self.begin_write(block)
        return blocks, list(range(found, len(wanted)))

    def begin_write(self, block: int) -> None:
        if self.identity[block]:
            del self.cached[self.identity[block]]
            self.identity[block] = b""
        self.generation[block] += 1 + self.generation[block] % 2  # odd, and new
        self.content[block] = RUBBISH

    def seal(self, block: int, identity: bytes, full: bool) -> None:
        self.content[block] = identity
        self.generation[block] += 1
        if full:
            self.publish(block, identity)

    def publish(self, block: int, identity: bytes) -> None:
        if identity not in self.cached:
            self.cached[identity] = block
            self.identity[block] = identity

    def check(self, blocks: Sequence[int], token_ids: tuple[int, ...], what: str) -> None:
        for block, identity in zip(blocks, identities(token_ids), strict=True):
            require(self.content[block] == identity, what)

    # What senders and leases use

    def acquire(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            require(self.references[block] > 0, "acquired a block that nobody holds")
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] -= 1
            require(self.references[block] >= 0, "released a block too often")
            if not self.references[block]:
                self.watcher.freed(self, block)
        self.watcher.room_changed(self)

    def forget(self, hashes: Sequence[bytes]) -> None:
        for identity in hashes:
            block = self.cached.pop(identity, None)
            if block is not None:
                self.identity[block] = b""

    # IntakePool

    def reserve(self, offer: Offer) -> Reservation | None:
        taken = self.take(identities(offer.request.token_ids), len(offer.block_hashes))
        if taken is None:
            return None
        reservation = Reservation(tuple(taken[0]), tuple(taken[1]))
        self.reservations.append(reservation)
        return reservation

    def withdraw(self, offer: Offer) -> None: ...

    def landed(self, reservation: Reservation, piece: Piece) -> None:
        require(reservation in self.reservations, "landed in a reservation that is over")
        self.generation[piece.block] += 1
        if not piece.fill:
            require(self.content[piece.block] == piece.seed, "a wrong block was published")
            self.publish(piece.block, piece.seed)

    def adopt(self, reservation: Reservation) -> None:
        require(reservation in self.reservations, "adopted what was not reserved")
        self.reservations.remove(reservation)

    def discard(self, reservation: Reservation) -> None:
        require(reservation in self.reservations, "discarded what was not reserved")
        self.reservations.remove(reservation)
        for index in reservation.missing:
            block = reservation.blocks[index]
            require(
                self.references[block] > 1 or not self.watcher.landing(self, block),
                "freed a block into which a copy still runs",
            )
        self.release(reservation.blocks)
