"""How many blocks a pool gets on a device with memory of its own: what is left when all else has its share.

    weights → the largest steps, once → pool = left - graphs - links → graphs → links

In this order: what a step needs beside the pool is measured, and the allocator keeps it for the next one; the
pool's addresses are in the graphs; links, which allocate in threads of their own, come last.

Owns the arithmetic, in bytes. What is left accounts for `gpu_memory_utilization` (device.free_memory).
"""

from __future__ import annotations

import dataclasses

from common.errors import InsufficientMemory
from common.settings.config import EngineSettings

GIB = 1 << 30
LINK_BYTES = 256 << 20  # for transports that have memory on the device
GRAPH_BYTES = 4 << 20  # of one graph, beside what its kernels write
GRAPH_SLACK = 1.25  # of what the largest one's kernels write, for smaller ones that fit badly into it


@dataclasses.dataclass(frozen=True, slots=True)
class Needs:
    """Beside the pool."""

    weights: int  # for messages
    steps: int  # what the largest step needed; it is taken already
    bucket: int  # what the largest bucket needed: its graph will have memory of its own
    graphs: int  # how many are recorded
    shared: bool  # other processes will read the pool

    @property
    def later(self) -> int:
        """Bytes that are taken after the pool."""
        graphs = int(self.bucket * GRAPH_SLACK) + self.graphs * GRAPH_BYTES if self.graphs else 0
        return graphs + (LINK_BYTES if self.shared else 0)


def blocks_of_pool(settings: EngineSettings, left: int, needs: Needs, slab_bytes: int, useful: int) -> int:
    """`left` bytes may be taken yet; more than `useful` blocks are never in use. `InsufficientMemory` names
    the setting to change."""
    free = left - needs.later
    fits = max(0, free) // slab_bytes
    wanted = settings.num_kv_blocks
    if wanted is None and settings.kv_cache_memory_bytes is not None:
        wanted = settings.kv_cache_memory_bytes // slab_bytes
    if wanted is not None and 1 <= wanted <= fits:
        return wanted
    if wanted is None and fits >= 1:
        return min(useful, fits)
    if wanted is not None and wanted < 1:
        raise InsufficientMemory(
            f"{settings.kv_cache_memory_bytes} bytes hold no block of {slab_bytes}; raise "
            "--kv-cache-memory-bytes or lower --block-size",
            param="kv_cache_memory_bytes",
        )
    named = "num_kv_blocks" if settings.num_kv_blocks is not None else "kv_cache_memory_bytes"
    param = named if wanted is not None else "gpu_memory_utilization"
    remedy = (
        f"lower --{param.replace('_', '-')}"
        if wanted is not None
        else "raise --gpu-memory-utilization, or lower --max-num-batched-tokens or --max-num-seqs"
    )
    raise InsufficientMemory(
        f"a KV pool of {(wanted or 1) * slab_bytes / GIB:.2f} GiB does not fit: with gpu_memory_utilization "
        f"{settings.gpu_memory_utilization:g}, beside {needs.weights / GIB:.2f} GiB of weights and "
        f"{needs.steps / GIB:.2f} GiB for the largest step, {max(0, left) / GIB:.2f} GiB are left, and "
        f"graphs and links need {needs.later / GIB:.2f} GiB of them; {remedy}",
        param=param,
    )
