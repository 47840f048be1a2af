"""The driver of both ends: runs them over a bus, copies in threads, and reports the results to them.

Owns the links (peer, connection of the bus, transport, reader) and their teardown. Decides nothing about
a handoff: handoff.py and intake.py do. All methods belong to the event loop's thread; threads call only
transports (threads.py).

A link has one transport. Opening a link to a peer tries one transport after the other until the peer
welcomes one, and closes a refused one at once.
"""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import functools
import secrets
import time
import weakref
from collections.abc import Callable, Coroutine, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, Protocol, TypeVar

from common.errors import LinkLost, PdqError, TransportFailed
from common.kv_layout import Fingerprint
from common.logs import get_logger
from common.wire.messages import (
    Abort,
    Ack,
    Blocks,
    Closed,
    Commit,
    Deny,
    Grant,
    HandoffKey,
    HandoffMessage,
    Hello,
    LinkMessage,
    Message,
    Offer,
    Refuse,
    Release,
    Tail,
    TokenLogprobs,
    Welcome,
)
from kv_transfer import handshake
from kv_transfer.handoff import Handoff
from kv_transfer.intake import Intake
from kv_transfer.lease import Leases
from kv_transfer.ports import (
    Adopted,
    ContinueCheck,
    Copy,
    Effect,
    Ended,
    Granted,
    IntakePool,
    Outcome,
    Piece,
    ReadyBlock,
    Send,
    Teardown,
    TransferSettings,
)
from kv_transfer.threads import Threads
from kv_transfer.transports.base import Opener, Reader, Source, Target

log = get_logger("kv")

FAILED_S = 60.0  # so long a transport that failed with a peer is taken only where there is no other


class MessageBus(Protocol):
    """The part of common/wire/bus.py that links need. Its links are connections that never come back."""

    def send(self, peer: str, message: Message, *, link: str | None = None) -> None:
        """Never waits; `LinkLost` if that link with the peer is down."""

    def link(self, peer: str) -> str | None:
        """The id of the link that a `send` to the peer would take."""

    def disconnect(self, peer: str) -> None: ...


Transports = tuple[Sequence[Source], Mapping[str, Opener]]
"""Both ends of each transport, fastest first; an opener by its transport's name."""

HandoffListener = Callable[[Granted | Ended], None]

T = TypeVar("T")


@dataclasses.dataclass(slots=True, eq=False)
class _Link:
    peer: str
    connection: str  # the bus's link under ours
    copies: asyncio.Semaphore
    source: Source | None = None  # where we are the handoff side
    transport: str = ""
    reason: str = ""
    reader: Reader | None = None
    busy: asyncio.Future[Any] | None = None  # opening this end, in a thread
    answer: Welcome | Refuse | None = None  # ours to Hello, to repeat
    answered: asyncio.Future[Welcome | Refuse] | None = None  # theirs

    @property
    def sending(self) -> bool:
        return self.source is not None


class Links:
    """All KV links of one node, in both directions."""

    def __init__(
        self,
        bus: MessageBus,
        node: str,
        fingerprint: Fingerprint,
        target: Target,
        *,
        pool: IntakePool,
        leases: Leases,
        make_transports: Callable[[], Transports],
        on_arrival: Callable[[Adopted], None],
        on_intake_ended: Callable[[Ended], None],
        settings: TransferSettings,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`make_transports` is called at the start. `on_arrival` hears of each sequence that is
        here with its KV, `on_intake_ended` of each intake that ended otherwise, which may have freed
        room. Like the listeners of handoffs they are called on the event loop, and may call back."""
        self._handoff = Handoff(leases, settings)
        self._intake = Intake(pool, fingerprint, settings)
        self.counts: collections.Counter[str] = collections.Counter()
        self.ended: collections.Counter[tuple[str, ...]] = collections.Counter()
        """Handoffs and intakes that ended, by end, transport and outcome."""
        self.received_blocks: collections.Counter[str] = collections.Counter()  # by transport
        self.received_bytes: collections.Counter[str] = collections.Counter()
        self._bus, self._node, self._fingerprint, self._target = bus, node, fingerprint, target
        self._leases, self._make_transports = leases, make_transports
        self._sources: Sequence[Source] = ()
        self._openers: Mapping[str, Opener] = {}
        self._on_arrival, self._on_intake_ended = on_arrival, on_intake_ended
        self._listeners: dict[HandoffKey, HandoffListener] = {}
        self._settings, self._clock = settings, clock
        self._links: dict[str, _Link] = {}
        self._opening: dict[str, asyncio.Task[str]] = {}  # by connection
        self._turns: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._failed: dict[tuple[str, str], tuple[float, str]] = {}  # peer, transport → until, why
        self._threads = Threads(settings.copies)
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timer: asyncio.Task[None] | None = None
        self._closed = False

    # Life

    def start(self) -> None:
        """Make the transports; raises what that raises."""
        self._sources, self._openers = self._make_transports()
        loop = asyncio.get_running_loop()

        def wake() -> None:
            loop.call_soon_threadsafe(self._leases.collect)

        self._leases.wake = wake
        self._timer = loop.create_task(self._timers(), name="kv-timers")

    async def close(self) -> None:
        """Tear down every link, wait for copies to end, and close the sources. No link opens after
        this, so a handoff that ends here is not offered to another node."""
        self._closed = True
        for link in list(self._links):
            self._tear_down(link)
        if self._timer is not None:
            self._timer.cancel()
            await asyncio.gather(self._timer, return_exceptions=True)
        while self._tasks:
            await asyncio.gather(*self._tasks, return_exceptions=True)
        for source in self._sources:
            await self._threads.close(source.name, source.close)
        self._threads.end()
        self._leases.collect()

    async def _timers(self) -> None:
        while True:
            await asyncio.sleep(self._settings.repeat / 2)
            self._perform(self._handoff.tick(self._clock()))
            self._perform(self._intake.tick(self._clock()))

    # Links

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
        for name, link in self._links.items():
            if link.connection == connection and link.sending and link.transport:
                return name
        opening = self._opening.get(connection)
        if opening is None:
            opening = self._opening[connection] = self._spawn(self._open(peer, connection))
            opening.add_done_callback(lambda _: self._opening.pop(connection, None))
        return await asyncio.shield(opening)

    async def _open(self, peer: str, connection: str) -> str:
        wanted = self._settings.transport
        sources = [source for source in self._sources if wanted in ("", source.name)]
        tried: list[str] = []
        refusal: Refuse | None = None
        for index, source in enumerate(sources):
            name = secrets.token_hex(8)
            link = self._links[name] = _Link(peer, connection, self._copy_permits(), source)
            then = [other.name for other in sources[index + 1 :]]
            try:
                answer = await self._say_hello(name, link, source, then, tried)
            except _CannotOpen as failure:
                tried.append(f"{source.name}: {failure}")
                self._tear_down(name)
                continue
            except BaseException:  # whatever it is, nobody may wait for this link, at either end
                self._send(name, Closed(name))
                self._tear_down(name)
                raise
            if isinstance(answer, Welcome):
                return name
            self._tear_down(name)
            if answer.field != "transport":
                raise handshake.mismatch(answer)
            refusal = answer
            tried.append(answer.yours)
        why = "; ".join(tried) or "this node has none"
        if refusal is not None:
            raise handshake.mismatch(dataclasses.replace(refusal, yours=why))
        raise LinkLost(f"no transport to {peer} can be opened: {why}", param=peer)

    async def _say_hello(
        self, name: str, link: _Link, source: Source, then: Sequence[str], tried: Sequence[str]
    ) -> Welcome | Refuse:
        """Open our end of one transport, and ask the peer to open its own. `_CannotOpen` if ours
        cannot be, `LinkLost` if the link goes down meanwhile."""
        link.answered = asyncio.get_running_loop().create_future()
        opening = link.busy = self._threads.open(source.name, source.open_link, name)
        try:
            proof = await opening
        except PdqError as error:
            self._require_open(name, link)
            raise _CannotOpen(str(error)) from error
        self._require_open(name, link)
        self._send(
            name,
            handshake.hello(
                name,
                self._node,
                self._fingerprint,
                self._target.memory.slab_bytes,
                {source.name: proof},
                then=then,
                tried=tried,
            ),
        )
        try:
            return await asyncio.wait_for(asyncio.shield(link.answered), self._settings.answer)
        except TimeoutError as error:
            raise LinkLost(f"{link.peer} does not answer", param=link.peer) from error

    def _require_open(self, name: str, link: _Link) -> None:
        if self._links.get(name) is not link:
            raise LinkLost(f"the link with {link.peer} is down", param=link.peer)

    def _copy_permits(self) -> asyncio.Semaphore:
        return asyncio.Semaphore(self._settings.copies_per_link)

    @property
    def transports(self) -> tuple[str, ...]:
        """What this node has of them, fastest first."""
        return tuple(self._openers)

    def describe(self) -> list[dict[str, str]]:
        """One row per link, for `pdq nodes`; a row changes with its link only."""
        return [
            {
                "link": name,
                "peer": link.peer,
                "transport": link.transport,
                "reason": link.reason,
                "direction": "sends" if link.sending else "receives",
            }
            for name, link in self._links.items()
        ]

    def events(self) -> dict[tuple[str, ...], int]:
        """How often links and handoffs met with what is not the usual way, by end (`link`: of neither)
        and event."""
        counts = {"link": self.counts, "handoff": self._handoff.counts, "intake": self._intake.counts}
        return {(end, event): n for end, of_one in counts.items() for event, n in of_one.items()}

    def connection_lost(self, connection: str) -> None:
        """Tear down every KV link over the bus's link of this id, which is down."""
        for name in [name for name, link in self._links.items() if link.connection == connection]:
            self._tear_down(name)

    def _tear_down(self, name: str) -> None:
        """Tear down a link. Its leases end as soon as nothing here touches their blocks."""
        link = self._links.pop(name, None)
        if link is None:
            return
        if link.answered is not None and not link.answered.done():
            link.answered.set_exception(LinkLost(f"the link with {link.peer} is down"))
            link.answered.exception()  # somebody may have stopped waiting
        self._spawn(self._close_end(name, link))
        if link.sending:
            self._perform(self._handoff.link_lost(name, now=self._clock()), link)
        else:
            self._perform(self._intake.link_lost(name, now=self._clock()), link)

    async def _close_end(self, name: str, link: _Link) -> None:
        """Close this end of a link that is down, after any call that opens it has ended."""
        if link.busy is not None:
            await asyncio.wait({link.busy})
        reader, link.reader = link.reader, None
        if reader is not None:
            await self._threads.close(link.transport, reader.close)
        if link.source is not None:
            await self._threads.close(link.source.name, link.source.close_link, name)

    # Handoffs, which this node sends

    def offer(self, offer: Offer, listener: HandoffListener, *, waited: float = 0.0) -> None:
        """Ask for room at the other end of the offer's link, for a request that has waited so many
        seconds. `listener` hears when it is granted and, last, how the handoff ended, perhaps
        before this returns. `LinkLost` if the link is down: then it hears nothing."""
        if offer.link not in self._links:
            raise LinkLost("the link went down since it was opened", param=offer.link)
        self._listeners[offer.key] = listener
        self._perform(self._handoff.offer(offer, now=self._clock(), waited=waited))

    def announce(self, key: HandoffKey, blocks: Sequence[ReadyBlock]) -> None:
        """Announce blocks that are computed, and lie still until the handoff has ended."""
        self._perform(self._handoff.ready(key, blocks, now=self._clock()))

    def commit(
        self, key: HandoffKey, *, position: int, first_token: int, logprobs: TokenLogprobs | None
    ) -> None:
        """All blocks are announced: have the other end go on with this token, at this position."""
        self._perform(
            self._handoff.finished(
                key, position=position, first_token=first_token, logprobs=logprobs, now=self._clock()
            )
        )

    def cancel(self, key: HandoffKey, reason: str) -> None:
        """Withdraw a handoff. Its listener hears the end, which may be that it was adopted."""
        self._perform(self._handoff.cancel(key, reason, now=self._clock()))

    def handoffs(self) -> AbstractSet[HandoffKey]:
        """Those that have not ended."""
        return self._handoff.states().keys()

    # Intakes, which this node receives

    def intakes(self) -> AbstractSet[HandoffKey]:
        """Those that have not ended, those included that a lost link left behind."""
        return self._intake.states().keys()

    def refuse(self, wanted: Callable[[Offer], bool], reason: str) -> None:
        """Withdraw from the intakes of these offers."""
        for key, offer in self._intake.offered().items():
            if wanted(offer):
                self._perform(self._intake.cancel(key, reason, now=self._clock()))

    def room_changed(self) -> None:
        """Look whether an offer that waits has room now."""
        self._perform(self._intake.room_changed(self._clock()))

    def drain(self) -> None:
        """Deny what was not granted yet, and every offer from now on."""
        self._perform(self._intake.drain(self._clock()))

    # Messages

    def receive(self, peer: str, connection: str, message: LinkMessage | HandoffMessage) -> None:
        """Handle a message from the bus. It is late if its link is not `peer`'s."""
        name = message.link
        link = self._links.get(name)
        if isinstance(message, Hello) and link is None:
            self._receive_hello(peer, connection, message)
        elif link is None or (link.peer, link.connection) != (peer, connection):
            self.counts["late_link"] += 1
        elif isinstance(message, Hello):
            if link.answer is not None:
                self._send(name, link.answer)
        elif isinstance(message, (Welcome, Refuse)):
            self._receive_answer(name, link, message)
        elif not link.sending and isinstance(message, Closed):
            self._tear_down(name)
        elif link.sending and isinstance(message, (Grant, Deny, Ack, Abort, Release)):
            self._perform(self._handoff.receive(message, now=self._clock()))
        elif not link.sending and isinstance(message, (Offer, Blocks, Tail, Commit, Abort)):
            self._perform(self._intake.receive(message, now=self._clock()))
        else:
            self.counts["wrong_side"] += 1

    def _receive_hello(self, peer: str, connection: str, hello: Hello) -> None:
        """Open a new link from `peer`, and end the link that it used before."""
        if self._closed:
            return
        before = [name for name, link in self._links.items() if link.peer == peer]
        for name in [name for name in before if not self._links[name].sending]:
            self._tear_down(name)
        link = self._links[hello.link] = _Link(peer, connection, self._copy_permits())
        self._spawn(self._answer_hello(link, hello))

    async def _answer_hello(self, link: _Link, hello: Hello) -> None:
        """Open our end, one link at a time for each peer. The peer always gets an answer."""
        async with self._turns.setdefault(link.peer, asyncio.Lock()):
            if self._links.get(hello.link) is not link:
                return
            answering = functools.partial(
                handshake.answer,
                hello,
                self._node,
                self._fingerprint,
                self._target,
                self._openers,
                credits=self._settings.credits,
                forced=self._settings.transport,
                failed=self._recent_failures(link.peer),
            )
            link.busy = self._threads.open("handshake", answering)
            try:
                answer, link.reader = await link.busy
            except PdqError as error:
                mine = ",".join(self._openers)
                answer = handshake.no_transport(hello, self._node, mine, str(error))
        if isinstance(answer, Welcome):
            link.transport, link.reason = answer.transport, answer.reason
        if self._links.get(hello.link) is not link:
            await self._close_end(hello.link, link)
            return
        link.answer = answer
        if isinstance(answer, Welcome):
            self._intake.open_link(hello.link, answer.credits, hello.fingerprint.block_size)
            if converts := handshake.converts_from(hello, self._fingerprint):
                log.info("link.converts", peer=link.peer, link=hello.link, reason=converts)
        self._send(hello.link, answer)

    def _recent_failures(self, peer: str) -> dict[str, str]:
        """Transports that failed with this peer recently, and how."""
        now = self._clock()
        for key in [key for key, (until, _) in self._failed.items() if until <= now]:
            del self._failed[key]
        return {name: why for (whose, name), (_, why) in self._failed.items() if whose == peer}

    def _receive_answer(self, name: str, link: _Link, answer: Welcome | Refuse) -> None:
        if link.answered is None or link.answered.done():
            self.counts["late"] += 1
            return
        if isinstance(answer, Welcome):
            link.transport, link.reason = answer.transport, answer.reason
            self._handoff.open_link(name, answer.credits)
        link.answered.set_result(answer)

    def _send(self, name: str, message: Message) -> None:
        link = self._links.get(name)
        if link is None:
            return
        try:
            self._bus.send(link.peer, message, link=link.connection)
        except LinkLost:
            self._tear_down(name)

    # Effects

    def _perform(self, effects: list[Effect], of: _Link | None = None) -> None:
        """Perform the effects that a method of either end returned. `of`: the link that they are of,
        where that may be down."""
        for effect in effects:
            if isinstance(effect, (Adopted, Ended)):
                self._count_end(effect, of or self._links.get(effect.key.link))
            if isinstance(effect, Send):
                self._send(effect.link, effect.message)
            elif isinstance(effect, Copy):
                self._spawn(self._copy(effect))
            elif isinstance(effect, ContinueCheck):
                asyncio.get_running_loop().call_soon(self._continue_check)
            elif isinstance(effect, Teardown):
                self.counts["teardown"] += 1
                if (link := self._links.get(effect.link)) is not None:
                    self._bus.disconnect(link.peer)
                    self._tear_down(effect.link)
            elif isinstance(effect, Granted):
                self._listeners[effect.key](effect)
            elif isinstance(effect, Adopted):
                self._on_arrival(effect)
            elif effect.sending:
                self._listeners.pop(effect.key)(effect)
            else:
                self._on_intake_ended(effect)

    def _count_end(self, effect: Adopted | Ended, link: _Link | None) -> None:
        sending = isinstance(effect, Ended) and effect.sending
        outcome = effect.outcome if isinstance(effect, Ended) else Outcome.ADOPTED
        transport = link.transport if link is not None else ""
        self.ended["handoff" if sending else "intake", transport, outcome.value] += 1

    def _continue_check(self) -> None:
        self._perform(self._intake.continue_check(self._clock()))

    async def _copy(self, copy: Copy) -> None:
        """Pull in a thread, and report the result even when the link is gone.

        A reader that has lost its source while the bus still has its peer finds it no more: the
        link is torn down, so that the next handoff opens another one.
        """
        link = self._links.get(copy.key.link)
        error = "internal_error"  # what is not ours to handle fails the attempt, and is raised
        lost = False
        try:
            if link is None or link.reader is None:
                raise LinkLost("the link went down before the copy began")
            async with link.copies, self._threads.copies:
                await self._pull(link, link.reader, copy)
            error = ""
            self.received_blocks[link.transport] += len(copy.pieces)
            self.received_bytes[link.transport] += sum(map(self._size_of, copy.pieces))
        except PdqError as failure:
            error = failure.code
            self.counts[error] += 1
            lost = isinstance(failure, LinkLost) and link is not None
            if isinstance(failure, TransportFailed) and link is not None:
                until = self._clock() + FAILED_S
                self._failed[link.peer, link.transport] = until, str(failure)
        finally:
            self._perform(self._intake.copied(copy.number, error, now=self._clock()), link)
            if lost and self._links.get(copy.key.link) is link:
                self._perform([Teardown(copy.key.link, error)])

    def _size_of(self, piece: Piece) -> int:
        """Bytes of KV that a piece brought."""
        block_size = self._fingerprint.block_size
        filled = sum(span.length for span in piece.spans) or piece.fill or block_size
        return self._target.memory.slab_bytes * filled // block_size

    async def _pull(self, link: _Link, reader: Reader, copy: Copy) -> None:
        """Run a pull. One that takes too long ends with its link, even if bytes still arrive."""
        pulling = self._threads.pull(link.transport, reader, copy.pieces)
        done, _ = await asyncio.wait({pulling}, timeout=self._settings.copy)
        if not done:
            log.warning("copy.too_slow", peer=link.peer, blocks=len(copy.pieces))
            if self._links.get(copy.key.link) is link:
                self._perform([Teardown(copy.key.link, "too slow")])
        await pulling

    def _spawn(self, coroutine: Coroutine[object, object, T]) -> asyncio.Task[T]:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._log_failure)
        return task

    def _log_failure(self, task: asyncio.Task[Any]) -> None:
        """Log the error of a task that nobody awaits."""
        self._tasks.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is not None and not isinstance(error, PdqError):
            log.error("kv.task_failed", exc_info=error)


class _CannotOpen(Exception):
    """This end of a transport cannot be opened; the next transport may work."""
