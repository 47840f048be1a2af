"""The bus: messages between nodes and gateways over ZeroMQ.

Owns sockets, and who hears what: everything about links but their bytes is in bus_links.py, its
rules are in common/README.md. Knows nothing of what messages mean. The one door to ZeroMQ, but for
the transport that carries slabs over tcp.

    One ROUTER socket is bound; peers that call `connect` to us arrive there. One DEALER socket per
    peer that we connect to. Either is a *link*: it carries messages both ways, in order, and has an
    id, new at each connect. A link that went down never comes up again: ZeroMQ's own reconnecting
    is off, so that nothing is lost or repeated behind our back.

    routing id of a DEALER   incarnation "/" link id
    frame                    encoded message; more than one are malformed

Every connection is encrypted and authenticated by CURVE, with the one key of the whole system: who
does not have it is not heard.

A connection that a peer made is closed by ZeroMQ, when its own heartbeats, which need no event loop
at the other end, are unanswered for twice the silence that ends a link, a second at least: of a peer
that was stopped, or is gone without a word, nothing is left here.

Messages for a peer without link, or that a link that is down still brings, are not delivered: `send`
raises `LinkLost`, and late input is counted and dropped.

All methods belong to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import dataclasses
import secrets
import time
from collections import Counter
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import parse_monitor_message

from common.background import report
from common.errors import ConfigError, LinkLost, MalformedMessage, ResourceError
from common.logs import get_logger
from common.settings.config import BusSettings
from common.wire.bus_links import OVER_LINKS, Down, Link, LinkEvent, LinkTable, Progress
from common.wire.codec import decode, encode
from common.wire.message import Message
from common.wire.senders import Kinds

__all__ = ["Bus", "Down", "LinkEvent", "Progress", "Received", "new_secret_key"]

log = get_logger("bus")

INBOX = 4096
FAREWELL_MS = 100  # for the last word on a connection to leave
GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
GONE |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL


@dataclasses.dataclass(frozen=True, slots=True)
class Received:
    """One message, from which incarnation, and over which link."""

    peer: str
    link: str
    message: Message


@dataclasses.dataclass(slots=True)
class _Connection:
    """That of a link of our own, while it is open."""

    socket: Any  # a DEALER
    monitor: Any
    tasks: tuple[asyncio.Task[None], ...] = ()


class Bus:
    """The messages of one incarnation. `async with Bus(…) as bus`, or `start` and `close`."""

    def __init__(
        self,
        incarnation: str,
        settings: BusSettings,
        *,
        progress: Progress = lambda: (0, False),
        hears: Kinds = OVER_LINKS,
        inbox: int = INBOX,
    ) -> None:
        """`hears`: the kinds of messages that are delivered; others are refused (senders.py). `inbox`: how
        many may wait to be received; beyond, links are not read."""
        self.incarnation = incarnation
        self.endpoint = ""
        self._settings = settings
        self._context: Any = None
        self._router: Any = None
        self._authenticator: Any = None
        self._inbox: asyncio.Queue[Received] = asyncio.Queue(inbox)
        self._events: asyncio.Queue[LinkEvent] = asyncio.Queue()
        self._links = LinkTable(
            incarnation, settings, self, progress=progress, say=self._events.put_nowait, hears=hears
        )
        self._tasks: list[asyncio.Task[None]] = []
        self._farewell_ms = FAREWELL_MS

    @property
    def counts(self) -> Counter[str]:
        """Messages sent, received, malformed, late and refused; ends of links by reason."""
        return self._links.counts

    # ── Start and end ────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Bind; `endpoint` is then what peers connect to. `ResourceError` if the port is taken."""
        settings = self._settings
        public_key = _public(settings)
        self._context = zmq.asyncio.Context()
        self._authenticator = AsyncioAuthenticator(self._context)
        self._authenticator.start()
        self._authenticator.configure_curve_callback("pdq", _OneKey(public_key))
        self._router = self._socket(zmq.ROUTER)
        self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        silence_s = settings.missed_beats * settings.beat_interval_s
        self._router.setsockopt(zmq.HEARTBEAT_IVL, round(1000 * settings.beat_interval_s))
        self._router.setsockopt(zmq.HEARTBEAT_TIMEOUT, round(1000 * max(1.0, 2 * silence_s)))
        host = f"[{settings.host}]" if ":" in settings.host else settings.host
        try:
            self._router.bind(f"tcp://{host}:{settings.port or '*'}")
        except zmq.ZMQError as error:
            await self.close()
            raise ResourceError(
                f"the bus cannot listen on {settings.host}:{settings.port}: {error}; --bus-port and "
                "--bus-host name another place",
                param="bus.port",
            ) from error
        bound = self._router.getsockopt_string(zmq.LAST_ENDPOINT)
        advertised = settings.advertise_host or host
        self.endpoint = f"tcp://{advertised}:{bound.rpartition(':')[2]}"
        self._tasks = [
            asyncio.create_task(self._read(None), name="bus-router"),
            asyncio.create_task(self._beat(), name="bus-beat"),
        ]
        for task in self._tasks:
            task.add_done_callback(report)

    async def close(self, *, goodbye: bool = True) -> None:
        """Say goodbye on every link, and give up all sockets. What peers have not taken is lost."""
        if self._context is None:
            return
        self._farewell_ms = FAREWELL_MS if goodbye else 0
        self._links.close(goodbye=goodbye)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._router is not None:
            self._router.close(linger=self._farewell_ms)
        if self._authenticator is not None:
            self._authenticator.stop()
        context, self._context = self._context, None
        await asyncio.to_thread(context.term)

    async def __aenter__(self) -> Bus:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # ── Links ────────────────────────────────────────────────────────────────────────────────────

    def connect(self, peer: str, endpoint: str) -> str:
        """Open a link to the incarnation that listens at `endpoint`, unless there is one; its id.

        Messages can be sent at once; whether they arrive is known with the event that the link is
        up. Never retries: after a link went down, call it again.
        """
        for link in self._links.with_peer(peer):
            if link.ours:
                return link.id
        link_id = secrets.token_hex(6)
        socket = self._socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, f"{self.incarnation}/{link_id}".encode())
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        connection = _Connection(socket, socket.get_monitor_socket(GONE))
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.disable_monitor()
            connection.monitor.close(linger=0)
            socket.close(linger=0)
            raise LinkLost(f"{endpoint!r} is not an address: {error}", param=peer) from error
        link = self._links.open(peer, link_id, time.monotonic(), connection)
        if self._links.holds(link):
            connection.tasks = (
                asyncio.create_task(self._read(link), name=f"bus-read-{peer}"),
                asyncio.create_task(self._watch(link), name=f"bus-watch-{peer}"),
            )
            for task in connection.tasks:
                task.add_done_callback(report)
        return link_id

    def disconnect(self, peer: str) -> None:
        """Close every link with `peer`; for an unknown one nothing happens."""
        for link in self._links.with_peer(peer):
            self._links.end(link, Down.CLOSED)

    def link(self, peer: str) -> str | None:
        """Id of the link that `send` would take, or None."""
        links = self._links.with_peer(peer)
        return links[0].id if links else None

    def peers(self) -> frozenset[str]:
        """Incarnations with a link that is up."""
        return frozenset(link.peer for link in self._links if link.up)

    async def next_event(self) -> LinkEvent:
        """The next link that came up or went down, in order."""
        return await self._events.get()

    # ── Messages ─────────────────────────────────────────────────────────────────────────────────

    def send(self, peer: str, message: Message, *, link: str | None = None) -> None:
        """Hand a message to the link with `peer`, our own before theirs; never waits.

        `LinkLost` without a link, or with another one than `link` where that is given. A link that
        is full goes down. That it was sent does not mean that it arrives: the protocols above it
        have their acknowledgements.
        """
        for found in self._links.with_peer(peer):
            if link in (None, found.id):
                return self._send(found, encode(message))
        raise LinkLost(f"no link with {peer}", param=peer)

    async def receive(self) -> Received:
        """The next message of any peer."""
        return await self._inbox.get()

    def _send(self, link: Link, frame: bytes) -> None:
        reason = self.put(link, frame)
        if reason is not None:
            self._links.end(link, reason)
            raise LinkLost(f"the link with {link.peer} is {reason.value}", param=link.peer)

    def put(self, link: Link, frame: bytes) -> Down | None:
        """Of `Wire`: hand a message to ZeroMQ."""
        if link.ours:
            future = link.wire.socket.send(frame, flags=zmq.DONTWAIT)
        else:
            future = self._router.send_multipart((link.address, frame), flags=zmq.DONTWAIT)
        error = future.exception()  # it is done: it was not to wait
        if error is None:
            self.counts["sent"] += 1
            return None
        if not isinstance(error, zmq.ZMQError):
            raise error
        full = isinstance(error, zmq.Again) and not _connection_gone(link)
        return Down.FULL if full else Down.DISCONNECTED

    def hang_up(self, link: Link) -> None:
        """Of `Wire`: close the connection that we opened; who opened it closes the other kind."""
        if not link.ours:
            return
        connection: _Connection = link.wire
        for task in connection.tasks:
            if task is not asyncio.current_task():
                task.cancel()
        connection.socket.disable_monitor()
        connection.monitor.close(linger=0)
        connection.socket.close(linger=self._farewell_ms)

    async def _read(self, link: Link | None) -> None:
        """Deliver what comes over one link of our own, or (None) over all that peers opened."""
        socket = link.wire.socket if link is not None else self._router
        while link is None or self._links.holds(link):
            frames = await socket.recv_multipart()
            source: Link | bytes = link if link is not None else frames.pop(0)
            try:
                if len(frames) != 1:
                    raise MalformedMessage(f"{len(frames)} frames")
                message = decode(frames[0])
            except MalformedMessage as error:
                self._malformed(link.peer if link is not None else repr(source), str(error))
                continue
            found = self._links.heard(source, message, time.monotonic())
            if found is not None:
                await self._inbox.put(Received(found.peer, found.id, message))

    def _malformed(self, peer: str, error: str) -> None:
        self.counts["malformed"] += 1
        if self.counts["malformed"].bit_count() == 1:  # 1, 2, 4, …: a flood fills no disk
            log.warning("bus.malformed", peer=peer, error=error, count=self.counts["malformed"])

    async def _beat(self) -> None:
        while True:
            self._links.tick(time.monotonic(), inbox_full=self._inbox.full())
            await asyncio.sleep(self._settings.beat_interval_s)

    async def _watch(self, link: Link) -> None:
        """Wait until the connection of a link of our own is gone."""
        event = 0
        while not event & GONE:
            event = parse_monitor_message(await link.wire.monitor.recv_multipart())["event"]
        self._links.end(link, Down.DISCONNECTED if link.up else Down.UNREACHABLE)

    def _socket(self, kind: int) -> Any:
        settings = self._settings
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, settings.high_water_mark)
        socket.setsockopt(zmq.RCVHWM, settings.high_water_mark)
        socket.setsockopt(zmq.MAXMSGSIZE, settings.max_message_bytes)
        socket.setsockopt(zmq.IPV6, 1)
        socket.setsockopt(zmq.CURVE_SECRETKEY, settings.secret_key.encode())
        if kind == zmq.ROUTER:
            socket.setsockopt(zmq.CURVE_SERVER, 1)
            socket.setsockopt(zmq.ZAP_DOMAIN, b"pdq")
        else:
            socket.setsockopt(zmq.CURVE_PUBLICKEY, _public(settings))
            socket.setsockopt(zmq.CURVE_SERVERKEY, _public(settings))
        return socket


def new_secret_key() -> str:
    """A CURVE key, as `BusSettings.secret_key` wants it."""
    _, secret = zmq.curve_keypair()
    return bytes(secret).decode("ascii")


def _connection_gone(link: Link) -> bool:
    """Whether the monitor of a link of ours has news, of which there is one kind only."""
    if not link.ours:
        return False
    return bool(zmq.Socket.shadow(link.wire.monitor.underlying).poll(0))


class _OneKey:
    """Lets in whoever has the key that the whole system shares."""

    def __init__(self, public_key: bytes) -> None:
        self._public_key = public_key

    def callback(self, domain: str, key: bytes) -> bool:
        return key == self._public_key


def _public(settings: BusSettings) -> bytes:
    try:
        return bytes(zmq.curve_public(settings.secret_key.encode()))
    except (zmq.ZMQError, ValueError) as error:
        raise ConfigError("the bus secret key is not a CURVE key", param="secret_key") from error
