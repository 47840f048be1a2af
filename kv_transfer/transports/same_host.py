"""How two processes of one host and user find each other: a descriptor over a unix socket.

That the connection works, and that both halves of the link's nonce match, proves that both ends are
on one host; host names prove nothing and are not looked at. `shm` and `cuda_ipc` pass a pool's
descriptor this way, and a few bytes with it. The socket is one of two kinds, and everything else is
the same for both:

    abstract          no file, nothing left behind; ends at the border of a network namespace
    in a folder       `--shm-dir`, for containers, which have a network namespace each and can have
                      a folder in common; what a killed process left there, the next source removes
"""

from __future__ import annotations

import contextlib
import hmac
import os
import secrets
import socket
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

from common.errors import ConfigError, LinkLost, MalformedMessage

_NAME_BYTES = 16
_HALF = 16  # bytes of a nonce's half: the first is shown by the reader, the second by the source
_TIMEOUT = 2.0  # seconds for one exchange on the socket
_CREDENTIALS = struct.Struct("3i")  # pid, uid, gid
_MAX_PAYLOAD = 256


class Passer:
    """Hands `fd` and `payload` to readers that can prove a link. One thread, mostly asleep."""

    def __init__(self, fd: int, folder: str = "", payload: bytes = b"") -> None:
        """`folder`: where the socket is to lie; empty: an abstract one. `ConfigError` if it cannot."""
        self._fd, self._payload = fd, payload
        self._name = secrets.token_bytes(_NAME_BYTES // 2).hex().encode()
        self._nonces: dict[bytes, bytes] = {}  # first half → second half
        self._links: dict[str, bytes] = {}
        self._path = _path(folder, self._name) if folder else None
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        if self._path is None:
            self._socket.bind(_abstract(self._name))
            self._socket.listen(64)
        else:
            try:
                _listen(self._socket, self._path)
            except OSError as error:
                self._socket.close()
                raise ConfigError(
                    f"no socket can be made in the shm folder {folder}: {error}; name a writable "
                    "one with a short path (--shm-dir)",
                    param="shm_dir",
                ) from error
        self._thread = threading.Thread(target=self._serve, name="kv-source", daemon=True)
        self._thread.start()

    def open_link(self, link: str) -> bytes:
        first, second = secrets.token_bytes(_HALF), secrets.token_bytes(_HALF)
        self._links[link] = first
        self._nonces[first] = second
        return self._name + first + second

    def close_link(self, link: str) -> None:
        first = self._links.pop(link, None)
        if first is not None:
            self._nonces.pop(first, None)

    def close(self) -> None:
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes accept
        self._thread.join()
        self._socket.close()
        if self._path is not None:
            self._path.unlink(missing_ok=True)
        self._links.clear()
        self._nonces.clear()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                self._answer(connection)

    def _answer(self, connection: socket.socket) -> None:
        connection.settimeout(_TIMEOUT)
        if _user(connection) != os.geteuid():
            return
        second = self._nonces.get(connection.recv(_HALF + 1))
        if second is not None:
            socket.send_fds(connection, [second, self._payload], [self._fd])


@contextlib.contextmanager
def receive(proof: bytes, folder: str = "") -> Iterator[tuple[int, bytes]]:
    """The descriptor and payload of the source that made `proof`; the descriptor is closed at the end.

    A source is looked for in `folder`, where there is one, and among the abstract sockets.
    `LinkLost` if it is not on this host, of another user, or does not know the nonce.
    """
    if len(proof) != _NAME_BYTES + 2 * _HALF:
        raise MalformedMessage("a proof of one host has a name and a nonce", param="proofs")
    name, first = proof[:_NAME_BYTES], proof[_NAME_BYTES:-_HALF]
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.settimeout(_TIMEOUT)
            _connect(connection, name, folder)
            if _user(connection) != os.geteuid():
                raise LinkLost("the pool belongs to another user")
            connection.send(first)
            answer, fds, _, _ = socket.recv_fds(connection, _HALF + _MAX_PAYLOAD, 1)
    except OSError as error:
        raise LinkLost(f"not on this host: {error}") from error
    try:
        if not hmac.compare_digest(answer[:_HALF], proof[-_HALF:]) or len(fds) != 1:
            raise LinkLost("not on this host: the nonce differs")
        yield fds[0], answer[_HALF:]
    finally:
        for fd in fds:
            os.close(fd)


def _abstract(name: bytes) -> bytes:
    return b"\0pdq-" + name


def _path(folder: str, name: bytes) -> Path:
    return Path(folder, f"pdq-{name.decode()}.sock")


def _listen(listener: socket.socket, path: Path) -> None:
    """Listen at `path`, which appears only then; and remove those that nobody listens at any more."""
    unfinished = path.with_suffix(".new")
    listener.bind(str(unfinished))
    listener.listen(64)
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
