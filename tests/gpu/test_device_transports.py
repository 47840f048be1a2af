"""What moves KV between devices, on one: `make test-gpu`. Needs torch, numpy and xxhash.

Everything but the calls of CUDA and NCCL is tested without a device, in
tests/integration/test_transports.py; here are those calls.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from common.errors import LinkLost, StaleBlock
from common.kv_layout import KVLayout
from kv_transfer.cuda_runtime import CudaRuntime
from kv_transfer.device_memory import STAGED_BYTES, DevicePoolMemory
from kv_transfer.nccl_library import NcclLibrary
from kv_transfer.ports import Piece, Span
from kv_transfer.transports.base import Target
from kv_transfer.transports.cuda_ipc import CudaIpcReader

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]
ROOT = Path(__file__).resolve().parents[2]
BLOCKS = 256
LAYOUT = KVLayout.paged_attention(num_layers=16, num_kv_heads=8, head_dim=64, block_size=16, dtype="bfloat16")

OWNER = """
import sys
from kv_transfer.cuda_runtime import CudaRuntime
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.transports.cuda_ipc import CudaIpcSource
import torch
cuda = CudaRuntime()
memory = DevicePoolMemory(int(sys.argv[1]), int(sys.argv[2]), cuda)
for block in range(memory.num_blocks):
    memory.begin_write(block)
    memory.slabs[block] = block % 251
torch.cuda.synchronize()
for block in range(memory.num_blocks):
    memory.seal(block)
source = CudaIpcSource(memory, cuda)
print("proof", source.open_link("link").hex(), flush=True)
for line in sys.stdin:
    block = int(line)
    memory.begin_write(block)
    print("writing", flush=True)
"""

RANK = """
import sys, time
import torch
from common.errors import PdqError
from kv_transfer.nccl_library import NcclLibrary
rank, device, unique = int(sys.argv[1]), int(sys.argv[2]), bytes.fromhex(sys.argv[3])
torch.cuda.set_device(device)
content = torch.full((1 << 20,), 7 if rank == 0 else 0, dtype=torch.uint8, device="cuda")
stream = torch.cuda.Stream()
torch.cuda.synchronize()
try:
    pair = NcclLibrary().communicator(device, unique, rank)
    deadline = time.monotonic() + 60
    while not pair.is_ready():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    pair.exchange([(content.data_ptr(), 1 << 20)], stream.cuda_stream, send=rank == 0)
    while not pair.is_ready():
        time.sleep(0.001)
    stream.synchronize()
    print("moved", int(content.min()), int(content.max()), flush=True)
    pair.abort()
except PdqError as error:
    print("refused", error, flush=True)
"""


@contextlib.contextmanager
def python(script: str, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-c", script, *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"},
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def answer(process: subprocess.Popen[str], word: str) -> str:
    assert process.stdout is not None
    while line := process.stdout.readline():
        if line.startswith(word):
            return line.removeprefix(word).strip()
    pytest.fail(f"the process ended without {word!r}")


@contextlib.contextmanager
def pool(blocks: int = BLOCKS, staged_bytes: int = STAGED_BYTES) -> Iterator[DevicePoolMemory]:
    memory = DevicePoolMemory(blocks, LAYOUT.slab_bytes, CudaRuntime(), staged_bytes)
    try:
        yield memory
    finally:
        memory.close()


@contextlib.contextmanager
def another_process() -> Iterator[tuple[subprocess.Popen[str], CudaIpcReader, DevicePoolMemory]]:
    """A process that owns a pool on this device, and a reader of it here."""
    arguments = (str(BLOCKS), str(LAYOUT.slab_bytes))
    with python(OWNER, *arguments) as process, pool() as memory:
        proof = bytes.fromhex(answer(process, "proof"))
        reader = CudaIpcReader.open("link", proof, Target(memory, LAYOUT), cuda=memory.cuda)
        try:
            yield process, reader, memory
        finally:
            reader.close()


def pieces(fill: int = 0) -> list[Piece]:
    return [Piece(b, b, 2, b, fill, b"", b"") for b in range(BLOCKS)]


def test_a_pool_lies_on_the_device_and_its_generations_do_not() -> None:
    with pool(4) as memory:
        assert memory.slabs.is_cuda
        assert memory.slabs.data_ptr() == memory.address(0)
        assert int(memory.slabs.max()) == 0
        memory.slabs[2] = 9
        torch.cuda.synchronize()
        assert in_host(memory, [2]) == [bytes([9]) * LAYOUT.slab_bytes]
        content = bytes(range(256)) * (LAYOUT.slab_bytes // 256)
        half = LAYOUT.slab_bytes // 2
        with memory.from_host(1, [(0, half), (half, half)]) as views:
            views[0][:], views[1][:] = content[:half], content[half:]
        assert in_host(memory, [1]) == [content]
        assert memory.generations.tolist() == [0, 0, 0, 0]


def in_host(memory: DevicePoolMemory, blocks: list[int]) -> list[bytes]:
    return [bytes(slab) for batch in memory.to_host(blocks) for slab in batch]


def test_slabs_come_to_the_host_some_at_a_time() -> None:
    with pool(5, 2 * LAYOUT.slab_bytes) as memory:
        for block in range(5):
            memory.slabs[block] = block + 1
        torch.cuda.synchronize()
        assert [set(slab) for slab in in_host(memory, [3, 0, 4, 1, 2])] == [{4}, {1}, {5}, {2}, {3}]


def test_positions_are_copied_on_the_device() -> None:
    whole = LAYOUT.with_block_size(4 * LAYOUT.block_size)
    with pool(4) as memory:
        other = memory.beside(1, whole.slab_bytes)
        for block in range(4):
            memory.slabs[block] = block + 1
        torch.cuda.synchronize()
        spans = [(b, Span(0, b * LAYOUT.block_size, 0, LAYOUT.block_size)) for b in range(4)]
        other.copy_positions(whole, memory, LAYOUT, spans)
        (slab,) = in_host(other, [0])
        row = LAYOUT.block_size * (whole.bytes_per_token // len(whole.segments))
        assert slab == b"".join(bytes([b + 1]) * row for b in range(4)) * len(whole.segments)
        other.close()


def test_two_processes_on_one_device() -> None:
    with another_process() as (_, reader, memory):
        reader.pull(pieces())
        expected = torch.arange(BLOCKS, device="cuda").remainder(251).to(torch.uint8)
        assert torch.equal(memory.slabs, expected[:, None].expand_as(memory.slabs))


def test_of_a_tail_only_the_filled_positions_come() -> None:
    with another_process() as (_, reader, memory):
        reader.pull(pieces(fill=3)[200:201])
        filled = sum(length for _, length in LAYOUT.ranges(3))
        assert int((memory.slabs[200] == 200).sum()) == filled
        assert int((memory.slabs[200] == 0).sum()) == LAYOUT.slab_bytes - filled


def test_a_block_that_the_owner_writes_is_stale() -> None:
    with another_process() as (process, reader, _):
        assert process.stdin is not None
        process.stdin.write("5\n")
        process.stdin.flush()
        answer(process, "writing")
        reader.pull(pieces()[:5])
        with pytest.raises(StaleBlock):
            reader.pull(pieces()[5:6])


def test_kill_9_of_the_owner_leaves_the_reader_its_device() -> None:
    """What the driver does with a dead owner's memory is what this is to find out: a copy ends with
    the right bytes or a typed error, and the device works on."""
    with another_process() as (process, reader, memory):
        reader.pull(pieces())
        process.kill()
        process.wait()
        memory.slabs.zero_()
        torch.cuda.synchronize()
        with contextlib.suppress(LinkLost):
            reader.pull(pieces())
            expected = torch.arange(BLOCKS, device="cuda").remainder(251).to(torch.uint8)
            assert torch.equal(memory.slabs, expected[:, None].expand_as(memory.slabs))
        assert int(torch.ones(8, device="cuda").sum()) == 8


def test_at_least_0_8_of_a_copy_on_the_device() -> None:
    """64 MB in slabs, against the same copies inside one pool."""
    with another_process() as (_, reader, memory):
        other = torch.empty_like(memory.slabs)

        def plain() -> None:
            for block in range(BLOCKS):
                other[block].copy_(memory.slabs[block])
            torch.cuda.synchronize()

        ratio = best(plain) / best(lambda: reader.pull(pieces()))
        print(f"cuda_ipc at {ratio:.2f} of copies of the same pieces on the device")
        assert ratio >= 0.8


def best(work: object, rounds: int = 10) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()  # type: ignore[operator]
        times.append(time.perf_counter() - began)
    return min(times)


def test_nccl_init_with_an_absent_peer_can_be_aborted() -> None:
    nccl = NcclLibrary()
    pair = nccl.communicator(0, nccl.unique_id(), 0)
    deadline = time.monotonic() + 1.0
    while time.monotonic() < deadline:
        assert not pair.is_ready(), "nobody came"
        time.sleep(0.01)
    began = time.monotonic()
    pair.abort()
    pair.abort()
    assert time.monotonic() - began < 10
    assert int(torch.ones(8, device="cuda").sum()) == 8


def test_nccl_between_two_processes() -> None:
    """NCCL takes no two ranks on one device: with one, what is shown is that it says so."""
    several = torch.cuda.device_count() > 1
    unique = NcclLibrary().unique_id().hex()
    with (
        python(RANK, "0", "0", unique) as sender,
        python(RANK, "1", "1" if several else "0", unique) as receiver,
    ):
        if several:
            assert answer(sender, "moved") == "7 7"
            assert answer(receiver, "moved") == "7 7"
        else:
            said = answer(receiver, "refused") + answer(sender, "refused")
            print("one device:", said)
            assert "nccl" in said.lower()
