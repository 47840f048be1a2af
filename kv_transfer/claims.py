"""What the sending end says about its prompt, held against what its offer must mean here.

Owns the checks of Offer, Blocks, Tail and Commit that need no more than these and the sender's
fingerprint: the intake believes no hash, index, or count that it does not compute itself. Knows no
state of a handoff: that is intake.py.
"""

from __future__ import annotations

import dataclasses

from common.errors import ProtocolError
from common.kv_layout import Fingerprint, chain_hashes, root_hash
from common.messages import Blocks, Commit, Offer, Tail
from kv_transfer.digests import DIGEST_BYTES, tail_seed


@dataclasses.dataclass(frozen=True, slots=True)
class Announced:
    """A computed block of the sender's, as a `Piece` names it, but for where it goes here."""

    index: int
    slot: int
    generation: int
    fill: int
    digest: bytes
    seed: bytes


def is_well_formed(offer: Offer, fingerprint: Fingerprint) -> bool:
    """The hashes are what this node computes itself: nothing else may name blocks here."""
    block_size = fingerprint.block_size
    count, tail_fill = divmod(len(offer.token_ids), block_size)
    return (
        len(offer.token_ids) > 0
        and offer.tail_fill == tail_fill
        and len(offer.block_hashes) == count
        and 0 <= offer.prompt_len <= len(offer.token_ids)
        and all(0 <= token < 2**32 for token in offer.token_ids)
        and list(offer.block_hashes)
        == chain_hashes(
            root_hash(fingerprint, offer.cache_salt), offer.token_ids, block_size, offer.prompt_len
        )
    )


def full_blocks(offer: Offer, blocks: Blocks) -> list[Announced]:
    """`ProtocolError` where the message does not fit the offer."""
    hashes, count = offer.block_hashes, len(blocks.indexes)
    digests = blocks.digests or (b"",) * count
    if not (
        len(blocks.slots) == len(blocks.generations) == len(digests) == count
        and all(0 <= index < len(hashes) for index in blocks.indexes)
        and all(len(digest) == DIGEST_BYTES for digest in blocks.digests)
    ):
        raise ProtocolError("Blocks that the offer has not")
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
        and tail.token_ids == offer.token_ids[-tail.fill :]
        and len(tail.digest) in (0, DIGEST_BYTES)
    ):
        raise ProtocolError("a Tail that the offer has not")
    seed = tail_seed(parent or root_hash(fingerprint, offer.cache_salt), tail.token_ids)
    return Announced(tail.index, tail.slot, tail.generation, tail.fill, tail.digest, seed)


def commits_all(offer: Offer, commit: Commit) -> bool:
    """Whether a Commit is of the whole prompt."""
    count = len(offer.block_hashes) + (offer.tail_fill > 0)
    return commit.blocks == count and commit.position == len(offer.token_ids)
