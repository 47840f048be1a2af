"""This node's ends of its KV links: opened, answered, used for copies, torn down.

Owns each end (peer, connection of the bus, transport, source or reader) and the threads that call
transports. Knows no handoff: link.py runs those over the links, and hears of each link that comes up
or goes down. All methods belong to the event loop's thread; threads call only transports (threads.py).

A link has one transport. Opening a link to a peer tries one transport after the other until the peer
welcomes one, and closes a refused one at once.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import secrets
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from typing import Any, Protocol, TypeVar

from common.background import report
from common.errors import LinkLost, PdqError, TransportFailed
from common.kv_layout import Fingerprint
from common.logs import get_logger
from common.wire.message import LinkMessage, Message
from common.wire.messages import Closed, Hello, Refuse, Welcome
from kv_transfer import handshake
from kv_transfer.ports import Piece, TransferSettings
from kv_transfer.threads import Threads
from kv_transfer.transports.base import Opener, Reader, Source, Target

log = get_logger("kv")

FAILED_S = 60.0  # for so long a transport that failed with a peer is taken only where there is no other


class MessageBus(Protocol):
    """The part of common/wire/bus.py that links need. Its links are connections that never come back."""

    def send(self, peer: str, message: Message, *, link: str | None = None) -> None:
        """Never waits; `LinkLost` if that link with the peer is down."""

    def link(self, peer: str) -> str | None:
        """The id of the link that a `send` to the peer would take."""

    def disconnect(self, peer: str) -> None: ...


Transports = tuple[Sequence[Source], Mapping[str, Opener]]
"""Both ends of each transport, fastest first; an opener by its transport's name."""

T = TypeVar("T")


@dataclasses.dataclass(slots=True, eq=False)
class LinkEnd:
    """This node's end of one link."""

    name: str
    peer: str
    connection: str  # the bus's link under ours
    copies: asyncio.Semaphore
    source: Source | None = None  # where we are the handoff side
    transport: str = ""
    reason: str = ""
    reader: Reader | None = None
    bytes_per_token: int = 0  # of what our reader copies
    busy: asyncio.Future[Any] | None = None  # opening this end, in a thread
    answer: Welcome | Refuse | None = None  # ours to Hello, to repeat
    answered: asyncio.Future[Welcome | Refuse] | None = None  # theirs

    @property
    def sending(self) -> bool:
        return self.source is not None


class LinkEnds:
    """The ends of all KV links of one node, in both directions."""

    def __init__(
        self,
        bus: MessageBus,
        node: str,
        fingerprint: Fingerprint,
        target: Target,
        settings: TransferSettings,
        clock: Callable[[], float],
        *,
        sending_up: Callable[[str, int], None],
        receiving_up: Callable[[str, int, Fingerprint], None],
        down: Callable[[LinkEnd], None],
    ) -> None:
        """`sending_up` hears of a link on which this node may offer: its name and credits.
        `receiving_up` hears of one on which the peer may: its name, credits, and the peer's fingerprint.
        `down` hears of every end that is torn down, up or not."""
        self.counts: collections.Counter[str] = collections.Counter()
        self._bus, self._node, self._fingerprint, self._target = bus, node, fingerprint, target
        self._settings, self._clock = settings, clock
        self._sending_up, self._receiving_up, self._down = sending_up, receiving_up, down
        self._sources: Sequence[Source] = ()
        self._openers: Mapping[str, Opener] = {}
        self._ends: dict[str, LinkEnd] = {}
        self._opening: dict[str, asyncio.Task[str]] = {}  # by connection
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._failed: dict[tuple[str, str], tuple[float, str]] = {}  # peer, transport → until, why
        self._threads = Threads(settings.copies)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._closed = False

    # Life

    def start(self, transports: Transports) -> None:
        self._sources, self._openers = transports

    async def close(self) -> None:
        """Tear down every link, wait for all tasks to end, and close the sources. No link opens after
        this begins."""
        self._closed = True
        for name in list(self._ends):
            self._tear_down(name)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for source in self._sources:
            await self._threads.close(source.name, source.close)
        self._threads.end()

    def spawn(self, coroutine: Coroutine[object, object, T]) -> asyncio.Task[T]:
        """Start a task that `close` waits for. The loop hears of an error that is none of ours."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if task.cancelled() or not isinstance(task.exception(), PdqError):
            report(task)

    # What there is

    def get(self, name: str) -> LinkEnd | None:
        return self._ends.get(name)

    def find(self, name: str, peer: str, connection: str) -> LinkEnd | None:
        """The end of the link that a message names. None, counted, for a message that is late: the link
        is down, or is not `peer`'s."""
        end = self._ends.get(name)
        if end is None or (end.peer, end.connection) != (peer, connection):
            self.counts["late_link"] += 1
            return None
        return end

    @property
    def transports(self) -> tuple[str, ...]:
        """What this node has of them, fastest first."""
        return tuple(self._openers)

    def describe(self) -> list[dict[str, str]]:
        """One row per link, for `pdq nodes`; a row changes with its link only."""
        return [
            {
                "link": end.name,
                "peer": end.peer,
                "transport": end.transport,
                "reason": end.reason,
                "direction": "sends" if end.sending else "receives",
            }
            for end in self._ends.values()
        ]

    # Opening: the handoff side

    async def open(self, peer: str) -> str:
        """Return the id of a link on which this node can offer to `peer`, a peer of the bus.

        `FingerprintMismatch` if the peer serves something else, or has no transport in common,
        `LinkLost` if it does not answer or none can be opened. A caller that is cancelled leaves the
        link to the others, and to the next.
        """
        if self._closed:
            raise LinkLost("this node ends", param=peer)
        connection = self._bus.link(peer)
        if connection is None:
            raise LinkLost(f"no connection with {peer}", param=peer)
        for end in self._ends.values():
            if end.connection == connection and end.sending and end.transport:
                return end.name
        opening = self._opening.get(connection)
        if opening is None:
            opening = self._opening[connection] = self.spawn(self._open(peer, connection))
            opening.add_done_callback(lambda _: self._opening.pop(connection, None))
        return await asyncio.shield(opening)

    async def _open(self, peer: str, connection: str) -> str:
        tried: list[str] = []
        refusal: Refuse | None = None
        for index, source in enumerate(self._sources):
            end = self._add(secrets.token_hex(8), peer, connection, source)
            then = [other.name for other in self._sources[index + 1 :]]
            try:
                answer = await self._say_hello(end, source, then, tried)
            except _CannotOpen as failure:
                tried.append(f"{source.name}: {failure}")
                self._tear_down(end.name)
                continue
            except BaseException:  # after any error nobody may wait for this link, at either end
                self.send(end.name, Closed(end.name))
                self._tear_down(end.name)
                raise
            if isinstance(answer, Welcome):
                return end.name
            self._tear_down(end.name)
            if answer.field != "transport":
                raise handshake.mismatch(answer)
            refusal = answer
            tried.append(answer.yours)
        why = "; ".join(tried) or "this node has none"
        if refusal is not None:
            raise handshake.mismatch(dataclasses.replace(refusal, yours=why))
        raise LinkLost(f"no transport to {peer} can be opened: {why}", param=peer)

    def _add(self, name: str, peer: str, connection: str, source: Source | None = None) -> LinkEnd:
        copies = asyncio.Semaphore(self._settings.copies_per_link)
        end = self._ends[name] = LinkEnd(name, peer, connection, copies, source)
        return end

    async def _say_hello(
        self, end: LinkEnd, source: Source, then: Sequence[str], tried: Sequence[str]
    ) -> Welcome | Refuse:
        """Open our end of one transport, and ask the peer to open its own. `_CannotOpen` if ours
        cannot be, `LinkLost` if the link goes down meanwhile."""
        end.answered = asyncio.get_running_loop().create_future()
        opening = end.busy = self._threads.open(source.name, source.open_link, end.name)
        try:
            proof = await opening
        except PdqError as error:
            self._require_up(end)
            raise _CannotOpen(str(error)) from error
        self._require_up(end)
        slab_bytes = self._target.memory.slab_bytes
        hello = handshake.hello(
            end.name, self._node, self._fingerprint, slab_bytes, {source.name: proof}, then=then, tried=tried
        )
        self.send(end.name, hello)
        try:
            return await asyncio.wait_for(asyncio.shield(end.answered), self._settings.answer)
        except TimeoutError as error:
            raise LinkLost(f"{end.peer} does not answer", param=end.peer) from error

    def _require_up(self, end: LinkEnd) -> None:
        if self._ends.get(end.name) is not end:
            raise LinkLost(f"the link with {end.peer} is down", param=end.peer)

    # Messages about links

    def receive(self, peer: str, connection: str, message: LinkMessage) -> None:
        if isinstance(message, Hello) and message.link not in self._ends:
            self._receive_hello(peer, connection, message)
        elif (end := self.find(message.link, peer, connection)) is None:
            pass
        elif isinstance(message, Hello):
            if end.answer is not None:
                self.send(end.name, end.answer)
        elif isinstance(message, (Welcome, Refuse)):
            self._receive_answer(end, message)
        elif isinstance(message, Closed) and not end.sending:
            self._tear_down(end.name)
        else:
            self.counts["wrong_side"] += 1

    def _receive_hello(self, peer: str, connection: str, hello: Hello) -> None:
        """Open a new link from `peer`, and end the link that it used before."""
        if self._closed:
            return
        for before in [end for end in self._ends.values() if end.peer == peer and not end.sending]:
            self._tear_down(before.name)
        self.spawn(self._answer_hello(self._add(hello.link, peer, connection), hello))

    async def _answer_hello(self, end: LinkEnd, hello: Hello) -> None:
        """Open our end, one link at a time for each peer. The peer always gets an answer."""
        async with self._turns.setdefault(end.peer, asyncio.Lock()):
            if self._ends.get(end.name) is not end:
                return
            answering = functools.partial(
                handshake.answer,
                hello,
                self._node,
                self._fingerprint,
                self._target,
                self._openers,
                credits=self._settings.credits,
                failed=self._recent_failures(end.peer),
            )
            end.busy = self._threads.open("handshake", answering)
            try:
                answer, end.reader = await end.busy
            except PdqError as error:
                mine = ",".join(self._openers)
                answer = handshake.no_transport(hello, self._node, mine, str(error))
        if isinstance(answer, Welcome):
            end.transport, end.reason = answer.transport, answer.reason
        if self._ends.get(end.name) is not end:
            await self._close(end)
            return
        end.answer = answer
        if isinstance(answer, Welcome):
            received = handshake.target_for(hello, self._fingerprint, self._target)
            end.bytes_per_token = received.layout.bytes_per_token
            self._receiving_up(end.name, answer.credits, hello.fingerprint)
            if remarks := handshake.remarks(hello, self._fingerprint):
                log.info("link.differs", peer=end.peer, link=end.name, reason="; ".join(remarks))
        self.send(end.name, answer)

    def _recent_failures(self, peer: str) -> dict[str, str]:
        """Transports that failed with this peer recently, and how."""
        now = self._clock()
        for key in [key for key, (until, _) in self._failed.items() if until <= now]:
            del self._failed[key]
        return {name: why for (whose, name), (_, why) in self._failed.items() if whose == peer}

    def _receive_answer(self, end: LinkEnd, answer: Welcome | Refuse) -> None:
        if end.answered is None or end.answered.done():
            self.counts["late"] += 1
            return
        if isinstance(answer, Welcome):
            end.transport, end.reason = answer.transport, answer.reason
            self._sending_up(end.name, answer.credits)
        end.answered.set_result(answer)

    # Use

    def send(self, name: str, message: Message) -> None:
        """Send over a link. One that cannot send is torn down; one that is down sends nothing."""
        end = self._ends.get(name)
        if end is None:
            return
        try:
            self._bus.send(end.peer, message, link=end.connection)
        except LinkLost:
            self._tear_down(name)

    async def pull(self, end: LinkEnd, pieces: Sequence[Piece]) -> None:
        """Copy pieces in a thread. A copy that takes too long ends with its link, even if bytes still
        arrive. A transport that fails is not the first choice of the next link with the peer."""
        reader = end.reader
        if reader is None:
            raise LinkLost("the link went down before the copy began")
        async with end.copies, self._threads.copies:
            pulling = self._threads.pull(end.transport, reader, pieces)
            done, _ = await asyncio.wait({pulling}, timeout=self._settings.copy)
            if not done:
                log.warning("copy.too_slow", peer=end.peer, blocks=len(pieces))
                self.give_up(end)
            try:
                await pulling
            except TransportFailed as failure:
                self._failed[end.peer, end.transport] = self._clock() + FAILED_S, str(failure)
                raise

    # The end of a link

    def give_up(self, end: LinkEnd) -> None:
        """Tear down a link with the connection under it, unless it is down."""
        if self._ends.get(end.name) is end:
            self.counts["teardown"] += 1
            self._bus.disconnect(end.peer)
            self._tear_down(end.name)

    def connection_lost(self, connection: str) -> None:
        """Tear down every link over the bus's link of this id, which is down."""
        for name in [end.name for end in self._ends.values() if end.connection == connection]:
            self._tear_down(name)

    def _tear_down(self, name: str) -> None:
        end = self._ends.pop(name, None)
        if end is None:
            return
        if end.answered is not None and not end.answered.done():
            end.answered.set_exception(LinkLost(f"the link with {end.peer} is down"))
            end.answered.exception()  # somebody may have stopped waiting
        self.spawn(self._close(end))
        self._down(end)

    async def _close(self, end: LinkEnd) -> None:
        """Close an end whose link is down, after any call that opens it has ended."""
        if end.busy is not None:
            await asyncio.wait({end.busy})
        reader, end.reader = end.reader, None
        if reader is not None:
            await self._threads.close(end.transport, reader.close)
        if end.source is not None:
            await self._threads.close(end.source.name, end.source.close_link, end.name)


class _CannotOpen(Exception):
    """This end of a transport cannot be opened; the next transport may work."""
