"""The pool's memory: what either kind of it promises, and which pages are touched when.

The device is one that is not there (tests/support/fake_cuda.py): what is proven is everything but the
calls of torch and CUDA.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.errors import LinkLost
from common.kv_layout import KVLayout
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.pool_memory import HostPoolMemory, PoolMemory
from kv_transfer.ports import Span
from tests.support.fake_cuda import FakeCuda

LAYOUT = KVLayout.paged_attention(num_layers=2, num_kv_heads=1, head_dim=4, block_size=4, dtype="float32")


def resident_bytes() -> int:
    """Shared memory of this process that has pages."""
    found = re.search(r"RssShmem:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024


def test_a_pool_is_warmed_as_far_as_asked_and_keeps_its_content() -> None:
    before = resident_bytes()
    memory = HostPoolMemory(64, 1 << 20, warm=False)
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


@pytest.fixture(params=["host", "device"])
def memory(request: pytest.FixtureRequest) -> Iterator[PoolMemory]:
    cuda = FakeCuda()
    on_host = request.param == "host"
    made: PoolMemory = (
        HostPoolMemory(5, LAYOUT.slab_bytes)
        if on_host
        else DevicePoolMemory(5, LAYOUT.slab_bytes, cuda, staged_bytes=2 * LAYOUT.slab_bytes)
    )
    made.slabs[:] = torch.arange(5 * LAYOUT.slab_bytes).view(5, -1).remainder(251)
    assert (made.cuda is None) == on_host
    yield made
    made.close()
    assert cuda.left == 0


def test_slabs_come_to_host_memory_in_the_order_asked_for(memory: PoolMemory) -> None:
    blocks = [3, 0, 4, 4, 1]
    came = [bytes(slab) for batch in memory.to_host(blocks) for slab in batch]
    assert came == [bytes(memory.slabs[block].numpy()) for block in blocks]
    assert list(memory.to_host([])) in ([], [[]])


def test_a_slab_has_what_was_filled_in_once_the_context_ends(memory: PoolMemory) -> None:
    before = memory.slabs.clone()
    with memory.from_host([(2, [(3, 5), (20, 2)]), (4, [(0, 3)])]) as ((first, second), (third,)):
        first[:], second[:], third[:] = b"abcde", b"xy", b"new"
    before[2, 3:8] = torch.tensor(list(b"abcde"))
    before[2, 20:22] = torch.tensor(list(b"xy"))
    before[4, :3] = torch.tensor(list(b"new"))
    assert torch.equal(memory.slabs, before)


def test_an_error_while_a_slab_is_filled_reaches_the_caller(memory: PoolMemory) -> None:
    with pytest.raises(LinkLost), memory.from_host([(2, [(0, 4)])]):
        raise LinkLost("gone")


def test_positions_go_to_blocks_of_another_size(memory: PoolMemory) -> None:
    """Four positions of each of five blocks become the twenty of one."""
    whole = LAYOUT.with_block_size(20)
    with contextlib.closing(memory.beside(1, whole.slab_bytes)) as other:
        spans = [(block, Span(0, 4 * block, 0, 4)) for block in range(5)]
        other.copy_positions(whole, memory, LAYOUT, spans)
        [content] = [bytes(slab) for [slab] in other.to_host([0])]
    for theirs, ours in zip(LAYOUT.segments, whole.segments, strict=True):
        rows = [memory.slabs[b, theirs.offset :][: theirs.num_bytes] for b in range(5)]
        expected = bytes(torch.cat(rows).numpy())
        assert content[ours.offset :][: ours.num_bytes] == expected


@pytest.mark.parametrize("on_host", [True, False], ids=["host", "device"])
@pytest.mark.parametrize("block_size", [1, 4, 5, 16])
def test_positions_of_segments_of_several_types_go_to_blocks_of_another_size(
    on_host: bool, block_size: int
) -> None:
    """Keys and values in 8 bits, their scales, and a draft model's in 16; what lies between is nobody's."""
    scaled, draft = (
        KVLayout.paged_attention(num_layers=layers, num_kv_heads=3, head_dim=4, block_size=7, dtype=dtype)
        for layers, dtype in ((2, "float8_e4m3fn"), (1, "bfloat16"))
    )
    theirs = scaled.with_draft(draft)
    ours, cuda = theirs.with_block_size(block_size), FakeCuda()
    count = -(-7 // block_size)
    with contextlib.ExitStack() as made:
        target: PoolMemory = (
            HostPoolMemory(count, ours.slab_bytes)
            if on_host
            else DevicePoolMemory(count, ours.slab_bytes, cuda)
        )
        made.callback(target.close)
        source = target.beside(2, theirs.slab_bytes)
        made.callback(source.close)
        source.slabs[:] = torch.arange(2 * theirs.slab_bytes).view(2, -1).remainder(241) + 1
        target.slabs[:] = 0
        spans = [(1, Span(p // block_size, p % block_size, p, 1)) for p in range(7)]
        target.copy_positions(ours, source, theirs, spans)
        expected = torch.zeros_like(target.slabs)
        for one, other in zip(theirs.segments, ours.segments, strict=True):
            row = one.num_bytes // 7
            for position in range(7):
                block, at = divmod(position, block_size)
                sent = source.slabs[1, one.offset + position * row :][:row]
                expected[block, other.offset + at * row :][:row] = sent
        assert torch.equal(target.slabs, expected)
    assert cuda.left == 0


def test_a_block_is_odd_while_it_is_written_and_never_gets_a_number_again(memory: PoolMemory) -> None:
    seen = [int(memory.generations[1])]
    for change in (memory.begin_write, memory.begin_write, memory.seal, memory.seal):
        change(1)
        seen.append(int(memory.generations[1]))
    assert seen == [0, 1, 3, 4, 4]
    assert memory.address(1) - memory.address(0) == LAYOUT.slab_bytes
