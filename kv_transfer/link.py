"""The driver of both ends: runs them over links, and reports the results of copies to them.

Owns the clock's ticks, the listeners, and what is counted. Decides nothing about a handoff: handoff.py
and intake.py do; nor about a link: link_ends.py does. All methods belong to the event loop's thread.
"""

from __future__ import annotations

import asyncio
import collections
import time
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet

from common.background import report
from common.errors import LinkLost, PdqError
from common.kv_layout import Fingerprint
from common.wire.message import HandoffKey, HandoffMessage, LinkMessage
from common.wire.messages import Offer, TokenLogprobs
from kv_transfer import handoff, intake
from kv_transfer.lease import Leases
from kv_transfer.link_ends import LinkEnd, LinkEnds, MessageBus, Transports
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
from kv_transfer.transports.base import Target

HandoffListener = Callable[[Granted | Ended], None]


class Links:
    """All KV links of one node, with the handoffs and intakes on them, in both directions."""

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
        self._handoff = handoff.Handoff(leases, settings)
        self._intake = intake.Intake(pool, fingerprint, settings)
        self._ends = LinkEnds(
            bus,
            node,
            fingerprint,
            target,
            settings,
            clock,
            sending_up=self._handoff.open_link,
            receiving_up=self._intake.open_link,
            down=self._link_down,
        )
        self.counts = self._ends.counts
        self.ended: collections.Counter[tuple[str, ...]] = collections.Counter()
        """Handoffs and intakes that ended, by end, transport and outcome."""
        self.received_blocks: collections.Counter[str] = collections.Counter()  # by transport
        self.received_bytes: collections.Counter[str] = collections.Counter()
        self._block_size = fingerprint.block_size
        self._leases, self._make_transports = leases, make_transports
        self._on_arrival, self._on_intake_ended = on_arrival, on_intake_ended
        self._listeners: dict[HandoffKey, HandoffListener] = {}
        self._settings, self._clock = settings, clock
        self._timer: asyncio.Task[None] | None = None

    # Life

    def start(self) -> None:
        """Make the transports; raises what that raises."""
        self._ends.start(self._make_transports())
        loop = asyncio.get_running_loop()
        self._leases.wake = lambda: loop.call_soon_threadsafe(self._leases.collect)
        self._timer = loop.create_task(self._timers(), name="kv-timers")
        self._timer.add_done_callback(report)

    async def close(self) -> None:
        """Tear down every link, and wait for copies to end. No link opens after this, so a handoff that
        ends here is not offered to another node."""
        if self._timer is not None:
            self._timer.cancel()
        await self._ends.close()
        self._leases.collect()

    async def _timers(self) -> None:
        while True:
            await asyncio.sleep(self._settings.repeat / 2)
            self._perform(self._handoff.tick(self._clock()))
            self._perform(self._intake.tick(self._clock()))

    # Links

    async def open(self, peer: str) -> str:
        """Return the id of a link on which this node can offer to `peer`; see `LinkEnds.open`."""
        return await self._ends.open(peer)

    @property
    def transports(self) -> tuple[str, ...]:
        """What this node has of them, fastest first."""
        return self._ends.transports

    def describe(self) -> list[dict[str, str]]:
        """One row per link, for `pdq nodes`; a row changes with its link only."""
        return self._ends.describe()

    def events(self) -> dict[tuple[str, ...], int]:
        """Counts of what is unusual, by end (`link` for neither) and event."""
        counts = {"link": self.counts, "handoff": self._handoff.counts, "intake": self._intake.counts}
        return {(end, event): n for end, of_one in counts.items() for event, n in of_one.items()}

    def connection_lost(self, connection: str) -> None:
        """Tear down every KV link over the bus's link of this id, which is down."""
        self._ends.connection_lost(connection)

    def _link_down(self, end: LinkEnd) -> None:
        """A link was torn down. Its leases end as soon as nothing here touches their blocks."""
        side = self._handoff if end.sending else self._intake
        self._perform(side.link_lost(end.name, now=self._clock()), end)

    # Handoffs, which this node sends

    def offer(self, offer: Offer, listener: HandoffListener, *, waited: float = 0.0) -> None:
        """Ask for room at the other end of the offer's link, for a request that has waited so many
        seconds. `listener` hears when it is granted and, last, how the handoff ended, perhaps
        before this returns. `LinkLost` if the link is down: then it hears nothing."""
        if self._ends.get(offer.link) is None:
            raise LinkLost("the link went down since it was opened", param=offer.link)
        self._listeners[offer.key] = listener
        self._perform(self._handoff.offer(offer, now=self._clock(), waited=waited))

    def announce(self, key: HandoffKey, blocks: Sequence[ReadyBlock]) -> None:
        """Announce blocks that are computed, and lie still until the handoff has ended."""
        self._perform(self._handoff.ready(key, blocks, now=self._clock()))

    def commit(
        self,
        key: HandoffKey,
        *,
        position: int,
        first_token: int,
        logprobs: TokenLogprobs | None,
        draft_positions: int = 0,
    ) -> None:
        """All blocks are announced: have the other end go on with this token, at this position."""
        self._perform(
            self._handoff.finished(
                key,
                position=position,
                first_token=first_token,
                logprobs=logprobs,
                draft_positions=draft_positions,
                now=self._clock(),
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
        """Those that have not ended, including those that a lost link left behind."""
        return self._intake.states().keys()

    def refuse(self, wanted: Callable[[Offer], bool], reason: str) -> None:
        """Cancel the intakes of these offers."""
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
        if isinstance(message, LinkMessage):
            self._ends.receive(peer, connection, message)
        elif (end := self._ends.find(message.link, peer, connection)) is None:
            pass
        elif end.sending and type(message) in handoff.EVENT_OF:
            self._perform(self._handoff.receive(message, now=self._clock()))
        elif not end.sending and type(message) in intake.EVENT_OF:
            self._perform(self._intake.receive(message, now=self._clock()))
        else:
            self.counts["wrong_side"] += 1

    # Effects

    def _perform(self, effects: list[Effect], of: LinkEnd | None = None) -> None:
        """Perform the effects that a method of either end returned. `of` is their link, where it may be
        down."""
        for effect in effects:
            if isinstance(effect, (Adopted, Ended)):
                self._count_end(effect, of or self._ends.get(effect.key.link))
            if isinstance(effect, Send):
                self._ends.send(effect.link, effect.message)
            elif isinstance(effect, Copy):
                self._ends.spawn(self._copy(effect))
            elif isinstance(effect, ContinueCheck):
                asyncio.get_running_loop().call_soon(self._continue_check)
            elif isinstance(effect, Teardown):
                if (end := self._ends.get(effect.link)) is not None:
                    self._ends.give_up(end)
            elif isinstance(effect, Granted):
                self._listeners[effect.key](effect)
            elif isinstance(effect, Adopted):
                self._on_arrival(effect)
            elif effect.sending:
                self._listeners.pop(effect.key)(effect)
            else:
                self._on_intake_ended(effect)

    def _count_end(self, effect: Adopted | Ended, end: LinkEnd | None) -> None:
        sending = isinstance(effect, Ended) and effect.sending
        outcome = effect.outcome if isinstance(effect, Ended) else Outcome.ADOPTED
        transport = end.transport if end is not None else ""
        self.ended["handoff" if sending else "intake", transport, outcome.value] += 1

    def _continue_check(self) -> None:
        self._perform(self._intake.continue_check(self._clock()))

    async def _copy(self, copy: Copy) -> None:
        """Copy, and report the result even when the link is gone.

        A reader that has lost its source while the bus still has its peer finds it no more: the
        link is given up, so that the next handoff opens another one.
        """
        end = self._ends.get(copy.key.link)
        error = "internal_error"  # what is not ours to handle fails the attempt, and is raised
        lost: LinkEnd | None = None
        try:
            if end is None:
                raise LinkLost("the link went down before the copy began")
            await self._ends.pull(end, copy.pieces)
            error = ""
            self.received_blocks[end.transport] += len(copy.pieces)
            self.received_bytes[end.transport] += end.bytes_per_token * sum(map(self._positions, copy.pieces))
        except PdqError as failure:
            error = failure.code
            self.counts[error] += 1
            lost = end if isinstance(failure, LinkLost) else None
        finally:
            self._perform(self._intake.copied(copy.number, error, now=self._clock()), end)
            if lost is not None:
                self._ends.give_up(lost)

    def _positions(self, piece: Piece) -> int:
        """Number of positions that a piece brought."""
        return sum(span.length for span in piece.spans) or piece.fill or self._block_size
