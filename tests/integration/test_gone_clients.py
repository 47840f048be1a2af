"""Whoever writes to a client that is gone stops at once, before asyncio has told anybody of the loss."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence

import pytest
from starlette.types import ASGIApp, Receive, Scope, Send

from common.settings.config import HTTPSettings
from gateway.server import Server
from gateway.sse import EventStream, JSONAnswer
from tests.support.fake_cluster import until
from tests.support.redis import HANGS_S

REQUEST = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"
EVENTS = 500


@contextlib.asynccontextmanager
async def answering(app: ASGIApp) -> AsyncIterator[socket.socket]:
    """A client of a server of `app`; it reads nothing by itself."""
    server = Server(app, HTTPSettings())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        await until(lambda: server.started or serving.done())
        with socket.create_connection(listener.getsockname()) as client:
            yield client
        server.should_exit = True
        await serving


def vanish(client: socket.socket) -> None:
    """Gone with a reset, as a process that is killed with unread bytes."""
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


class App:
    """An answer during which the client vanishes, in the same turn of the loop as the next word."""

    def __init__(self, kind: str) -> None:
        self.client: socket.socket
        self.made = 0  # events that were taken from their source
        self.ended = asyncio.Event()
        answers: dict[str, Callable[[], ASGIApp]] = {
            "one JSON value": lambda: JSONAnswer(self._parts, 1.0),
            "events": lambda: EventStream(self._events(), 1.0),
            "an application of its own": lambda: self._heedless,
        }
        self._answer = answers[kind]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._answer()(scope, receive, send)
        finally:
            self.ended.set()

    async def _parts(self) -> Sequence[bytes]:
        vanish(self.client)
        return [b"[", b"1," * 2**24, b"1]"]

    async def _events(self) -> AsyncGenerator[object, None]:
        for number in range(EVENTS):
            if number == 1:
                vanish(self.client)
            self.made += 1
            yield {"number": number}

    async def _heedless(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        vanish(self.client)
        for _ in range(EVENTS):
            await send({"type": "http.response.body", "body": b"x" * 1000, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})


@pytest.mark.parametrize("kind", ["one JSON value", "events", "an application of its own"])
async def test_nothing_more_is_written_to_a_connection_that_is_lost(
    kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    app = App(kind)
    async with answering(app) as client:
        app.client = client
        client.sendall(REQUEST)
        await asyncio.wait_for(app.ended.wait(), HANGS_S)
    assert [record.getMessage() for record in caplog.records if record.name == "asyncio"] == []
    assert [record for record in caplog.records if record.levelno >= logging.ERROR] == []


async def test_events_are_not_made_for_a_client_that_is_gone() -> None:
    app = App("events")
    async with answering(app) as client:
        app.client = client
        client.sendall(REQUEST)
        await asyncio.wait_for(app.ended.wait(), HANGS_S)
    assert app.made < 20


async def test_others_have_their_turn_while_a_client_takes_an_answer_that_waited_for_it() -> None:
    turns = 0

    async def events() -> AsyncGenerator[object, None]:
        for number in range(EVENTS):
            yield {"number": number}

    async with answering(EventStream(events(), 1.0)) as client:
        client.sendall(REQUEST)
        client.setblocking(False)
        loop, received = asyncio.get_running_loop(), b""
        while b"[DONE]" not in received:
            received += await loop.sock_recv(client, 2**20)
            turns += 1
    assert turns > EVENTS / 10
