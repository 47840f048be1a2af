"""A wire of ZeroMQ sockets, which encrypts where there is a key (CURVE): slabs are frames.

Either end copies each slab once, between the pool and a frame; encryption takes far longer. The
queues of the sockets bound the frames that wait.

Reconnecting is off: a connection is a link. This file and common/wire/bus.py are the only users of zmq.
"""

from __future__ import annotations

import collections
import contextlib
import time
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import zmq
import zmq.utils.monitor

from common.errors import LinkLost, MalformedMessage
from kv_transfer.pool_memory import copy_bytes
from kv_transfer.transports.wires import LOOK_S, MAX_PULL_BYTES, Stop

REQUEST_BYTES = 2 << 20
_QUEUE = 8  # messages that wait at either end; there are two for each Pull


class SendingFrames:
    """The source's end: a ROUTER."""

    request_bytes = REQUEST_BYTES

    def __init__(self, host: str, secret_key: str) -> None:
        """`LinkLost` if it cannot listen there; nothing is left behind then."""
        try:
            with contextlib.ExitStack() as made:
                self._stop = Stop()
                made.callback(self._stop.close)
                self._context = zmq.Context()
                made.callback(self._context.term)
                self._socket = self._context.socket(zmq.ROUTER)
                made.callback(self._socket.close)
                self._socket.setsockopt(zmq.LINGER, 0)
                self._socket.setsockopt(zmq.SNDHWM, _QUEUE)
                self._socket.setsockopt(zmq.RCVHWM, _QUEUE)
                self._socket.setsockopt(zmq.SNDTIMEO, round(LOOK_S * 1000))
                self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)  # or it drops what has to wait
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

    def send(self, peer: bytes, message: bytes) -> None:
        self.send_slabs(peer, message, ())

    def send_slabs(self, peer: bytes, header: bytes, batches: Iterable[Sequence[memoryview]]) -> None:
        """Wait while the queue to the reader is full. A reader that is gone is sent nothing."""
        try:
            self._send(peer, zmq.SNDMORE)
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            return
        part: bytes | zmq.Frame = header
        for batch in batches:
            for piece in batch:
                following = zmq.Frame(piece, copy=True)  # its batch may go before it is sent
                self._send(part, zmq.SNDMORE)
                part = following
        self._send(part)

    def _send(self, part: bytes | zmq.Frame, flags: int = 0) -> None:
        while True:
            with contextlib.suppress(zmq.Again):  # after LOOK_S
                self._socket.send(part, flags, copy=False)
                return
            if self._stop.is_set:
                raise LinkLost("the link was closed")

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._socket.close()
        self._context.term()
        self._stop.close()


class ReceivingFrames:
    """The reader's end: a DEALER, and what its monitor says of the connection."""

    request_bytes = REQUEST_BYTES

    def __init__(self, endpoint: str, secret_key: str, slab_bytes: int) -> None:
        """`MalformedMessage` for what is no endpoint; nothing is left behind then."""
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
        """Set the socket's options; returns its monitor."""
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.RECONNECT_IVL, -1)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUE)
        self._socket.setsockopt(zmq.MAXMSGSIZE, slab_bytes + MAX_PULL_BYTES)
        if secret_key:
            public = zmq.curve_public(secret_key.encode())
            self._socket.curve_secretkey = secret_key.encode()
            self._socket.curve_publickey = self._socket.curve_serverkey = public
        return self._socket.get_monitor_socket(
            zmq.EVENT_DISCONNECTED
            | zmq.EVENT_CLOSED
            | zmq.EVENT_CONNECT_RETRIED
            | zmq.EVENT_HANDSHAKE_FAILED_AUTH
            | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL
        )

    def send(self, message: bytes) -> None:
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

    def read_into(self, view: memoryview) -> None:
        if not self._frames:
            raise MalformedMessage("fewer slabs than were asked for")
        frame = memoryview(self._frames.popleft().buffer)
        if len(frame) != len(view):
            raise MalformedMessage(f"{len(frame)} bytes instead of {len(view)}")
        target, source = (np.frombuffer(one, np.uint8).ctypes.data for one in (view, frame))
        copy_bytes(target, source, len(view))

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        self._frames.clear()
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close()
        self._context.term()
        self._stop.close()
