"""One HTTP connection: how long each part of a request may take, and what the parser may be fed.

Owns: the deadlines of a connection (head, body, idle, unread answer), which of them make way when
there are too many, half-closed connections, and the answers to what is not HTTP. Parsing, flow
control and the ASGI cycle are uvicorn's, whose protocol this extends.

A connection is always in one phase, read off h11's states after each event:

    HEAD    waits for a request's first or next bytes up to the blank line
    BODY    the head is there, the body is not
    ANSWER  the request is complete, the answer is being made or sent
    LEFT    the answer is complete, the client still sends a body that nobody reads
    CLOSED  we have said our last byte; what the client still sends is thrown away

A client that shuts down its sending half after a request still gets its answer. It looks the same as
one that is gone, until something is sent to it: the socket of a client that is gone answers with a
reset. So a client that half-closes is sent what any client passes over: `100 Continue` before the
answer, a comment between events. HTTP/1.0 has no such thing before the answer: there it is gone.
"""

from __future__ import annotations

import asyncio
import dataclasses
import enum
import socket
import time
from http import HTTPStatus
from typing import Any

import h11
from starlette.types import Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.errors import Overloaded, PdqError
from common.settings.config import HTTPSettings
from gateway.errors import (
    HeadTooLarge,
    MalformedHTTP,
    NotImplementedHere,
    RequestTimeout,
    URITooLong,
    error_json,
    status_of,
)

MAX_HEAD_BYTES = 16_384
MAX_TARGET_BYTES = 8_192
SMALL_CHUNK, MAX_SMALL_CHUNKS = 64, 1_024  # bytes; a chunk costs as much as a request's line
MAX_REFUSALS = 64  # connections beyond the limit that are told so at one time
LINGER_S = 1.0  # how long we go on reading what nobody wants, so that the answer is not lost
TCP_CLOSE = 7  # linux/tcp_states.h; tcpi_state is the first byte of struct tcp_info
CONTINUE = b"HTTP/1.1 100 Continue\r\n\r\n"
COMMENT = b":\n\n"  # of server-sent events


class Phase(enum.Enum):
    HEAD = enum.auto()
    BODY = enum.auto()
    ANSWER = enum.auto()
    LEFT = enum.auto()
    CLOSED = enum.auto()


@dataclasses.dataclass(slots=True)
class Roster:
    """The connections of one server: their limits, and which have no complete request yet."""

    settings: HTTPSettings
    open: set[Connection] = dataclasses.field(default_factory=set)
    waiting: dict[Connection, None] = dataclasses.field(default_factory=dict)  # longest first

    def make_way(self, newcomer: Connection) -> None:
        """Cut off the one that waits longest if there are too many; else refuse `newcomer`."""
        surplus = len(self.open) - self.settings.max_connections
        if surplus <= 0:
            return
        longest = next((other for other in self.waiting if other is not newcomer), None)
        if longest is not None:
            longest.cut()
        elif surplus <= MAX_REFUSALS:
            newcomer.refuse(Overloaded("this gateway has as many connections as it may have"))
        else:
            newcomer.cut()

    def check(self, now: float) -> None:
        """End what is overdue at `now`, a time of `time.monotonic`."""
        for connection in tuple(self.open):
            connection.check(now)


class Parser(h11.Connection):
    """h11's parser with bounds on what a head holds and how small chunks are."""

    def __init__(self) -> None:
        super().__init__(h11.SERVER, MAX_HEAD_BYTES)
        self.refusal: PdqError | None = None  # set when the client broke the protocol
        self.sends_events = False  # the answer under way is a stream of server-sent events
        self._chunks = self._chunk_bytes = 0

    def send(self, event: Any) -> Any:
        if isinstance(event, h11.Response):
            kind = dict(event.headers).get(b"content-type", b"")
            self.sends_events = kind.startswith(b"text/event-stream")
        return super().send(event)

    def next_event(self) -> Any:
        if self.refusal is not None:
            raise h11.RemoteProtocolError(self.refusal.message)
        try:
            if self.their_state is h11.IDLE:
                self._check_head()
            event = super().next_event()
        except h11.RemoteProtocolError as error:
            self.refusal = self.refusal or _refusal(error)
            raise
        if isinstance(event, h11.Request):
            self._chunks = self._chunk_bytes = 0
            names = {name for name, _ in event.headers}
            if {b"content-length", b"transfer-encoding"} <= names:
                # Whoever stands before us may have gone by the other one.
                self._refuse(MalformedHTTP("Content-Length and Transfer-Encoding exclude each other"))
            if len(event.target) > MAX_TARGET_BYTES:
                self._refuse(URITooLong(f"the path is longer than {MAX_TARGET_BYTES} bytes"))
        elif isinstance(event, h11.Data) and event.chunk_end:
            self._chunks += 1
            self._chunk_bytes += len(event.data)
            few = self._chunks <= MAX_SMALL_CHUNKS
            if not few and self._chunk_bytes < SMALL_CHUNK * self._chunks:
                self._refuse(MalformedHTTP(f"chunks of fewer than {SMALL_CHUNK} bytes"))
        return event

    def _check_head(self) -> None:
        data, _ = self.trailing_data
        end = MAX_HEAD_BYTES
        if len(data) > end and data.find(b"\n\r\n", 0, end) < 0 and data.find(b"\n\n", 0, end) < 0:
            self._refuse(HeadTooLarge(f"the head is larger than {end} bytes"))

    def _refuse(self, error: PdqError) -> None:
        self.refusal = error
        raise h11.RemoteProtocolError(error.message)


def _refusal(error: h11.RemoteProtocolError) -> PdqError:
    if error.error_status_hint == 431:
        return HeadTooLarge(f"the head is larger than {MAX_HEAD_BYTES} bytes")
    if error.error_status_hint == 501:
        return NotImplementedHere("this transfer encoding is not supported")
    return MalformedHTTP(f"not HTTP: {error}")


class Connection(H11Protocol):
    """`roster` is shared by all connections of a server; the rest is uvicorn's."""

    def __init__(self, *, roster: Roster, **uvicorns: Any) -> None:
        super().__init__(**uvicorns)
        self._roster = roster
        self.conn = Parser()
        self._application, self.app = self.app, self._run
        self._phase = Phase.HEAD
        self._since = 0.0  # when the phase began
        self._idle = True  # in HEAD: not one byte of the request is here
        self._unread_since: float | None = None  # the client takes nothing of what we wrote
        self.half_closed = False

    @property
    def unread(self) -> bool:
        """Whether the client has more to take than we will write ahead."""
        return self._unread_since is not None

    @property
    def owes_an_answer(self) -> bool:
        """Whether there is a request whose answer is not written yet."""
        return self._phase is Phase.ANSWER and not self.cycle.response_complete

    # ── What asyncio calls ───────────────────────────────────────────────────────────────────────

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._roster.open.add(self)
        self._enter(Phase.HEAD)
        self._roster.make_way(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._roster.open.discard(self)
        self._roster.waiting.pop(self, None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self._phase is not Phase.CLOSED:
            super().data_received(data)

    def eof_received(self) -> bool:  # type: ignore[override]
        """True keeps our sending half open: the request is complete, its answer is not."""
        if self._phase is not Phase.ANSWER or self.transport.is_closing():
            return False
        if not self.half_closed:
            if not self.cycle.response_started and self.scope["http_version"] != "1.1":
                return False
            self.half_closed = True
            self._probe()
        return True

    def pause_writing(self) -> None:
        self._unread_since = time.monotonic()
        super().pause_writing()

    def resume_writing(self) -> None:
        self._unread_since = None
        super().resume_writing()

    # ── What uvicorn calls ───────────────────────────────────────────────────────────────────────

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Run the application, and send nothing of it once the connection is lost. asyncio knows of the loss
        from the first write that fails, and calls `connection_lost` only in its next turn. Only the end
        of the process cancels this."""
        cycle = self.cycle

        async def send_unless_lost(message: Message) -> None:
            if self.transport.is_closing():
                cycle.disconnected = True
                cycle.message_event.set()
            await send(message)

        try:
            await self._application(scope, receive, send_unless_lost)
        except asyncio.CancelledError:
            cycle.disconnected = True
            self.transport.abort()

    def handle_events(self) -> None:
        super().handle_events()
        self._note_phase()

    def _should_upgrade(self) -> bool:
        return False  # a request to upgrade may be ignored, and is not worth a log line

    def on_response_complete(self) -> None:
        super().on_response_complete()  # goes on with a request that is here already
        self._note_phase()
        if self.half_closed and self._phase is not Phase.ANSWER:
            self.transport.close()

    def send_400_response(self, msg: str) -> None:
        parser = self.conn
        assert isinstance(parser, Parser)
        self.refuse(parser.refusal or MalformedHTTP(msg))

    # ── Deadlines ────────────────────────────────────────────────────────────────────────────────

    def check(self, now: float) -> None:
        """End this connection if it is overdue at `now`."""
        settings = self._roster.settings
        if self.transport.is_closing() and self._unread_since is None:
            self._unread_since = now  # closed as soon as the client has taken the rest
        if self._unread_since is not None and now - self._unread_since > settings.write_timeout_s:
            self.transport.abort()
            return
        if self.half_closed and self._is_gone():
            self.transport.abort()
            return
        waited = now - self._since
        match self._phase:
            case Phase.HEAD:
                limit = settings.header_timeout_s
                if waited > limit and self._idle:
                    self.cut()
                elif waited > limit:
                    self.refuse(RequestTimeout(f"no complete head within {limit:g} s"))
            case Phase.BODY:
                limit = settings.body_timeout_s
                if waited > limit:
                    self.refuse(RequestTimeout(f"no complete body within {limit:g} s"))
            case Phase.LEFT | Phase.CLOSED:
                if waited > LINGER_S:
                    self.transport.abort()
            case Phase.ANSWER:
                pass  # as long as a request may take

    def cut(self) -> None:
        """End the connection without a word."""
        self._enter(Phase.CLOSED)
        self._roster.open.discard(self)
        self.transport.abort()

    def refuse(self, error: PdqError) -> None:
        """Say why, if no answer has begun, and end the connection."""
        cycle = self.cycle
        open_answer = cycle is not None and not cycle.response_complete
        begun = open_answer and cycle.response_started
        if open_answer:
            cycle.disconnected = True
            cycle.message_event.set()
        self._unset_keepalive_if_required()
        self._enter(Phase.CLOSED)
        if begun or self.transport.is_closing():
            self.transport.abort()
            return
        self.transport.write(_response(error))
        self.transport.write_eof()  # what the client still sends is read, so that it sees this

    def _note_phase(self) -> None:
        if self._phase is Phase.CLOSED:
            return
        theirs, ours = self.conn.their_state, self.conn.our_state
        if theirs is h11.SEND_BODY:
            done = ours in (h11.DONE, h11.MUST_CLOSE, h11.CLOSED)
            self._enter(Phase.LEFT if done else Phase.BODY)
        elif theirs is h11.IDLE:
            idle = not self.conn.trailing_data[0]
            if self._phase is not Phase.HEAD or idle != self._idle:
                self._since = time.monotonic()
            self._idle = idle
            self._enter(Phase.HEAD)
        else:
            self._enter(Phase.ANSWER)

    def _enter(self, phase: Phase) -> None:
        if phase is self._phase and self._since:
            return
        self._phase, self._since = phase, time.monotonic()
        self._roster.waiting.pop(self, None)
        if phase in (Phase.HEAD, Phase.BODY):
            self._roster.waiting[self] = None

    def _probe(self) -> None:
        parser = self.conn
        assert isinstance(parser, Parser)
        if not self.cycle.response_started:
            self.transport.write(CONTINUE)
        elif parser.sends_events:  # whole events are written, so this stands between two
            self.transport.write(parser.send(h11.Data(data=COMMENT)))

    def _is_gone(self) -> bool:
        """Whether a client that half-closed has answered with a reset."""
        sock: socket.socket = self.transport.get_extra_info("socket")
        return sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0] == TCP_CLOSE


def _response(error: PdqError) -> bytes:
    status = status_of(error)
    body = error_json(error)
    lines = [
        f"HTTP/1.1 {status} {HTTPStatus(status).phrase}",
        "content-type: application/json",
        f"content-length: {len(body)}",
        "connection: close",
    ]
    if status in (429, 503):
        lines.append("retry-after: 1")
    return "\r\n".join([*lines, "", ""]).encode() + body
