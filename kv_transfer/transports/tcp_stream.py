"""A wire that is one TCP connection: messages after their length, slabs as plain bytes.

The kernel copies slabs out of the sender's pool and straight into the reader's; one thread at each end
does all of it. Bytes have left the pool when the call that sends them returns. Nothing is encrypted.
A stream proves only that its reader knows the link's token, which the reader sends first and gets back.
"""

from __future__ import annotations

import collections
import contextlib
import hmac
import selectors
import socket
import struct
import time
from collections.abc import Iterable, Sequence

from common.errors import LinkLost
from kv_transfer.transports.callers import Callers
from kv_transfer.transports.wires import LOOK_S, MAX_PULL_BYTES, STALL_TIMEOUT, Stop

REQUEST_BYTES = 64 << 20
_MAX_CALLERS = 8  # that have not sent the token yet; beyond these the oldest is closed
_IOV_MAX = 1024  # pieces of one call, limits.h
_CALL_BYTES = 256 << 10  # of small pieces; a call of many MiB keeps the kernel from its other end
_ALIGN = 64  # of a stream: slabs that begin inside a line of cache are copied at half the speed
_LENGTH = struct.Struct("!I")


class SendingStream:
    """The source's end. It serves one caller, the first that sends the token."""

    request_bytes = REQUEST_BYTES

    def __init__(self, host: str, token: bytes) -> None:
        """`LinkLost` if it cannot listen there; nothing is left behind then."""
        self._token = token
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        address = ("" if host == "*" else host.strip("[]"), 0)
        self._connection: socket.socket | None = None
        self._heard = bytearray()
        try:
            with contextlib.ExitStack() as made:
                listener = made.enter_context(socket.create_server(address, family=family))
                listener.setblocking(False)
                self.port: int = listener.getsockname()[1]
                self._stop = Stop()
                made.callback(self._stop.close)
                self._selector = made.enter_context(selectors.DefaultSelector())
                self._selector.register(self._stop.fd, selectors.EVENT_READ)
                self._callers = Callers(listener, self._selector, _MAX_CALLERS)
                made.pop_all()
        except OSError as error:  # no descriptor, or no such place
            raise LinkLost(f"a link cannot be listened for: {error}") from error

    def receive(self) -> tuple[bytes, bytes] | None:
        while self._stop.is_set or (message := self._next()) is None:
            ready = [key.fileobj for key, _ in self._selector.select()]
            if self._stop.fd in ready:
                return None
            for one in ready:
                if one is self._connection:
                    self._read()
                elif (caller := self._callers.heard(one)) is not None:
                    self._answer(caller)
        return b"", message

    def _next(self) -> bytes | None:
        """Take a whole message off what was received; None if none is whole."""
        if len(self._heard) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._heard)
        if length > MAX_PULL_BYTES:
            raise LinkLost(f"a message of {length} bytes")
        end = _LENGTH.size + length
        whole = end + _padding(end)
        if len(self._heard) < whole:
            return None
        message = bytes(self._heard[_LENGTH.size : end])
        del self._heard[:whole]
        return message

    def _read(self) -> None:
        assert self._connection is not None
        try:
            heard = self._connection.recv(MAX_PULL_BYTES, socket.MSG_DONTWAIT)
        except BlockingIOError:
            return
        except OSError as error:
            raise LinkLost(f"the reader is gone: {error}") from error
        if not heard:
            raise LinkLost("the reader is gone")
        self._heard += heard

    def _answer(self, caller: socket.socket) -> None:
        """Read the token, which must come in one piece, and send it back; or hang up."""
        said = b""
        with contextlib.suppress(OSError):
            said = caller.recv(len(self._token))
        if not hmac.compare_digest(said, self._token):
            self._callers.hang_up(caller)
            return
        self._callers.take(caller)
        self._callers.close()
        self._connection = caller
        _wait_in_the_kernel(caller)
        self._send([record(self._token)])

    def send(self, peer: bytes, message: bytes) -> None:
        self.send_slabs(peer, message, ())

    def send_slabs(self, peer: bytes, header: bytes, batches: Iterable[Sequence[memoryview]]) -> None:
        del peer  # there is one
        before = [record(header)]
        for batch in batches:
            self._send([*before, *batch])
            before = []
        self._send(before)

    def _send(self, pieces: Sequence[bytes | memoryview]) -> None:
        assert self._connection is not None
        left = collections.deque(memoryview(piece) for piece in pieces)
        while left:
            if self._stop.is_set:  # looked at also while the reader takes something
                raise LinkLost("the link was closed")
            try:
                sent = self._connection.sendmsg(_one_call_of(left))
            except BlockingIOError:  # the reader takes nothing
                continue
            except OSError as error:
                raise LinkLost(f"the reader is gone: {error}") from error
            while left and sent >= len(left[0]):
                sent -= len(left.popleft())
            if left:
                left[0] = left[0][sent:]

    def stop(self) -> None:
        self._stop.set()

    def close(self) -> None:
        with contextlib.ExitStack() as ending:
            ending.callback(self._stop.close)
            ending.callback(self._selector.close)
            if self._connection is not None:
                ending.callback(self._connection.close)
            self._callers.close()


class ReceivingStream:
    """The reader's end."""

    stall_timeout_s = STALL_TIMEOUT
    request_bytes = REQUEST_BYTES

    def __init__(self, host: str, port: int, token: bytes, timeout: float) -> None:
        """Connect, send the token and get it back; `LinkLost` if that takes over `timeout` seconds."""
        self._stopped = False
        try:
            self._connection = socket.create_connection((host.strip("[]"), port), timeout)
        except (OSError, ValueError) as error:  # ValueError: a name that cannot be one
            raise LinkLost(f"the source cannot be reached: {error}") from error
        try:
            self._connection.sendall(token)
            _wait_in_the_kernel(self._connection)
            if not hmac.compare_digest(self.receive(timeout), token):
                raise LinkLost("the source does not know this link")
        except BaseException as error:
            self._connection.close()
            if isinstance(error, (OSError, LinkLost)):
                raise LinkLost(f"the source does not answer: {error}") from error
            raise

    def send(self, message: bytes) -> None:
        left, deadline = record(message), time.monotonic() + self.stall_timeout_s
        while left:
            try:
                left = left[self._connection.send(left) :]
            except BlockingIOError:
                if self._stopped or time.monotonic() > deadline:
                    raise LinkLost("the source hears nothing") from None
            except OSError as error:
                raise LinkLost(f"the source is gone: {error}") from error

    def receive(self, timeout: float) -> bytes:
        header = bytearray(_LENGTH.size)
        self._fill(memoryview(header), timeout)
        (length,) = _LENGTH.unpack(header)
        if length > MAX_PULL_BYTES:
            raise LinkLost(f"a message of {length} bytes")
        message = bytearray(length + _padding(_LENGTH.size + length))
        self._fill(memoryview(message), timeout)
        return bytes(message[:length])

    def read_into(self, view: memoryview) -> None:
        self._fill(view, self.stall_timeout_s)

    def _fill(self, into: memoryview, timeout: float) -> None:
        deadline = time.monotonic() + timeout
        while into:
            if self._stopped:  # looked at also while something arrives
                raise LinkLost("the link was closed")
            try:
                got = self._connection.recv_into(into)
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise LinkLost("the source sends nothing") from None
                continue
            except OSError as error:
                raise LinkLost(f"the source is gone: {error}") from error
            if not got:
                raise LinkLost("the source is gone")
            into, deadline = into[got:], time.monotonic() + timeout

    def stop(self) -> None:
        self._stopped = True

    def close(self) -> None:
        self._connection.close()


def record(message: bytes) -> bytes:
    """A message after its length, with zeros up to the next multiple of 64 bytes."""
    length = _LENGTH.size + len(message)
    return _LENGTH.pack(len(message)) + message + bytes(_padding(length))


def _padding(length: int) -> int:
    return -length % _ALIGN


def _one_call_of(pieces: Iterable[memoryview]) -> list[memoryview]:
    """The first piece, and small ones that follow it."""
    some: list[memoryview] = []
    size = 0
    for piece in pieces:
        size += len(piece)
        if some and (size > _CALL_BYTES or len(some) == _IOV_MAX):
            break
        some.append(piece)
    return some


def _wait_in_the_kernel(connection: socket.socket) -> None:
    """Let calls wait in the kernel, for `LOOK_S` at most, so that none needs a poll before it."""
    connection.setblocking(True)
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    look = struct.pack("@ll", 0, round(LOOK_S * 1e6))  # struct timeval
    for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, look)
