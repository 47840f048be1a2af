"""Pass a descriptor between two processes of one host and user, over a unix socket.

A connection that works, and a nonce whose halves both match, prove that both ends are on one host.
Host names prove nothing, and nobody looks at them. `shm` and `cuda_ipc` pass a pool's descriptor this
way, with a few bytes of payload. There are two kinds of socket, which differ in nothing else:

    abstract          needs no file and leaves nothing behind; ends at the border of a network namespace
    in a folder       `--shm-dir`, for containers, which have a network namespace each but can share a
                      folder; the next source removes what a killed process left there
"""

from __future__ import annotations

import contextlib
import dataclasses
import hmac
import os
import secrets
import selectors
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from common.errors import ConfigError, LinkLost, MalformedMessage
from kv_transfer.mappings import UNMAPPED, Mapped, Mappings
from kv_transfer.transports.callers import Callers
from kv_transfer.transports.wires import Stop

_NAME_BYTES = 16
_HALF = 16  # bytes of a nonce's half: the first is shown by the reader, the second by the source
_TIMEOUT = 2.0  # seconds for one exchange on the socket
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_MAX_PAYLOAD = 256
_BACKLOG = 64
_MAX_CALLERS = 64  # that have sent nothing yet; beyond these the oldest is closed


class DescriptorServer:
    """Hands `fd` and `payload` to readers that prove a link. One thread serves all of them, and waits
    for none in particular."""

    def __init__(
        self, fd: int, folder: str = "", payload: bytes = b"", mappings: Mappings | None = None
    ) -> None:
        """`folder` is the socket's place; "" makes an abstract one. `ConfigError` if neither can be.
        `mappings` keeps the connections of those who got the payload, if it is a handle."""
        self._fd, self._payload, self._mappings = fd, payload, mappings
        self._name = secrets.token_bytes(_NAME_BYTES // 2).hex().encode()
        self._nonces: dict[bytes, bytes] = {}  # first half → second half
        self._links: dict[str, bytes] = {}
        with contextlib.ExitStack() as made:
            listener = made.enter_context(_listener(self._name, folder))
            if folder:
                made.callback(_path(folder, self._name).unlink, missing_ok=True)
            self._stop = Stop()
            made.callback(self._stop.close)
            self._selector = made.enter_context(selectors.DefaultSelector())
            self._selector.register(self._stop.fd, selectors.EVENT_READ)
            self._callers = Callers(listener, self._selector, _MAX_CALLERS)
            self._thread = threading.Thread(target=self._serve, name="kv-source", daemon=True)
            self._thread.start()
            self._made = made.pop_all()

    def open_link(self, link: str) -> bytes:
        first, second = secrets.token_bytes(_HALF), secrets.token_bytes(_HALF)
        self._links[link] = first
        self._nonces[first] = second
        return self._name + first + second

    def close_link(self, link: str) -> None:
        first = self._links.pop(link, None)
        if first is not None:
            self._nonces.pop(first, None)
        if self._mappings is not None:
            self._mappings.sweep()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()
        self._made.close()
        self._links.clear()
        self._nonces.clear()

    def _serve(self) -> None:
        try:
            while True:
                ready = [key.fileobj for key, _ in self._selector.select()]
                if self._stop.fd in ready:
                    return
                for one in ready:
                    if (caller := self._callers.heard(one)) is not None:
                        self._answer(caller)
        finally:
            self._callers.close()

    def _answer(self, caller: socket.socket) -> None:
        hang_up: Callable[[socket.socket], None] = self._callers.hang_up
        with contextlib.suppress(OSError):
            first = caller.recv(_HALF + 1) if _user(caller) == os.geteuid() else b""
            second = self._nonces.get(first)
            if second is not None:
                if self._mappings is not None:
                    self._nonces.pop(first, None)  # so that what is kept has a bound
                    self._callers.let_go(caller)
                    hang_up = lambda _: None  # noqa: E731
                    self._mappings.add(caller)  # before it can map anything
                socket.send_fds(caller, [second, self._payload], [self._fd])
        hang_up(caller)


@dataclasses.dataclass(slots=True, eq=False)
class Received:
    """What a source hands over, and the connection that it came over."""

    fd: int
    payload: bytes
    connection: socket.socket
    is_kept: bool = False

    def keep(self) -> Mapped:
        """Take the connection over: what the payload names is about to be mapped."""
        mapped = Mapped(self.connection)
        self.is_kept = True
        return mapped


@contextlib.contextmanager
def receive(proof: bytes, folder: str = "") -> Iterator[Received]:
    """Yield what the source hands over that made `proof`. The descriptor is closed at the end, and the
    connection, unless it was kept.

    Looks for the source in `folder`, if there is one, and among the abstract sockets. `LinkLost` if it
    is not on this host, belongs to another user, or does not know the nonce.
    """
    if len(proof) != _NAME_BYTES + 2 * _HALF:
        raise MalformedMessage("a proof of one host has a name and a nonce", param="proofs")
    name, first = proof[:_NAME_BYTES], proof[_NAME_BYTES:-_HALF]
    fds: list[int] = []
    received: Received | None = None
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        try:
            connection.settimeout(_TIMEOUT)
            _connect(connection, name, folder)
            if _user(connection) != os.geteuid():
                raise LinkLost("the pool belongs to another user")
            connection.send(first)
            answer, fds, _, _ = socket.recv_fds(connection, _HALF + _MAX_PAYLOAD, 1)
        except OSError as error:
            raise LinkLost(f"not on this host: {error}") from error
        if not hmac.compare_digest(answer[:_HALF], proof[-_HALF:]) or len(fds) != 1:
            raise LinkLost("not on this host: the nonce differs")
        received = Received(fds[0], answer[_HALF:], connection)
        yield received
    finally:
        for fd in fds:
            os.close(fd)
        if received is None or not received.is_kept:
            with contextlib.suppress(OSError):
                connection.send(UNMAPPED)
            connection.close()


def _abstract(name: bytes) -> bytes:
    return b"\0pdq-" + name


def _path(folder: str, name: bytes) -> Path:
    return Path(folder, f"pdq-{name.decode()}.sock")


def _listener(name: bytes, folder: str) -> socket.socket:
    """A source's socket: abstract, or in `folder`. `ConfigError` where it cannot be made."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        listener.setblocking(False)
        if folder:
            _listen(listener, _path(folder, name))
        else:
            listener.bind(_abstract(name))
            listener.listen(_BACKLOG)
    except OSError as error:
        listener.close()
        if not folder:
            raise ConfigError(f"no socket can be made for this host: {error}") from error
        raise ConfigError(
            f"no socket can be made in the shm folder {folder}: {error}; name a writable one with a "
            "short path (--shm-dir)",
            param="shm_dir",
        ) from error
    return listener


def _listen(listener: socket.socket, path: Path) -> None:
    """Listen at `path`, which appears only when it is ready. Remove sockets that nobody listens at."""
    unfinished = path.with_suffix(".new")
    listener.bind(str(unfinished))
    listener.listen(_BACKLOG)
    unfinished.chmod(0o600)
    unfinished.rename(path)
    for other in path.parent.glob("pdq-*.sock"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as probe:
            probe.setblocking(False)
            try:
                probe.connect(str(other))
            except ConnectionRefusedError:
                other.unlink(missing_ok=True)
            except OSError:  # full, of another user, or just gone: not ours to judge
                continue


def _connect(connection: socket.socket, name: bytes, folder: str) -> None:
    if folder and name.isalnum():  # it comes from a peer, and becomes part of a path
        with contextlib.suppress(FileNotFoundError):
            return connection.connect(str(_path(folder, name)))
    return connection.connect(_abstract(name))


def _user(connection: socket.socket) -> int:
    """The user id of the process at the other end, from the kernel."""
    credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    return int(_CREDENTIALS.unpack(credentials)[1])
