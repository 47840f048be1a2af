"""What goes wrong with a tcp link, over either wire: lost in the middle, slow, out of memory, out of
descriptors, and strangers."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import gc
import os
import resource
import socket
import threading
import time
from collections.abc import Iterator

import pytest
import torch
import zmq

from common.errors import InsufficientMemory, LinkLost, MalformedMessage, PdqError
from common.wire.codec import encode
from common.wire.messages import Proved, Pull, Slabs
from kv_transfer.cuda import Pinned
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import HostPoolMemory
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Target
from kv_transfer.transports.nccl import NcclReader, Turns
from kv_transfer.transports.tcp import TcpReader, TcpSource, split_proof
from kv_transfer.transports.tcp_frames import ReceivingFrames
from kv_transfer.transports.tcp_stream import SendingStream, record
from tests.integration.test_transports import (
    CUDA,
    KEY,
    KEY_PAIR,
    LARGE,
    LAYOUT,
    NCCL,
    CountingPool,
    _nothing_is_left,  # noqa: F401  (autouse: descriptors, threads, fake devices)
    both_ends,
    tcp_wires,
    wait_until,
)
from tests.support.fake_cuda import FakeStream
from tests.unit.kv_transfer.test_kv_links import two_nodes


def framed(message: object) -> bytes:
    return record(encode(message))  # type: ignore[arg-type]


@pytest.mark.parametrize("transport", ["tcp", "tcp+curve", "tcp+staged"])
def test_one_pull_may_ask_for_more_slabs_than_one_call_of_the_kernel_takes(transport: str) -> None:
    """IOV_MAX is 1024: sendmsg says EMSGSIZE, and the link is lost."""
    blocks = 1500
    with both_ends(transport, blocks=blocks) as end:
        for block in range(blocks):
            end.fill(block)
        end.leases.add(KEY, list(range(blocks)))
        end.reader().pull([end.piece(b, b, index=b) for b in range(blocks)])
        assert end.all_same()


@pytest.mark.parametrize("transport", ["tcp", "tcp+staged"])
def test_after_a_lost_pull_the_next_one_reads_no_slab_as_conversation(transport: str) -> None:
    """Two copies of one link: the second waits for the first one's lock (link.py has two threads).
    The source stands still, the first pull gives up, the source goes on. Nothing of what was on its
    way for the first may be heard by the second; here a slab says that it is the answer."""
    with both_ends(transport) as end:
        for block in range(4):
            end.fill(block)
        reader = end.reader()
        assert isinstance(reader, TcpReader)
        lost, asked = reader._number, reader._number + 1
        answer, proof = framed(Slabs("link", asked, "")), framed(Proved("link", asked, True))
        end.memory.slabs[0][: len(answer)] = torch.tensor(list(answer), dtype=torch.uint8)
        end.memory.slabs[1][len(answer) : len(answer) + len(proof)] = torch.tensor(
            list(proof), dtype=torch.uint8
        )
        end.leases.add(KEY, list(range(4)))
        pieces = [dataclasses.replace(end.piece(b, b), digest=b"") for b in range(4)]
        reader.stall_timeout_s = 0.3
        with end.leases._lock, pytest.raises(LinkLost):  # the source stands still
            reader.pull(pieces[:2])
        assert reader._number == lost + 1
        try:
            reader.pull(pieces[3:])
        except LinkLost:
            return
        assert end.same(3, 3), "a pull that returned brought other bytes than the source's"


@pytest.mark.parametrize("transport", ["tcp+staged", "tcp+curve+staged"])
def test_a_pull_that_found_no_pinned_memory_leaves_its_link_in_step_or_lost(transport: str) -> None:
    with both_ends(transport) as end:
        for block in range(8):
            end.fill(block)
        end.memory.slabs[:] = 0  # as keys of padding are: their bytes read as empty messages
        end.leases.add(KEY, list(range(8)))
        reader = end.reader()
        pieces = [end.piece(b, b, index=b) for b in range(8)]
        with pytest.MonkeyPatch.context() as patch:
            pinned, puller = CUDA.pinned, threading.get_ident()  # the source has a thread of its own
            patch.setattr(
                CUDA, "pinned", lambda n: no_memory() if threading.get_ident() == puller else pinned(n)
            )
            with pytest.raises(PdqError):
                reader.pull(pieces)
        try:
            reader.pull(pieces)
        except LinkLost:
            return  # what tells link.py to open another
        assert end.all_same()


def no_memory(*_: object) -> Pinned:
    raise InsufficientMemory("no pinned memory")


@pytest.mark.parametrize("transport", ["tcp+staged", "tcp+curve+staged"])
@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.parametrize("what", ["pinned", "copy"])
def test_a_pull_that_cannot_be_staged_lets_go_of_its_blocks(transport: str, what: str) -> None:
    with both_ends(transport) as end:
        end.fill(0)
        end.leases.add(KEY, [0])
        reader = end.reader()
        failure = InsufficientMemory("none") if what == "pinned" else LinkLost("device")

        def fails(*_: object) -> int:
            raise failure

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CUDA if what == "pinned" else FakeStream, what, fails)
            with pytest.raises(PdqError):
                reader.pull([end.piece(0, 0)])
        end.leases.end(KEY)
        end.source.close_link("link")
        end.leases.collect()
        assert end.leases.count() == {"open": 0, "ending": 0, "touched": 0}
        assert end.pool.references[0] == 0


def test_closing_a_link_does_not_wait_for_a_reader_that_reads_slowly() -> None:
    """Each call sends something, so that none says EAGAIN, and nobody looks at the stop."""
    with both_ends("tcp", LARGE, blocks=32) as end, contextlib.ExitStack() as stack:
        for block in range(32):
            end.memory.seal(block)
        end.leases.add(KEY, list(range(32)))
        token, _, host, port = split_proof(end.source.open_link("link"))
        call = socket.socket()
        call.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 16)
        stack.enter_context(call)
        call.connect((host, port))
        call.sendall(token)
        slots = tuple(range(32)) * 4
        generations = tuple(int(end.memory.generations[s]) for s in slots)
        for number in range(4):
            call.sendall(framed(Pull("link", token, number, slots, generations, 0)))
        ended = threading.Event()

        def read_slowly() -> None:
            with contextlib.suppress(OSError):
                while call.recv(1 << 14) and not ended.wait(0.001):  # about 15 MB/s
                    pass

        thread = threading.Thread(target=read_slowly)
        thread.start()
        wait_until(lambda: end.leases.count()["touched"], "the source sends")
        began = time.monotonic()
        closing = threading.Thread(target=end.source.close_link, args=("link",))
        closing.start()
        closing.join(2.0)
        took = time.monotonic() - began
        hung = closing.is_alive()
        ended.set()
        thread.join()
        call.close()
        closing.join()
        assert not hung, f"close_link hung for {took:.1f} s and more"


def test_closing_a_reader_does_not_wait_for_a_source_that_sends_slowly() -> None:
    """A byte every 30 ms: no call says EAGAIN, the deadline moves on, nobody looks at the stop."""
    target = Target(HostPoolMemory(1, LAYOUT.slab_bytes), LAYOUT)
    listener = socket.create_server(("127.0.0.1", 0))
    token, ended, begun = bytes(16), threading.Event(), threading.Event()

    def source() -> None:
        call, _ = listener.accept()
        with call, contextlib.suppress(OSError):
            call.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            call.sendall(record(call.recv(16)))
            call.recv(1 << 16)
            call.sendall(framed(Slabs("link", 0, "")) + framed(Proved("link", 0, True)))
            call.recv(1 << 16)
            call.sendall(framed(Slabs("link", 1, "")))
            begun.set()
            while not ended.wait(0.03):
                call.sendall(b"x")

    sending = threading.Thread(target=source)
    sending.start()
    try:
        port = listener.getsockname()[1]
        reader = TcpReader.open("link", token + f"tcp://127.0.0.1:{port}".encode(), target)
        errors: list[BaseException] = []

        def pull() -> None:
            try:
                reader.pull([Piece(0, 0, 0, 0, 0, b"", b"seed")])
            except PdqError as error:
                errors.append(error)

        pulling = threading.Thread(target=pull)
        pulling.start()
        assert begun.wait(10), "the pull never began"
        closing = threading.Thread(target=reader.close)
        closing.start()
        closing.join(2.0)
        hung = closing.is_alive()
        ended.set()
        for thread in (sending, pulling, closing):
            thread.join(30)
        assert isinstance(errors[0], LinkLost)
        assert not hung, "close waited for the source"
    finally:
        ended.set()
        listener.close()
        target.memory.close()


def test_a_reader_of_frames_holds_no_more_than_its_queue_of_what_nobody_asked_for() -> None:
    slab = bytes(1 << 20)
    with zmq.Context() as context, context.socket(zmq.ROUTER) as source:
        source.setsockopt(zmq.ROUTER_MANDATORY, 1)
        source.setsockopt(zmq.SNDHWM, 1)
        source.setsockopt(zmq.SNDTIMEO, 500)
        source.setsockopt(zmq.LINGER, 0)
        port = source.bind_to_random_port("tcp://127.0.0.1")
        reader = ReceivingFrames(f"tcp://127.0.0.1:{port}", "", len(slab))
        try:
            reader.send(b"hello")
            peer = source.recv_multipart()[0]
            flood = (source.send_multipart([peer, b"", slab]) for _ in range(256))
            with pytest.raises(zmq.Again):  # the source waits, for nobody takes more
                list(flood)
        finally:
            reader.close()


@pytest.mark.parametrize("host", ["a" * 64, "a..b", "nul\0host", ".leading"])
@pytest.mark.parametrize("scheme", ["tcp", "zmq"])
def test_a_proof_with_a_host_that_is_no_name_is_an_error_of_ours(scheme: str, host: str) -> None:
    """handshake.answer catches PdqError and goes on to the next transport; else nobody answers."""
    target = Target(HostPoolMemory(1, LAYOUT.slab_bytes), LAYOUT)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(TcpReader, "open_timeout_s", 0.5)
            with pytest.raises((LinkLost, MalformedMessage)):
                TcpReader.open("link", bytes(16) + f"{scheme}://{host}:80".encode(), target)
    finally:
        target.memory.close()


def test_an_nccl_reader_that_gets_no_stream_leaves_no_sockets() -> None:
    with both_ends("nccl") as end:
        proof = end.source.open_link("link")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(CUDA, "stream", no_memory)
            for _ in range(3):
                with pytest.raises(InsufficientMemory):
                    NcclReader.connect("link", proof, end.target, CUDA, NCCL, Turns())


def test_an_nccl_source_that_gets_no_stream_leaves_no_sockets() -> None:
    with both_ends("nccl") as end, pytest.MonkeyPatch.context() as patch:
        patch.setattr(CUDA, "stream", no_memory)
        for _ in range(3):
            with pytest.raises(InsufficientMemory):
                end.source.open_link("link")


def test_a_source_whose_thread_cannot_start_leaves_no_sockets() -> None:
    for key in ("", KEY_PAIR):
        with both_ends("tcp+curve" if key else "tcp") as end, pytest.MonkeyPatch.context() as patch:

            def fails(_: object) -> None:
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", fails)
            with pytest.raises((RuntimeError, PdqError)):
                end.source.open_link("link")


@contextlib.contextmanager
def few_descriptors(more: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    spare = os.dup(0)
    os.close(spare)
    resource.setrlimit(resource.RLIMIT_NOFILE, (spare + more, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def count_descriptors() -> int:
    gc.collect()
    return len(os.listdir("/proc/self/fd"))


@pytest.mark.filterwarnings("ignore::ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("more", [0, 1, 2])
def test_a_stream_that_is_made_with_too_few_descriptors_leaves_none(more: int) -> None:
    before = count_descriptors()
    with few_descriptors(more), pytest.raises(LinkLost, match="Too many open files"):
        SendingStream("127.0.0.1", bytes(16))
    assert count_descriptors() == before


def test_a_source_that_is_out_of_descriptors_does_not_spin() -> None:
    """accept says EMFILE, the listener stays readable."""
    with both_ends("tcp") as end:
        _, _, host, port = split_proof(end.source.open_link("link"))
        caller = socket.socket()
        with few_descriptors(0):
            before = time.process_time()
            caller.connect((host, port))
            threading.Event().wait(1.0)
            used = time.process_time() - before
        caller.close()
        assert used < 0.5, f"{used:.2f} s of a core in 1 s"


@tcp_wires
def test_a_link_that_is_opened_twice_leaves_nothing_of_the_first(transport: str) -> None:
    with both_ends(transport) as end:
        end.source.open_link("link")
        end.source.open_link("link")


async def test_a_link_whose_source_cannot_be_opened_holds_up_no_later_one() -> None:
    """open_link raises what the system says: the link stays in the table, never opened."""
    async with two_nodes("tcp") as (_, p, _), asyncio.timeout(20):
        with few_descriptors(0), pytest.raises((OSError, PdqError)):
            await p.links.open("d")
        async with asyncio.timeout(3):
            assert await p.links.open("d")


@tcp_wires
def test_a_place_at_which_a_source_cannot_listen_is_an_error_of_ours(transport: str) -> None:
    memory, leases = HostPoolMemory(1, LAYOUT.slab_bytes), Leases(CountingPool())
    key = KEY_PAIR if "curve" in transport else ""
    source = TcpSource(memory, LAYOUT, leases, host="192.0.2.1", secret_key=key)
    try:
        with pytest.raises(PdqError):  # what Links.open and sender.py know
            source.open_link("link")
    finally:
        source.close()
        memory.close()
