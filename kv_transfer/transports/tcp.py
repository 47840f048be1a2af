"""Slabs over TCP, by ZeroMQ: the reader asks (`Pull`), the source sends (`Slabs`), the reader says
that they are here (`Arrived`), the source that they stood still until then (`Proved`).

The source sends pool memory itself as frames, without a copy (of a pool on a device, pinned copies
out of a ring that is as large as the window). They touch the lease of their blocks until `Arrived`
says that their bytes have left, and only then is it looked up, and said in `Proved`, that no
generation changed. The reader copies each frame once, into its own pool, and digests it while it
is in cache. What is under way is bounded by the reader's window, whatever the prompt.

Each link has a context, socket and thread of its own: tearing a link down ends the context, after
which nothing of the pool is in any buffer of ours, whatever the peer does. Reconnecting is off: a
connection is a link. This file, zmq_frames.py and common/bus.py are the only users of zmq.
"""

from __future__ import annotations

import collections
import ctypes
import dataclasses
import hmac
import itertools
import os
import secrets
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import zmq
import zmq.utils.monitor

from common.codec import decode, encode
from common.errors import LinkLost, MalformedMessage, PdqError, StaleBlock
from common.kv_layout import KVLayout
from common.messages import Arrived, Message, Proved, Pull, Slabs
from kv_transfer.device_memory import DevicePoolMemory, Staging
from kv_transfer.lease import Leases
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.ports import Piece
from kv_transfer.transports import zmq_frames
from kv_transfer.transports.base import Target

WINDOW_BYTES = 8 << 20  # under way at once on a link, or two slabs where those are larger
REQUEST_BYTES = 2 << 20  # of one Pull, or one slab
_TOKEN_BYTES = 16
_MAX_PULL_BYTES = 1 << 16  # of one Pull message
_MAX_PENDING = 16  # pulls that a source has under way at once; more are refused
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


@dataclasses.dataclass(slots=True, eq=False)
class Sent:
    """A Pull whose bytes may still be on their way out of the pool."""

    routing_id: bytes
    pull: Pull
    buffers: Sequence[int] = ()  # of a ring, where the pool itself cannot be sent


class Served:
    """One link of a source: a thread that owns a ROUTER."""

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
        self._sent: list[Sent] = []
        self._waiting: collections.deque[tuple[bytes, Pull]] = collections.deque()  # to be sent
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
            for pull in [sent.pull for sent in self._sent] + [pull for _, pull in self._waiting]:
                self._leases.untouch(self._link, pull.slots)

    def _serve_until_stopped(self, poller: zmq.Poller) -> None:
        while self._stop not in dict(poller.poll()):
            self._read()
            while self._waiting:
                routing_id, pull = self._waiting.popleft()
                if not self._ship(routing_id, pull):
                    self._waiting.appendleft((routing_id, pull))
                    break

    def _read(self) -> None:
        frames = self._socket.recv_multipart()
        try:
            message = decode(frames[1] if len(frames) == 2 else b"")
        except MalformedMessage:
            return
        if not isinstance(message, (Pull, Arrived)) or message.link != self._link:
            return
        if not hmac.compare_digest(message.token, self._token):
            return
        if isinstance(message, Pull):
            self._pulled(frames[0], message)
            return
        for sent in self._sent:
            if (sent.routing_id, sent.pull.number) == (frames[0], message.number):
                self._prove(sent)
                return

    def _pulled(self, routing_id: bytes, pull: Pull) -> None:
        """Take a pull that may be served; what is taken is touched until it is proved."""
        if len(self._sent) + len(self._waiting) >= _MAX_PENDING:
            self._send(routing_id, Slabs(self._link, pull.number, "too_many"))
        elif not self._is_still(pull) or not self._leases.touch(self._link, pull.slots):
            self._send(routing_id, Slabs(self._link, pull.number, "stale_block"))
        else:
            self._waiting.append((routing_id, pull))

    def _ship(self, routing_id: bytes, pull: Pull) -> bool:
        """Send what a pull asks for; False, and nothing done, if that has to wait."""
        memory = self._memory
        self._send_slabs(routing_id, pull, [memory.slab_address(slot) for slot in pull.slots])
        self._sent.append(Sent(routing_id, pull))
        return True

    def _ended(self) -> None:
        """The thread has ended, and nothing is on its way any more."""

    def _send_slabs(self, routing_id: bytes, pull: Pull, slabs: Sequence[int]) -> None:
        """Send the slabs at these addresses of host memory as they lie there. Of a tail its filled
        positions are gathered: the one thing that is copied here."""
        header = [routing_id, encode(Slabs(self._link, pull.number, ""))]
        if pull.fill:
            slab = memoryview((ctypes.c_uint8 * self._memory.slab_bytes).from_address(slabs[0]))
            ranges = self._layout.tail_ranges(pull.fill)
            header.append(b"".join(slab[offset : offset + length] for offset, length in ranges))
            slabs = ()
        self._socket.send_multipart(header, zmq.SNDMORE if slabs else 0)
        zmq_frames.send_in_place(self._socket, slabs, self._memory.slab_bytes)

    def _prove(self, sent: Sent) -> None:
        """Its bytes have left: say whether they stood still until now."""
        self._sent.remove(sent)
        proved = Proved(self._link, sent.pull.number, self._is_still(sent.pull))
        self._leases.untouch(self._link, sent.pull.slots)
        self._send(sent.routing_id, proved)
        self._left(sent)

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

    def _ship(self, routing_id: bytes, pull: Pull) -> bool:
        memory = self._device_memory
        if self._ring is None and pull.slots:
            self._ring = Staging(memory, max(2, WINDOW_BYTES // memory.slab_bytes))
        buffers: list[int] = []
        if self._ring is not None:
            if len(pull.slots) > self._ring.count:  # no reader of ours asks for so many
                self._leases.untouch(self._link, pull.slots)
                self._send(routing_id, Slabs(self._link, pull.number, "too_many"))
                return True
            taken = self._ring.take(len(pull.slots))
            if taken is None:
                return False
            buffers = taken
            self._ring.load(buffers, [memory.slab_address(slot) for slot in pull.slots])
        ring = self._ring
        slabs = [ring.address(buffer) for buffer in buffers] if ring is not None else []
        self._send_slabs(routing_id, pull, slabs)
        self._sent.append(Sent(routing_id, pull, buffers))
        return True

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
        zmq_frames.keep_freed_pages()
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

    def _pull(self, requests: Iterable[tuple[Piece, ...]], timeout: float) -> None:
        """Keep the window full until every request is copied, checked and proved.

        After a failure nothing more is asked for, and what is on its way is received: the source
        lets go of it then, and the next pull finds the link empty.
        """
        waiting = iter(requests)
        arriving: dict[int, tuple[Piece, ...]] = {}  # asked for
        proving: set[int] = set()  # arrived, not proved
        failure: PdqError | None = None
        with self._lock:
            self._ask_for(waiting, arriving)
            while arriving or (proving and failure is None):
                message, frames = self._receive(timeout)
                if isinstance(message, Proved) and message.number in proving:
                    proving.remove(message.number)
                    if not message.unchanged:
                        failure = StaleBlock("a block was reused while it was being sent")
                if not isinstance(message, Slabs):
                    continue
                pieces = arriving.pop(message.number, None)
                if message.refused:
                    if pieces is not None:
                        failure = StaleBlock("a block is not leased to this link any more")
                    continue
                self._say(Arrived(self._link, self._token, message.number))
                if pieces is None or failure is not None:
                    continue
                proving.add(message.number)
                self._ask_for(waiting, arriving)
                try:
                    self._arrived(pieces, frames)
                except PdqError as error:
                    failure = error
        if failure is not None:
            raise failure

    def _ask_for(
        self, waiting: Iterator[tuple[Piece, ...]], arriving: dict[int, tuple[Piece, ...]]
    ) -> None:
        """Fill the window."""
        for pieces in itertools.islice(waiting, self._window() - len(arriving)):
            arriving[self._ask(pieces)] = pieces

    def _ask(self, pieces: tuple[Piece, ...]) -> int:
        number, self._number = self._number, self._number + 1
        fill = pieces[0].fill if pieces else 0
        slots = tuple(piece.slot for piece in pieces)
        generations = tuple(piece.generation for piece in pieces)
        self._say(Pull(self._link, self._token, number, slots, generations, fill))
        return number

    def _say(self, message: Message) -> None:
        if self._closed:
            raise LinkLost("the link was closed")
        try:  # without a peer, it would wait for ever
            self._socket.send(encode(message), zmq.DONTWAIT)
        except zmq.Again as error:
            raise LinkLost("the connection to the source is gone") from error

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


def split_proof(proof: bytes) -> tuple[bytes, bytes]:
    """The token that the source knows a reader by, and its endpoint."""
    return proof[:_TOKEN_BYTES], proof[_TOKEN_BYTES:]
