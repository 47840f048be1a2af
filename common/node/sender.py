"""What a node sends to other nodes: performs what the table of departures (departure.py) says.

The same for every role that sends. The role (`Owner`) says which node is asked, and what follows.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Protocol

from common.engine.core.sequence import Sequence
from common.errors import DigestMismatch, LinkLost, MalformedMessage, PdqError, StaleBlock
from common.logs import get_logger
from common.node.attempt import Attempt
from common.node.departure import COMPUTING, ENDED_HERE, IDLE, Departures, Event, State
from common.node.ports import NodeServices
from common.sampling import FinishReason
from common.wire.message import HandoffKey
from common.wire.messages import Offer, TokenLogprobs, TookOver
from kv_transfer.ports import Ended, Granted, Outcome

log = get_logger("sender")

FULL = frozenset({"out_of_blocks", "overloaded"})  # reasons of a Deny that pass by themselves

# Reasons of a failure that say nothing about the other node: whoever is asked next finds the same.
SPOILED = frozenset({DigestMismatch.code, StaleBlock.code, MalformedMessage.code})


@dataclasses.dataclass(slots=True, eq=False)
class Departure:
    """One choice: positions below `length` are offered, and the token at `length` with the commit."""

    attempt: Attempt
    sequence: Sequence
    length: int = 0
    state: State = State.HERE
    peer: str = ""  # the last one that was asked, or is about to be
    endpoint: str = ""
    link: str = ""  # the last one that was opened
    key: HandoffKey | None = None  # of the last handoff
    asks: int = 0  # how often it was offered
    computed: int = 0  # positions whose blocks may be announced
    announced: int = 0  # blocks announced to the last handoff
    drafted: int = 0  # positions of which what was announced may have the draft model's KV, too
    logprobs: TokenLogprobs | None = None  # of the token at `length`
    held: list[int] = dataclasses.field(default_factory=list)  # blocks of an ended sequence
    reason: str = ""  # why it was cancelled, or the last handoff ended
    refused: set[str] = dataclasses.field(default_factory=set)  # nodes that did not take it
    found_full: bool = False  # one of them has no room just now
    stranded_since: float | None = None  # nobody could be asked since then
    timer: asyncio.TimerHandle | None = None  # until a grant
    paused_at: float = 0.0
    began: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def is_idle(self) -> bool:
        """No link is opened for it, and no handoff is under way."""
        return self.state in IDLE

    @property
    def is_computing(self) -> bool:
        """A prompt that has no first token and is still wanted."""
        return self.state in COMPUTING

    @property
    def is_wanted(self) -> bool:
        return self.state not in ENDED_HERE

    @property
    def table(self) -> list[int]:
        """Its blocks, whoever holds them."""
        return self.held or self.sequence.block_table


class Owner(Protocol):
    """The role, as its departures see it."""

    def choose(self, departure: Departure) -> tuple[str, str] | None:
        """Incarnation and endpoint of the node to ask next; None: there is none."""
        ...

    def linked(self, departure: Departure) -> None:
        """The link to the chosen node is open: `offer`, `pause` or `stay` when that is possible."""
        ...

    def await_grant(self, departure: Departure) -> None:
        """Call `no_grant` after a while, unless `departure.timer` is cancelled before."""
        ...

    def granted(self, departure: Departure) -> None: ...

    def adopted(self, departure: Departure) -> None:
        """Another node goes on with it, and the gateway was told so."""
        ...

    def refused(self, departure: Departure) -> None:
        """The node that was asked does not take it; it is here as before."""
        ...

    def spoiled(self, departure: Departure) -> None:
        """Its blocks cannot be right, as the node that copied them found: it has to be computed again."""
        ...

    def over(self, departure: Departure) -> None:
        """Nothing of it is here or under way any more."""
        ...


class Sender(Departures):
    """What one node sends."""

    def __init__(self, node: NodeServices, owner: Owner, clock: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._node, self._owner, self._clock = node, owner, clock

    # What the owner does.

    def ask(self, departure: Departure) -> bool:
        """Choose a node, for good unless it refuses, and open a link to it; False: nobody to ask."""
        chosen = self._owner.choose(departure)
        if chosen is None:
            return False
        departure.peer, departure.endpoint = chosen
        self.take(departure, Event.ASK)
        return True

    def offer(self, departure: Departure) -> None:
        """Offer a prompt that is being computed."""
        self.take(departure, Event.OFFER)

    def pause(self, departure: Departure) -> None:
        """Pause a running sequence that no step has, and offer it as it is now."""
        departure.length = departure.sequence.num_computed
        self.take(departure, Event.PAUSE)

    def stay(self, departure: Departure) -> None:
        """Let a running sequence go on here; nothing was offered."""
        self.take(departure, Event.STAY)

    def filled(self, departure: Departure, computed: int) -> None:
        """The blocks of so many positions of a prompt hold their KV."""
        departure.computed = computed
        self.take(departure, Event.FILLED)

    def computed(self, departure: Departure, logprobs: TokenLogprobs | None) -> None:
        """All of a prompt is computed, and the token at `length` is the sequence's, which ends."""
        departure.computed, departure.logprobs = departure.length, logprobs
        self.take(departure, Event.COMPUTED)

    def no_grant(self, departure: Departure) -> None:
        """A paused sequence has waited long enough."""
        departure.found_full, departure.reason = True, "no room in time"
        self.take(departure, Event.NO_GRANT)

    def cancel(self, departure: Departure, reason: str) -> None:
        """It has ended here; `over` comes when nothing of it is under way any more."""
        departure.reason = reason
        self.take(departure, Event.CANCEL)

    # Actions: block references.

    def _hold(self, departure: Departure) -> None:
        departure.held = self._node.engine.finish(departure.sequence, FinishReason.LENGTH)

    def _release(self, departure: Departure) -> None:
        held, departure.held = departure.held, []
        self._node.engine.pool.release(held)
        self._node.wake()

    def _pause(self, departure: Departure) -> None:
        departure.paused_at = self._clock()
        self._node.engine.scheduler.pause(departure.sequence)

    def _resume(self, departure: Departure) -> None:
        self._node.kv.go_on_writing(departure.sequence)
        self._node.engine.scheduler.resume(departure.sequence)
        self._node.wake()

    def _finish(self, departure: Departure) -> None:
        """Its blocks stay here as prefix cache only."""
        engine = self._node.engine
        engine.pool.release(engine.finish(departure.sequence, FinishReason.CANCELLED))

    def _forget(self, departure: Departure) -> None:
        """What was sent, and what any of it is a copy of."""
        engine = self._node.engine
        block_size = engine.layout.block_size
        engine.pool.forget(departure.sequence.hashes(departure.length // block_size, block_size))

    # Actions: the link.

    def _open_link(self, departure: Departure) -> None:
        self._node.spawn(self._open(departure))

    async def _open(self, departure: Departure) -> None:
        """Whatever goes wrong, also what is no error of ours, the departure hears of it: another node
        may do better, and nobody waits for this one."""
        node, task = self._node, asyncio.current_task()
        try:
            node.connect(departure.peer, departure.endpoint)
            link = await node.links.open(departure.peer)
            await self._seal(departure)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, PdqError):
                log.warning("link.refused", peer=departure.peer, error=error)
            else:
                log.error("link.failed", peer=departure.peer, exc_info=error)
            self._not_taken(departure, Event.NOT_OPENED)
            if task is not None and task.cancelling():
                raise
        else:
            departure.link = link
            self.take(departure, Event.OPENED)

    async def _seal(self, departure: Departure) -> None:
        """Digests of many blocks take long, and the event loop has streams to feed: what is full
        before the offer is sealed in a thread. These references are given back here, whatever becomes
        of the departure meanwhile. The tail is sealed when the sequence stands still."""
        node, sequence = self._node, departure.sequence
        seals = node.kv.unsealed(sequence, departure.table)
        if not seals:
            return
        slots = [seal.slot for seal in seals]
        node.engine.pool.acquire(slots)
        try:
            await asyncio.to_thread(node.kv.seal, seals)
        finally:
            node.engine.pool.release(slots)
            node.wake()

    # Actions: the handoff.

    def _offer(self, departure: Departure) -> None:
        """Ask for room for all of it."""
        node, attempt, sequence = self._node, departure.attempt, departure.sequence
        block_size, length = node.engine.layout.block_size, departure.length
        departure.asks += 1
        request = dataclasses.replace(
            attempt.request, token_ids=tuple(sequence.token_ids[:length]), prompt_len=sequence.prompt_len
        )
        offer = Offer(
            HandoffKey(departure.link, request.id, attempt.number, sequence.choice, departure.asks),
            request,
            tuple(sequence.hashes(length // block_size, block_size)),
            length % block_size,
            0,
            attempt.alone,
        )
        departure.key, departure.announced, departure.drafted = offer.key, 0, length
        departure.computed = min(departure.length, sequence.num_computed)
        listener = functools.partial(self._heard, departure)
        try:
            node.links.offer(offer, listener, waited=self._clock() - departure.began)
        except LinkLost:
            departure.reason = LinkLost.code
            self._not_taken(departure, Event.REFUSED)

    def _announce(self, departure: Departure) -> None:
        """Give the handoff the blocks that hold their KV; at the end also the tail."""
        sequence, block_size = departure.sequence, self._node.engine.layout.block_size
        if sequence.num_draft_computed < sequence.num_computed:  # what it makes up for comes too late
            departure.drafted = min(departure.drafted, sequence.num_draft_computed)
        start, computed = departure.announced, departure.computed
        end = computed // block_size
        if computed == departure.length:
            end = -(-computed // block_size)
        if end <= start:
            return
        blocks = self._node.kv.ready_blocks(sequence, departure.table, start, end, computed)
        departure.announced = end
        assert departure.key is not None
        self._node.links.announce(departure.key, blocks)

    def _commit(self, departure: Departure) -> None:
        assert departure.key is not None
        sequence, length = departure.sequence, departure.length
        self._node.links.commit(
            departure.key,
            position=length,
            first_token=sequence.token_ids[length],
            logprobs=departure.logprobs,
            draft_positions=min(departure.drafted, sequence.num_draft_computed),
        )

    def _withdraw(self, departure: Departure) -> None:
        assert departure.key is not None
        self._node.links.cancel(departure.key, departure.reason)

    def _await_grant(self, departure: Departure) -> None:
        self._owner.await_grant(departure)

    def _stop_waiting(self, departure: Departure) -> None:
        if departure.timer is not None:
            departure.timer.cancel()
            departure.timer = None

    def _heard(self, departure: Departure, effect: Granted | Ended) -> None:
        """News of the handoff that is under way."""
        if isinstance(effect, Granted):
            self.take(departure, Event.GRANT)
        elif effect.outcome is Outcome.ADOPTED:
            self.take(departure, Event.ADOPTED)
        else:
            departure.reason, failed = effect.reason, effect.outcome is Outcome.FAILED
            if effect.outcome is Outcome.DENIED and effect.reason in FULL:
                departure.found_full = True
            log.info(
                "handoff.ended",
                request=effect.key.request,
                outcome=effect.outcome.value,
                reason=effect.reason,
                peer=departure.peer,
            )
            spoiled = failed and effect.reason in SPOILED
            self._not_taken(departure, Event.SPOILED if spoiled else Event.REFUSED)
        self._node.wake()

    def _not_taken(self, departure: Departure, event: Event) -> None:
        departure.refused.add(departure.peer)
        self.take(departure, event)

    # Actions: what the owner hears.

    def _say_linked(self, departure: Departure) -> None:
        self._owner.linked(departure)

    def _say_granted(self, departure: Departure) -> None:
        self._owner.granted(departure)

    def _say_adopted(self, departure: Departure) -> None:
        """The other node tells the gateway so too, but it may die between its Ack and that."""
        attempt = departure.attempt
        key = attempt.key(departure.sequence.choice)
        self._node.gateways.end(attempt.gateway, TookOver(departure.peer, *key, departure.length + 1))
        self._owner.adopted(departure)

    def _say_refused(self, departure: Departure) -> None:
        self._owner.refused(departure)

    def _say_spoiled(self, departure: Departure) -> None:
        self._owner.spoiled(departure)

    def _say_over(self, departure: Departure) -> None:
        self._owner.over(departure)
