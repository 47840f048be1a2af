"""How the KV of one block lies in memory, what identifies it, and who may exchange it.

Owns: segments and slabs, the fingerprint of a serving configuration, and block hashes.
Knows nothing of tensors or torch: offsets are bytes, dtypes are names.

A *slab* is the KV of one block (a fixed number of token positions) for all layers, in one
contiguous piece; the pool is block-major, so that sending a block is one contiguous copy.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import struct
from collections.abc import Iterator, Sequence

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
HASH_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One tensor inside a slab.

    `shape` is `[block_size, heads, head_dim]`; `offset` is in bytes from the slab's start; the
    head range is half-open and in the model's numbering, so that a tensor-parallel rank can say
    which part of the heads it holds.
    """

    layer: int
    kind: str  # "k" or "v"; later "latent", "scale", …
    shape: tuple[int, ...]
    dtype: str
    offset: int
    head_start: int
    head_end: int

    @property
    def num_bytes(self) -> int:
        return math.prod(self.shape) * DTYPE_BYTES[self.dtype]


@dataclasses.dataclass(frozen=True, slots=True)
class KVLayout:
    """The ordered list of segments of a slab. `slab_bytes` is its whole length."""

    block_size: int
    segments: tuple[Segment, ...]

    @classmethod
    def paged_attention(
        cls, *, num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: str
    ) -> KVLayout:
        """Per layer K, then V, each `[block_size, num_kv_heads, head_dim]`."""
        shape = (block_size, num_kv_heads, head_dim)
        size = math.prod(shape) * DTYPE_BYTES[dtype]
        segments = tuple(
            Segment(layer, kind, shape, dtype, (2 * layer + index) * size, 0, num_kv_heads)
            for layer in range(num_layers)
            for index, kind in enumerate(("k", "v"))
        )
        return cls(block_size, segments)

    @property
    def slab_bytes(self) -> int:
        return sum(segment.num_bytes for segment in self.segments)

    @property
    def bytes_per_token(self) -> int:
        return self.slab_bytes // self.block_size

    def tail_ranges(self, fill: int) -> Iterator[tuple[int, int]]:
        """Byte ranges (offset, length) of the first `fill` positions of every segment."""
        if not 0 < fill < self.block_size:
            raise ValueError(f"a tail holds 1 to {self.block_size - 1} positions, not {fill}")
        for segment in self.segments:
            yield segment.offset, segment.num_bytes // self.block_size * fill

    def describe(self) -> list[list[object]]:
        """A plain value, equal for equal layouts, for messages and the fingerprint."""
        return [
            [s.layer, s.kind, list(s.shape), s.dtype, s.offset, s.head_start, s.head_end]
            for s in self.segments
        ]


@dataclasses.dataclass(frozen=True, slots=True)
class Fingerprint:
    """What two nodes must agree on before one may use the other's KV.

    `layout` is a digest of the segment list without the block size, which two nodes may choose
    differently (intake converts); `numerics` is the engine's numerics class.
    """

    model: str
    revision: str
    layout: str
    numerics: str
    block_size: int
    adapter: str = ""

    def mismatch(self, other: Fingerprint) -> str | None:
        """The first field in which two fingerprints differ, `block_size` last; None if equal."""
        for field in ("model", "revision", "layout", "numerics", "adapter", "block_size"):
            if getattr(self, field) != getattr(other, field):
                return field
        return None

    def digest(self) -> bytes:
        """16 bytes over every field: the root of all block hashes made under it."""
        value = json.dumps(dataclasses.asdict(self), sort_keys=True).encode()
        return hashlib.blake2b(value, digest_size=HASH_BYTES).digest()


def layout_digest(layout: KVLayout) -> str:
    """A digest of the layout that does not depend on the block size."""
    value = [
        [s.layer, s.kind, list(s.shape[1:]), s.dtype, s.head_start, s.head_end]
        for s in layout.segments
    ]
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=HASH_BYTES).hexdigest()


@functools.lru_cache(maxsize=1024)  # asked for with every prompt; few fingerprints, some tenants
def root_hash(fingerprint: Fingerprint, cache_salt: str = "") -> bytes:
    """The parent of a first block: covers fingerprint, adapter, block size and tenant salt."""
    return hashlib.blake2b(
        fingerprint.digest() + cache_salt.encode(), digest_size=HASH_BYTES, person=b"pdq-root"
    ).digest()


def block_hash(parent: bytes, token_ids: Sequence[int], num_prompt: int) -> bytes:
    """Hash of a full block: parent, its token ids, and how many of its positions are prompt.

    Prompt and generated positions are computed by different kernel shapes (see the numerics
    rule), so a block is identified by its border too: `num_prompt` is `block_size` for a block
    of a prompt, 0 for a generated one, between for the block with the border inside.
    """
    data = struct.pack(f"<I{len(token_ids)}I", num_prompt, *token_ids)
    return hashlib.blake2b(parent + data, digest_size=HASH_BYTES, person=b"pdq-block").digest()


def chain_hashes(
    root: bytes, token_ids: Sequence[int], block_size: int, prompt_len: int
) -> list[bytes]:
    """Hashes of all full blocks of a sequence, in order."""
    hashes: list[bytes] = []
    parent = root
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        num_prompt = min(max(prompt_len - start, 0), block_size)
        parent = block_hash(parent, token_ids[start : start + block_size], num_prompt)
        hashes.append(parent)
    return hashes
