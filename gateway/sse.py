"""Answers that end when their client goes away, as one JSON body or as server-sent events.

Owns: watching for the disconnect while the answer is still being made, the bytes of an event, and
what happens to an error before and after the first byte went out. Knows nothing of what is sent.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from common.errors import PdqError
from common.logs import get_logger
from gateway.errors import error_body, error_response
from gateway.json_text import dumps

log = get_logger("http")

JSON = b"application/json"
SLICE_BYTES = 65_536
DONE = b"data: [DONE]\n\n"
HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]

Events = AsyncGenerator[object, None]


def event(value: object) -> bytes:
    """The bytes of one event. A value of bytes is JSON already."""
    return b"data: " + (value if isinstance(value, bytes) else dumps(value)) + b"\n\n"


class Answer(Response):
    """Runs `make` while it listens for the disconnect, and cancels it when that comes first.

    Everything happens inside one task, so that what `make` opened is closed before this returns.
    """

    def __init__(self, retry_after_s: float) -> None:
        super().__init__()
        self._retry_after_s = retry_after_s

    async def make(self, scope: Scope, receive: Receive, send: Send) -> None:
        raise NotImplementedError

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        begun = False

        async def noted_send(message: Message) -> None:
            nonlocal begun
            if message["type"] == "http.response.start":
                begun = True
            await send(message)
            # Lets other tasks run between two writes, the one that notices a disconnect among them.
            await asyncio.sleep(0)

        async def answer() -> None:
            try:
                await self.make(scope, receive, noted_send)
            except PdqError as error:
                if begun:
                    raise
                response = error_response(error, self._retry_after_s)
                await response(scope, receive, noted_send)

        answering = asyncio.create_task(answer())
        leaving = asyncio.create_task(_disconnected(receive))
        try:
            await asyncio.wait((answering, leaving), return_when=asyncio.FIRST_COMPLETED)
        finally:
            leaving.cancel()
            if not answering.done():
                answering.cancel()
            await asyncio.gather(answering, leaving, return_exceptions=True)
        if not answering.cancelled() and (error := answering.exception()) is not None:
            raise error


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class JSONAnswer(Answer):
    """Sends one JSON value, in the parts that `make_parts` returns."""

    def __init__(self, make_parts: Callable[[], Awaitable[Sequence[bytes]]], retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self._make_parts = make_parts

    async def make(self, scope: Scope, receive: Receive, send: Send) -> None:
        parts = await self._make_parts()
        length = str(sum(map(len, parts))).encode()
        headers = [(b"content-type", JSON), (b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for part in parts:
            for begin in range(0, len(part), SLICE_BYTES):
                # Each slice waits until the client has taken most of what was written before.
                await _send_body(send, part[begin : begin + SLICE_BYTES], more=True)
        await _send_body(send, b"", more=False)


class EventStream(Answer):
    """Sends each object of `events` as one event, then `[DONE]`.

    The status line goes out with the first event, so an error before it has a status of its own. A later
    error becomes the last event.
    """

    def __init__(self, events: Events, retry_after_s: float) -> None:
        super().__init__(retry_after_s)
        self._events = events

    async def make(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with aclosing(self._events) as events:
            data = await _next_event(events)
            await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
            try:
                while data is not None:
                    await _send_body(send, data, more=True)
                    data = await _next_event(events)
                last = DONE
            except PdqError as error:
                log.warning("stream.failed", code=error.code, error=error)
                last = event(error_body(error)) + DONE
            await _send_body(send, last, more=False)


async def _next_event(events: Events) -> bytes | None:
    async for value in events:
        return event(value)
    return None


async def _send_body(send: Send, body: bytes, *, more: bool) -> None:
    await send({"type": "http.response.body", "body": body, "more_body": more})
