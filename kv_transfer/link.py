"""The driver: runs both sans-io ends over a bus, copies in threads, and feeds results back.

Owns the links (which peer, which connection of the bus, which transport, which reader) and their
teardown. Decides nothing about a handoff: that is handoff.py and intake.py. All methods belong to
the event loop's thread; only `Reader.pull`, opening and closing run in threads.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import secrets
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Protocol

from common.errors import LinkLost, PdqError
from common.kv_layout import Fingerprint
from common.logs import get_logger
from common.messages import (
    Abort,
    Ack,
    Blocks,
    Commit,
    Deny,
    Grant,
    Hello,
    Message,
    Offer,
    Refuse,
    Release,
    Tail,
    Welcome,
)
from kv_transfer import handshake
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.lease import Leases
from kv_transfer.ports import (
    Adopted,
    Copy,
    Effect,
    Ended,
    Granted,
    IntakePool,
    Send,
    Teardown,
    TransferSettings,
)
from kv_transfer.transports.base import Opener, Reader, Source, Target

log = get_logger("kv")

TRANSFER_MESSAGES: tuple[type[Message], ...] = (
    Hello, Welcome, Refuse, Offer, Grant, Deny, Blocks, Tail, Commit, Ack, Abort, Release,
)  # fmt: skip


class MessageBus(Protocol):
    """What is used of common/bus.py: its links are connections that never come back."""

    def send(
        self, peer: str, message: Message, frames: Sequence[bytes] = (), *, link: str | None = None
    ) -> None:
        """Never waits; `LinkLost` if that link with the peer is down."""

    def link(self, peer: str) -> str | None:
        """The id of the link that a `send` to the peer would take."""

    def disconnect(self, peer: str) -> None: ...


@dataclasses.dataclass(slots=True, eq=False)
class _Link:
    peer: str
    connection: str  # the bus's link under ours
    sending: bool  # we are the handoff side
    transport: str = ""
    reason: str = ""
    reader: Reader | None = None
    blocks: int = 0  # copied here over it
    answer: Welcome | Refuse | None = None  # ours to Hello, to repeat
    opened: asyncio.Future[None] | None = None  # theirs to Hello


class Links:
    """All KV links of one node, in both directions."""

    def __init__(
        self, bus: MessageBus, node: str, fingerprint: Fingerprint, target: Target, *,
        pool: IntakePool, leases: Leases, sources: Iterable[Source], openers: Mapping[str, Opener],
        on_sent: Callable[[Granted | Ended], None],
        on_received: Callable[[Adopted | Ended], None],
        settings: TransferSettings, clock: Callable[[], float] = time.monotonic,
    ) -> None:  # fmt: skip
        """`sources` and `openers`: fastest first. `on_sent` hears of handoffs, `on_received` of
        intakes; both are called on the event loop, and may call back into this object."""
        self.handoff = Handoff(leases, settings)
        self.intake = Intake(pool, fingerprint, settings)
        self.counts: collections.Counter[str] = collections.Counter()
        self._bus, self._node, self._fingerprint, self._target = bus, node, fingerprint, target
        self._leases, self._sources, self._openers = leases, list(sources), dict(openers)
        self._on_sent, self._on_received = on_sent, on_received
        self._settings, self._clock = settings, clock
        self._links: dict[str, _Link] = {}
        self._threads = ThreadPoolExecutor(2, "kv-copy")
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.Task[None] | None = None
        self._closed = False

    # Life

    def start(self) -> None:
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._leases.collect)

        self._leases.wake = wake
        self._timer = loop.create_task(self._timers(), name="kv-timers")

    async def close(self) -> None:
        """Tear every link down, wait for copies to end, and stop. The sources are closed, too.
        What ends by that finds nobody else to go to: no link opens any more."""
        self._closed = True
        for link in list(self._links):
            self._down(link)
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for source in self._sources:
            await asyncio.to_thread(source.close)
        self._threads.shutdown()
        self._leases.collect()

    async def _timers(self) -> None:
        while True:
            await asyncio.sleep(self._settings.repeat / 2)
            self.perform(self.handoff.tick(self._clock()))
            self.perform(self.intake.tick(self._clock()))

    # Links

    async def open(self, peer: str) -> str:
        """A link on which this node can offer to `peer`, which the bus is connected with; its id.

        `FingerprintMismatch` if the peer serves something else, `LinkLost` if it does not answer.
        """
        if self._closed:
            raise LinkLost("this node ends", param=peer)
        connection = self._bus.link(peer)
        if connection is None:
            raise LinkLost(f"no connection with {peer}", param=peer)
        for name, link in self._links.items():
            if link.connection == connection and link.opened is not None:
                await asyncio.shield(link.opened)
                return name
        name = secrets.token_hex(8)
        link = self._links[name] = _Link(peer, connection, sending=True)
        link.opened = asyncio.get_running_loop().create_future()
        wanted = self._settings.transport
        sources = [source for source in self._sources if wanted in ("", source.name)]
        try:
            proofs = {source.name: source.open_link(name) for source in sources}
            self._send(name, handshake.hello(
                name, self._node, self._fingerprint, self._target.memory.slab_bytes, proofs
            ))  # fmt: skip
            await asyncio.wait_for(asyncio.shield(link.opened), self._settings.answer)
        except TimeoutError as error:
            self._down(name)
            raise LinkLost(f"{peer} does not answer", param=peer) from error
        except BaseException:  # whatever it is, nobody may wait for this link
            self._down(name)
            raise
        return name

    def describe(self) -> list[dict[str, str]]:
        """One row per link, for `pdq nodes`. `blocks` were copied: 0 at the side that sends."""
        return [
            {"link": name, "peer": link.peer, "transport": link.transport, "reason": link.reason,
             "direction": "sends" if link.sending else "receives", "blocks": str(link.blocks)}
            for name, link in self._links.items()
        ]  # fmt: skip

    def connection_lost(self, connection: str) -> None:
        """The bus's link of this id is down: so is every KV link over it."""
        for name in [name for name, link in self._links.items() if link.connection == connection]:
            self._down(name)

    def _down(self, name: str) -> None:
        """Tear a link down: leases end as soon as nothing here touches their blocks."""
        link = self._links.pop(name, None)
        if link is None:
            return
        if link.opened is not None and not link.opened.done():
            link.opened.set_exception(LinkLost(f"the link with {link.peer} is down"))
            link.opened.exception()  # somebody may have stopped waiting
        if link.reader is not None:
            self._spawn(asyncio.to_thread(link.reader.close))
        if link.sending:
            for source in self._sources:
                self._spawn(asyncio.to_thread(source.close_link, name))
            self.perform(self.handoff.link_lost(name, now=self._clock()))
        else:
            self.perform(self.intake.link_lost(name, now=self._clock()))

    # Messages

    def receive(self, peer: str, connection: str, message: Message) -> None:
        """A message of TRANSFER_MESSAGES from the bus. One of a link that is not `peer`'s is late."""
        name: str = getattr(message, "link")  # noqa: B009  (all of TRANSFER_MESSAGES have it)
        link = self._links.get(name)
        if isinstance(message, Hello) and link is None:
            self._greeted(peer, connection, message)
        elif link is None or (link.peer, link.connection) != (peer, connection):
            self.counts["late_link"] += 1
        elif isinstance(message, Hello):
            if link.answer is not None:
                self._send(name, link.answer)
        elif isinstance(message, (Welcome, Refuse)):
            self._answered(name, link, message)
        elif link.sending and isinstance(message, (Grant, Deny, Ack, Abort, Release)):
            self.perform(self.handoff.receive(message, now=self._clock()))
        elif not link.sending and isinstance(message, (Offer, Blocks, Tail, Commit, Abort)):
            self.perform(self.intake.receive(message, now=self._clock()))
        else:
            self.counts["wrong_side"] += 1

    def _greeted(self, peer: str, connection: str, hello: Hello) -> None:
        """A new link from `peer`; the link that it used before is over."""
        before = [name for name, link in self._links.items() if link.peer == peer]
        for name in [name for name in before if not self._links[name].sending]:
            self._down(name)
        self._links[hello.link] = _Link(peer, connection, sending=False)
        self._spawn(self._answer(hello))

    async def _answer(self, hello: Hello) -> None:
        answer, reader = await asyncio.to_thread(
            handshake.answer, hello, self._node, self._fingerprint, self._target, self._openers,
            credits=self._settings.credits, forced=self._settings.transport,
        )  # fmt: skip
        link = self._links.get(hello.link)
        if link is None:
            if reader is not None:
                await asyncio.to_thread(reader.close)
            return
        link.answer, link.reader = answer, reader
        if isinstance(answer, Welcome):
            link.transport, link.reason = answer.transport, answer.reason
            self.intake.open_link(hello.link, answer.credits, hello.fingerprint.block_size)
            if converts := handshake.converts_from(hello, self._fingerprint):
                log.info("link.converts", peer=link.peer, link=hello.link, reason=converts)
        self._send(hello.link, answer)

    def _answered(self, name: str, link: _Link, answer: Welcome | Refuse) -> None:
        if not link.sending or link.opened is None or link.opened.done():
            self.counts["late"] += 1
        elif isinstance(answer, Refuse):
            link.opened.set_exception(handshake.mismatch(answer))
        else:
            link.transport, link.reason = answer.transport, answer.reason
            self.handoff.open_link(name, answer.credits)
            link.opened.set_result(None)

    def _send(self, name: str, message: Message) -> None:
        link = self._links.get(name)
        if link is None:
            return
        try:
            self._bus.send(link.peer, message, link=link.connection)
        except LinkLost:
            self._down(name)

    # Effects

    def perform(self, effects: list[Effect]) -> None:
        """Do what an end asks for; call it with what any of their public methods returns."""
        for effect in effects:
            if isinstance(effect, Send):
                self._send(effect.link, effect.message)
            elif isinstance(effect, Copy):
                self._spawn(self._copy(effect))
            elif isinstance(effect, Teardown):
                self.counts["teardown"] += 1
                if (link := self._links.get(effect.link)) is not None:
                    self._bus.disconnect(link.peer)
                    self._down(effect.link)
            elif isinstance(effect, Granted):
                self._on_sent(effect)
            elif isinstance(effect, Adopted):
                self._on_received(effect)
            else:
                (self._on_sent if effect.sending else self._on_received)(effect)

    async def _copy(self, copy: Copy) -> None:
        """Pull in a thread; whatever comes of it is reported, also when the link is gone.

        A reader that has lost its source while the bus still has its peer finds it no more: the
        link is torn down, so that the next handoff opens another one.
        """
        link = self._links.get(copy.key.link)
        error = "internal_error"  # what is not ours to handle fails the attempt, and is raised
        lost = False
        try:
            if link is None or link.reader is None:
                raise LinkLost("the link went down before the copy began")
            loop = asyncio.get_running_loop()
            await loop.run_in_executor(self._threads, link.reader.pull, copy.pieces)
            error = ""
            self.counts["blocks_copied"] += len(copy.pieces)
            link.blocks += len(copy.pieces)
        except PdqError as failure:
            error = failure.code
            self.counts[error] += 1
            lost = isinstance(failure, LinkLost) and link is not None
        finally:
            self.perform(self.intake.copied(copy.number, error, now=self._clock()))
            if lost and self._links.get(copy.key.link) is link:
                self.perform([Teardown(copy.key.link, error)])

    def _spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
