"""The pool's memory: which pages are touched when."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from kv_transfer.pool_memory import PoolMemory


def resident_bytes() -> int:
    """Shared memory of this process that has pages."""
    found = re.search(r"RssShmem:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_a_pool_is_warmed_as_far_as_asked_and_keeps_its_content() -> None:
    before = resident_bytes()
    memory = PoolMemory(64, 1 << 20, warm=False)
    try:
        memory.slabs[3] = 7
        memory.warm(16 << 20)
        assert 16 << 20 <= resident_bytes() - before < 24 << 20
        assert torch.equal(memory.slabs[3], torch.full((1 << 20,), 7, dtype=torch.uint8))
        assert not memory.slabs[4].any()
        memory.warm(1 << 40)
        assert resident_bytes() - before >= 64 << 20
    finally:
        memory.close()
