"""Takes queue entries while the node has room, gives them back when it ends, deletes those that are over.

Owns the only task that takes entries, and the order in which it ends: it takes nothing more, gives what
it has read to the role or back, and only then does the node know all that it has. The role says how many
entries there is room for.

    ready      take as many entries as there is room for; when idle, take unread ones of another node
    draining   give back what nobody here has claimed, to a node that does the same work or else to its
               gateway; go on doing so, because gateways that have not heard of the end send more
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses

from common.errors import FingerprintMismatch, LinkLost, PoisonedRequest, ServiceUnavailable
from common.kv_layout import HashChain
from common.logs import get_logger
from common.node.ports import NodeRole, NodeServices
from common.node.token_stream import ChoiceKey
from common.store.client import RedisClient
from common.store.queue import Entry, NodeQueue, move_unread, queue_lengths
from common.store.registry import NodeState

log = get_logger("entries")

QUEUE_WAIT_S = 1.0
GIVE_BACK_INTERVAL_S = 0.25


class Entries:
    """Run `take` and `delete` as long as the node lives; call `room` whenever the role may have room."""

    redis_pause_s = 0.5  # before Redis is asked again, after it did not answer

    def __init__(self, node: NodeServices, role: NodeRole, redis: RedisClient) -> None:
        self._node, self._role, self._redis = node, role, redis
        self._queue = NodeQueue(redis, node.incarnation)
        self._room = asyncio.Event()
        self._over = asyncio.Event()  # there are entries to delete
        self.settled = False  # after `stop`: the role gets no more entries

    @property
    def num_dropped(self) -> int:
        """Entries that were not for this node any more, or could not be read."""
        return self._queue.dropped

    async def open(self) -> None:
        await self._queue.open()

    def room(self) -> None:
        """There may be room for another entry."""
        self._room.set()

    def done(self, entry: Entry) -> None:
        """The attempt is over here: delete its entry, as soon as Redis answers."""
        self._queue.over(entry)
        self._over.set()

    def stop(self) -> None:
        """Take nothing more, and give back the rest. The node is draining; see `settled`."""
        self._queue.stop()
        self._room.set()

    # Loops.

    async def take(self) -> None:
        """Take entries until the node drains, then give back what comes, until cancelled."""
        while self._node.state is NodeState.READY:
            await self._take()
        while True:
            try:
                await self._give_back()
            except ServiceUnavailable as error:
                log.warning("entries.kept", error=error)
            self.settled = True
            await asyncio.sleep(GIVE_BACK_INTERVAL_S)

    async def delete(self) -> None:
        """Delete the entries that are over, as soon as Redis answers, until cancelled."""
        while True:
            await self._over.wait()
            self._over.clear()
            try:
                await self._queue.done(())
            except ServiceUnavailable as error:
                log.warning("entries.undeleted", error=error)
                await asyncio.sleep(self.redis_pause_s)
                self._over.set()

    # Steps.

    async def _take(self) -> None:
        """Wait for room, then for entries, up to QUEUE_WAIT_S, and accept them."""
        node = self._node
        self._room.clear()
        capacity = self._role.capacity()
        if capacity <= 0:
            await self._room.wait()
            return
        try:
            entries = await self._queue.take(capacity, wait_s=QUEUE_WAIT_S)
            if not entries and not node.engine.has_work and node.state is NodeState.READY:
                await self._relieve_others(capacity)
        except ServiceUnavailable as error:
            log.warning("queue.unreachable", error=error)
            await asyncio.sleep(self.redis_pause_s)
            return
        for entry in entries:
            request = entry.dispatch.request
            try:
                node.connect(request.gateway, request.gateway_endpoint)
            except LinkLost as error:
                log.warning("gateway.unreachable", gateway=request.gateway, error=error)
            if self._is_for_our_model(entry):
                self._accept(await self._hashed(entry))
        if entries:
            node.wake()

    async def _hashed(self, entry: Entry) -> Entry:
        """The entry with the hashes of its blocks, computed in pieces between the event loop's other work.
        The engine refuses token ids that cannot be hashed."""
        request, mine = entry.dispatch.request, self._node.engine.fingerprint
        root = request.cache_root(mine)
        chain = HashChain(root, request.token_ids, mine.block_size, mine.border(request.prompt_len))
        with contextlib.suppress(ValueError):
            return dataclasses.replace(entry, block_hashes=tuple(await chain.finish()))
        return entry

    def _accept(self, entry: Entry) -> None:
        """Give an entry to the role. If the role raises, the request ends: another node would do no
        better, and this one has other requests."""
        node, dispatch = self._node, entry.dispatch
        try:
            self._role.accept(entry)
        except Exception as error:
            log.error("entry.refused", request=dispatch.request.id, exc_info=error)
            engine_id = f"{dispatch.request.id}/{dispatch.attempt}"
            poison = PoisonedRequest(f"a node cannot take it ({type(error).__name__})")
            self._role.give_up(engine_id, poison, retryable=False)
            node.engine.abort(engine_id)
            for choice in dispatch.choices:
                key = ChoiceKey(dispatch.request.id, dispatch.attempt, choice)
                node.gateways.fail(dispatch.request.gateway, key, poison, retryable=False)
            self.done(entry)

    def _is_for_our_model(self, entry: Entry) -> bool:
        """Whether the entry is for this node's model. Any other one goes back to its gateway."""
        node, dispatch = self._node, entry.dispatch
        differs = dispatch.request.model.mismatch(node.engine.fingerprint)
        if differs is None:
            return True
        error = FingerprintMismatch(
            f"a request for {differs.field} {differs.mine!r} came to {node.incarnation}, where it "
            f"is {differs.yours!r}"
        )
        for choice in dispatch.choices:
            key = ChoiceKey(dispatch.request.id, dispatch.attempt, choice)
            node.gateways.fail(dispatch.request.gateway, key, error, retryable=True)
        self.done(entry)
        return False

    async def _relieve_others(self, capacity: int) -> None:
        """Take unread entries of a node that does the same work."""
        node = self._node
        alike = [record.incarnation for record in node.peers.of_same_work()]
        if not alike:
            return
        for name, length in zip(alike, await queue_lengths(self._redis, alike), strict=True):
            if length.waiting and await move_unread(self._redis, name, node.incarnation, capacity):
                return

    async def _give_back(self) -> None:
        """Give entries to the least busy node that does the same work, or else to their gateways."""
        alike = self._node.peers.of_same_work()
        ready = [record for record in alike if record.state is NodeState.READY]
        ready.sort(key=lambda record: record.waiting + record.running)
        for target in (*(record.incarnation for record in ready), ""):
            count = await self._queue.give_back(target)
            if count:
                log.info("entries.given_back", count=count, target=target or "their gateways")
                return
