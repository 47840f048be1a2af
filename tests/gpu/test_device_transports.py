"""What moves KV between devices, on one: `make test-gpu`. Needs torch, triton, numpy and xxhash.

Everything but the calls of CUDA and NCCL is tested without a device, in
tests/integration/test_transports.py; here are those calls.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

pytest.importorskip("xxhash", reason="xxhash is not installed, and digests of slabs need it")

from common.errors import LinkLost, StaleBlock
from common.kv_layout import KVLayout
from kv_transfer import cuda_runtime
from kv_transfer.cuda import Between, Stream
from kv_transfer.cuda_library import CudaLibrary
from kv_transfer.cuda_runtime import CudaRuntime
from kv_transfer.device_memory import STAGED_BYTES, DevicePoolMemory
from kv_transfer.nccl_library import NcclLibrary
from kv_transfer.ports import Piece, Span
from kv_transfer.transports.base import Places, Target
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
source = CudaIpcSource(memory)
print("proof", source.open_link("link").hex(), flush=True)
for line in sys.stdin:
    if line == "close\n":
        source.close()
        memory.close()
        print("closed", flush=True)
        continue
    memory.begin_write(int(line))
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
def pool(
    blocks: int = BLOCKS, staged_bytes: int = STAGED_BYTES, layout: KVLayout = LAYOUT
) -> Iterator[DevicePoolMemory]:
    memory = DevicePoolMemory(blocks, layout.slab_bytes, CudaRuntime(), staged_bytes)
    try:
        yield memory
    finally:
        memory.close()


@contextlib.contextmanager
def another_process(
    blocks: int = BLOCKS, layout: KVLayout = LAYOUT
) -> Iterator[tuple[subprocess.Popen[str], CudaIpcReader, DevicePoolMemory]]:
    """A process that owns a pool on this device, and a reader of it here."""
    arguments = (str(blocks), str(layout.slab_bytes))
    with python(OWNER, *arguments) as process, pool(blocks, layout=layout) as memory:
        proof = bytes.fromhex(answer(process, "proof"))
        reader = CudaIpcReader.open("link", proof, Target(memory, layout), cuda=memory.cuda)
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
        with memory.from_host([(1, [(0, half), (half, half)])]) as [[first, second]]:
            first[:], second[:] = content[:half], content[half:]
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


def test_an_owner_that_ends_keeps_memory_that_is_still_mapped() -> None:
    """It waits for its readers, and then leaves the memory alone: what is mapped stays readable."""
    with another_process() as (process, reader, memory):
        assert process.stdin is not None
        process.stdin.write("close\n")
        process.stdin.flush()
        answer(process, "closed")
        reader.pull(pieces())
        expected = torch.arange(BLOCKS, device="cuda").remainder(251).to(torch.uint8)
        assert torch.equal(memory.slabs, expected[:, None].expand_as(memory.slabs))


@pytest.mark.parametrize("way", ["kernel", "one call", "one after the other"])
def test_each_way_of_copying_brings_every_byte(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if way != "kernel":
        monkeypatch.setattr(cuda_runtime, "_load_kernels", lambda: None)
    if way == "one after the other":
        monkeypatch.setattr(CudaLibrary, "has_batches", False)
    with another_process() as (_, reader, memory):
        if way == "kernel":
            assert isinstance(memory.cuda, CudaRuntime)
            assert memory.cuda.kernels, "triton compiles here"
        if way == "one call" and not CudaLibrary().has_batches:
            pytest.skip("this driver or runtime is older than 12.8")
        slots, blocks = torch.randperm(BLOCKS).tolist(), torch.randperm(BLOCKS).tolist()
        places = list(zip(slots, blocks, strict=True))
        reader.pull([Piece(i, slot, 2, block, 0, b"", b"") for i, (slot, block) in enumerate(places)])
        expected = torch.empty(BLOCKS, dtype=torch.uint8, device="cuda")
        expected[blocks] = torch.tensor(slots, device="cuda").remainder(251).to(torch.uint8)
        assert torch.equal(memory.slabs, expected[:, None].expand_as(memory.slabs))
        memory.slabs.zero_()
        torch.cuda.synchronize()
        reader.pull([Piece(0, 200, 2, 7, 3, b"", b"")])
        assert int((memory.slabs == 200).sum()) == sum(length for _, length in LAYOUT.ranges(3))


def test_a_link_that_opens_and_pulls_ends_no_capture_of_another_thread() -> None:
    """Not even one of the global mode, which every forbidden call of any thread ends."""
    errors: list[BaseException] = []
    with another_process() as (_, reader, memory):
        begun = threading.Event()

        def serve() -> None:
            try:
                assert begun.wait(60)
                reader.pull(pieces())
                streams = [memory.cuda.stream() for _ in range(4)]  # more than are kept
                memory.cuda.give_pinned(memory.cuda.pinned(33 << 20))
                memory.cuda.give_scratch(memory.cuda.scratch(33 << 20))
                for stream in streams:
                    stream.synchronize()
                    stream.close()
                with pool(4) as another:
                    assert in_host(another, [0])
            except BaseException as error:
                errors.append(error)

        number = torch.ones(1 << 20, device="cuda")
        assert float((number + 1).mul(3).sum()) == 6 << 20  # what is captured has run before
        graph, serving = torch.cuda.CUDAGraph(), threading.Thread(target=serve)
        serving.start()
        torch.cuda.synchronize()
        with torch.cuda.graph(graph, capture_error_mode="global"):
            more = number + 1
            begun.set()
            serving.join(60)
            result = more.mul(3)
        assert errors == []
        graph.replay()
        torch.cuda.synchronize()
        assert float(result.sum()) == 6 << 20


BYTES = 64 << 20  # of every copy that is measured
SHAPES = {  # slabs of 16 tokens
    "2.4 MB": KVLayout.paged_attention(
        num_layers=36, num_kv_heads=8, head_dim=128, block_size=16, dtype="bfloat16"
    ),
    "64 KB": KVLayout.paged_attention(
        num_layers=8, num_kv_heads=2, head_dim=64, block_size=16, dtype="bfloat16"
    ),
}
by_shape = pytest.mark.parametrize("shape", SHAPES)


@by_shape
def test_the_device_copies_slabs_at_0_8_of_one_contiguous_copy(
    shape: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of the device's time: 64 MB out of another process's pool, blocks in an order of chance at both ends.
    The contiguous copy is torch's."""
    with measured(shape) as (reader, memory, some):
        batch, between = reader._batch(Places(some)), reader._between
        with contextlib.closing(memory.cuda.stream()) as stream:
            ours = device_seconds(stream, lambda: stream.copy(batch, between))
            into, source = two_of(batch.num_bytes)
            outside = torch.cuda.ExternalStream(stream.handle)
            one = device_seconds(stream, lambda: copied_on(outside, into, source))
            engines = device_seconds(stream, lambda: stream.copy(batch, Between.HOST))
        report(
            capsys,
            measured="device time of a batch",
            slab=shape,
            copies=len(batch),
            one_contiguous_copy_us=1e6 * one,
            cuda_ipc_us=1e6 * ours,
            copy_engines_us=1e6 * engines,
            ratio=one / ours,
        )
        assert one / ours >= 0.8


def test_a_pull_takes_at_most_1_25_times_as_long_as_one_contiguous_copy(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """From the call to the return, Python and both looks at the generations included: 64 MB in slabs of
    2.4 MB. The contiguous copy is torch's, waited for likewise."""
    with measured("2.4 MB") as (reader, _, some):
        one, ours = wall(reader, some)
        report(capsys, measured="pull", slab="2.4 MB", one_contiguous_copy_us=1e6 * one, pull_us=1e6 * ours)
        assert one / ours >= 0.8


def test_what_python_adds_to_a_pull_of_small_slabs_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    """A pull in service has 64 pieces at most; of 64 KB these are copied in 2 us. What is asserted is only
    that a piece costs less than a call of the driver for each would."""
    with measured("64 KB") as (reader, memory, some):
        one, ours = wall(reader, some)
        target = memory.slabs

        def piece_by_piece() -> None:
            for piece in some:
                target[piece.block].copy_(target[(piece.block + 1) % len(target)], non_blocking=True)
            torch.cuda.current_stream().synchronize()

        each = best(piece_by_piece)
        report(
            capsys,
            measured="pull",
            slab="64 KB",
            one_contiguous_copy_us=1e6 * one,
            pull_us=1e6 * ours,
            copied_one_by_one_us=1e6 * each,
        )
        assert ours < 0.5 * each


@contextlib.contextmanager
def measured(shape: str) -> Iterator[tuple[CudaIpcReader, DevicePoolMemory, list[Piece]]]:
    """A reader, its pool, and pieces of 64 MB in an order of chance, which have been read once."""
    layout = SHAPES[shape]
    count = BYTES // layout.slab_bytes
    slots, blocks = (torch.randperm(2 * count)[:count].tolist() for _ in range(2))
    places = zip(slots, blocks, strict=True)
    some = [Piece(i, slot, 2, block, 0, b"", b"") for i, (slot, block) in enumerate(places)]
    with another_process(2 * count, layout) as (_, reader, memory):
        reader.pull(some)
        expected = torch.tensor(slots, device="cuda").remainder(251).to(torch.uint8)
        assert torch.equal(memory.slabs[blocks].amax(1), expected)
        assert torch.equal(memory.slabs[blocks].amin(1), expected)
        yield reader, memory, some


def device_seconds(stream: Stream, enqueue: Callable[[], None], times: int = 20) -> float:
    """Of the device, for one of many in a row; the best of some rounds."""
    outside = torch.cuda.ExternalStream(stream.handle)
    found = []
    for _ in range(5):
        enqueue()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda._sleep(10_000_000)  # so that the device never waits for the host
        outside.wait_stream(torch.cuda.current_stream())
        begin.record(outside)
        for _ in range(times):
            enqueue()
        end.record(outside)
        stream.synchronize()
        found.append(begin.elapsed_time(end) / 1000 / times)
    return min(found)


def wall(reader: CudaIpcReader, some: list[Piece]) -> tuple[float, float]:
    """Seconds of one contiguous copy of 64 MB, and of a pull of it."""
    into, source = two_of(len(some) * reader._target.source_slab_bytes)
    stream = torch.cuda.Stream()

    def plain() -> None:
        copied_on(stream, into, source)
        stream.synchronize()

    return best(plain, 50), best(lambda: reader.pull(some), 50)


def two_of(num_bytes: int) -> tuple[torch.Tensor, torch.Tensor]:
    into = torch.zeros(num_bytes, dtype=torch.uint8, device="cuda")
    source = torch.ones_like(into)
    torch.cuda.synchronize()
    return into, source


def copied_on(stream: torch.cuda.Stream, into: torch.Tensor, source: torch.Tensor) -> None:
    with torch.cuda.stream(stream):
        into.copy_(source, non_blocking=True)


def best(work: Callable[[], None], rounds: int = 10) -> float:
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def report(capsys: pytest.CaptureFixture[str], **found: object) -> None:
    """One line of JSON, whatever pytest is asked to show."""
    device = torch.cuda.get_device_name()
    with capsys.disabled():
        print("\n" + json.dumps({"device": device, **found}), flush=True)


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
