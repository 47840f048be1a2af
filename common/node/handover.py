"""The sending conversations of a node: a peer, a link to it, the offer, the blocks, the commit.

Owns what is on its way to another node, and is the same for every role that sends. The role
(`Owner`) says which node is asked, and what follows:

    offer ──choose──▶ a link is opened ──opened──▶ send_offer ──▶ announce … complete
                          │                            │ granted
                          ▼                            ▼
            refused ◀── no link, denied, failed    adopted        cancel ──▶ dropped

Each callback comes when nothing of that try is under way any more, but `granted`.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import time
from typing import Protocol

from common.engine.core.sequence import Sequence
from common.errors import DigestMismatch, LinkLost, MalformedMessage, PdqError, StaleBlock
from common.logs import get_logger
from common.node.attempt import Attempt
from common.node.ports import NodeServices
from common.wire.message import HandoffKey
from common.wire.messages import Offer, TokenLogprobs, TookOver
from kv_transfer.ports import Ended, Granted, Outcome

log = get_logger("handover")

FULL = frozenset({"out_of_blocks", "overloaded"})  # reasons of a Deny that pass by themselves

# Reasons of a failure that say nothing about the other node: whoever is asked next finds the same.
SPOILED = frozenset({DigestMismatch.code, StaleBlock.code, MalformedMessage.code})


@dataclasses.dataclass(slots=True, eq=False)
class Handover:
    """One choice on its way: positions below `length`, and the token at `length`."""

    attempt: Attempt
    sequence: Sequence
    length: int
    peer: str = ""  # where it is offered, or about to be
    opening: bool = False  # a link to it; and full blocks get their digests
    key: HandoffKey | None = None  # of the handoff that is under way
    asks: int = 0  # how often it was offered
    announced: int = 0  # blocks given to that handoff
    is_complete: bool = False  # all is computed, and the token at `length` is chosen
    logprobs: TokenLogprobs | None = None  # of that token
    held: list[int] = dataclasses.field(default_factory=list)  # blocks of an ended sequence
    refused: set[str] = dataclasses.field(default_factory=set)  # nodes that did not take it
    found_full: bool = False  # one of them has no room just now
    spoiled: str = ""  # why its blocks cannot be right, as the node that copied them found
    cancelled: bool = False
    began: float = dataclasses.field(default_factory=time.monotonic)


class Owner(Protocol):
    """The role, as its handovers see it."""

    def choose(self, handover: Handover) -> tuple[str, str] | None:
        """Incarnation and endpoint of the node to ask next; None: there is none."""
        ...

    def opened(self, handover: Handover, link: str) -> None:
        """The link to the chosen node is open: `send_offer` when it can be offered."""
        ...

    def granted(self, handover: Handover) -> None: ...

    def adopted(self, handover: Handover) -> None:
        """Another node goes on with it, and the gateway was told so."""
        ...

    def refused(self, handover: Handover, peer: str) -> None:
        """The node that was asked does not take it. A `spoiled` one has to be computed again."""
        ...

    def dropped(self, handover: Handover) -> None:
        """It was cancelled."""
        ...


class Handovers:
    """What one node hands over."""

    def __init__(self, node: NodeServices, owner: Owner) -> None:
        self._node = node
        self._owner = owner

    def offer(self, handover: Handover) -> bool:
        """Choose a node, for good unless it refuses, and open a link to it; False: nobody to ask."""
        chosen = self._owner.choose(handover)
        if chosen is None:
            return False
        handover.peer, endpoint = chosen
        handover.opening = True
        self._node.spawn(self._open(handover, handover.peer, endpoint))
        return True

    async def _open(self, handover: Handover, peer: str, endpoint: str) -> None:
        """Whatever goes wrong, also what is no error of ours, the handover is refused: another node
        may do better, and nobody waits for this one."""
        node, task = self._node, asyncio.current_task()
        try:
            node.connect(peer, endpoint)
            link = await node.links.open(peer)
            await self._seal(handover)
        except (Exception, asyncio.CancelledError) as error:
            if isinstance(error, PdqError):
                log.warning("link.refused", peer=peer, error=error)
            else:
                log.error("link.failed", peer=peer, exc_info=error)
            handover.opening = False
            self._refused(handover, peer)
            if task is not None and task.cancelling():
                raise
            return
        handover.opening = False
        if handover.cancelled:
            self._owner.dropped(handover)
        else:
            self._owner.opened(handover, link)

    async def _seal(self, handover: Handover) -> None:
        """Digests of many blocks take long, and the event loop has streams to feed: what is full
        before the offer is sealed in a thread, and held until that has ended, whatever ends
        meanwhile. The tail is sealed when the sequence stands still."""
        node, sequence = self._node, handover.sequence
        seals = node.kv.unsealed(sequence, handover.held or sequence.block_table)
        if not seals:
            return
        slots = [seal.slot for seal in seals]
        node.engine.pool.acquire(slots)
        try:
            await asyncio.to_thread(node.kv.seal, seals)
        finally:
            node.engine.pool.release(slots)
            node.wake()

    def send_offer(self, handover: Handover, link: str) -> None:
        """Ask for room for all of it; what is computed already is announced when that is granted."""
        node, attempt, sequence = self._node, handover.attempt, handover.sequence
        block_size, length = node.engine.layout.block_size, handover.length
        handover.asks += 1
        request = dataclasses.replace(
            attempt.request, token_ids=tuple(sequence.token_ids[:length]), prompt_len=sequence.prompt_len
        )
        offer = Offer(
            HandoffKey(link, request.id, attempt.number, sequence.choice, handover.asks),
            request,
            tuple(sequence.hashes(length // block_size, block_size)),
            length % block_size,
            0,
            attempt.alone,
        )
        handover.key = offer.key
        handover.announced = 0
        listener = functools.partial(self._heard, handover)
        try:
            node.links.offer(offer, listener, waited=time.monotonic() - handover.began)
        except LinkLost:
            handover.key = None
            self._refused(handover, handover.peer)
            return
        self.announce(handover, sequence.num_computed)
        if handover.is_complete:
            self._commit(handover)

    def announce(self, handover: Handover, computed: int) -> None:
        """Give the handoff the blocks that `computed` positions fill; at the end also the tail."""
        if handover.key is None:
            return
        sequence, block_size = handover.sequence, self._node.engine.layout.block_size
        end = computed // block_size
        if computed == handover.length:
            end = -(-computed // block_size)
        if end <= handover.announced:
            return
        table, start = handover.held or sequence.block_table, handover.announced
        blocks = self._node.kv.ready_blocks(sequence, table, start, end, computed)
        handover.announced = end
        self._node.links.announce(handover.key, blocks)

    def complete(self, handover: Handover, logprobs: TokenLogprobs | None) -> None:
        """All is computed, and the token at `length` is the sequence's: announce the rest, commit."""
        handover.is_complete, handover.logprobs = True, logprobs
        if handover.key is not None:
            self.announce(handover, handover.length)
            self._commit(handover)

    def _commit(self, handover: Handover) -> None:
        """A send just before may have found the link down, and ended the handoff."""
        if handover.key is None:
            return
        token = handover.sequence.token_ids[handover.length]
        self._node.links.commit(
            handover.key, position=handover.length, first_token=token, logprobs=handover.logprobs
        )

    def cancel(self, handover: Handover, reason: str) -> None:
        """End a handover; `dropped` comes when nothing of it is under way any more."""
        handover.cancelled = True
        if handover.key is not None:
            self._node.links.cancel(handover.key, reason)
        elif not handover.opening:
            self._owner.dropped(handover)

    def _heard(self, handover: Handover, effect: Granted | Ended) -> None:
        """News of the handoff that is under way."""
        if isinstance(effect, Granted):
            self._owner.granted(handover)
        else:
            self._ended(handover, effect)
        self._node.wake()

    def _ended(self, handover: Handover, effect: Ended) -> None:
        handover.key = None
        if handover.cancelled:
            self._owner.dropped(handover)
        elif effect.outcome is Outcome.ADOPTED:
            self._say_who_took_over(handover)
            self._owner.adopted(handover)
        else:
            if effect.outcome is Outcome.DENIED and effect.reason in FULL:
                handover.found_full = True
            if effect.outcome is Outcome.FAILED and effect.reason in SPOILED:
                self._spoiled(handover, effect.reason)
            log.info(
                "handoff.ended",
                request=effect.key.request,
                outcome=effect.outcome.value,
                reason=effect.reason,
                peer=handover.peer,
            )
            self._refused(handover, handover.peer)

    def _spoiled(self, handover: Handover, reason: str) -> None:
        """What nobody could prove, no other prompt finds as its prefix any more."""
        handover.spoiled = reason
        self._node.engine.pool.forget(handover.held or handover.sequence.block_table)

    def _say_who_took_over(self, handover: Handover) -> None:
        """The other node says so too, but it may die between its Ack and that."""
        attempt = handover.attempt
        key = attempt.key(handover.sequence.choice)
        self._node.gateways.end(attempt.gateway, TookOver(handover.peer, *key, handover.length + 1))

    def _refused(self, handover: Handover, peer: str) -> None:
        if handover.cancelled:
            self._owner.dropped(handover)
            return
        handover.refused.add(peer)
        handover.peer = ""
        self._owner.refused(handover, peer)
