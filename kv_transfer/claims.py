"""Checks of what the sending end claims about its prompt.

Owns the checks of Offer, Blocks, Tail and Commit that need only these messages and the sender's
fingerprint. The intake believes no hash, index or count that it does not compute itself. The state
of a handoff is in intake.py.
"""

from __future__ import annotations

import dataclasses

from common.errors import ProtocolError
from common.kv_layout import Fingerprint, HashChain
from common.wire.messages import Blocks, Commit, Offer, Tail
from kv_transfer.digests import DIGEST_BYTES, tail_seed


@dataclasses.dataclass(frozen=True, slots=True)
class Announced:
    """A computed block of the sender: a `Piece` without its place in this node's pool."""

    index: int
    slot: int
    generation: int
    fill: int
    digest: bytes
    seed: bytes


class Check:
    """Checks that an offer's hashes are those that this node computes itself, since nothing else may name
    blocks here. Where its own blocks (`mine`) have another size, it computes their hashes along the way.

    It works a piece at a time, because its loop also plans the steps of all streams.
    """

    def __init__(self, offer: Offer, theirs: Fingerprint, mine: Fingerprint) -> None:
        self._offer, self._block_size = offer, theirs.block_size
        self._chain = _chain(offer, theirs)
        self._converted = _chain(offer, mine) if theirs.block_size != mine.block_size else None
        self._shaped = False

    def advance(self) -> bool:
        """Check the next piece; True when the whole offer is right. `ProtocolError` if it is not."""
        if not self._shaped:
            self._check_shape()
        start = len(self._chain.hashes)
        try:
            done = self._chain.advance()
            if self._converted is not None:
                done = self._converted.advance() and done
        except ValueError as error:
            raise ProtocolError(str(error)) from error
        end = len(self._chain.hashes)
        if tuple(self._chain.hashes[start:]) != self._offer.block_hashes[start:end]:
            raise ProtocolError("block hashes of something else")
        return done

    @property
    def converted(self) -> list[bytes] | None:
        """Hashes of the prompt in blocks of this node, once the offer is checked. None means that the
        offer's own hashes hold here."""
        return None if self._converted is None else self._converted.hashes

    def _check_shape(self) -> None:
        offer = self._offer
        count, tail_fill = divmod(len(offer.request.token_ids), self._block_size)
        tail = offer.request.token_ids[count * self._block_size :]
        if not (
            offer.key.request == offer.request.id
            and len(offer.request.token_ids) > 0
            and offer.tail_fill == tail_fill
            and len(offer.block_hashes) == count
            and 0 <= offer.request.prompt_len <= len(offer.request.token_ids)
            and all(0 <= token < 2**32 for token in tail)
        ):
            raise ProtocolError("the parts of an Offer do not fit each other")
        self._shaped = True


def _chain(offer: Offer, fingerprint: Fingerprint) -> HashChain:
    root = offer.request.cache_root(fingerprint)
    border = fingerprint.border(offer.request.prompt_len)
    return HashChain(root, offer.request.token_ids, fingerprint.block_size, border)


def full_blocks(offer: Offer, blocks: Blocks) -> list[Announced]:
    """`ProtocolError` where the message does not fit the offer."""
    hashes, count = offer.block_hashes, len(blocks.indexes)
    digests = blocks.digests or (b"",) * count
    if not (
        len(blocks.slots) == len(blocks.generations) == len(digests) == count
        and all(0 <= index < len(hashes) for index in blocks.indexes)
        and all(len(digest) == DIGEST_BYTES for digest in blocks.digests)
    ):
        raise ProtocolError("Blocks name what the offer does not have")
    return [
        Announced(index, slot, generation, 0, digest, hashes[index])
        for index, slot, generation, digest in zip(
            blocks.indexes, blocks.slots, blocks.generations, digests, strict=True
        )
    ]


def tail_block(offer: Offer, tail: Tail, fingerprint: Fingerprint) -> Announced:
    """`ProtocolError` where the message does not fit the offer."""
    parent = offer.block_hashes[-1] if offer.block_hashes else b""
    if not (
        tail.index == len(offer.block_hashes)
        and tail.fill == offer.tail_fill > 0
        and tail.parent == parent
        and tail.token_ids == offer.request.token_ids[-tail.fill :]
        and len(tail.digest) in (0, DIGEST_BYTES)
    ):
        raise ProtocolError("a Tail names what the offer does not have")
    seed = tail_seed(parent or offer.request.cache_root(fingerprint), tail.token_ids)
    return Announced(tail.index, tail.slot, tail.generation, tail.fill, tail.digest, seed)


def commits_all(offer: Offer, commit: Commit) -> bool:
    """Whether a Commit covers the whole prompt."""
    count = len(offer.block_hashes) + (offer.tail_fill > 0)
    return commit.blocks == count and commit.position == len(offer.request.token_ids)
