"""Wires: what carries the messages of one tcp link, and the bytes of its slabs.

There are two, between which tcp.py chooses: `tcp_stream.py`, a plain connection, and `tcp_frames.py`,
ZeroMQ with CURVE. One thread at a time uses an end, except that any thread may call `stop`, even after
`close`.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from typing import Protocol

MAX_PULL_BYTES = 1 << 16  # of one message to a source
LOOK_S = 0.05  # the longest wait in a call until it is looked whether the link goes on
OPEN_TIMEOUT = 5.0  # for the other end of a new link to answer
STALL_TIMEOUT = 20.0  # a transport that receives nothing for so long loses its link


class SendingWire(Protocol):
    """The source's end. `peer` names the sender of a message, for the answer."""

    port: int
    request_bytes: int  # of slabs that one Pull asks for at most, or one slab

    def receive(self) -> tuple[bytes, bytes] | None:
        """Wait for a message; returns its peer and its bytes, None when stopped. `LinkLost`."""

    def send(self, peer: bytes, message: bytes) -> None:
        """Queue or send a message; `LinkLost`."""

    def send_slabs(self, peer: bytes, header: bytes, batches: Iterable[Sequence[memoryview]]) -> None:
        """Send a message and slabs behind it. Each batch has left its memory when the next is taken,
        the last when this returns, and all of them when it raises. `LinkLost`."""

    def stop(self) -> None:
        """End whatever waits."""

    def close(self) -> None: ...


class ReceivingWire(Protocol):
    """The reader's end."""

    request_bytes: int  # as the source's

    def send(self, message: bytes) -> None:
        """Send a message; `LinkLost` if it cannot reach anybody."""

    def receive(self, timeout: float) -> bytes:
        """Wait for the next message. `LinkLost` after `timeout` seconds, or when none can arrive."""

    def read_into(self, view: memoryview) -> None:
        """Fill `view` with the next bytes behind the last message. `LinkLost`, or `MalformedMessage`
        if the next bytes do not have this length."""

    def stop(self) -> None:
        """End whatever waits, with `LinkLost`."""

    def close(self) -> None: ...


class Stop:
    """A descriptor that wakes a thread: readable from `set` on."""

    def __init__(self) -> None:
        self.fd = os.eventfd(0, os.EFD_CLOEXEC)
        self.is_set = False
        self._lock = threading.Lock()

    def set(self) -> None:
        self.is_set = True
        with self._lock:
            if self.fd >= 0:
                os.eventfd_write(self.fd, 1)

    def close(self) -> None:
        with self._lock:
            os.close(self.fd)
            self.fd = -1
