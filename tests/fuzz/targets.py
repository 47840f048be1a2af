"""What is fuzzed: functions of arbitrary bytes that must return, whatever they are given.

Each feeds one decoder, and checks what comes out of it: a typed error, or a value that is what a
well-behaved sender could have meant. `tests/fuzz/test_targets.py` runs them with hypothesis in
`make test`; `python -m tests.fuzz TARGET` (`make fuzz`) with atheris, guided by coverage.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import os
import tracemalloc
import typing
from collections.abc import Callable, Sequence
from typing import Any

from common.errors import LinkLost, MalformedMessage
from common.kv_layout import Fingerprint, KVLayout, root_hash
from common.sampling import SamplingParams
from common.store import requests
from common.store.client import text
from common.store.node_record import BEAT, NodeRecord, Role, identity_from, joined
from common.store.request_record import RequestRecord, record_of
from common.wire.codec import VERSION, decode, encode
from common.wire.message import HandoffKey, Message
from common.wire.messages import (
    MESSAGES,
    Abort,
    Ack,
    Blocks,
    Commit,
    Deny,
    Grant,
    Offer,
    Refuse,
    Release,
    Tail,
)
from kv_transfer import generations, handshake
from kv_transfer.generations import MappedGenerations
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import HostPoolMemory
from kv_transfer.ports import Adopted, Copy, Piece, ReadyBlock, Reservation, TransferSettings
from kv_transfer.transports import same_host
from kv_transfer.transports.base import Target
from kv_transfer.transports.shm import ShmReader
from tests.support.asked import a_request
from tests.support.hashes import chain_hashes

BLOCK = 4
LAYOUT = KVLayout.paged_attention(num_layers=2, num_kv_heads=2, head_dim=8, block_size=BLOCK, dtype="float32")
FINGERPRINT = Fingerprint("model", "rev", "layout", "numerics", BLOCK)
TOKENS = tuple(range(10))
HASHES = tuple(chain_hashes(root_hash(FINGERPRINT), TOKENS, BLOCK, len(TOKENS)))
KEY = HandoffKey("link", "r", 1, 0)
OFFER = Offer(KEY, a_request(TOKENS, gateway="g"), HASHES, 2, 0)


class Source:
    """Takes values out of the bytes of an input, from its start; zeros when they are used up."""

    def __init__(self, data: bytes) -> None:
        self._data, self._at = data, 0

    def left(self) -> int:
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        taken = self._data[self._at : self._at + count]
        self._at += len(taken)
        return taken

    def byte(self) -> int:
        return (self.take(1) or b"\0")[0]

    def number(self) -> int:
        """Mostly small, as numbers of things that exist; now and then of any size."""
        first = self.byte()
        return int.from_bytes(self.take(8), "little", signed=True) if first > 250 else first % 7 - 1

    def numbers(self) -> tuple[int, ...]:
        return tuple(self.number() for _ in range(self.byte() % 6))

    def name(self) -> bytes:
        """A block hash that exists, or some bytes."""
        first = self.byte()
        return HASHES[first % 2] if first < 128 else self.take(first % 18)

    def names(self) -> tuple[bytes, ...]:
        return tuple(self.name() for _ in range(self.byte() % 5))


# Bytes of messages


def codec(data: bytes) -> None:
    """A message is refused, or is one that its sender could have sent: sent again it is the same.
    What decoding takes is bounded by what there is to decode: 72 bytes for a list, which one byte
    stands for, and 8 for its entry in another; and 128 KiB for msgpack's own stack, twice what it
    takes, since whatever else this process does meanwhile is counted too."""
    for whole in (data, bytes([VERSION]) + data):
        message = _decoded(whole)  # what decoding keeps for the next message of this kind is kept now
        tracemalloc.start()
        try:
            _decoded(whole)
            _, peak = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
        assert peak <= 100 * len(whole) + 2**17, f"{peak} bytes for {len(whole)}"
        if message is not None:
            sent = encode(message)
            assert encode(decode(sent)) == sent, "sent again it is another"


def _decoded(data: bytes) -> Message | None:
    try:
        return decode(data)
    except MalformedMessage:
        return None


def hello(data: bytes) -> None:
    """Whatever a Hello says, it is answered, and opens nothing without a proof."""
    source = Source(data)
    text = source.take(source.byte() % 40).decode("latin-1")
    proof = source.take(source.byte())
    fields = {"link": text, "node": text, "transports": ("shm", text), "proofs": {"shm": proof, text: proof}}
    own = handshake.hello("link", "peer", FINGERPRINT, LAYOUT.slab_bytes, {})
    parts = dataclasses.fields(Fingerprint)
    part = parts[source.byte() % len(parts)].name
    if isinstance(getattr(FINGERPRINT, part), str):
        fields["fingerprint"] = dataclasses.replace(FINGERPRINT, **{part: text})  # type: ignore[arg-type]
    elif source.byte() % 2:
        fields["fingerprint"] = dataclasses.replace(FINGERPRINT, block_size=source.number())
    asked = dataclasses.replace(own, **fields)  # type: ignore[arg-type]
    memory = HostPoolMemory(1, LAYOUT.slab_bytes)
    try:
        answer, reader = handshake.answer(
            asked, "me", FINGERPRINT, Target(memory, LAYOUT), {"shm": ShmReader.open}, credits=1
        )
        assert isinstance(answer, Refuse)
        assert answer.field
        assert reader is None
    finally:
        memory.close()


# Both ends of a handoff


class Room:
    """A pool with room for one prompt, which counts what it gave."""

    def __init__(self) -> None:
        self.given = 0
        self.references = [0] * 8

    def acquire(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        for block in blocks:
            self.references[block] -= 1

    def reserve(self, offer: Offer) -> Reservation:
        self.given += 1
        return Reservation((0, 1, 2), (0, 1, 2))

    def withdraw(self, offer: Offer) -> None: ...

    def landed(self, reservation: Reservation, piece: Piece) -> None:
        assert piece.block in reservation.blocks
        assert piece.index in reservation.missing

    def adopt(self, reservation: Reservation) -> None:
        self.given -= 1

    def discard(self, reservation: Reservation) -> None:
        self.given -= 1


def _for_intake(source: Source) -> Message:
    kind = source.byte() % 6
    if kind == 0:
        return Blocks(KEY, source.numbers(), source.numbers(), source.numbers(), source.names())
    if kind == 1:
        one = tuple(range(source.byte() % 4))
        return Blocks(KEY, one, source.numbers()[: len(one)] or one, one, ())
    if kind == 2:
        fill = source.number()
        tokens = TOKENS[-2:] if source.byte() % 2 else source.numbers()
        return Tail(
            KEY, source.number(), source.name(), tokens, fill, source.number(), source.number(), source.name()
        )
    if kind == 3:
        position = len(TOKENS) if source.byte() % 2 else source.number()
        return Commit(KEY, position, source.number(), None, source.number(), source.number())
    if kind == 4:
        return Abort(KEY, "why")

    def some(fields: dict[str, object]) -> dict[str, Any]:
        return {name: value for name, value in fields.items() if source.byte() % 2}

    asked = {"token_ids": source.numbers(), "prompt_len": source.number(), "id": "another"}
    request = dataclasses.replace(OFFER.request, **some(asked))
    own = {"tail_fill": source.number(), "block_hashes": source.names()}
    return dataclasses.replace(OFFER, request=request, **some(own))


def intake(data: bytes) -> None:
    """Any message at any moment: only what is whole is adopted, and nothing stays reserved."""
    source, room = Source(data), Room()
    end = Intake(room, FINGERPRINT, TransferSettings())
    end.open_link("link", 4)
    landed: set[int] = set()
    now, message = 0.0, OFFER
    effects = end.receive(message, now=now)
    while True:
        while effects:
            effect = effects.pop(0)
            if isinstance(effect, Copy):
                assert all(0 <= piece.block < 3 for piece in effect.pieces)
                failed = source.byte() > 220
                landed |= set() if failed else {piece.index for piece in effect.pieces}
                effects += end.copied(effect.number, "stale_block" if failed else "", now=now)
            elif isinstance(effect, Adopted):
                assert landed == {0, 1, 2}, "adopted before everything was here"
        if not source.left():
            break
        now += source.byte() / 64
        effects = end.receive(_for_intake(source), now=now) + end.tick(now)
    end.link_lost("link", now=now)
    assert not end.states()
    assert room.given == 0


def handoff(data: bytes) -> None:
    """Any answer at any moment: every reference comes back."""
    source, room = Source(data), Room()
    leases = Leases(room)
    end = Handoff(leases, TransferSettings())
    end.open_link("link", 4)
    end.offer(OFFER, now=0.0)
    now, ready = 0.0, 0
    while source.left():
        now += source.byte() / 64
        kind = source.byte() % 9
        if kind < 3:
            end.receive(Grant(KEY, source.numbers()), now=now)
        elif kind < 6:
            answer = (Deny(KEY, "no"), Ack(KEY), Abort(KEY, "no"))[kind - 3]
            end.receive(answer, now=now)
        elif kind == 6:
            end.receive(Release(KEY), now=now)
        elif kind == 7 and ready < 3:
            end.ready(KEY, [ReadyBlock(ready, ready, 2, b"")], now=now)
            ready += 1
            if ready == 3:
                end.finished(KEY, position=10, first_token=1, logprobs=None, now=now)
        else:
            end.cancel(KEY, "no", now=now)
        end.tick(now)
    end.link_lost("link", now=now)
    assert not end.states()
    assert leases.count() == {"open": 0, "ending": 0, "touched": 0}
    assert set(room.references) == {0}


# What transports read besides messages


def pool_file(data: bytes) -> None:
    """A file is mapped as a pool only if header and length agree."""
    source = Source(data)
    pages = source.byte() % 5
    header = source.take(40)
    if source.byte() % 4:
        header = generations._MAGIC + header
    fd = os.memfd_create("fuzz", os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, pages * 4096)
        if pages:
            os.pwrite(fd, header, 0)
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, generations._SEALS)
        try:
            mapped = MappedGenerations(fd)
        except MalformedMessage:
            return
        assert mapped.num_blocks * 8 + mapped.content_bytes <= pages * 4096
        assert len(mapped.generations) == mapped.num_blocks
        mapped.close()
    finally:
        os.close(fd)


def same_host_proof(data: bytes) -> None:
    """A proof that nobody made opens nothing."""
    for proof in (data, (data + bytes(48))[:48]):
        with contextlib.suppress(LinkLost, MalformedMessage), same_host.receive(proof):
            raise AssertionError("opened by any bytes")


# What lies in Redis


def _fields(source: Source, known: Sequence[str]) -> dict[bytes, bytes]:
    """Fields of a hash: mostly some that are known, with any values."""
    fields: dict[bytes, bytes] = {}
    for _ in range(source.byte() % 24):
        first = source.byte()
        name = known[first % len(known)].encode() if first < 230 else source.take(first % 9)
        kind = source.byte()
        fields[name] = (
            str(source.number()).encode()
            if kind < 100
            else KNOWN_VALUES[kind % len(KNOWN_VALUES)]
            if kind < 200
            else source.take(kind - 200)
        )
    return fields


KNOWN_VALUES = (
    b"",
    b"0",
    b"1",
    b"0,1",
    b"queued",
    b"finished",
    b"prefill",
    b"ready",
    b"1.5",
    b"nan",
    b"inf",
    b"\xff",
    b"9" * 5000,
    b"tcp://127.0.0.1:1",
)
_NODE_FIELDS = [field.name for field in dataclasses.fields(NodeRecord)]
_REQUEST_FIELDS = [
    *(field.name for field in dataclasses.fields(RequestRecord)),
    *(
        f"c{choice}.{name}"
        for choice in (0, 1)
        for name in (
            "state",
            "attempt",
            "prefill_node",
            "generated",
            "cached_tokens",
            "queued_at",
            "seconds.prefill",
        )
    ),
    "a1.choices",
    "a1.node",
    "a1.claim",
    "a2.choices",
    "a.choices",
    "aX.choices",
    "c0",
    "c.",
]


def node_record(data: bytes) -> None:
    """A record of a node is one, or is left out."""
    stored = {text(name): text(value) for name, value in _fields(Source(data), _NODE_FIELDS).items()}
    record = identity_from(stored)
    assert record is None or isinstance(record.role, Role)
    known = record or NodeRecord("n-1", "n", Role.DECODE)
    record = joined(known, [stored.get(name, False) for name in BEAT])
    assert record is None or isinstance(record.running, int)


def request_record(data: bytes) -> None:
    """A record of a request is one, or is left out."""
    record = record_of("r", _fields(Source(data), _REQUEST_FIELDS))
    assert record is None or isinstance(record.state, requests.State)


def load_record(data: bytes) -> None:
    requests.load_of(_fields(Source(data), ["requests", "prompt_tokens"]))


def seeds() -> list[bytes]:
    """One message of each kind, for a fuzzer to begin with."""
    return [encode(_sample(message_type)) for message_type in MESSAGES.values()]


def _sample(annotation: Any) -> Any:
    """A value that a field of this type may have."""
    if annotation is SamplingParams:
        return SamplingParams()
    if dataclasses.is_dataclass(annotation):
        hints = typing.get_type_hints(annotation)
        fields = dataclasses.fields(annotation)
        return typing.cast(Any, annotation)(*(_sample(hints[field.name]) for field in fields))
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is tuple:
        return tuple(_sample(inner) for inner in arguments if inner is not Ellipsis)
    if origin is dict:
        return {"name": _sample(arguments[1])}
    if arguments:  # a union with None
        return _sample(arguments[0])
    return {int: 300, str: "name", bytes: b"0123456789abcdef", bool: True, float: 1.5}[annotation]


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (
        codec,
        hello,
        intake,
        handoff,
        pool_file,
        same_host_proof,
        node_record,
        request_record,
        load_record,
    )
}
