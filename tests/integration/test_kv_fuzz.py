"""Whatever a peer sends to the transfer layer: no crash, nothing accepted that is malformed, and no
memory beyond what the input itself, or what it was declared to be, takes.

The codec alone is in tests/unit/test_codec.py; here are the two ends of the protocol under any valid
message at any moment, the handshake, and what transports read from a socket or a mapped file.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import struct
import tracemalloc
from collections.abc import Iterator
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from common.codec import VERSION, decode, encode
from common.errors import LinkLost, MalformedMessage, PdqError
from common.kv_layout import Fingerprint, KVLayout, chain_hashes, root_hash
from common.messages import (
    Abort,
    Ack,
    Arrived,
    Blocks,
    Commit,
    Deny,
    Grant,
    Hello,
    Message,
    Offer,
    Proved,
    Pull,
    Refuse,
    Release,
    Slabs,
    Tail,
)
from common.sampling import SamplingParams
from kv_transfer import handshake, pool_memory
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import MappedPool, PoolMemory
from kv_transfer.ports import Copy, Key, Piece, ReadyBlock, Reservation, TransferSettings
from kv_transfer.transports.base import Target
from kv_transfer.transports.shm import ShmReader
from kv_transfer.transports.tcp import TcpReader, TcpSource
from tests.unit.test_codec import of_type

BLOCK = 4
LAYOUT = KVLayout.paged_attention(
    num_layers=2, num_kv_heads=2, head_dim=8, block_size=BLOCK, dtype="float32"
)
FINGERPRINT = Fingerprint("model", "rev", "layout", "numerics", BLOCK)
TOKENS = tuple(range(10))
HASHES = tuple(chain_hashes(root_hash(FINGERPRINT), TOKENS, BLOCK, len(TOKENS)))
KEY = Key("link", "r", 1, 0)
OFFER = Offer(
    *KEY, TOKENS, len(TOKENS), SamplingParams(), HASHES, 2, "g", "", "", 0, 0,
)  # fmt: skip
few = settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
many = settings(few, max_examples=300)


def of_key(message_type: type[Message]) -> st.SearchStrategy[Message]:
    """Any message of this type that is about the one handoff there is: the others are merely late.
    Numbers are small now and then, so that they name places that exist."""
    small = st.integers(-1, 4)
    names = st.sampled_from(HASHES) | st.binary(max_size=17)
    fields: dict[str, st.SearchStrategy[Any]] = {
        "indexes": st.lists(small, max_size=5).map(tuple),
        "missing": st.lists(small, max_size=5).map(tuple),
        "slots": st.lists(small | st.integers(-(2**63), 2**63 - 1), max_size=5).map(tuple),
        "generations": st.lists(small, max_size=5).map(tuple),
        "digests": st.lists(st.binary(min_size=16, max_size=16) | names, max_size=5).map(tuple),
        "index": small, "fill": small, "slot": small, "generation": small,
        "position": st.sampled_from([0, len(TOKENS), 2**40]), "blocks": small,
    }  # fmt: skip

    def about_the_key(message: Any) -> st.SearchStrategy[Message]:
        own = {f.name for f in dataclasses.fields(message)} & fields.keys()
        return st.fixed_dictionaries({name: fields[name] for name in sorted(own)}).map(
            lambda drawn: dataclasses.replace(message, **KEY._asdict(), **drawn)
        )

    return of_type(message_type).flatmap(about_the_key)


class Room:
    """A pool with room for one prompt, which counts what it gave."""

    def __init__(self) -> None:
        self.given = 0
        self.references = [0] * 8

    def acquire(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] += 1

    def release(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] -= 1

    def reserve(self, offer: Offer) -> Reservation:
        self.given += 1
        return Reservation((0, 1, 2), (0, 1, 2))

    def landed(self, reservation: Reservation, piece: Piece) -> None:
        assert piece.block in reservation.blocks
        assert piece.index in reservation.missing

    def adopt(self, reservation: Reservation) -> None:
        self.given -= 1

    def discard(self, reservation: Reservation) -> None:
        self.given -= 1


@given(
    messages=st.lists(
        st.sampled_from([Offer, Blocks, Tail, Commit, Abort]).flatmap(of_key) | st.just(OFFER),
        max_size=8,
    )
)
@many
def test_an_intake_takes_any_message_at_any_moment_and_adopts_only_what_is_whole(
    messages: list[Message],
) -> None:
    room = Room()
    intake = Intake(room, FINGERPRINT, TransferSettings())
    intake.open_link("link", 4)
    landed: set[int] = set()
    for now, message in enumerate([OFFER, *messages]):
        effects = intake.receive(message, now=float(now))
        while effects:
            effect = effects.pop(0)
            if isinstance(effect, Copy):
                assert all(0 <= piece.block < 3 for piece in effect.pieces)
                landed |= {piece.index for piece in effect.pieces}
                effects += intake.copied(effect.number, "", now=float(now))
            elif hasattr(effect, "reservation"):
                assert landed == {0, 1, 2}, "adopted before everything was here"
    intake.link_lost("link", now=99.0)
    assert not intake.states()
    assert room.given == 0


@given(
    messages=st.lists(
        st.sampled_from([Grant, Deny, Ack, Abort, Release]).flatmap(of_key), max_size=8
    ),
    at=st.lists(st.integers(0, 8), min_size=3, max_size=3),
)
@many
def test_a_handoff_takes_any_message_at_any_moment_and_gives_all_references_back(
    messages: list[Message], at: list[int]
) -> None:
    room = Room()
    leases = Leases(room)
    handoff = Handoff(leases, TransferSettings())
    handoff.open_link("link", 4)
    handoff.offer(OFFER, now=0.0)
    ready = [ReadyBlock(index, index, 2, b"") for index in range(3)]
    for number, message in enumerate(messages):
        for index, when in enumerate(at):
            if when == number:
                handoff.ready(KEY, ready[index : index + 1], now=1.0)
        handoff.receive(message, now=1.0)
    handoff.link_lost("link", now=99.0)
    assert not handoff.states()
    assert leases.count() == {"open": 0, "ending": 0, "touched": 0}
    assert set(room.references) == {0}


@given(
    length=st.integers(0, 2**32 - 1), depth=st.integers(0, 400),
    header=st.sampled_from([0xDC, 0xDD, 0xDE, 0xDF, 0xC6, 0xDB, 0xC9]),
    rest=st.binary(max_size=2000),
)  # fmt: skip
@many
def test_a_length_that_is_only_claimed_takes_little_memory(
    length: int, depth: int, header: int, rest: bytes
) -> None:
    """Nested headers of arrays, maps, strings and extensions that promise what does not come. msgpack
    makes room for 10,000 entries of each list that it has begun, and lists nest up to 511 deep."""
    wide = header not in (0xDC, 0xDE)
    one = bytes([header]) + struct.pack(">I" if wide else ">H", length if wide else length & 0xFFFF)
    data = bytes([VERSION]) + one * depth + rest
    tracemalloc.start()
    try:
        with contextlib.suppress(MalformedMessage):
            decode(data)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak <= 64 * len(data) + min(depth, 511) * 8 * min(length, len(data), 10_000) + 2**16


@given(hello=of_type(Hello))
@few
def test_a_hello_is_answered_by_a_refusal_whatever_it_says(hello: Hello) -> None:
    memory = PoolMemory(1, LAYOUT.slab_bytes)
    try:
        answer, reader = handshake.answer(
            hello, "me", FINGERPRINT, Target(memory, LAYOUT), {"shm": ShmReader.open}, credits=1
        )
        assert isinstance(answer, Refuse)
        assert answer.field
        assert reader is None
        same = dataclasses.replace(
            hello, model="model", revision="rev", layout="layout", numerics="numerics",
            block_size=BLOCK, adapter="", slab_bytes=LAYOUT.slab_bytes,
        )  # fmt: skip
        same = dataclasses.replace(same, transports=("shm",), proofs={"shm": b"x" * 48})
        answer, reader = handshake.answer(
            same, "me", FINGERPRINT, Target(memory, LAYOUT), {"shm": ShmReader.open}, credits=1
        )
        assert isinstance(answer, Refuse)
        assert answer.field == "transport"
    finally:
        memory.close()


@given(header=st.binary(max_size=40), pages=st.integers(0, 3), pool=st.booleans())
@many
def test_a_file_is_mapped_as_a_pool_only_if_its_header_and_length_agree(
    header: bytes, pages: int, pool: bool
) -> None:
    header = (b"pdqpool1" + header) if pool else header
    fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, pages * 4096)
        if pages:
            os.pwrite(fd, header, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, pool_memory._SEALS)
        try:
            mapped = MappedPool(fd)
        except MalformedMessage:
            return
        assert mapped.num_blocks * (mapped.slab_bytes + 8) <= pages * 4096
        mapped.close()
    finally:
        os.close(fd)


# What comes out of a tcp socket


@contextlib.contextmanager
def served() -> Iterator[tuple[TcpSource, PoolMemory, bytes]]:
    class Held:
        def acquire(self, blocks: object) -> None: ...

        def release(self, blocks: object) -> None: ...

    memory, leases = PoolMemory(4, LAYOUT.slab_bytes), Leases(Held())
    source = TcpSource(memory, LAYOUT, leases)
    for block in range(4):
        memory.begin_write(block)
        memory.seal(block)
    leases.add(Key("link", "r", 1, 0), [0, 1])
    try:
        yield source, memory, source.open_link("link")
    finally:
        source.close()
        memory.close()


@pytest.fixture(scope="module")
def link() -> Iterator[tuple[TcpSource, PoolMemory, bytes]]:
    with served() as parts:
        yield parts


def pulls(token: bytes) -> st.SearchStrategy[Pull]:
    numbers = st.lists(st.integers(-2, 5) | st.integers(-(2**63), 2**64 - 1), max_size=4)
    return st.builds(
        Pull, st.sampled_from(["link", "other"]), st.sampled_from([token, b"", b"x" * 16]),
        st.integers(0, 9), numbers.map(tuple), numbers.map(tuple), st.integers(-2, 6),
    )  # fmt: skip


def arrivals(token: bytes) -> st.SearchStrategy[Arrived]:
    """Of pulls that were never asked for, or under way, or over."""
    tokens = st.sampled_from([token, b"", b"x" * 16])
    return st.builds(Arrived, st.sampled_from(["link", "other"]), tokens, st.integers(0, 9))


@given(data=st.data())
@few
def test_a_source_gives_out_nothing_but_leased_blocks_whatever_it_is_sent(
    link: tuple[TcpSource, PoolMemory, bytes], data: st.DataObject
) -> None:
    _, memory, proof = link
    token, endpoint = proof[:16], proof[16:].decode()
    frames = data.draw(
        st.lists(
            st.lists(
                st.binary(max_size=40) | (pulls(token) | arrivals(token)).map(encode),
                min_size=1,
                max_size=3,
            ),
            max_size=4,
        )
    )
    context = zmq.Context()
    socket = context.socket(zmq.DEALER)
    socket.setsockopt(zmq.LINGER, 0)
    try:
        socket.connect(endpoint)
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
            if isinstance(message, Slabs) and not message.refused:
                socket.send(encode(Arrived("link", token, message.number)))
            if isinstance(message, Proved) and message.number == last:
                break
    finally:
        socket.close()
        context.term()


@given(data=st.data())
@few
def test_a_reader_ends_with_a_typed_error_whatever_a_source_sends(data: st.DataObject) -> None:
    """Or with success, where the source did answer what was asked."""
    context = zmq.Context()
    router = context.socket(zmq.ROUTER)
    router.setsockopt(zmq.LINGER, 0)
    port = router.bind_to_random_port("tcp://127.0.0.1")
    memory = PoolMemory(2, LAYOUT.slab_bytes)
    reader = TcpReader("link", b"t" * 16, Target(memory, LAYOUT), "")
    try:
        reader._socket.connect(f"tcp://127.0.0.1:{port}")
        reader._socket.send(b"hello")
        routing_id = router.recv_multipart()[0]
        answers = st.one_of(
            st.builds(Slabs, st.just("link"), st.integers(0, 1), st.sampled_from(["", "stale"])),
            st.builds(Proved, st.just("link"), st.integers(0, 1), st.booleans()),
        ).map(encode)  # fmt: skip
        slab = st.binary(max_size=64) | st.just(bytes(LAYOUT.slab_bytes))
        for _ in range(data.draw(st.integers(0, 3))):
            header = data.draw(answers | st.binary(max_size=20))
            router.send_multipart([routing_id, header, *data.draw(st.lists(slab, max_size=2))])
        before = bytes(memory.slab(1))
        with contextlib.suppress(PdqError):
            reader._pull([(Piece(0, 0, 2, 0, 0, b"", b"seed"),)], 0.02)
        assert bytes(memory.slab(1)) == before, "wrote where nothing was asked for"
    finally:
        reader.close()
        router.close()
        context.term()
        memory.close()


@given(proof=st.binary(max_size=80))
@few
def test_a_proof_of_any_bytes_opens_nothing(proof: bytes) -> None:
    memory = PoolMemory(1, LAYOUT.slab_bytes)
    try:
        with pytest.raises((LinkLost, MalformedMessage)):
            ShmReader.open("link", proof, Target(memory, LAYOUT))
    finally:
        memory.close()
