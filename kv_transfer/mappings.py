"""Which other processes have this process's device memory mapped. `cudaFree` of it would be undefined.

The rule: memory is freed only when everybody who was ever given its handle has said that it is not mapped
any more, or has ended. Else it stays until this process ends.

Whoever maps keeps the connection over which the handle came, and says `UNMAPPED` on it when the mapping is
gone, or was never made. A process that dies says nothing: its connection ends some time before the driver
has let its memory go, so what counts is the end of the process itself, seen through its pidfd. A process
whose pidfd cannot be had (another PID namespace) counts as one that has the memory mapped for ever.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
import struct
import threading
import time

UNMAPPED = b"\1"
LOOK_S = 0.01  # between two looks while somebody waits
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid


class Mappings:
    """Of one allocation. Any thread may call; only `wait` waits."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._held: dict[socket.socket, int | None] = {}  # connection → pidfd
        self._for_ever = 0  # nobody can say any more when they end

    def add(self, connection: socket.socket) -> None:
        """Count a process that is about to get the handle over `connection`, which is ours from now on."""
        self.sweep()
        connection.setblocking(False)
        with self._lock:
            self._held[connection] = _pidfd(connection)

    def sweep(self) -> int:
        """Look who has ended; how many may have the memory mapped."""
        with self._lock:
            for connection, pidfd in list(self._held.items()):
                said = _said(connection)
                if said == UNMAPPED or (pidfd is not None and _is_readable(pidfd)):
                    self._forget(connection)
                elif said is not None and pidfd is None:
                    self._forget(connection)
                    self._for_ever += 1
            return len(self._held) + self._for_ever

    def _forget(self, connection: socket.socket) -> None:
        pidfd = self._held.pop(connection)
        connection.close()
        if pidfd is not None:
            os.close(pidfd)

    def wait(self, seconds: float) -> bool:
        """Wait until nobody has the memory mapped; False if some have when the time is over."""
        deadline = time.monotonic() + seconds
        while (left := self.sweep()) and time.monotonic() < deadline:
            if left == self._for_ever:
                return False
            time.sleep(LOOK_S)
        return not left

    def close(self) -> None:
        """Ask nobody any more."""
        with self._lock:
            for connection in list(self._held):
                self._forget(connection)


def _said(connection: socket.socket) -> bytes | None:
    """What the other end said; b"" if it is gone, None if it said nothing yet."""
    try:
        return connection.recv(1)
    except BlockingIOError:
        return None
    except OSError:
        return b""


def _is_readable(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(0))


def _pidfd(connection: socket.socket) -> int | None:
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    try:
        return os.pidfd_open(_CREDENTIALS.unpack(credentials)[0])
    except (OSError, AttributeError):  # another namespace; a kernel, or a Python, that has none
        return None


class Mapped:
    """The other side: this process has, or is about to have, somebody's memory mapped."""

    def __init__(self, connection: socket.socket) -> None:
        """`connection`: over which the handle came; ours from now on."""
        self._connection = connection

    def close(self) -> None:
        """Say that the memory is not mapped here any more. May be called twice."""
        with contextlib.suppress(OSError):  # the owner is gone, or listens no more
            self._connection.send(UNMAPPED)
        self._connection.close()
