"""`/metrics` of a process that serves nothing else over HTTP.

Owns: the listener and what one client of it may take: MOST_CONNECTIONS at a time, beyond which the one
that waits longest for its request makes way; one request on each, TIMEOUT_S for all of it, a head of
MOST_HEAD_BYTES. A text is rendered once in PAUSE_S at most: who asks sooner waits for the next one,
with all others. Knows nothing of what is counted. The gateway has its own routes (gateway/routes.py).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable
from http import HTTPStatus

import h11

from common.errors import ResourceError
from common.logs import get_logger
from common.metrics import CONTENT_TYPE_LATEST
from common.settings.config import MetricsSettings, is_loopback

log = get_logger("metrics")

MOST_CONNECTIONS = 16
MOST_HEAD_BYTES = 16_384
TIMEOUT_S = 10.0
PAUSE_S = 0.1
EVERY_ADDRESS = frozenset({"0.0.0.0", "::"})


class MetricsServer:
    """Serves what `render` returns, which runs on the event loop."""

    def __init__(
        self,
        settings: MetricsSettings,
        render: Callable[[], bytes],
        *,
        timeout_s: float = TIMEOUT_S,
        pause_s: float = PAUSE_S,
    ) -> None:
        self.port = 0
        """Where it listens; 0 before `start`."""
        self._settings = settings
        self._render = render
        self._timeout_s, self._pause_s = timeout_s, pause_s
        self._rendering: asyncio.Task[bytes] | None = None
        self._rendered_at = -math.inf
        self._server: asyncio.Server | None = None
        self._talks: set[asyncio.Task[None]] = set()
        self._waiting: dict[asyncio.Task[None], None] = {}  # for their request; longest first

    @property
    def num_open(self) -> int:
        """Clients that are connected."""
        return len(self._talks)

    @property
    def num_answering(self) -> int:
        """Those of them whose request is complete."""
        return len(self._talks) - len(self._waiting)

    def url(self, endpoint: str) -> str:
        """Where others find it; "" where it is off. If it listens on every address, that is the one of
        `endpoint`, an address of this process on the bus."""
        if not self.port:
            return ""
        host = self._settings.host
        if host in EVERY_ADDRESS:
            host = endpoint.removeprefix("tcp://").rpartition(":")[0]
        return f"http://{f'[{host}]' if ':' in host and host[0] != '[' else host}:{self.port}"

    async def start(self) -> None:
        """Listen, unless the settings have no port. `ResourceError` if the port is taken."""
        host, port = self._settings.host, self._settings.port
        if port is None:
            return
        try:
            self._server = await asyncio.start_server(self._accept, host, port)
        except OSError as error:
            raise ResourceError(
                f"/metrics cannot listen on {host}:{port}: {error}; --metrics-port and "
                "--metrics-host name another place, --metrics-port none does without",
                param="metrics.port",
            ) from error
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Cut off whoever is connected."""
        if self._server is not None:
            self._server.close()
        tasks = [*self._talks, *filter(None, [self._rendering])]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if len(self._talks) >= MOST_CONNECTIONS:
            if not self._waiting:
                writer.transport.abort()
                return
            self._heard(longest := next(iter(self._waiting)))
            longest.cancel()
        talk = asyncio.get_running_loop().create_task(self._talk(reader, writer))
        self._talks.add(talk)
        self._waiting[talk] = None
        talk.add_done_callback(self._talks.discard)
        talk.add_done_callback(self._heard)

    def _heard(self, talk: asyncio.Task[None]) -> None:
        self._waiting.pop(talk, None)

    async def _talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            with contextlib.suppress(OSError, TimeoutError, h11.ProtocolError):
                async with asyncio.timeout(self._timeout_s):
                    connection = h11.Connection(h11.SERVER, MOST_HEAD_BYTES)
                    status, body = await self._answer(connection, reader)
                    headers = [
                        ("Content-Type", CONTENT_TYPE_LATEST if status == 200 else "text/plain"),
                        ("Content-Length", str(len(body))),
                        ("Connection", "close"),
                    ]
                    for event in (
                        h11.Response(status_code=status, headers=headers),
                        h11.Data(data=body),
                        h11.EndOfMessage(),
                    ):
                        writer.write(connection.send(event) or b"")
                    await writer.drain()
                    writer.close()
                    await writer.wait_closed()
        finally:
            writer.transport.abort()

    async def _answer(self, connection: h11.Connection, reader: asyncio.StreamReader) -> tuple[int, bytes]:
        """Status and body for the first request; `h11.ProtocolError` if the client leaves before."""
        try:
            while (event := connection.next_event()) is h11.NEED_DATA:
                connection.receive_data(await reader.read(4096))
        except h11.RemoteProtocolError as error:
            return _said(error.error_status_hint)
        talk = asyncio.current_task()
        assert talk is not None
        self._heard(talk)
        if not isinstance(event, h11.Request):
            raise h11.LocalProtocolError("the client is gone")
        names = dict(event.headers)
        if is_loopback(self._settings.host) and not _is_ours(names.get(b"host", b"")):
            return _said(HTTPStatus.MISDIRECTED_REQUEST)
        if event.method not in (b"GET", b"HEAD"):
            return _said(HTTPStatus.METHOD_NOT_ALLOWED)
        if event.target.partition(b"?")[0] != b"/metrics":
            return _said(HTTPStatus.NOT_FOUND)
        if self._rendering is None:
            self._rendering = asyncio.get_running_loop().create_task(self._render_soon())
        try:
            return HTTPStatus.OK, await asyncio.shield(self._rendering)
        except Exception as error:
            log.error("metrics.not_rendered", exc_info=error)
            return _said(HTTPStatus.INTERNAL_SERVER_ERROR)

    async def _render_soon(self) -> bytes:
        try:
            await asyncio.sleep(self._rendered_at + self._pause_s - time.monotonic())
            return self._render()
        finally:
            self._rendering, self._rendered_at = None, time.monotonic()


def _said(status: int) -> tuple[int, bytes]:
    return status, f"{HTTPStatus(status).phrase}\n".encode()


def _is_ours(host: bytes) -> bool:
    """Whether it names this machine: a web page may lead a name of its own here."""
    name = host.decode("latin-1")
    name = name.partition("]")[0] if name.startswith("[") else name.partition(":")[0]
    return is_loopback(name)
