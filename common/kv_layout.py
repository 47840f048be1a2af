"""How the KV of one block lies in memory, what identifies it, and who may exchange it.

Owns: segments and slabs, the fingerprint of a serving configuration, and block hashes.
Knows nothing of tensors or torch: offsets are bytes, dtypes are names.

A *slab* is the KV of one block (a fixed number of token positions) for all layers, in one
contiguous piece; the pool is block-major, so that sending a block is one contiguous copy.

Keys and values of 8 bits have a *scale* for each position and head, in segments of their own
(engine/devices/scaled_rows.py says how it is chosen).
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import struct
import sys
from collections.abc import Iterable, Sequence
from typing import NamedTuple

DTYPE_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1}
SCALED_DTYPES: tuple[str, ...] = ("float8_e4m3fn", "float8_e5m2")  # mean nothing without a scale
SCALE_DTYPE = "bfloat16"  # scales are powers of two, of which it has as many as float32, in half the bytes
ALIGNMENT = 16  # bytes at whose multiples every segment and every slab begin: what one load of a GPU takes
HASH_BYTES = 16


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """One tensor inside a slab.

    `shape` is `[block_size, heads, head_dim]`, of scales `[block_size, heads]`; `offset` is in bytes from
    the slab's start; the head range is half-open and in the model's numbering, so that a tensor-parallel
    rank can say which part of the heads it holds.
    """

    layer: int
    kind: str  # "k", "v", "k_scale" or "v_scale"; later "latent", …
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
    """The ordered list of segments of a slab, each at the next multiple of `ALIGNMENT`.

    The last `num_draft` segments are a draft model's, whose layers are numbered on from the model's own.
    They travel with the others, but no digest covers them: they may be written after the block is full,
    and what is wrong in them costs drafts only.

    What lies between two segments, if anything does, is zero and stays so: whole slabs are copied and
    digested, and what has the same hash has the same bytes.
    """

    block_size: int
    segments: tuple[Segment, ...]
    num_draft: int = 0

    @classmethod
    def paged_attention(
        cls, *, num_layers: int, num_kv_heads: int, head_dim: int, block_size: int, dtype: str
    ) -> KVLayout:
        """Per layer K, then V, each `[block_size, num_kv_heads, head_dim]`. If `dtype` is one of
        `SCALED_DTYPES`, per layer K's scales, then V's, each `[block_size, num_kv_heads]`, follow behind the
        last layer's V, so that keys and values lie at equal distances in any type."""

        def per_layer(kinds: tuple[str, str], dtype: str, *row: int) -> Iterable[Segment]:
            shape = (block_size, num_kv_heads, *row)
            for layer in range(num_layers):
                for kind in kinds:
                    yield Segment(layer, kind, shape, dtype, 0, 0, num_kv_heads)

        segments = [*per_layer(("k", "v"), dtype, head_dim)]
        if dtype in SCALED_DTYPES:
            segments += per_layer(("k_scale", "v_scale"), SCALE_DTYPE)
        return _placed(block_size, segments)

    def with_draft(self, draft: KVLayout) -> KVLayout:
        """This model's segments, then those of a draft model with blocks of the same size, whose dtype may
        be another."""
        assert draft.block_size == self.block_size
        assert not self.num_draft
        layers = self.num_layers
        behind = [dataclasses.replace(segment, layer=layers + segment.layer) for segment in draft.segments]
        return _placed(self.block_size, [*self.segments, *behind], len(behind))

    @property
    def num_layers(self) -> int:
        """The draft model's included."""
        return self.segments[-1].layer + 1

    @property
    def slab_bytes(self) -> int:
        last = self.segments[-1]
        return _aligned(last.offset + last.num_bytes)

    @property
    def without_draft(self) -> KVLayout:
        """The model's own segments, which lie at the start of a slab: what a digest covers, and what nodes
        with different draft models have in common."""
        return KVLayout(self.block_size, self.segments[: len(self.segments) - self.num_draft])

    @property
    def bytes_per_token(self) -> int:
        """As many as a position's share of a slab is, in whole bytes."""
        return self.slab_bytes // self.block_size

    def ranges(self, fill: int = 0) -> list[tuple[int, int]]:
        """Byte ranges (offset, length) of a slab: one for all of it, or of a tail the first `fill` positions
        of every segment."""
        if not fill:
            return [(0, self.slab_bytes)]
        if not 0 < fill < self.block_size:
            raise ValueError(f"a tail holds 1 to {self.block_size - 1} positions, not {fill}")
        return [(one.offset, one.num_bytes // self.block_size * fill) for one in self.segments]

    def with_block_size(self, block_size: int) -> KVLayout:
        """The same segments in slabs of another number of positions."""
        segments = [
            dataclasses.replace(segment, shape=(block_size, *segment.shape[1:])) for segment in self.segments
        ]
        return _placed(block_size, segments, self.num_draft)

    def describe(self) -> str:
        """All that two layouts must have in common, whatever their block sizes, as one text: without a
        draft model's segments, which `describe_draft` describes.

        Ranges are half-open, and layers that are alike are said once:
        `layers 0-24: k bfloat16 heads 0-4 of 64, v bfloat16 heads 0-4 of 64`. Groups of other
        layers, and scales (`layers 0-24: k_scale bfloat16 heads 0-4, v_scale …`), follow after a semicolon,
        in the order in which they lie in a slab.
        """
        return _described(self.without_draft.segments)

    def describe_draft(self) -> str:
        """As `describe`, of the draft model's segments; "" without any."""
        return _described(self.segments[len(self.segments) - self.num_draft :])


def _aligned(offset: int) -> int:
    return -(-offset // ALIGNMENT) * ALIGNMENT


def _placed(block_size: int, segments: Iterable[Segment], num_draft: int = 0) -> KVLayout:
    """A layout of these segments in this order, whatever their offsets were."""
    offset, placed = 0, []
    for segment in segments:
        placed.append(dataclasses.replace(segment, offset=offset))
        offset = _aligned(offset + segment.num_bytes)
    return KVLayout(block_size, tuple(placed), num_draft)


def _described(segments: Sequence[Segment]) -> str:
    groups: list[tuple[int, int, str]] = []  # first layer, the one after the last, segments
    for layer, of_layer in itertools.groupby(segments, lambda segment: segment.layer):
        said = ", ".join(
            f"{s.kind} {s.dtype} heads {s.head_start}-{s.head_end}"
            + (" of " + "x".join(map(str, s.shape[2:])) if s.shape[2:] else "")
            for s in of_layer
        )
        if groups and groups[-1][1:] == (layer, said):
            groups[-1] = (groups[-1][0], layer + 1, said)
        else:
            groups.append((layer, layer + 1, said))
    return "; ".join(f"layers {start}-{end}: {said}" for start, end, said in groups)


UNREPEATABLE = "unrepeatable"  # in a numerics class: a token may depend on who else was in its step
ONE_CLASS = "one-class"  # in a numerics class: a generated position has the bits it would have in a prompt


class Mismatch(NamedTuple):
    """What keeps two nodes from using each other's KV: a field, and its value at either."""

    field: str
    mine: str
    yours: str


@dataclasses.dataclass(frozen=True, slots=True)
class Fingerprint:
    """What decides whether one node may use the other's KV.

    `layout` is `KVLayout.describe()`; `numerics` is the engine's numerics class; `tokenizer` is a
    digest of what gives token ids their meaning, ids that end an answer included. `block_size` is
    each node's own choice (an intake converts), but blocks of different sizes have different
    hashes, for it is part of their root. `draft` names the draft model whose KV is in the slabs, too, ""
    for none. It is each node's own choice as well: the draft's KV goes along where both ends have the
    same, and the model's own KV has the same hashes with any.
    """

    model: str
    revision: str
    layout: str
    numerics: str
    block_size: int
    adapter: str = ""
    tokenizer: str = ""
    draft: str = ""

    def border(self, prompt_len: int) -> int:
        """How many of a sequence's first positions count as prompt in the hashes of its blocks: all of them
        where the numerics class says that generated ones have the same bits."""
        return sys.maxsize if ONE_CLASS in self.numerics.split("/") else prompt_len

    @property
    def is_repeatable(self) -> bool:
        """Whether the same request gives the same tokens on all nodes of this class."""
        return all(part.partition("-")[0] != UNREPEATABLE for part in self.numerics.split("/"))

    def mismatch(self, other: Fingerprint) -> Mismatch | None:
        """The first thing that must be equal and is not, with both values; None if KV of one may
        go on at the other. Of a layout it is named which part differs."""
        for field in ("model", "revision", "tokenizer", "layout", "numerics", "adapter"):
            mine, yours = str(getattr(self, field)), str(getattr(other, field))
            if mine != yours:
                differs = Mismatch(field, mine, yours)
                return _layout_mismatch(differs) if field == "layout" else differs
        return None

    def digest(self) -> bytes:
        """16 bytes over every field but `draft`: the root of all block hashes made under it."""
        value = json.dumps(dataclasses.asdict(dataclasses.replace(self, draft="")), sort_keys=True).encode()
        return hashlib.blake2b(value, digest_size=HASH_BYTES).digest()


_LONGEST_TEXT = 2**14  # of a described layout that is taken apart: it comes from a peer
_GROUP = re.compile(r"layers (\d{1,9})-(\d{1,9}): (.+)", re.ASCII)
_SEGMENT = re.compile(r"(\w+) (\w+) heads (\d{1,9})-(\d{1,9})(?: of ([\dx]+))?", re.ASCII)
_Groups = list[tuple[str, str, list[re.Match[str]]]]  # first layer, the one after the last, segments


def _parsed(text: str) -> _Groups | None:
    """A described layout, taken apart; None for what is none."""
    groups: _Groups = []
    for part in text.split("; "):
        group = _GROUP.fullmatch(part)
        segments = [_SEGMENT.fullmatch(one) for one in group[3].split(", ")] if group else [None]
        found = [segment for segment in segments if segment is not None]
        if group is None or len(found) < len(segments):
            return None
        groups.append((group[1], group[2], found))
    return groups


def _layout_mismatch(differs: Mismatch) -> Mismatch:
    """Which part of two described layouts differs; `differs` as it is where none can be named, as
    for the text of another version."""
    if max(map(len, differs[1:])) > _LONGEST_TEXT:
        return differs
    mine, yours = (_parsed(text) for text in differs[1:])
    if mine is None or yours is None:
        return differs
    layers = [{(start, end) for start, end, _ in groups} for groups in (mine, yours)]
    if max(map(len, layers)) > 1:  # layers of several sorts
        return differs
    [(my_start, my_end)], [(your_start, your_end)] = layers
    if my_start == your_start and my_end != your_end:
        return Mismatch("num_layers", my_end, your_end)
    parts = [[segment for _, _, segments in groups for segment in segments] for groups in (mine, yours)]
    for one, other in zip(*parts, strict=False):
        if one[1] != other[1]:
            return differs
        for field, values in (
            ("dtype", (one[2], other[2])),
            ("num_kv_heads", [str(int(s[4]) - int(s[3])) for s in (one, other)]),
            ("head_range", (f"{one[3]}-{one[4]}", f"{other[3]}-{other[4]}")),
            ("head_dim", (one[5] or "none", other[5] or "none")),
        ):
            if values[0] != values[1]:
                return Mismatch(field if one[1] in ("k", "v") else f"{one[1]} {field}", *values)
    return differs


@functools.lru_cache(maxsize=1024)  # asked for with every prompt; few fingerprints, some tenants
def root_hash(fingerprint: Fingerprint, cache_salt: str = "") -> bytes:
    """The parent of a first block: covers fingerprint, adapter, block size and tenant salt."""
    return hashlib.blake2b(
        fingerprint.digest() + cache_salt.encode(), digest_size=HASH_BYTES, person=b"pdq-root"
    ).digest()


def block_hash(parent: bytes, token_ids: Sequence[int], num_prompt: int) -> bytes:
    """Hash of a full block: parent, its token ids, and how many of its positions are prompt.

    Where prompt and generated positions are computed by different kernel shapes (see the numerics
    rule), a block is identified by its border too: `num_prompt` is `block_size` for a block
    of a prompt, 0 for a generated one, between for the block with the border inside. Where they are
    not, all count as prompt (`Fingerprint.border`): a reply's blocks are those of the next turn's prompt.
    """
    data = struct.pack(f"<I{len(token_ids)}I", num_prompt, *token_ids)
    return hashlib.blake2b(parent + data, digest_size=HASH_BYTES, person=b"pdq-block").digest()


HASHED_AT_ONCE = 4096  # tokens: less than half a millisecond


class HashChain:
    """Hashes of all full blocks of a sequence, in order, computed a piece at a time: those of a long
    prompt take longer than an event loop may be held up (128k tokens: 13 ms)."""

    def __init__(self, root: bytes, token_ids: Sequence[int], block_size: int, border: int) -> None:
        """`border`: as `Fingerprint.border` gives it."""
        self.hashes: list[bytes] = []
        self._parent = root
        self._token_ids, self._block_size, self._border = token_ids, block_size, border

    def advance(self, tokens: int = HASHED_AT_ONCE) -> bool:
        """Compute those of about so many more tokens, of one block at least; whether these were the
        last. `ValueError` for a token id that is no unsigned number of 32 bits."""
        size, known = self._block_size, len(self.hashes)
        total, count = len(self._token_ids) // size, max(1, tokens // size)
        for index in range(known, min(known + count, total)):
            start = index * size
            num_prompt = min(max(self._border - start, 0), size)
            try:
                self._parent = block_hash(self._parent, self._token_ids[start : start + size], num_prompt)
            except struct.error as error:
                raise ValueError(f"token ids in block {index}: {error}") from error
            self.hashes.append(self._parent)
        return len(self.hashes) == total

    async def finish(self) -> list[bytes]:
        """All of them; whatever else the event loop has to do comes between two pieces."""
        while not self.advance():  # noqa: ASYNC110  (each turn does a piece)
            await asyncio.sleep(0)
        return self.hashes
