"""TLS 1.3 over the bare socket of bench/transports.py: what a tcp wire with TLS could have at most.

The source writes slabs with `ssl.SSLSocket`. The reader takes 128 KiB from the socket at a time and
decrypts it with an `ssl.SSLObject`: OpenSSL alone would call the kernel twice for each record of
16 KiB. The certificate is made by the `openssl` command, and nobody checks it: only speed counts here.
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import subprocess
import tempfile
from pathlib import Path

_READ_BYTES = 128 << 10


def accept(listener: socket.socket) -> ssl.SSLSocket:
    """The source's end."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.num_tickets = 0
    with tempfile.TemporaryDirectory() as folder:
        key, certificate = Path(folder, "key.pem"), Path(folder, "certificate.pem")
        subprocess.run(
            [
                "openssl",
                "req",
                "-x509",
                "-newkey",
                "ec",
                "-pkeyopt",
                "ec_paramgen_curve:P-256",
                "-nodes",
                "-subj",
                "/CN=bench",
                "-keyout",
                key,
                "-out",
                certificate,
            ],
            check=True,
            capture_output=True,
        )
        context.load_cert_chain(certificate, key)
    connection, _ = listener.accept()
    connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return context.wrap_socket(connection, server_side=True)


class Reader:
    """The reading end."""

    def __init__(self, connection: socket.socket) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        self._socket, self._buffer = connection, memoryview(bytearray(_READ_BYTES))
        self._received, self._said = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._received, self._said)
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                self._tls.do_handshake()
                break
            connection.sendall(self._said.read())
            self._receive()
        connection.sendall(self._said.read())
        self.cipher = self._tls.cipher()

    def _receive(self) -> None:
        if not (length := self._socket.recv_into(self._buffer)):
            raise EOFError("the source is gone")
        self._received.write(self._buffer[:length])

    def send(self, message: bytes) -> None:
        self._tls.write(message)
        self._socket.sendall(self._said.read())

    def recv_into(self, view: memoryview) -> int:
        while True:
            with contextlib.suppress(ssl.SSLWantReadError):
                return self._tls.read(len(view), view)  # type: ignore[arg-type, return-value]
            self._receive()

    def close(self) -> None:
        self._socket.close()
