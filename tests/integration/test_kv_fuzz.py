"""What transports read from a socket, whatever is at its other end: no crash, nothing given out or
taken in that was not asked for, and a typed error.

The bytes of messages, both ends of the protocol and the records in Redis are in tests/fuzz; ZeroMQ's
framing, and the bus, in test_bus_fuzz.py.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
from collections.abc import Iterator

import pytest
import zmq
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from common.errors import LinkLost, MalformedMessage, PdqError
from common.wire.bus import new_secret_key
from common.wire.codec import decode, encode
from common.wire.message import HandoffKey
from common.wire.messages import Proved, Pull, Slabs
from kv_transfer.device_memory import DevicePoolMemory
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import HostPoolMemory, PoolMemory
from kv_transfer.ports import Piece
from kv_transfer.transports import same_host, tcp_stream
from kv_transfer.transports.base import Target
from kv_transfer.transports.nccl import NcclReader, Turns
from kv_transfer.transports.shm import ShmReader, ShmSource
from kv_transfer.transports.tcp import TcpReader, TcpSource, split_proof
from kv_transfer.transports.tcp_frames import ReceivingFrames
from tests.fuzz.targets import LAYOUT
from tests.support.fake_cuda import FakeCuda
from tests.support.fake_nccl import FakeNccl

few = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


KEY_PAIR = new_secret_key()
SECRET = 0xEE

# What comes out of a tcp socket


@contextlib.contextmanager
def served(secret_key: str = "") -> Iterator[tuple[TcpSource, PoolMemory, bytes]]:
    """Four blocks, of which two are leased; the others hold what nobody may see."""

    class Held:
        def acquire(self, blocks: object) -> None: ...

        def release(self, blocks: object) -> None: ...

    memory, leases = HostPoolMemory(4, LAYOUT.slab_bytes), Leases(Held())
    source = TcpSource(memory, LAYOUT, leases, secret_key=secret_key)
    for block in range(4):
        memory.begin_write(block)
        memory.slabs[block] = 0 if block < 2 else SECRET
        memory.seal(block)
    leases.add(HandoffKey("link", "r", 1, 0), [0, 1])
    try:
        yield source, memory, source.open_link("link")
    finally:
        source.close()
        memory.close()


@pytest.fixture(scope="module")
def link() -> Iterator[tuple[TcpSource, PoolMemory, bytes]]:
    with served(KEY_PAIR) as parts:
        yield parts


def pulls(token: bytes) -> st.SearchStrategy[Pull]:
    numbers = st.lists(st.integers(-2, 5) | st.integers(-(2**63), 2**64 - 1), max_size=4)
    return st.builds(
        Pull,
        st.sampled_from(["link", "other"]),
        st.sampled_from([token, b"", b"x" * 16]),
        st.integers(0, 9),
        numbers.map(tuple),
        numbers.map(tuple),
        st.integers(-2, 6),
    )


def messages(token: bytes) -> st.SearchStrategy[bytes]:
    return st.binary(max_size=40) | pulls(token).map(encode)


@given(data=st.data())
@few
def test_a_source_gives_out_nothing_but_leased_blocks_whatever_it_is_sent(
    link: tuple[TcpSource, PoolMemory, bytes], data: st.DataObject
) -> None:
    """Over ZeroMQ."""
    _, memory, proof = link
    token, _, host, port = split_proof(proof)
    frames = data.draw(st.lists(st.lists(messages(token), min_size=1, max_size=3), max_size=4))
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    socket.curve_secretkey = KEY_PAIR.encode()
    socket.curve_publickey = socket.curve_serverkey = zmq.curve_public(KEY_PAIR.encode())
    try:
        socket.connect(f"tcp://{host}:{port}")
        for parts in frames:
            socket.send_multipart(parts)
        last = 1_000_003
        socket.send(encode(Pull("link", token, last, (0,), (int(memory.generations[0]),), 0)))
        while True:
            assert socket.poll(10_000), "the source does not answer any more"
            header, *slabs = socket.recv_multipart()
            message = decode(header)
            assert isinstance(message, (Slabs, Proved))
            assert all(len(slab) <= LAYOUT.slab_bytes for slab in slabs)
            assert SECRET not in b"".join(slabs)
            if isinstance(message, Proved) and message.number == last:
                break
    finally:
        socket.close()
        context.term()


@given(data=st.data())
@few
def test_a_stream_gives_out_nothing_but_leased_blocks_whatever_it_is_sent(data: st.DataObject) -> None:
    with served() as (source, memory, proof):
        token, _, host, port = split_proof(proof)
        first = data.draw(st.just(token) | st.binary(max_size=20))
        whole = messages(token).map(tcp_stream.record)
        said = first + b"".join(data.draw(st.lists(whole | st.binary(max_size=9))))
        got = bytearray()
        with socket.create_connection((host, port), 10) as stranger:
            with contextlib.suppress(OSError):  # it may hang up at any time
                stranger.sendall(said)
                stranger.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while more := stranger.recv(1 << 16):
                    got += more
        assert bytes([SECRET] * 8) not in got, "a block that is not leased"
        echo = tcp_stream.record(token)
        assert got[: len(echo)] in (b"", echo)
        again = TcpReader.open("link", source.open_link("link"), Target(memory, LAYOUT))
        again.pull([Piece(0, 1, int(memory.generations[1]), 3, 0, b"", b"")])  # it serves on
        again.close()


def ends_typed(reader: TcpReader, memory: HostPoolMemory) -> None:
    """Or with success, where the source did answer what was asked."""
    before = bytes(memory.slab(1))
    with contextlib.suppress(PdqError):
        reader._pull([(Piece(0, 0, 2, 0, 0, b"", b"seed"),)], 0.02)
    assert bytes(memory.slab(1)) == before, "wrote where nothing was asked for"


answers = st.one_of(
    st.builds(Slabs, st.just("link"), st.integers(0, 1), st.sampled_from(["", "stale"])),
    st.builds(Proved, st.just("link"), st.integers(0, 1), st.booleans()),
).map(encode)
slabs = st.binary(max_size=64) | st.just(bytes(LAYOUT.slab_bytes))


@given(data=st.data())
@few
def test_a_reader_ends_with_a_typed_error_whatever_a_source_sends(data: st.DataObject) -> None:
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    memory = HostPoolMemory(2, LAYOUT.slab_bytes)
    wire = ReceivingFrames(f"tcp://127.0.0.1:{port}", "", LAYOUT.slab_bytes)
    reader = TcpReader("link", b"t" * 16, Target(memory, LAYOUT), wire)
    try:
        wire.send(b"hello")
        routing_id = router.recv_multipart()[0]
        for _ in range(data.draw(st.integers(0, 3))):
            header = data.draw(answers | st.binary(max_size=20))
            router.send_multipart([routing_id, header, *data.draw(st.lists(slabs, max_size=2))])
        ends_typed(reader, memory)
    finally:
        reader.close()
        router.close()
        context.term()
        memory.close()


@given(data=st.data())
@few
def test_a_reader_of_a_stream_ends_with_a_typed_error_whatever_a_source_sends(data: st.DataObject) -> None:
    whole = answers.map(tcp_stream.record)
    echo = tcp_stream.record(b"t" * 16)
    answer = data.draw(st.just(echo) | st.binary(min_size=1, max_size=16))
    said = answer + b"".join(data.draw(st.lists(whole | slabs | st.binary(max_size=9))))
    hangs_up = data.draw(st.booleans())

    def serve() -> None:
        caller, _ = listener.accept()
        with caller, contextlib.suppress(OSError):
            caller.recv(16)
            caller.sendall(said)
            if not hangs_up:
                caller.recv(1 << 16)  # what it is asked, until it gives up
                caller.recv(1)

    memory = HostPoolMemory(2, LAYOUT.slab_bytes)
    with (
        contextlib.closing(memory),
        socket.create_server(("127.0.0.1", 0)) as listener,
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(tcp_stream.ReceivingStream, "stall_timeout_s", 0.01)
        server = threading.Thread(target=serve, daemon=True)
        server.start()
        try:
            wire = tcp_stream.ReceivingStream(*listener.getsockname(), b"t" * 16, 1.0)
        except LinkLost:
            assert answer != echo or hangs_up
        else:
            reader = TcpReader("link", b"t" * 16, Target(memory, LAYOUT), wire)
            ends_typed(reader, memory)
            reader.close()
        server.join(10)
        assert not server.is_alive()


# Over the other transports


@given(payload=st.binary(max_size=80))
@few
def test_a_source_on_this_host_goes_on_whatever_it_is_shown(payload: bytes) -> None:
    """And gives its descriptor to nobody who does not know the link's nonce."""
    memory = HostPoolMemory(1, LAYOUT.slab_bytes)
    source = ShmSource(memory)
    try:
        proof = source.open_link("link")
        name = b"\0pdq-" + proof[: same_host._NAME_BYTES]
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as stranger:
            stranger.settimeout(5)
            stranger.connect(name)
            stranger.send(payload)
            _, descriptors, _, _ = socket.recv_fds(stranger, 64, 1)
            assert not descriptors
        ShmReader.open("link", proof, Target(memory, LAYOUT)).close()
    finally:
        source.close()
        memory.close()


@pytest.fixture(scope="module")
def nixl_proof() -> Iterator[bytes]:
    pytest.importorskip("nixl", reason="pip install pdq[nixl]")
    from kv_transfer.transports.nixl import NixlSource

    memory = HostPoolMemory(2, LAYOUT.slab_bytes)
    source = NixlSource(memory)
    try:
        yield source.open_link("link")
    finally:
        source.close()
        memory.close()


@given(
    at=st.integers(0, 10_000),
    damage=st.sampled_from(["cut", "flip", "insert", "number"]),
    number=st.sampled_from([0, 1, 2**31, 2**40, 2**63 - 1, 2**64 - 1]),
    byte=st.integers(0, 255),
)
@few
def test_a_damaged_proof_of_nixl_is_refused_before_nixl_sees_it(
    nixl_proof: bytes, at: int, damage: str, number: int, byte: int
) -> None:
    from kv_transfer.transports.nixl import NixlReader

    at %= len(nixl_proof)
    damaged = {
        "cut": nixl_proof[:at],
        "flip": nixl_proof[:at] + bytes([byte]) + nixl_proof[at + 1 :],
        "insert": nixl_proof[:at] + bytes([byte]) + nixl_proof[at:],
        "number": nixl_proof[:at] + struct.pack("<Q", number) + nixl_proof[at + 8 :],
    }[damage]
    assume(damaged != nixl_proof)
    memory = HostPoolMemory(2, LAYOUT.slab_bytes)
    try:
        with pytest.raises(MalformedMessage):
            NixlReader.open("link", damaged, Target(memory, LAYOUT))
    finally:
        memory.close()


@given(data=st.data())
@few
def test_a_reader_of_nccl_ends_with_a_typed_error_whatever_a_source_answers(data: st.DataObject) -> None:
    """The control socket as it is; the communicator and the device are not there."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    cuda = FakeCuda()
    nccl = FakeNccl(cuda, peer_comes=False)
    memory = DevicePoolMemory(2, LAYOUT.slab_bytes, cuda)
    wire = ReceivingFrames(f"tcp://127.0.0.1:{port}", "", 0)
    reader = NcclReader("link", b"t" * 16, Target(memory, LAYOUT), wire, cuda, nccl, Turns())
    try:
        wire.send(b"hello")
        routing_id = router.recv_multipart()[0]
        frames = st.lists(st.binary(max_size=200) | st.just(bytes(128)), max_size=2)
        for _ in range(data.draw(st.integers(0, 3))):
            header = data.draw(answers | st.binary(max_size=20))
            router.send_multipart([routing_id, header, *data.draw(frames)])
        with contextlib.suppress(PdqError):
            reader._pull([()], 0.02)
        with contextlib.suppress(PdqError):
            reader._pull([(Piece(0, 0, 2, 0, 0, b"", b"seed"),)], 0.02)
    finally:
        reader.close()
        router.close()
        context.term()
        memory.close()
    assert nccl.left == 0
