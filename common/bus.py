"""The bus: messages between nodes and gateways over ZeroMQ, and the death of a peer.

Owns: sockets, links, beats, and the conclusion that a link is down. Knows nothing of what messages
mean, except `Beat` and `Goodbye`, which it sends and consumes itself. The one door to ZeroMQ, but
for the transport that carries slabs over tcp.

    One ROUTER socket is bound; peers that call `connect` to us arrive there. One DEALER socket per
    peer that we connect to. Either is a *link*: it carries messages both ways, in order, and has an
    id, new at each connect. A link that went down never comes up again: ZeroMQ's own reconnecting
    is off, so that nothing is lost or repeated behind our back.

    routing id of a DEALER   incarnation "/" link id
    first message on a link  Beat, both ways; the answer proves that the right incarnation listens
    frames                   [encoded message, further frames…]

A link goes down, with one event that says why, when

    unreachable    nobody listens there
    disconnected   the connection is gone, as after kill -9
    silent         `missed_beats` beat intervals have passed without any message
    stalled        the peer is busy, yet its step counter has not moved for `stall_limit_s`
    full           it takes `high_water_mark` messages no more: it does not read
    impostor       another incarnation answers at that address
    goodbye        the peer ended in order
    closed         we closed it

A connection that a peer made is closed by ZeroMQ, when its own heartbeats, which need no event loop
at the other end, are unanswered for twice the silence that ends a link, a second at least: of a peer
that was stopped, or is gone without a word, nothing is left here.

Time in which we ourselves did not run, or could not read because our own inbox was full, is never
held against a peer. Messages for a peer without link, or that a link that is down still brings,
are not delivered: `send` raises `LinkLost`, and late input is counted and dropped.

All methods belong to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import enum
import secrets
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import zmq
import zmq.asyncio
from zmq.auth.asyncio import AsyncioAuthenticator
from zmq.utils.monitor import parse_monitor_message

from common.codec import decode, encode
from common.config import BusSettings, is_loopback
from common.errors import ConfigError, LinkLost, MalformedMessage, ResourceError
from common.logs import get_logger
from common.messages import Beat, Goodbye, Message

log = get_logger("bus")

INBOX = 4096
DEAD_LINKS_REMEMBERED = 4096
GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_AUTH
GONE |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL | zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL

Progress = Callable[[], tuple[int, bool]]
"""The engine's step counter, and whether it has work."""


class Down(enum.StrEnum):
    """Why a link went down; explained above."""

    UNREACHABLE = "unreachable"
    DISCONNECTED = "disconnected"
    SILENT = "silent"
    STALLED = "stalled"
    FULL = "full"
    IMPOSTOR = "impostor"
    GOODBYE = "goodbye"
    CLOSED = "closed"


@dataclasses.dataclass(frozen=True, slots=True)
class LinkEvent:
    """A link came up (`reason` None) or went down for good."""

    peer: str
    link: str
    reason: Down | None

    @property
    def up(self) -> bool:
        return self.reason is None


@dataclasses.dataclass(frozen=True, slots=True)
class Received:
    """One message, from which incarnation, and over which link."""

    peer: str
    link: str
    message: Message
    frames: tuple[bytes, ...]


@dataclasses.dataclass(slots=True, eq=False)
class _Link:
    peer: str
    id: str
    socket: Any  # a DEALER of our own, or the ROUTER that all incoming links share
    address: tuple[bytes, ...]  # first frames of whatever is sent: the routing id behind a ROUTER
    endpoint: str  # "" for an incoming link
    heard_at: float
    steps: int = -1
    moved_at: float = 0.0
    busy: bool = False
    up: bool = False
    tasks: tuple[asyncio.Task[None], ...] = ()
    monitor: Any = None


class Bus:
    """The messages of one incarnation. `async with Bus(…) as bus`, or `start` and `close`."""

    def __init__(
        self, incarnation: str, settings: BusSettings, *, progress: Progress = lambda: (0, False)
    ) -> None:
        self.incarnation = incarnation
        self.endpoint = ""
        self.counts: Counter[str] = Counter()  # sent, received, malformed, late, and link ends
        self._settings = settings
        self._progress = progress
        self._context: Any = None
        self._router: Any = None
        self._authenticator: Any = None
        self._outgoing: dict[str, _Link] = {}
        self._incoming: dict[str, _Link] = {}
        self._by_routing_id: dict[bytes, _Link] = {}
        self._dead: OrderedDict[bytes, None] = OrderedDict()
        self._inbox: asyncio.Queue[Received] = asyncio.Queue(INBOX)
        self._events: asyncio.Queue[LinkEvent] = asyncio.Queue()
        self._tasks: list[asyncio.Task[None]] = []

    # ── Start and end ────────────────────────────────────────────────────────────────────────────

    async def start(self) -> None:
        """Bind; `endpoint` is then what peers connect to. `ResourceError` if the port is taken."""
        settings = self._settings
        if not settings.secret_key and not is_loopback(settings.host):
            raise ConfigError(
                f"without a bus secret key the bus listens on loopback only, not {settings.host!r}"
            )
        public_key = _public(settings) if settings.secret_key else b""
        self._context = zmq.asyncio.Context()
        if settings.secret_key:
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
            asyncio.create_task(self._read(self._router, None), name="bus-router"),
            asyncio.create_task(self._beat(), name="bus-beat"),
        ]

    async def close(self, *, goodbye: bool = True) -> None:
        """Say goodbye on every link, and give up all sockets. What peers have not taken is lost."""
        if self._context is None:
            return
        links = [*self._outgoing.values(), *self._incoming.values()]
        if goodbye:
            for link in links:
                with contextlib.suppress(LinkLost):
                    self._send(link, (encode(Goodbye(self.incarnation)),))
        for link in [*self._outgoing.values(), *self._incoming.values()]:
            self._end(link, Down.CLOSED, linger_ms=100 if goodbye else 0)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._router is not None:
            self._router.close(linger=100 if goodbye else 0)
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
        if peer in self._outgoing:
            return self._outgoing[peer].id
        link_id = secrets.token_hex(6)
        socket = self._socket(zmq.DEALER)
        socket.setsockopt(zmq.ROUTING_ID, f"{self.incarnation}/{link_id}".encode())
        socket.setsockopt(zmq.RECONNECT_IVL, -1)
        link = _Link(peer, link_id, socket, (), endpoint, heard_at=time.monotonic())
        link.monitor = socket.get_monitor_socket(GONE)
        try:
            socket.connect(endpoint)
        except zmq.ZMQError as error:
            socket.disable_monitor()
            link.monitor.close(linger=0)
            socket.close(linger=0)
            raise LinkLost(f"{endpoint!r} is not an address: {error}", param=peer) from error
        self._outgoing[peer] = link
        link.tasks = (
            asyncio.create_task(self._read(socket, link), name=f"bus-read-{peer}"),
            asyncio.create_task(self._watch(link), name=f"bus-watch-{peer}"),
        )
        self._send(link, (self._own_beat(),))
        return link_id

    def disconnect(self, peer: str) -> None:
        """Close every link with `peer`; for an unknown one nothing happens."""
        for links in (self._outgoing, self._incoming):
            if peer in links:
                self._end(links[peer], Down.CLOSED)

    def link(self, peer: str) -> str | None:
        """Id of the link that `send` would take, or None."""
        link = self._outgoing.get(peer) or self._incoming.get(peer)
        return link.id if link else None

    def peers(self) -> frozenset[str]:
        """Incarnations with a link that is up."""
        links = [*self._outgoing.values(), *self._incoming.values()]
        return frozenset(link.peer for link in links if link.up)

    async def next_event(self) -> LinkEvent:
        """The next link that came up or went down, in order."""
        return await self._events.get()

    # ── Messages ─────────────────────────────────────────────────────────────────────────────────

    def send(
        self, peer: str, message: Message, frames: Sequence[bytes] = (), *, link: str | None = None
    ) -> None:
        """Hand a message to the link with `peer`, our own before theirs; never waits.

        `LinkLost` without a link, or with another one than `link` where that is given. A link that
        is full goes down. That it was sent does not mean that it arrives: the protocols above it
        have their acknowledgements.
        """
        for links in (self._outgoing, self._incoming):
            found = links.get(peer)
            if found is not None and link in (None, found.id):
                return self._send(found, (encode(message), *frames))
        raise LinkLost(f"no link with {peer}", param=peer)

    async def receive(self) -> Received:
        """The next message of any peer."""
        return await self._inbox.get()

    def _send(self, link: _Link, frames: Sequence[bytes]) -> None:
        future = link.socket.send_multipart((*link.address, *frames), flags=zmq.DONTWAIT)
        error = future.exception()  # it is done: it was not to wait
        if error is None:
            self.counts["sent"] += 1
            return
        if not isinstance(error, zmq.ZMQError):
            raise error
        full = isinstance(error, zmq.Again) and not _connection_gone(link)
        reason = Down.FULL if full else Down.DISCONNECTED
        self._end(link, reason)
        raise LinkLost(f"the link with {link.peer} is {reason.value}", param=link.peer) from error

    async def _read(self, socket: Any, link: _Link | None) -> None:
        """Deliver what `socket` brings: that of one outgoing link, or of all incoming ones."""
        while True:
            frames = await socket.recv_multipart()
            source = link if link is not None else self._arrived(frames.pop(0))
            if source is None:
                continue
            try:
                message = decode(frames[0] if frames else b"")
            except MalformedMessage as error:
                self._malformed(source.peer, str(error))
                continue
            source.heard_at = time.monotonic()
            self.counts["received"] += 1
            if isinstance(message, Beat):
                self._heard_beat(source, message)
            elif isinstance(message, Goodbye):
                self._end(source, Down.GOODBYE)
            else:
                await self._inbox.put(Received(source.peer, source.id, message, tuple(frames[1:])))
            if link is not None and self._outgoing.get(link.peer) is not link:
                return  # what we have read has ended it

    def _arrived(self, routing_id: bytes) -> _Link | None:
        """The incoming link of this routing id, made at its first message; None if it is dead."""
        if routing_id in self._dead:
            self.counts["late"] += 1
            return None
        if (link := self._by_routing_id.get(routing_id)) is not None:
            return link
        try:
            peer, _, link_id = routing_id.decode("ascii").rpartition("/")
        except UnicodeDecodeError:
            peer = link_id = ""
        if not peer or not link_id:
            self._malformed("?", f"routing id {routing_id!r}")
            return None
        if peer in self._incoming:  # it opened a new one: whatever the old one brings is late
            self._end(self._incoming[peer], Down.DISCONNECTED)
        link = _Link(peer, link_id, self._router, (routing_id,), "", heard_at=time.monotonic())
        self._incoming[peer] = self._by_routing_id[routing_id] = link
        self._came_up(link)
        with contextlib.suppress(LinkLost):
            self._send(link, (self._own_beat(),))
        return link

    def _malformed(self, peer: str, error: str) -> None:
        self.counts["malformed"] += 1
        if self.counts["malformed"].bit_count() == 1:  # 1, 2, 4, …: a flood fills no disk
            log.warning("bus.malformed", peer=peer, error=error, count=self.counts["malformed"])

    # ── Life and death of links ──────────────────────────────────────────────────────────────────

    def _own_beat(self) -> bytes:
        return encode(Beat(self.incarnation, *self._progress()))

    def _heard_beat(self, link: _Link, beat: Beat) -> None:
        if beat.node != link.peer:
            return self._end(link, Down.IMPOSTOR)
        if not link.up:
            self._came_up(link)
        if beat.steps != link.steps or not (beat.busy and link.busy):
            link.moved_at = link.heard_at
        link.steps, link.busy = beat.steps, beat.busy
        return None

    async def _beat(self) -> None:
        """Send beats, and look for links whose peer sends none."""
        interval = self._settings.beat_interval_s
        looked_at = time.monotonic()
        while True:
            await asyncio.sleep(interval)
            beat = self._own_beat()
            now = time.monotonic()
            excused = now - looked_at if self._inbox.full() else now - looked_at - 2 * interval
            looked_at = now
            for link in [*self._outgoing.values(), *self._incoming.values()]:
                if excused > 0:
                    link.heard_at += excused
                    link.moved_at += excused
                if now - link.heard_at > self._settings.missed_beats * interval:
                    self._end(link, Down.SILENT if link.up else Down.UNREACHABLE)
                elif link.busy and now - link.moved_at > self._settings.stall_limit_s:
                    self._end(link, Down.STALLED)
                else:
                    with contextlib.suppress(LinkLost):
                        self._send(link, (beat,))

    async def _watch(self, link: _Link) -> None:
        """Wait until the connection of an outgoing link is gone."""
        event = 0
        while not event & GONE:
            event = parse_monitor_message(await link.monitor.recv_multipart())["event"]
        self._end(link, Down.DISCONNECTED if link.up else Down.UNREACHABLE)

    def _came_up(self, link: _Link) -> None:
        link.up = True
        link.moved_at = link.heard_at
        self._events.put_nowait(LinkEvent(link.peer, link.id, None))
        log.debug("bus.up", peer=link.peer, link=link.id)

    def _end(self, link: _Link, reason: Down, *, linger_ms: int = 0) -> None:
        """Take a link down, once."""
        links = self._outgoing if link.endpoint else self._incoming
        if links.get(link.peer) is not link:
            return
        del links[link.peer]
        for routing_id in link.address:
            del self._by_routing_id[routing_id]
            self._dead[routing_id] = None
            if len(self._dead) > DEAD_LINKS_REMEMBERED:
                self._dead.popitem(last=False)
        if link.endpoint:
            for task in link.tasks:
                if task is not asyncio.current_task():
                    task.cancel()
            link.socket.disable_monitor()
            link.monitor.close(linger=0)
            link.socket.close(linger=linger_ms)
        self.counts[reason.value] += 1
        self._events.put_nowait(LinkEvent(link.peer, link.id, reason))
        say = log.debug if reason in (Down.CLOSED, Down.GOODBYE) else log.info
        say("bus.down", peer=link.peer, link=link.id, reason=reason.value)

    def _socket(self, kind: int) -> Any:
        settings = self._settings
        socket = self._context.socket(kind)
        socket.setsockopt(zmq.LINGER, 0)
        socket.setsockopt(zmq.SNDHWM, settings.high_water_mark)
        socket.setsockopt(zmq.RCVHWM, settings.high_water_mark)
        socket.setsockopt(zmq.MAXMSGSIZE, settings.max_message_bytes)
        socket.setsockopt(zmq.IPV6, 1)
        if settings.secret_key:
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


def _connection_gone(link: _Link) -> bool:
    """Whether the monitor of an outgoing link has news, of which there is one kind only."""
    if link.monitor is None:
        return False
    return bool(zmq.Socket.shadow(link.monitor.underlying).poll(0))


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
