"""The KV pool: one slab per block, block-major, as the layout describes it.

Owns the memory (or a view of memory that somebody else owns, such as a shared mapping) and the
strided views that attention reads. Knows nothing of who holds which block: that is block_pool.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from common.errors import ConfigError, InsufficientMemory
from common.kv_layout import KVLayout, Segment

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Of segments; nothing is computed in those of 8 bits.
STORED_DTYPES = TORCH_DTYPES | {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}
# Of the setting `kv_cache_dtype`; any other name is the type in which a model computes.
SCALED_KV_DTYPES = {
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


class KVCache:
    """`num_blocks` slabs: `slabs` is the pool as bytes, uint8 `[num_blocks, slab_bytes]`.

    `parts` are all elements of all slabs, `[num_blocks, elements]` each: segments that lie side by side and
    have one dtype are one part. `own_parts` leave a draft model's segments out.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, storage: Tensor) -> None:
        """`storage` is the pool's memory, as `slabs`."""
        self.layout = layout
        self.num_blocks = num_blocks
        shape = (num_blocks, layout.slab_bytes)
        if tuple(storage.shape) != shape or not storage.is_contiguous():
            raise ConfigError(f"the pool's memory must be {list(shape)} contiguous bytes")
        self.slabs = storage
        self._segments = {(segment.layer, segment.kind): segment for segment in layout.segments}
        self._views: dict[tuple[int, str], Tensor] = {
            (s.layer, s.kind): _typed(storage, s.dtype, s.offset, s.num_bytes).view(num_blocks, *s.shape)
            for s in layout.segments
        }
        own = layout.without_draft.segments
        self.own_parts = _parts(storage, own)
        self.parts = (*self.own_parts, *_parts(storage, layout.segments[len(own) :]))

    def offset_bytes(self, layer: int, kind: str) -> int:
        """Where a segment starts inside a slab, in bytes."""
        return self._segments[layer, kind].offset

    def view(self, layer: int, kind: str) -> Tensor:
        """One layer's segment of all slabs, in its dtype: strided `[num_blocks, *segment.shape]`, which is
        `[num_blocks, block_size, kv_heads, head_dim]` of keys and values."""
        return self._views[layer, kind]

    def scales(self, layer: int, kind: str) -> Tensor | None:
        """Of a segment of 8 bits the scales, `[num_blocks, block_size, kv_heads]` (scaled_rows.py); None of
        any other."""
        return self._views.get((layer, f"{kind}_scale"))

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole slabs, (source, destination) each, in order."""
        for source, destination in copies:
            self.slabs[destination].copy_(self.slabs[source])

    def poison(self, block_ids: Iterable[int]) -> None:
        """Fill blocks with NaN, so that whoever reads a freed block finds out (tests)."""
        ids = list(block_ids)
        for part in self.parts:
            part[ids] = float("nan")


def _typed(slabs: Tensor, dtype: str, offset: int, num_bytes: int) -> Tensor:
    """So many bytes of each slab, `[num_blocks, elements]`."""
    return slabs[:, offset : offset + num_bytes].view(STORED_DTYPES[dtype])


def _parts(slabs: Tensor, segments: Sequence[Segment]) -> tuple[Tensor, ...]:
    runs: list[tuple[str, int, int]] = []  # dtype, first byte, the one after the last
    for segment in segments:
        end = segment.offset + segment.num_bytes
        if runs and runs[-1][0] == segment.dtype and runs[-1][2] == segment.offset:
            runs[-1] = (segment.dtype, runs[-1][1], end)
        else:
            runs.append((segment.dtype, segment.offset, end))
    return tuple(_typed(slabs, dtype, start, end - start) for dtype, start, end in runs)


def blocks_for_memory(layout: KVLayout, memory_bytes: int) -> int:
    """How many blocks fit into `memory_bytes`; raises `InsufficientMemory` when none does."""
    count = memory_bytes // layout.slab_bytes
    if count < 1:
        raise InsufficientMemory(
            f"{memory_bytes} bytes hold no block of {layout.slab_bytes}; "
            "raise --kv-cache-memory-bytes or lower --block-size",
            param="kv_cache_memory_bytes",
        )
    return count
