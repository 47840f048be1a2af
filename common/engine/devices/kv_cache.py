"""The KV pool: one slab per block, block-major, as the layout describes it.

Owns the memory (or a view of memory that somebody else owns, such as a shared mapping) and the
strided views that attention reads. Knows nothing of who holds which block: that is block_pool.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from common.errors import ConfigError, InsufficientMemory
from common.kv_layout import KVLayout

TORCH_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class KVCache:
    """`num_blocks` slabs.

    `slabs` is the pool as bytes, uint8 `[num_blocks, slab_bytes]`; `elements` the same memory in
    the layout's dtype. `storage` is such a byte tensor.
    """

    def __init__(self, layout: KVLayout, num_blocks: int, storage: Tensor) -> None:
        dtypes = {segment.dtype for segment in layout.segments}
        if len(dtypes) != 1:
            raise ConfigError(f"a slab of several dtypes {sorted(dtypes)} needs another kernel")
        self.layout = layout
        self.num_blocks = num_blocks
        self.dtype = TORCH_DTYPES[dtypes.pop()]
        shape = (num_blocks, layout.slab_bytes)
        if tuple(storage.shape) != shape or not storage.is_contiguous():
            raise ConfigError(f"the pool's memory must be {list(shape)} contiguous bytes")
        self.slabs = storage
        self.elements = storage.view(self.dtype)
        self._offsets = {
            (segment.layer, segment.kind): segment.offset // self.dtype.itemsize
            for segment in layout.segments
        }
        self._shapes = {(s.layer, s.kind): s.shape for s in layout.segments}

    @property
    def own_elements(self) -> Tensor:
        """`elements` without a draft model's."""
        return self.elements[:, : self.layout.without_draft.slab_bytes // self.dtype.itemsize]

    @property
    def slab_elements(self) -> int:
        return self.elements.shape[1]

    def offset(self, layer: int, kind: str) -> int:
        """Where a segment starts inside a slab, in elements."""
        return self._offsets[layer, kind]

    def view(self, layer: int, kind: str) -> Tensor:
        """Strided view `[num_blocks, block_size, kv_heads, head_dim]` of one layer's segment."""
        positions, heads, head_dim = self._shapes[layer, kind]
        return torch.as_strided(
            self.elements,
            (self.num_blocks, positions, heads, head_dim),
            (self.slab_elements, heads * head_dim, head_dim, 1),
            self.elements.storage_offset() + self.offset(layer, kind),
        )

    def copy_blocks(self, copies: Sequence[tuple[int, int]]) -> None:
        """Copy whole slabs, (source, destination) each, in order."""
        for source, destination in copies:
            self.slabs[destination].copy_(self.slabs[source])

    def poison(self, block_ids: Sequence[int]) -> None:
        """Fill blocks with NaN, so that whoever reads a freed block finds out (tests)."""
        self.elements[list(block_ids)] = float("nan")


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
