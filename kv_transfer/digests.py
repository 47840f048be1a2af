"""Digests of slabs: xxh3-128, seeded with the identity of the content. The only user of xxhash.

The seed is the block hash (of a tail: parent and token ids). So the digest of a block that was reused
for another prompt differs from the promised one even where the bytes are equal. A digest finds
mistakes and corruption; it does not protect against a peer that lies on purpose.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Iterable, Sequence

import xxhash

from common.kv_layout import HASH_BYTES

DIGEST_BYTES = 16


def slab_digest(slab: memoryview, seed: bytes) -> bytes:
    """16 bytes over one slab. `seed` is its block hash. Releases the GIL."""
    return xxhash.xxh3_128_digest(slab, int.from_bytes(seed[:8], "little"))


def ranges_digest(slab: memoryview, ranges: Iterable[tuple[int, int]], seed: bytes) -> bytes:
    """16 bytes over the (offset, length) pieces of one slab, in order: a tail's filled positions."""
    digest = xxhash.xxh3_128(seed=int.from_bytes(seed[:8], "little"))
    for offset, length in ranges:
        digest.update(slab[offset : offset + length])
    return digest.digest()


def tail_seed(parent: bytes, token_ids: Sequence[int]) -> bytes:
    """Seed of a tail's digest, in place of a block hash, which a tail does not have.

    `parent` is the hash of the block before it, or the root (`kv_layout.root_hash`) if there is none.
    """
    data = struct.pack(f"<{len(token_ids)}I", *token_ids)
    return hashlib.blake2b(parent + data, digest_size=HASH_BYTES, person=b"pdq-tail").digest()
