"""Slabs over TCP, by ZeroMQ: the reader asks (`Pull`), the source sends (`Slabs`, then `Proved`).

The source sends pool memory itself as frames, without a copy (of a pool on a device, pinned copies
out of a ring that is as large as the window); the frames' trackers touch the lease
of their blocks until the bytes have left, and only then is it looked up, and said in `Proved`,
that no generation changed. The reader copies each frame once, into its own pool, and digests it
while it is in cache. What is under way is bounded by the reader's window, whatever the prompt.

Each link has a context, socket and thread of its own: tearing a link down ends the context, after
which nothing of the pool is in any buffer of ours, whatever the peer does. Reconnecting is off: a
connection is a link. This file and common/bus.py are the only users of zmq.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import functools
import hmac
import os
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import zmq
import zmq.utils.monitor

from common.codec import decode, encode
from common.errors import LinkLost, MalformedMessage, PdqError, StaleBlock
from common.kv_layout import KVLayout
from common.messages import Message, Proved, Pull, Slabs
from kv_transfer.device_memory import DevicePoolMemory, Staging
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.ports import Piece
from kv_transfer.transports.base import Target

WINDOW_BYTES = 8 << 20  # under way at once on a link, or two slabs where those are larger
REQUEST_BYTES = 2 << 20  # of one Pull, or one slab
_TOKEN_BYTES = 16
_MAX_PULL_BYTES = 1 << 16  # of one Pull message
_MAX_PENDING = 16  # pulls that a source has under way at once; more wait in the socket
_OPEN_TIMEOUT = 5.0
STALL_TIMEOUT = 20.0  # a pull in which nothing arrives for so long has lost its link


class TcpSource:
    """Serves the blocks of `memory` that are leased to a link, to the holder of its token."""

    name = "tcp"

    def __init__(
        self, memory: PoolMemory, layout: KVLayout, leases: Leases, *, host: str = "127.0.0.1",
        advertise_host: str = "", secret_key: str = "",
    ) -> None:  # fmt: skip
        """`host`: where to listen; `advertise_host`: what peers connect to, if that differs."""
        self.memory, self._layout, self._leases = memory, layout, leases
        self._host, self._advertise, self._secret_key = host, advertise_host or host, secret_key
        self._served: dict[str, Served] = {}

    def open_link(self, link: str) -> bytes:
        token = secrets.token_bytes(_TOKEN_BYTES)
        served = self._served[link] = self._serve(link, token)
        return token + f"tcp://{self._advertise}:{served.port}".encode()

    def _serve(self, link: str, token: bytes) -> Served:
        if isinstance(self.memory, DevicePoolMemory):
            return _StagedServed(self, link, token, self.memory)
        return Served(self, link, token)

    def close_link(self, link: str) -> None:
        served = self._served.pop(link, None)
        if served is not None:
            served.close()

    def close(self) -> None:
        for link in list(self._served):
            self.close_link(link)


@dataclasses.dataclass(slots=True)
class Sent:
    """A Pull whose bytes may still be on their way out of the pool."""

    routing_id: bytes
    pull: Pull
    tracker: Any
    buffers: Sequence[int] = ()  # of a ring, where the pool itself cannot be sent


class Served:
    """One link of a source: a thread that owns a ROUTER."""

    max_pending = _MAX_PENDING

    def __init__(self, source: TcpSource, link: str, token: bytes) -> None:
        self._memory, self._layout, self._leases = source.memory, source._layout, source._leases
        self._link, self._token = link, token
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by _MAX_PENDING
        self._socket.setsockopt(zmq.MAXMSGSIZE, _MAX_PULL_BYTES)
        if source._secret_key:
            self._socket.curve_server = True
            self._socket.curve_secretkey = source._secret_key.encode()
        self.port = self._socket.bind_to_random_port(f"tcp://{source._host}")
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._sent: collections.deque[Sent] = collections.deque()
        self._held: tuple[bytes, Pull] | None = None  # cannot be sent now
        self._closing = False
        self._thread = threading.Thread(target=self._serve, name="tcp-source", daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._closing = True
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        os.close(self._stop)

    def _serve(self) -> None:
        poller = zmq.Poller()
        poller.register(self._stop, zmq.POLLIN)
        poller.register(self._socket, zmq.POLLIN)
        try:
            self._serve_until_stopped(poller)
        finally:
            self._socket.close()
            self._context.term()  # from here on no buffer of ours refers to the pool
            self._ended()
            held = [] if self._held is None else [self._held[1]]
            for pull in [sent.pull for sent in self._sent] + held:
                self._leases.untouch(self._link, pull.slots)

    def _serve_until_stopped(self, poller: zmq.Poller) -> None:
        while True:
            full = len(self._sent) >= self.max_pending or self._held is not None
            poller.modify(self._socket, 0 if full else zmq.POLLIN)
            ready = dict(poller.poll(0 if self._sent else None))
            if self._stop in ready:
                return
            if self._socket in ready:
                self._read()
            elif self._sent:
                self._prove(0.001)

    def _read(self) -> None:
        frames = self._socket.recv_multipart()
        try:
            pull = decode(frames[1] if len(frames) == 2 else b"")
        except MalformedMessage:
            return
        if not isinstance(pull, Pull) or pull.link != self._link:
            return
        if not hmac.compare_digest(pull.token, self._token):
            return
        slots = pull.slots
        if not self._is_still(pull) or not self._leases.touch(self._link, slots):
            self._send(frames[0], Slabs(self._link, pull.number, "stale_block"))
            return
        self._ship(frames[0], pull)

    def _ship(self, routing_id: bytes, pull: Pull) -> None:
        """Send what a pull that may be served asks for, or keep it in `_held` until it can be."""
        memory = self._memory
        slabs = [memory.slab(slot) for slot in pull.slots]
        self._sent.append(Sent(routing_id, pull, self._frames(routing_id, pull, slabs)))

    def _ended(self) -> None:
        """The thread has ended, and nothing is on its way any more."""

    def _frames(self, routing_id: bytes, pull: Pull, slabs: Sequence[memoryview]) -> Any:
        """Send slabs as they lie there; the tracker says when they have left."""
        header = [routing_id, encode(Slabs(self._link, pull.number, ""))]
        frames = [self._filled(pull, slabs[0])] if pull.fill else slabs
        return self._socket.send_multipart([*header, *frames], copy=False, track=True)

    def _filled(self, pull: Pull, slab: memoryview) -> bytes:
        """A tail's filled positions, gathered: the one thing that is copied here."""
        ranges = self._layout.tail_ranges(pull.fill)
        return b"".join(slab[offset : offset + length] for offset, length in ranges)

    def _prove(self, timeout: float) -> None:
        """Wait a moment for the oldest bytes to leave; then say whether they stood still."""
        try:
            self._sent[0].tracker.wait(timeout)
        except NotDone:
            return
        sent = self._sent.popleft()
        proved = Proved(self._link, sent.pull.number, self._is_still(sent.pull))
        self._leases.untouch(self._link, sent.pull.slots)
        self._send(sent.routing_id, proved)
        self._left(sent)
        if self._held is not None:
            (routing_id, pull), self._held = self._held, None
            self._ship(routing_id, pull)

    def _left(self, sent: Sent) -> None:
        """What was sent has left this process."""

    def _is_still(self, pull: Pull) -> bool:
        if len(pull.slots) != len(pull.generations) or (pull.fill and len(pull.slots) != 1):
            return False
        if pull.fill and not 0 < pull.fill < self._layout.block_size:
            return False
        generations = self._memory.generations
        return all(
            0 <= slot < self._memory.num_blocks and generation % 2 == 0
            and int(generations[slot]) == generation
            for slot, generation in zip(pull.slots, pull.generations, strict=True)
        )  # fmt: skip

    def _send(self, routing_id: bytes, message: Message) -> None:
        self._socket.send_multipart([routing_id, encode(message)])


class _StagedServed(Served):
    """A link of a pool on a device: slabs pass through a ring of pinned buffers of its own.

    What does not fit now waits for what left, so that the ring bounds what is staged.
    """

    def __init__(
        self, source: TcpSource, link: str, token: bytes, memory: DevicePoolMemory
    ) -> None:
        self._device_memory = memory
        self._ring: Staging | None = None  # made for the first pull that wants a slab
        super().__init__(source, link, token)

    def _ship(self, routing_id: bytes, pull: Pull) -> None:
        memory = self._device_memory
        if self._ring is None and pull.slots:
            self._ring = Staging(memory, max(2, WINDOW_BYTES // memory.slab_bytes))
        buffers: list[int] = []
        slabs: list[memoryview] = []
        if self._ring is not None:
            if len(pull.slots) > self._ring.count:  # no reader of ours asks for so many
                self._leases.untouch(self._link, pull.slots)
                return self._send(routing_id, Slabs(self._link, pull.number, "too_many"))
            taken = self._ring.take(len(pull.slots))
            if taken is None:
                self._held = routing_id, pull
                return None
            buffers = taken
            self._ring.load(buffers, [memory.slab_address(slot) for slot in pull.slots])
            slabs = [self._ring.view(buffer) for buffer in buffers]
        tracker = self._frames(routing_id, pull, slabs)
        self._sent.append(Sent(routing_id, pull, tracker, buffers))
        return None

    def _left(self, sent: Sent) -> None:
        if self._ring is not None:
            self._ring.give(sent.buffers)

    def _ended(self) -> None:
        if self._ring is not None:
            self._ring.close()


class TcpReader:
    """The asking end of one link."""

    def __init__(self, link: str, token: bytes, target: Target, key: str) -> None:
        self._link, self._token, self._target = link, token, target
        self._lock = threading.Lock()  # held by whoever uses the socket
        self._number = 0
        self._closed = False
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # bounded by the window
        self._socket.setsockopt(zmq.MAXMSGSIZE, target.memory.slab_bytes + _MAX_PULL_BYTES)
        if key:
            self._socket.curve_secretkey = key.encode()
            self._socket.curve_publickey = zmq.curve_public(key.encode())
            self._socket.curve_serverkey = zmq.curve_public(key.encode())
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )  # fmt: skip
        self._poller = zmq.Poller()
        self._poller.register(self._stop, zmq.POLLIN)
        self._poller.register(self._monitor, zmq.POLLIN)
        self._poller.register(self._socket, zmq.POLLIN)

    @classmethod
    def open(cls, link: str, proof: bytes, target: Target, secret_key: str = "") -> TcpReader:
        """Connect, and prove by an empty pull that the source is there and knows the token."""
        _keep_freed_pages()
        token, endpoint = split_proof(proof)
        reader = cls(link, token, target, secret_key)
        try:
            reader._connect(endpoint)
        except PdqError:
            reader.close()
            raise
        return reader

    def _connect(self, endpoint: bytes) -> None:
        try:
            self._socket.connect(endpoint.decode("ascii"))
        except (UnicodeDecodeError, zmq.ZMQError) as error:
            raise MalformedMessage(f"not an endpoint: {endpoint!r}", param="proofs") from error
        self._pull([()], _OPEN_TIMEOUT)

    def pull(self, pieces: Sequence[Piece]) -> None:
        self._pull(self._requests(pieces), STALL_TIMEOUT)

    def _requests(self, pieces: Sequence[Piece]) -> Iterator[tuple[Piece, ...]]:
        """The pieces in portions of a Pull each: whole slabs together, a tail alone."""
        full = [piece for piece in pieces if not piece.fill]
        count = max(1, REQUEST_BYTES // self._target.memory.slab_bytes)
        for start in range(0, len(full), count):
            yield tuple(full[start : start + count])
        for piece in pieces:
            if piece.fill:
                yield (piece,)

    def _window(self) -> int:
        """How many requests may be under way at once."""
        return max(2, WINDOW_BYTES // max(REQUEST_BYTES, self._target.memory.slab_bytes))

    def _pull(self, requests: Any, timeout: float) -> None:
        """Keep the window full until every request is copied, checked and proved."""
        window = self._window()
        waiting = iter(requests)
        arriving: dict[int, tuple[Piece, ...]] = {}  # asked for
        proving: set[int] = set()  # arrived, not proved
        with self._lock:
            while True:
                while len(arriving) + len(proving) < window:
                    pieces = next(waiting, None)
                    if pieces is None:
                        break
                    arriving[self._ask(pieces)] = pieces
                if not arriving and not proving:
                    return
                message, frames = self._receive(timeout)
                if isinstance(message, Slabs) and message.number in arriving:
                    if message.refused:
                        raise StaleBlock("a block is not leased to this link any more")
                    self._arrived(arriving.pop(message.number), frames)
                    proving.add(message.number)
                elif isinstance(message, Proved) and message.number in proving:
                    if not message.unchanged:
                        raise StaleBlock("a block was reused while it was being sent")
                    proving.remove(message.number)

    def _ask(self, pieces: tuple[Piece, ...]) -> int:
        number, self._number = self._number, self._number + 1
        fill = pieces[0].fill if pieces else 0
        slots = tuple(piece.slot for piece in pieces)
        generations = tuple(piece.generation for piece in pieces)
        if self._closed:
            raise LinkLost("the link was closed")
        pull = Pull(self._link, self._token, number, slots, generations, fill)
        try:
            self._socket.send(encode(pull), zmq.DONTWAIT)  # it would wait for ever without a peer
        except zmq.Again as error:
            raise LinkLost("the connection to the source is gone") from error
        return number

    def _receive(self, timeout: float) -> tuple[Message, list[Any]]:
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready = dict(self._poller.poll(round(left * 1000)))
            if self._stop in ready:
                raise LinkLost("the link was closed")
            if self._socket in ready:
                header, *frames = self._socket.recv_multipart(copy=False)
                return decode(header.buffer), frames
            if self._monitor in ready:
                raise LinkLost("the connection to the source is gone")
            if left == 0.0:
                raise LinkLost("the source sends nothing")

    def _arrived(self, pieces: tuple[Piece, ...], frames: list[Any]) -> None:
        target = self._target
        if len(frames) != len(pieces):
            raise MalformedMessage(f"{len(frames)} slabs for {len(pieces)} pieces")
        for piece, frame in zip(pieces, frames, strict=True):
            ranges = target.ranges(piece)
            if len(frame.buffer) != sum(length for _, length in ranges):
                raise MalformedMessage(f"a slab of {len(frame.buffer)} bytes")
            source = np.frombuffer(frame.buffer, np.uint8).ctypes.data
            target.memory.put(piece.block, ranges, source)
            target.check(piece)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        os.eventfd_write(self._stop, 1)
        with self._lock:
            self._socket.disable_monitor()
            self._monitor.close(linger=0)
            self._socket.close()
            self._context.term()
            os.close(self._stop)
            self._released()

    def _released(self) -> None:
        """The link has ended, and no pull runs."""


NotDone = zmq.NotDone  # what a tracker's `wait` raises when its time is over


def split_proof(proof: bytes) -> tuple[bytes, bytes]:
    """The token that the source knows a reader by, and its endpoint."""
    return proof[:_TOKEN_BYTES], proof[_TOKEN_BYTES:]


@functools.cache
def _keep_freed_pages() -> None:
    """Let malloc keep the memory of frames that are copied, for the frames that come next.

    By default it returns what is free at the top of an arena to the system at once, and every slab
    pays again for its page faults: a third of what receiving it costs. What is kept is bounded by
    the window, and by `_KEPT_BYTES` per arena. A C library without `mallopt` has its own ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)  # setting one ends the automatic choice of both
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 32 << 20  # the most that M_MMAP_THRESHOLD takes
