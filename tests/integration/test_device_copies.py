"""Copies on a device that is not there: how many calls, and what must hold when they fail half-way, late, or
under somebody's hands; and who may free memory that others have mapped.

The device says what is undefined (tests/support/fake_cuda.py); here the transports are driven to it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import pytest
import torch

from common.errors import LinkLost, PdqError, StaleBlock
from kv_transfer import device_memory, mappings
from kv_transfer.copy_batch import CopyBatch
from kv_transfer.cuda import Between
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.digests import slab_digest
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Reader, Target
from kv_transfer.transports.cuda_ipc import CudaIpcReader, CudaIpcSource
from tests.integration.test_transports import (
    CUDA,
    KEY,
    LARGE,
    LAYOUT,
    NCCL,
    SEED,
    End,
    _nothing_is_left,  # noqa: F401  (autouse: descriptors, threads, the fake device and its faults)
    both_ends,
    opener,
    target_for,
    wait_until,
)
from tests.support.fake_cuda import FakeCuda, FakeStream


@contextlib.contextmanager
def filled(transport: str, blocks: int = 8) -> Iterator[tuple[End, Reader, list[Piece]]]:
    """Both ends, full blocks that are leased, and pieces that change places."""
    with both_ends(transport, blocks=blocks) as end:
        for block in range(blocks):
            end.fill(block)
        end.leases.add(KEY, list(range(blocks)))
        pieces = [end.piece(slot, blocks - 1 - slot, index=slot) for slot in range(blocks)]
        reader = end.reader()
        CUDA.batches.clear()
        NCCL.groups.clear()
        yield end, reader, pieces


def all_moved(end: End, pieces: list[Piece]) -> bool:
    return all(end.same(piece.slot, piece.block) for piece in pieces)


# How many calls


def test_a_pull_by_cuda_ipc_is_one_batch() -> None:
    with filled("cuda_ipc", blocks=64) as (end, reader, pieces):
        tail = dataclasses.replace(pieces[5], fill=3)
        reader.pull([*pieces[:5], tail, *pieces[6:]])
        assert CUDA.batches == [(Between.ONE_DEVICE, 63 + len(LAYOUT.segments))]
        assert all_moved(end, pieces[:5] + pieces[6:])


def test_a_device_with_another_name_is_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    with both_ends("cuda_ipc") as end:
        end.fill(0)
        monkeypatch.setattr(CUDA, "name", b"another device..")
        CUDA.batches.clear()
        end.reader().pull([end.piece(0, 1)])
        assert CUDA.batches == [(Between.DEVICES, 1)]


@pytest.mark.parametrize("transport", ["tcp+staged", "tcp+curve+staged"])
def test_staging_is_one_batch_for_each_end_and_request(transport: str) -> None:
    with filled(transport, blocks=64) as (end, reader, pieces):
        reader.pull(pieces)
        assert CUDA.batches == [(Between.HOST, 64)] * 2, "out of the device, and into it"
        assert all_moved(end, pieces)


def test_positions_of_blocks_of_another_size_are_one_batch() -> None:
    with filled("cuda_ipc:3") as (_, reader, pieces):
        reader.pull(pieces)
        spans = sum(len(piece.spans) for piece in pieces)
        assert CUDA.batches == [(Between.ONE_DEVICE, 8), (Between.ONE_DEVICE, spans * len(LAYOUT.segments))]


def test_a_pull_by_nccl_is_one_group_at_each_end() -> None:
    with filled("nccl", blocks=64) as (end, reader, pieces):
        reader.pull(pieces)
        assert sorted(NCCL.groups) == [(False, 64), (True, 64)]
        assert all_moved(end, pieces)


def test_two_pulls_of_one_link_run_at_once_on_streams_of_their_own() -> None:
    """What one copies may take long; the other goes on."""
    with filled("cuda_ipc") as (end, reader, pieces):
        first_runs, second_is_done = threading.Event(), threading.Event()
        synchronize, errors = FakeStream.synchronize, []

        def slow(stream: FakeStream) -> None:
            if not first_runs.is_set():
                first_runs.set()
                assert second_is_done.wait(30)
            synchronize(stream)

        def pull() -> None:
            try:
                reader.pull(pieces[:4])
            except PdqError as error:
                errors.append(error)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeStream, "synchronize", slow)
            thread = threading.Thread(target=pull)
            thread.start()
            assert first_runs.wait(30)
            reader.pull(pieces[4:])
            assert all_moved(end, pieces[4:])
            second_is_done.set()
            thread.join(30)
        assert errors == []
        assert all_moved(end, pieces)


# What goes wrong


@pytest.mark.parametrize("transport", ["cuda_ipc", "tcp+staged", "cuda_ipc:3"])
@pytest.mark.parametrize("copies", [0, 1, 5])
def test_a_device_that_fails_in_a_batch_fails_the_pull_and_no_copy_outlives_it(
    transport: str, copies: int
) -> None:
    with filled(transport) as (end, reader, pieces):
        CUDA.fails_after = copies
        with pytest.raises(PdqError):
            reader.pull(pieces)
        assert not CUDA.is_busy
        if transport != "tcp+staged":  # there it was the source's device: its end of the link is gone
            reader.pull(pieces)
            assert all_moved(end, pieces)


@pytest.mark.parametrize("rewrite_before", ["copy", "synchronize"])
def test_a_block_that_changes_while_its_batch_runs_is_stale(rewrite_before: str) -> None:
    """Before the first of its bytes is read, or after the device was asked and before it copied."""
    with filled("cuda_ipc") as (end, reader, pieces):
        original = getattr(FakeStream, rewrite_before)

        def rewritten(*arguments: object) -> None:
            end.fill(5)
            original(*arguments)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeStream, rewrite_before, rewritten)
            with pytest.raises(StaleBlock, match="block 5"):
                reader.pull(pieces)


def test_a_close_waits_for_the_copies_under_way() -> None:
    """The mapping is what they read: the device would fault if it went first."""
    with filled("cuda_ipc") as (end, reader, pieces):
        runs, go_on, order = threading.Event(), threading.Event(), []
        synchronize = FakeStream.synchronize

        def slow(stream: FakeStream) -> None:
            runs.set()
            assert go_on.wait(30)
            synchronize(stream)
            order.append("copied")

        def close() -> None:
            reader.close()
            order.append("closed")

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FakeStream, "synchronize", slow)
            pulling = threading.Thread(target=reader.pull, args=(pieces,))
            pulling.start()
            assert runs.wait(30)
            closing = threading.Thread(target=close)
            closing.start()
            wait_until(lambda: reader._closed, "it is closing")  # type: ignore[attr-defined]
            with pytest.raises(LinkLost):
                reader.pull(pieces)
            go_on.set()
            pulling.join(30)
            closing.join(30)
        assert order == ["copied", "closed"]
        assert all_moved(end, pieces)


def test_an_nccl_source_whose_reader_stands_still_gives_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """It says that it will receive, and does not: the source's kernel is aborted, and its blocks go back."""
    from kv_transfer.transports import nccl

    monkeypatch.setattr(nccl, "STALL_TIMEOUT", 0.2)
    with filled("nccl") as (end, reader, pieces):
        exchange = type(next(iter(NCCL.pairs.values()))[0]).exchange
        with pytest.MonkeyPatch.context() as patch:

            def only_sends(self: object, ranges: object, stream: int, *, send: bool) -> None:
                if send:
                    exchange(self, ranges, stream, send=send)  # type: ignore[arg-type]
                else:
                    wait_until(lambda: not end.leases.count()["touched"], "the source let go")

            let_go: list[int] = []
            untouch = end.leases.untouch

            def noted(link: str, blocks: Sequence[int]) -> None:
                if blocks:
                    let_go.append(NCCL.left)
                untouch(link, blocks)

            patch.setattr(end.leases, "untouch", noted)
            patch.setattr(type(next(iter(NCCL.pairs.values()))[0]), "exchange", only_sends)
            with pytest.raises(LinkLost):
                reader.pull(pieces)
            assert let_go == [1], "the source aborted its end before it let the blocks go"


# Whose memory may be freed


def test_memory_is_freed_only_once_nobody_has_it_mapped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_memory, "UNMAP_S", 0.05)
    cuda = FakeCuda()
    memory, target = DevicePoolMemory(2, LAYOUT.slab_bytes, cuda), target_for("cuda_ipc", LAYOUT, 2)
    source = CudaIpcSource(memory)
    reader = CudaIpcReader.open("link", source.open_link("link"), target, cuda=CUDA)
    source.close()
    assert memory.mappings.sweep() == 1
    before = cuda.left
    memory.close()
    assert cuda.left == before, "it stays: a reader has not said that it is unmapped"
    reader.pull([Piece(0, 0, 0, 1, 0, b"", b"")])
    reader.close()
    target.memory.close()
    cuda.free(memory._base)
    assert cuda.faults == []


def test_an_owner_waits_for_those_who_unmap_in_time() -> None:
    cuda = FakeCuda()
    memory, target = DevicePoolMemory(2, LAYOUT.slab_bytes, cuda), target_for("cuda_ipc", LAYOUT, 2)
    source = CudaIpcSource(memory)
    reader = CudaIpcReader.open("link", source.open_link("link"), target, cuda=CUDA)
    source.close()
    closing = threading.Thread(target=memory.close)
    closing.start()
    reader.close()
    closing.join(30)
    assert (cuda.left, cuda.faults) == (0, [])
    target.memory.close()


def test_the_device_faults_where_the_rule_is_taken_out() -> None:
    """What the two tests above prove nothing without."""
    cuda = FakeCuda()
    memory, target = DevicePoolMemory(2, LAYOUT.slab_bytes, cuda), target_for("cuda_ipc", LAYOUT, 2)
    source = CudaIpcSource(memory)
    reader = CudaIpcReader.open("link", source.open_link("link"), target, cuda=CUDA)
    source.close()
    memory.mappings.close()
    with pytest.raises(AssertionError, match="another process has mapped"):
        memory.close()
    reader.close()
    target.memory.close()
    cuda.free(memory._base)


def test_a_mapping_that_cannot_be_closed_is_never_said_to_be_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    with filled("cuda_ipc") as (end, reader, _):
        assert isinstance(end.memory, DevicePoolMemory)
        close_ipc = CUDA.close_ipc

        def fails(address: int) -> None:
            raise LinkLost("the driver does not")

        monkeypatch.setattr(CUDA, "close_ipc", fails)
        with pytest.raises(LinkLost):
            reader.close()
        assert end.memory.mappings.sweep() == 1
        monkeypatch.setattr(CUDA, "close_ipc", close_ipc)
        reader.close()  # as threads.py does, which tries again
        assert end.memory.mappings.sweep() == 0


def test_a_proof_maps_once() -> None:
    """Who has it could otherwise hold as many connections of its owner as it likes."""
    with filled("cuda_ipc") as (end, _, _):
        proof = end.source.open_link("another")
        end.readers.append(opener("cuda_ipc", LAYOUT)("another", proof, end.target))
        with pytest.raises(LinkLost):
            opener("cuda_ipc", LAYOUT)("another", proof, end.target)


def test_a_link_that_opens_nothing_maps_nothing() -> None:
    with both_ends("cuda_ipc") as end:
        assert isinstance(end.memory, DevicePoolMemory)
        other = Target(end.target.memory, LARGE)
        other.source_slab_bytes = LARGE.slab_bytes
        with pytest.raises(PdqError, match="another size"):
            opener("cuda_ipc", LAYOUT)("link", end.source.open_link("link"), other)
        wait_until(lambda: end.memory.mappings.sweep() == 0, "it said so")  # type: ignore[attr-defined]


def test_a_connection_that_ends_without_a_word_says_nothing_while_its_process_lives() -> None:
    """The kernel closes it before the driver lets memory go; here the process goes on, with its mapping."""
    with filled("cuda_ipc") as (end, reader, _):
        assert isinstance(end.memory, DevicePoolMemory)
        assert isinstance(reader, CudaIpcReader)
        reader._said._connection.close()
        assert end.memory.mappings.sweep() == 1
        reader.close()
        assert end.memory.mappings.sweep() == 1
        end.memory.mappings.close()  # as at the end of its owner's process


READER = """
import sys
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.transports.base import Target
from kv_transfer.transports.cuda_ipc import CudaIpcReader
from common.kv_layout import KVLayout
from tests.support.fake_cuda import FakeCuda
LAYOUT = KVLayout.paged_attention(
    num_layers=3, num_kv_heads=2, head_dim=8, block_size=4, dtype="float32")
cuda = FakeCuda()
target = Target(DevicePoolMemory(2, LAYOUT.slab_bytes, cuda), LAYOUT)
reader = CudaIpcReader.open("link", bytes.fromhex(sys.argv[1]), target, cuda=cuda)
print("mapped", flush=True)
sys.stdin.read()
"""


@contextlib.contextmanager
def reader_process(proof: bytes) -> Iterator[subprocess.Popen[str]]:
    root = str(Path(__file__).resolve().parents[2])
    with subprocess.Popen(
        [sys.executable, "-c", READER, proof.hex()],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        cwd=root,
        env={**os.environ, "PYTHONPATH": root},
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "mapped\n"
            yield process
        finally:
            process.kill()


def test_a_reader_that_dies_has_nothing_mapped_once_its_process_has_ended() -> None:
    """kill -9: it says nothing. The end of its connection is not enough, the end of the process is."""
    with both_ends("cuda_ipc") as end:
        assert isinstance(end.memory, DevicePoolMemory)
        who = end.memory.mappings
        with reader_process(end.source.open_link("link")) as process:
            assert who.sweep() == 1
            process.send_signal(signal.SIGSTOP)
            assert who.sweep() == 1
            process.send_signal(signal.SIGKILL)
            wait_until(lambda: who.sweep() == 0, "its process has ended")


def test_a_dead_reader_whose_end_nobody_can_see_counts_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    """In another PID namespace. Its memory is kept, at once: there is nothing to wait for."""
    monkeypatch.setattr(mappings, "_pidfd", lambda _: None)
    cuda = FakeCuda()
    memory = DevicePoolMemory(2, LAYOUT.slab_bytes, cuda)
    source = CudaIpcSource(memory)
    with reader_process(source.open_link("link")) as process:
        process.kill()
        process.wait()
        assert memory.mappings.sweep() == 1
        monkeypatch.setattr(mappings.time, "sleep", lambda _: pytest.fail("it waits for nobody"))
        source.close()
        memory.close()
        assert (cuda.left, cuda.faults) == (1, [])
    cuda.free(memory._base)


# Digests over copies that come in any order


@pytest.mark.parametrize("seed", range(5))
def test_a_promised_digest_is_compared_with_what_arrived_whatever_the_order(seed: int) -> None:
    with filled("cuda_ipc") as (end, reader, pieces):
        CUDA._random.seed(seed)
        right = [
            dataclasses.replace(p, digest=slab_digest(memoryview(end.memory.slabs[p.slot].numpy()), SEED))
            for p in pieces
        ]
        reader.pull(right)
        end.memory.slabs[3] ^= 1  # no generation tells
        with pytest.raises(PdqError, match="block 3"):
            reader.pull(right)


def test_the_fake_device_tells_of_each_misuse() -> None:
    """A test that cannot fail proves nothing: each of its faults is made once."""
    cuda = FakeCuda()
    pool, pinned, stream = cuda.malloc(64), cuda.pinned(64), cuda.stream()
    other = cuda.malloc(64)

    def copy(*ranges: tuple[int, int, int]) -> CopyBatch:
        into, source, lengths = (torch.tensor(column).numpy() for column in zip(*ranges, strict=True))
        return CopyBatch(into, source, lengths)

    misuses: dict[str, Callable[[], object]] = {
        "overlap": lambda: stream.copy(copy((pool, other, 8), (pool + 4, other, 8)), Between.ONE_DEVICE),
        "leaves the memory": lambda: stream.copy(copy((pool + 60, other, 8)), Between.ONE_DEVICE),
        "an end elsewhere": lambda: stream.copy(copy((pool, pinned.address, 8)), Between.ONE_DEVICE),
        "of nothing": lambda: stream.copy(copy((pool, other, 0)), Between.ONE_DEVICE),
    }
    for what, misuse in misuses.items():
        with pytest.raises(AssertionError, match=what):
            misuse()
    stream.copy(copy((pool, pinned.address, 8)), Between.HOST)
    late: dict[str, Callable[[], object]] = {
        "while a copy uses it": lambda: cuda.give_pinned(pinned),
        "given back while its copies run": stream.close,
    }
    for what, misuse in late.items():
        with pytest.raises(AssertionError, match=what):
            misuse()
    stream.synchronize()
    stream.close()
    with pytest.raises(AssertionError, match="was given back"):
        stream.copy(copy((pool, other, 8)), Between.ONE_DEVICE)
    with pytest.raises(AssertionError, match="twice"):
        cuda.free(pool + 1)
    assert len(cuda.faults) == len(misuses) + len(late) + 2
    cuda.give_pinned(pinned)
    cuda.free(pool)
    cuda.free(other)
