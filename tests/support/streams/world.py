"""Processes that can be stopped, connections that can break, and time that costs none.

Owns: one event loop per process, on one virtual clock (a stopped process' loop is not run: its timers
are late when it goes on, and what arrives meanwhile waits, as after SIGSTOP); connections as the
kernel has them; and a bus over those with the links of common/wire/bus_links.py, as they are. One seed
decides everything.
"""

from __future__ import annotations

import asyncio
import heapq
import random
import time
from collections import defaultdict, deque
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from common.errors import LinkLost
from common.settings.config import BusSettings
from common.wire.bus import Received
from common.wire.bus_links import Down, Link, LinkEvent, LinkTable
from common.wire.codec import decode, encode
from common.wire.message import Message

SETTINGS = BusSettings()
SILENCE_S = SETTINGS.missed_beats * SETTINGS.beat_interval_s
DELAY_S = 0.005  # or twice that
INBOX = 4096
CLOSE_ROUNDS = 4


class _Loop(asyncio.SelectorEventLoop):  # type: ignore[misc, valid-type]
    """Time is the world's; nothing is waited for here."""

    def __init__(self, world: World) -> None:
        self._world = world
        super().__init__()

    def time(self) -> float:
        return self._world.now

    def run_due(self) -> bool:
        """What is ready, or due, now; False if there was nothing."""
        if not self._ready and self.next_due() > self._world.now:
            return False
        self.call_soon(self.stop)
        self.run_forever()
        return True

    def next_due(self) -> float:
        while self._scheduled and self._scheduled[0].cancelled():
            handle = heapq.heappop(self._scheduled)
            handle._scheduled = False
        return self._scheduled[0].when() if self._scheduled else float("inf")


class Process:
    """One process: it runs, is stopped, or is dead."""

    def __init__(self, world: World, name: str) -> None:
        self.world, self.name = world, name
        self.loop = _Loop(world)
        self.loop.set_exception_handler(self._unhandled)
        self.stopped = self.dead = False
        self.stops = 0
        self.bus: VirtualBus
        world.processes[name] = self

    def start(self, main: Coroutine[Any, Any, Any]) -> asyncio.Task[Any]:
        task = self.loop.create_task(main)
        task.add_done_callback(self.world.ended)
        return task

    def _unhandled(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if "exception" in context:
            self.world.errors.append(context["exception"])

    def stop(self) -> None:
        """SIGSTOP. Peers that listen close the connections of who does not answer their heartbeats."""
        self.stopped = True
        self.stops += 1
        self.world.later(2 * SILENCE_S, self._unanswered, self.stops)

    def _unanswered(self, stop: int) -> None:
        if self.stopped and self.stops == stop:
            for connection in self.bus.opened():
                if connection.listener is not None and not connection.listener.stopped:
                    connection.cut()

    def soon(self, call: Callable[..., None], *arguments: Any) -> None:
        """It hears of it now, or when it goes on."""
        if not self.dead:
            self.loop.call_soon(call, *arguments)

    def go_on(self) -> None:
        self.stopped = False

    def kill(self) -> None:
        """kill -9: nothing is said; the kernel closes its connections."""
        self.dead = True
        for connection in self.world.connections.values():
            if self in (connection.opener, connection.listener):
                connection.cut()
        self.close()

    def close(self) -> None:
        """End its tasks; those that are new run once before, as whatever they were given expects."""
        for _ in range(CLOSE_ROUNDS):
            while self.loop.run_due():
                pass
            for task in asyncio.all_tasks(self.loop):
                task.cancel()
        self.loop.close()
        self.world.processes.pop(self.name, None)


class World:
    """All processes, the network between them, and the time."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.now = 1000.0
        self.processes: dict[str, Process] = {}
        self.connections: dict[bytes, Connection] = {}  # by the opener's routing id
        self.parted: set[frozenset[str]] = set()  # pairs that do not hear each other
        self._events: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._number = 0
        self.errors: list[BaseException] = []

    def ended(self, task: asyncio.Task[Any]) -> None:
        """Whatever a process raises ends the run."""
        if not task.cancelled() and (error := task.exception()) is not None:
            self.errors.append(error)

    def later(self, delay: float, call: Callable[..., None], *arguments: Any) -> None:
        self._number += 1
        at = round(self.now + delay, 3)  # what comes at one moment is handled at one
        heapq.heappush(self._events, (at, self._number, call, arguments))

    def run_until(self, done: Callable[[], bool], limit_s: float) -> bool:
        """Let time pass until `done`; False when the limit comes first."""
        end = self.now + limit_s
        while not done():
            if self.errors:
                raise self.errors[0]
            if self._run_ready():
                continue
            running = [p.loop.next_due() for p in self.processes.values() if not p.stopped]
            upcoming = min(running, default=float("inf"))
            if self._events and self._events[0][0] <= upcoming:
                upcoming = self._events[0][0]
            if upcoming > end:
                self.now = end
                return done()
            self.now = max(self.now, upcoming)
            while self._events and self._events[0][0] <= self.now:
                _, _, call, arguments = heapq.heappop(self._events)
                call(*arguments)
        return True

    def _time(self) -> float:
        return self.now

    def _run_ready(self) -> bool:
        order = [p for p in self.processes.values() if not p.stopped]
        self.random.shuffle(order)
        ran = [process.loop.run_due() for process in order if not process.dead]
        return any(ran)

    @contextmanager
    def clock(self) -> Iterator[None]:
        with mock.patch("time.monotonic", self._time):
            try:
                yield
            finally:
                for process in list(self.processes.values()):
                    process.close()


class Connection:
    """As TCP: in order both ways until it breaks. What its two ends know of that differs."""

    def __init__(self, opener: Process, listener: Process | None, link: str) -> None:
        """Nobody listens where `listener` is None."""
        self.world = opener.world
        self.opener, self.listener = opener, listener
        self.address = f"{opener.name}/{link}".encode()
        self.link: Link | None = None  # at the opener
        self.closed = False  # by the opener
        self.broken = False
        self._queues: defaultdict[Process, deque[bytes]] = defaultdict(deque)
        self.world.connections[self.address] = self

    def send(self, to: Process, frame: bytes) -> None:
        self._queues[to].append(frame)
        self.world.later(DELAY_S * self.world.random.randint(1, 2), self._arrive, to)

    def _arrive(self, to: Process) -> None:
        """The kernel has it. Where the network is parted it comes when that is over."""
        if self.broken or to.dead:
            return
        assert self.listener is not None
        if frozenset((self.opener.name, self.listener.name)) in self.world.parted:
            self.world.later(0.2, self._arrive, to)
            return
        frame = self._queues[to].popleft()
        to.soon(to.bus.arrived, self, frame)

    def cut(self) -> None:
        """It breaks: what was on its way is lost, and the end that connected is told."""
        if not self.broken:
            self.broken = True
            self.world.later(DELAY_S, self.opener.soon, self.hear_the_end)

    def hear_the_end(self) -> None:
        if self.link is not None and not self.closed:
            self.opener.bus.disconnected(self.link)


class VirtualBus:
    """What common/wire/bus.py is, over `Connection`s."""

    def __init__(self, process: Process) -> None:
        self.process, self.world = process, process.world
        self.incarnation = process.name
        self.endpoint = f"virtual://{process.name}"
        process.bus = self
        self._events: asyncio.Queue[LinkEvent] = asyncio.Queue()
        self._inbox: asyncio.Queue[Received] = asyncio.Queue()
        self._links = LinkTable(
            process.name, SETTINGS, self, progress=lambda: (0, False), say=self._events.put_nowait
        )
        self.counts = self._links.counts

    async def beat(self) -> None:
        while True:
            self._links.tick(time.monotonic(), inbox_full=self._inbox.qsize() >= INBOX)
            await asyncio.sleep(SETTINGS.beat_interval_s)

    def close(self) -> None:
        self._links.close(goodbye=True)

    def connect(self, peer: str, endpoint: str) -> str:
        for link in self._links.with_peer(peer):
            if link.ours:
                return link.id
        link_id = f"{self.world.random.getrandbits(48):012x}"
        listener = self.world.processes.get(endpoint.removeprefix("virtual://"))
        connection = Connection(self.process, listener, link_id)
        connection.link = self._links.open(peer, link_id, time.monotonic(), connection)
        if listener is None:
            connection.cut()
        return link_id

    def opened(self) -> list[Connection]:
        return [link.wire for link in self._links if link.ours]

    def disconnect(self, peer: str) -> None:
        for link in self._links.with_peer(peer):
            self._links.end(link, Down.CLOSED)

    def link(self, peer: str) -> str | None:
        links = self._links.with_peer(peer)
        return links[0].id if links else None

    def peers(self) -> frozenset[str]:
        return frozenset(link.peer for link in self._links if link.up)

    async def next_event(self) -> LinkEvent:
        return await self._events.get()

    async def receive(self) -> Received:
        return await self._inbox.get()

    def send(self, peer: str, message: Message, *, link: str | None = None) -> None:
        for found in self._links.with_peer(peer):
            if link in (None, found.id):
                reason = self.put(found, encode(message))
                if reason is None:
                    return
                self._links.end(found, reason)
                break
        raise LinkLost(f"no link with {peer}", param=peer)

    # Wire.

    def put(self, link: Link, frame: bytes) -> Down | None:
        if link.ours:
            if link.wire.listener is not None:  # else, or when it breaks, its own event says so
                link.wire.send(link.wire.listener, frame)
            return None
        connection = self.world.connections[link.address]
        if connection.broken or connection.closed:
            return Down.DISCONNECTED
        connection.send(connection.opener, frame)
        return None

    def hang_up(self, link: Link) -> None:
        """What was put leaves still, in good time; the listener is told nothing by its kernel."""
        if link.ours:
            link.wire.closed = True

    def arrived(self, connection: Connection, frame: bytes) -> None:
        ours = connection.opener is self.process
        if ours and (connection.closed or connection.link is None):
            return
        message = decode(frame)
        source = connection.link if ours else connection.address
        assert source is not None
        found = self._links.heard(source, message, time.monotonic())
        if found is not None:
            self._inbox.put_nowait(Received(found.peer, found.id, message))

    def disconnected(self, link: Link) -> None:
        self._links.end(link, Down.DISCONNECTED if link.up else Down.UNREACHABLE)
