"""The nodes as this gateway sees them: records from the registry, links of its own, and deaths.

Owns: one link to every node, the conclusion that an incarnation is dead, and the router's view of all
nodes. Implements `ports.NodeDirectory` and `ports.NodeBus`; passes messages and news to `ports.Inbox`.
Knows nothing of requests.

    record appears ──▶ connect ──▶ link up: a candidate; asked what it has of ours
                          ▲            │ disconnected, or given up by the node: once more, at once
                          └────────────┤
                                       ▼ unreachable, silent, stalled, goodbye, …
                                     lost: on_node_lost; connected again only after a new beat

A record alone proves nothing and a missing one neither: only a link makes a candidate, and only the loss
of a link makes a death. A wrong conclusion costs one retry.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from math import inf

from common.errors import LinkLost, ServiceUnavailable
from common.logs import get_logger
from common.store.registry import NodeRecord, NodeState, Registry, Role, Snapshot
from common.store.requests import Load, Requests
from common.wire.bus import Bus, Down, Received
from common.wire.message import Message
from common.wire.messages import CacheContent, CacheEvents, CacheQuery
from gateway.ports import Inbox, NodeLoad, NodeView
from gateway.prefix_index import PrefixIndex
from gateway.strangers import Strangers

log = get_logger("nodes")

WATCH_INTERVAL_S = 0.5
NODE_LIVES = frozenset({Down.DISCONNECTED, Down.OVER})  # perhaps: it is tried once more, at once
SECOND_TRY_S = 0.5  # between two such tries


class NodeLinks:
    """Set `inbox`, then call `run`. All methods belong to the event loop's thread."""

    def __init__(self, bus: Bus, registry: Registry, requests: Requests, index: PrefixIndex) -> None:
        self.inbox: Inbox
        self.on_redis_lost: Callable[[], Awaitable[None]] | None = None
        self.dropped: Counter[str] = Counter()  # messages without a link, by type
        self._bus = bus
        self._registry = registry
        self._requests = requests
        self._index = index  # fed here with the nodes' cache events
        self._records: dict[str, NodeRecord] = {}
        self._loads: dict[str, Load] = {}
        self._met: set[str] = set()
        self._strangers = Strangers(bus.disconnect)
        self._lost: dict[str, int] = {}  # incarnation → beats in its record when it was lost
        self._second_try: dict[str, float] = {}  # incarnation → when it was last tried at once
        self._generation = ""

    # ── Ports ────────────────────────────────────────────────────────────────────────────────────

    @property
    def endpoint(self) -> str:
        return self._bus.endpoint

    def nodes(self) -> Sequence[NodeView]:
        linked = self._bus.peers()
        return [
            _view(record, record.incarnation in linked, self._loads.get(record.incarnation))
            for record in self._records.values()
            if record.incarnation not in self._lost
        ]

    async def alone(self, node: str) -> str | None:
        try:
            return await self._registry.alone(node)
        except ServiceUnavailable as error:
            log.warning("registry.unreachable", error=error)
            return None

    def lost(self, node: str) -> bool:
        return node in self._lost

    def known(self, node: str) -> bool:
        return node in self._records or node in self._bus.peers()

    def send(self, node: str, message: Message) -> None:
        try:
            self._bus.send(node, message)
        except LinkLost:
            self.dropped[type(message).__name__] += 1

    @property
    def num_unheard(self) -> int:
        """Dropped messages of peers that the registry did not name in time."""
        return self._strangers.dropped

    # ── Loops ────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Run until cancelled."""
        async with asyncio.TaskGroup() as group:
            group.create_task(self._watch_registry())
            group.create_task(self._watch_links())
            group.create_task(self._receive())
            group.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            self.inbox.on_interval()
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def _watch_registry(self) -> None:
        async for snapshot in self._registry.watch(WATCH_INTERVAL_S):
            records = snapshot.of_role(Role.PREFILL, Role.DECODE, Role.UNIFIED)
            self._records = {record.incarnation: record for record in records}
            self._meet()
            self._forget_old_deaths()
            try:
                self._loads = await self._requests.loads(list(self._records))
                await self._assert_again(snapshot)
            except ServiceUnavailable as error:
                log.warning("nodes.unreachable", error=error)  # the last loads are good enough
            for record in records:
                self._link(record)
            self.inbox.on_nodes_changed()

    async def _watch_links(self) -> None:
        while True:
            event = await self._bus.next_event()
            if event.up:
                log.info("node.linked", node=event.peer)
                self._lost.pop(event.peer, None)
                self.send(event.peer, CacheQuery(self._bus.incarnation))
                self.inbox.on_node_linked(event.peer)
            elif event.peer in self._bus.peers():
                self.inbox.on_node_linked(event.peer)
            elif event.reason is not Down.CLOSED:
                self._link_ended(event.peer, event.reason)

    async def _receive(self) -> None:
        while True:
            received = await self._bus.receive()
            if received.peer in self._met:
                self._take(received)
            else:
                self._strangers.heard(received)

    def _take(self, received: Received) -> None:
        match received.message:
            case CacheEvents() as events:
                self._index.apply(events)
                if self._index.wants_snapshot(received.peer):
                    self.send(received.peer, CacheQuery(self._bus.incarnation))
            case CacheContent(number=number, blocks=blocks):
                self._index.load_snapshot(received.peer, number, blocks)
            case message:
                self.inbox.on_message(received.peer, message)

    # ── Steps ────────────────────────────────────────────────────────────────────────────────────

    def _link(self, record: NodeRecord) -> None:
        name = record.incarnation
        if name in self._lost and record.beats <= self._lost[name]:
            return
        if record.endpoint and self._bus.link(name) is None:
            self._connect(record)

    def _connect(self, record: NodeRecord) -> None:
        try:
            self._bus.connect(record.incarnation, record.endpoint)
        except LinkLost as error:
            log.warning("node.unconnectable", node=record.incarnation, error=error)
            self._lose(record.incarnation, "unconnectable")

    def _link_ended(self, node: str, reason: Down | None) -> None:
        """Handle the end of the last link with a node. If the end does not prove a death, open a link once
        more, at once, on which the node is asked; otherwise the node is lost."""
        if self._bus.link(node) is not None:
            return  # another is being opened, whose outcome decides
        record, now = self._records.get(node), time.monotonic()
        again = reason in NODE_LIVES and now - self._second_try.get(node, -inf) >= SECOND_TRY_S
        if again and record is not None and record.endpoint:
            self._second_try[node] = now
            self._connect(record)
            return
        self._lose(node, reason.value if reason is not None else "")

    def _lose(self, node: str, reason: str) -> None:
        self._second_try.pop(node, None)
        self._index.forget(node)
        if node not in self._lost:
            log.warning("node.lost", node=node, reason=reason)
        record = self._records.get(node)
        self._lost[node] = record.beats if record is not None else 0
        self.inbox.on_node_lost(node, reason)

    def _meet(self) -> None:
        """Count as nodes those with a record, and those that had one and still have a link: Redis may
        forget."""
        linked = {name for name in self._met if self._bus.link(name) is not None}
        self._met = linked | self._records.keys()
        admitted = self._strangers.read(self._met.__contains__)
        for received in admitted:
            self._take(received)
        for peer in {received.peer for received in admitted}:
            self.inbox.on_node_linked(peer)  # some of its messages may have been dropped

    def _forget_old_deaths(self) -> None:
        """Forget all but the latest thousand deaths. Names are never reused, and nobody speaks of older ones
        any more."""
        for name in list(self._lost)[:-1000]:
            if name not in self._records:
                del self._lost[name]

    async def _assert_again(self, snapshot: Snapshot) -> None:
        """Write the open requests again after Redis has lost its content: once per loss, repeated until it
        succeeds."""
        if self._generation not in ("", snapshot.generation) and self.on_redis_lost is not None:
            log.warning("redis.lost_content", generation=snapshot.generation)
            await self.on_redis_lost()
        self._generation = snapshot.generation


def _view(record: NodeRecord, linked: bool, load: Load | None) -> NodeView:
    return NodeView(
        incarnation=record.incarnation,
        role=record.role.value,
        endpoint=record.endpoint,
        fingerprint=record.fingerprint,
        max_model_len=record.max_model_len,
        total_blocks=record.num_blocks,
        healthy=linked and record.state in (NodeState.READY, NodeState.DRAINING),
        draining=record.state is NodeState.DRAINING,
        load=NodeLoad(waiting_tokens=load.prompt_tokens if load is not None else 0, running=record.running),
    )
