"""One streamed completion over HTTP/1.1, measured at little cost.

Owns: the connection, the moment each piece of the answer arrived, and reading the pieces afterwards.
Knows nothing of loads or statistics. While a request runs nothing is parsed: an HTTP library spends
more per event than the server it measures (httpx 130 µs, this 30 µs), and all of it on the cores
that are measured. Times are `time.monotonic()`.
"""

from __future__ import annotations

import asyncio
import bisect
import dataclasses
import json
import ssl
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

from common.errors import ConfigError


@dataclasses.dataclass(slots=True)
class Exchange:
    """A request and the raw answer, as (moment, bytes). `failure` is a label, or ""."""

    sent_at: float
    ended_at: float = 0.0
    pieces: list[tuple[float, bytes]] = dataclasses.field(default_factory=list)
    failure: str = ""


@dataclasses.dataclass(frozen=True, slots=True)
class Answer:
    """What an exchange was: `token_times` are the moments of the events that carried text or an
    end; `error` is the server's code, or a label of ours (http_…, connection_…, timeout), or ""."""

    token_times: tuple[float, ...]
    prompt_tokens: int
    output_tokens: int
    cached_tokens: int
    finish_reason: str
    error: str
    message: str


class Client:
    """Sends to one server, each request on a connection of its own."""

    def __init__(self, url: str, api_key: str, timeout_s: float) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"--url must be http://… or https://…, not {url!r}", param="url")
        secure = parts.scheme == "https"
        self._host, self._port = parts.hostname, parts.port or (443 if secure else 80)
        self._ssl = ssl.create_default_context() if secure else None
        self._timeout_s = timeout_s
        key = f"Authorization: Bearer {api_key}\r\n" if api_key else ""
        self._head = (
            f"POST {parts.path.rstrip('/')}/v1/completions HTTP/1.1\r\nHost: {parts.netloc}\r\n"
            f"{key}Content-Type: application/json\r\nConnection: close\r\nContent-Length: "
        )

    def encode(self, body: dict[str, Any]) -> bytes:
        """All bytes of a request; to be made before its moment has come."""
        data = json.dumps(body, separators=(",", ":")).encode()
        return f"{self._head}{len(data)}\r\n\r\n".encode() + data

    async def exchange(self, request: bytes, result: Exchange | None = None) -> Exchange:
        """Send, and collect what comes until the server closes. Raises nothing of the network's. A caller
        that may cancel gives the `result` to fill, and keeps what had come; so does one whose request
        was sent before, in a first leg."""
        result = result or Exchange(time.monotonic())
        loop = asyncio.get_running_loop()
        closed: asyncio.Future[Exception | None] = loop.create_future()
        transport: asyncio.BaseTransport | None = None
        try:
            async with asyncio.timeout(self._timeout_s):
                transport, _ = await loop.create_connection(
                    lambda: _Collector(request, result.pieces, closed), self._host, self._port, ssl=self._ssl
                )
                if await closed is not None:
                    result.failure = "connection_lost"
        except TimeoutError:
            result.failure = "timeout"
        except ConnectionRefusedError:
            result.failure = "connection_refused"
        except OSError:
            result.failure = "connection_failed"
        finally:
            if transport is not None:
                transport.close()
        result.ended_at = time.monotonic()
        return result


class _Collector(asyncio.Protocol):
    def __init__(
        self, request: bytes, pieces: list[tuple[float, bytes]], closed: asyncio.Future[Exception | None]
    ) -> None:
        self._request, self._pieces, self._closed = request, pieces, closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._pieces.append((time.monotonic(), data))

    def connection_lost(self, error: Exception | None) -> None:
        if not self._closed.done():
            self._closed.set_result(error)


# ── Reading what was collected ───────────────────────────────────────────────────────────────────


def read(exchange: Exchange) -> Answer:
    """What the exchange was. An answer that breaks off is `connection_lost`, whatever it had."""
    status, chunked, body_at = _head(exchange)
    if not status:
        return _failed(exchange.failure or "connection_lost")
    if status != 200:
        body = b"".join(data for _, data in _body(exchange, chunked, body_at))
        return _failed(*_error(body, f"http_{status}"))
    times: list[float] = []
    usage: dict[str, Any] = {}
    reason, error, message, done = "", "", "", False
    for moment, data in _events(_body(exchange, chunked, body_at)):
        if data == b"[DONE]":
            done = True
            continue
        event = _json(data)
        if event is None:
            error = "malformed_event"
            continue
        if "error" in event:
            error, message = _error(data, "stream_error")
        usage = event.get("usage") or usage
        for choice in event.get("choices") or ():
            reason = choice.get("finish_reason") or reason
            if choice.get("text") or choice.get("finish_reason"):
                times.append(moment)
    if not done and not error:
        error = exchange.failure or "connection_lost"
    details = usage.get("prompt_tokens_details") or {}
    return Answer(
        tuple(times),
        int(usage.get("prompt_tokens", 0)),
        int(usage.get("completion_tokens", 0)),
        int(details.get("cached_tokens") or 0),
        reason,
        error,
        message,
    )


def _failed(error: str, message: str = "") -> Answer:
    return Answer((), 0, 0, 0, "", error, message)


def _head(exchange: Exchange) -> tuple[int, bool, int]:
    """Status (0: there is none), whether the body is in chunks, and where it starts."""
    raw = b""
    for _, data in exchange.pieces:
        raw += data
        if (end := raw.find(b"\r\n\r\n")) >= 0:
            lines = raw[:end].decode("latin-1").split("\r\n")
            fields = lines[0].split(" ", 2)
            status = int(fields[1]) if len(fields) > 1 and fields[1].isdigit() else 0
            chunked = any(line.lower().replace(" ", "") == "transfer-encoding:chunked" for line in lines)
            return status, chunked, end + 4
    return 0, False, 0


def _body(exchange: Exchange, chunked: bool, start: int) -> Iterator[tuple[float, bytes]]:
    """The body in parts, each with the moment its last byte arrived."""
    ends, total = [], 0
    for _, data in exchange.pieces:
        total += len(data)
        ends.append(total)
    raw = b"".join(data for _, data in exchange.pieces)
    if not chunked:
        for (moment, _), end, size in zip(
            exchange.pieces, ends, (len(data) for _, data in exchange.pieces), strict=True
        ):
            if end > start:
                yield moment, raw[max(start, end - size) : end]
        return
    while (line_end := raw.find(b"\r\n", start)) >= 0:
        try:
            size = int(raw[start:line_end].split(b";")[0], 16)
        except ValueError:
            return
        end = line_end + 2 + size
        if size <= 0 or end > total:
            return
        yield exchange.pieces[bisect.bisect_left(ends, end)][0], raw[line_end + 2 : end]
        start = end + 2


def _events(body: Iterator[tuple[float, bytes]]) -> Iterator[tuple[float, bytes]]:
    """The data of each server-sent event, with the moment it was complete."""
    rest = b""
    for moment, data in body:
        *whole, rest = (rest + data).split(b"\n\n")
        for event in whole:
            if event.startswith(b"data:"):
                yield moment, event[5:].strip()


def _json(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
    except ValueError:
        return None
    return value if isinstance(value, dict) else None


def _error(data: bytes, otherwise: str) -> tuple[str, str]:
    """Code and message from an error body in OpenAI's shape."""
    error = (_json(data) or {}).get("error")
    if not isinstance(error, dict):
        return otherwise, ""
    code = error.get("code")
    return (code if isinstance(code, str) and code else otherwise), str(error.get("message", ""))
