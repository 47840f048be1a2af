"""A wire of ZeroMQ sockets, which encrypts where there is a key (CURVE): slabs are frames.

The source sends pool memory itself as frames, without a copy: libzmq's constant messages, to whose
memory it refers until their bytes have left, or the context has ended, and tells nobody which. (With
pyzmq's own, a Python thread keeps each such frame until then: a tenth of the time that a slab takes.)
Hence the reader has to say that they have arrived. It copies each frame once.

Reconnecting is off: a connection is a link. This file and common/bus.py are the only users of zmq.
"""

from __future__ import annotations

import collections
import contextlib
import ctypes
import functools
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import zmq
import zmq.backend.cython._zmq as _loaded  # the extension that libzmq is linked with
import zmq.utils.monitor

from common.errors import LinkLost, MalformedMessage
from kv_transfer.pool_memory import PoolMemory
from kv_transfer.transports.wires import MAX_PULL_BYTES, Stop

_MESSAGE_BYTES = 64  # zmq_msg_t, zmq.h
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h
_KEPT_BYTES = 32 << 20  # the most that M_MMAP_THRESHOLD takes


class SendingFrames:
    """The source's end: a ROUTER."""

    leaves_at_once = False

    def __init__(self, host: str, secret_key: str) -> None:
        """`LinkLost`, and nothing is left, where it cannot listen there."""
        try:
            with contextlib.ExitStack() as made:
                self._stop = Stop()
                made.callback(self._stop.close)
                self._context = zmq.Context()
                made.callback(self._context.term)
                self._socket = self._context.socket(zmq.ROUTER)
                made.callback(self._socket.close)
                self._socket.setsockopt(zmq.LINGER, 0)
                self._socket.setsockopt(zmq.SNDHWM, 0)  # bounded by the pulls that are taken
                self._socket.setsockopt(zmq.MAXMSGSIZE, MAX_PULL_BYTES)
                if secret_key:
                    self._socket.curve_server = True
                    self._socket.curve_secretkey = secret_key.encode()
                self.port = self._socket.bind_to_random_port(f"tcp://{host}")
                self._poller = zmq.Poller()
                self._poller.register(self._stop.fd, zmq.POLLIN)
                self._poller.register(self._socket, zmq.POLLIN)
                made.pop_all()
        except (OSError, zmq.ZMQError) as error:  # no descriptor, or no such place
            raise LinkLost(f"a link cannot be listened for: {error}") from error

    def receive(self) -> tuple[bytes, bytes] | None:
        while self._stop.fd not in dict(self._poller.poll()):
            frames = self._socket.recv_multipart()
            if len(frames) == 2:
                return frames[0], frames[1]
        return None

    def send(self, peer: bytes, message: bytes, *frames: bytes) -> None:
        self._socket.send_multipart([peer, message, *frames])

    def send_slabs(
        self, peer: bytes, header: bytes, batches: Iterable[Sequence[memoryview]]
    ) -> None:
        pieces = [piece for batch in batches for piece in batch]
        self._socket.send_multipart([peer, header], zmq.SNDMORE if pieces else 0)
        library, handle = _libzmq(), self._socket.underlying
        message = ctypes.create_string_buffer(_MESSAGE_BYTES)
        last = len(pieces) - 1
        for index, piece in enumerate(pieces):
            address = np.frombuffer(piece, np.uint8).ctypes.data
            library.zmq_msg_init_data(message, address, len(piece), None, None)
            if library.zmq_msg_send(message, handle, zmq.SNDMORE if index < last else 0) < 0:
                error = zmq.ZMQError(ctypes.get_errno())
                library.zmq_msg_close(message)
                raise error

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._socket.close()
        self._context.term()  # from here on no buffer of ours refers to a piece
        self._stop.close()


class ReceivingFrames:
    """The reader's end: a DEALER, and what its monitor says of the connection."""

    says_arrived = True
    request_bytes = 2 << 20

    def __init__(self, endpoint: str, secret_key: str, slab_bytes: int) -> None:
        """`MalformedMessage` for what is no endpoint; nothing is left then."""
        keep_freed_pages()
        self._frames: collections.deque[Any] = collections.deque()  # behind the last message
        with contextlib.ExitStack() as made:
            self._stop = Stop()
            made.callback(self._stop.close)
            self._context = zmq.Context()
            made.callback(self._context.term)
            self._socket = self._context.socket(zmq.DEALER)
            made.callback(self._socket.close)
            self._monitor = self._prepared(secret_key, slab_bytes)
            made.callback(self._monitor.close, linger=0)
            made.callback(self._socket.disable_monitor)
            self._poller = zmq.Poller()
            for one in (self._stop.fd, self._monitor, self._socket):
                self._poller.register(one, zmq.POLLIN)
            try:
                self._socket.connect(endpoint)
            except zmq.ZMQError as error:
                message = f"not an endpoint: {endpoint!r}"
                raise MalformedMessage(message, param="proofs") from error
            made.pop_all()

    def _prepared(self, secret_key: str, slab_bytes: int) -> Any:
        """Set the socket's options; its monitor."""
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.RCVHWM, 0)  # bounded by the window
        self._socket.setsockopt(zmq.MAXMSGSIZE, slab_bytes + MAX_PULL_BYTES)
        if secret_key:
            public = zmq.curve_public(secret_key.encode())
            self._socket.curve_secretkey = secret_key.encode()
            self._socket.curve_publickey = self._socket.curve_serverkey = public
        return self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_CONNECT_RETRIED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )  # fmt: skip

    def say(self, message: bytes) -> None:
        if self._stop.is_set:
            raise LinkLost("the link was closed")
        try:  # without a peer, it would wait for ever
            self._socket.send(message, zmq.DONTWAIT)
        except zmq.Again as error:
            raise LinkLost("the connection to the source is gone") from error

    def receive(self, timeout: float) -> bytes:
        deadline = time.monotonic() + timeout
        while True:
            left = max(0.0, deadline - time.monotonic())
            ready = dict(self._poller.poll(round(left * 1000)))
            if self._stop.fd in ready:
                raise LinkLost("the link was closed")
            if self._socket in ready:
                surplus = bool(self._frames)
                header, *frames = self._socket.recv_multipart(copy=False)
                self._frames = collections.deque(frames)
                if surplus:
                    raise MalformedMessage("more slabs than were asked for")
                return bytes(header.buffer)
            if self._monitor in ready:
                raise LinkLost("the connection to the source is gone")
            if left == 0.0:
                raise LinkLost("the source sends nothing")

    def next_frame(self) -> memoryview:
        """Of those behind the last message; `MalformedMessage` if there is none."""
        if not self._frames:
            raise MalformedMessage("fewer slabs than were asked for")
        return memoryview(self._frames.popleft().buffer)

    def place(self, memory: PoolMemory, block: int, ranges: Sequence[tuple[int, int]]) -> None:
        for offset, length in ranges:
            frame = self.next_frame()
            if len(frame) != length:
                raise MalformedMessage(f"{len(frame)} bytes instead of {length}")
            memory.put(block, [(offset, length)], np.frombuffer(frame, np.uint8).ctypes.data)

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._frames.clear()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._context.term()
        self._stop.close()


@functools.cache
def _libzmq() -> ctypes.CDLL:
    library = ctypes.CDLL(_loaded.__file__, use_errno=True)  # finds what it is linked with, too
    pointer, size = ctypes.c_void_p, ctypes.c_size_t
    library.zmq_msg_init_data.argtypes = [pointer, pointer, size, pointer, pointer]
    library.zmq_msg_send.argtypes = [pointer, pointer, ctypes.c_int]
    library.zmq_msg_close.argtypes = [pointer]
    return library


@functools.cache
def keep_freed_pages() -> None:
    """Let malloc keep the memory of frames that are copied, for the frames that come next.

    By default it returns what is free at the top of an arena to the system at once, and every slab
    pays again for its page faults: a third of what receiving it costs. What is kept is bounded by
    the window, and by `_KEPT_BYTES` per arena. A C library without `mallopt` has its own ways.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _KEPT_BYTES)  # setting one ends the automatic choice of both
        mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
