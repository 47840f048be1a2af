"""One node: an engine in a thread, and around it the loops that keep it in touch with the others.

Owns the process's parts and their order of start and stop: memory, engine, Redis, bus, KV links,
role. Read `run` from top to bottom. Blocks, sequences and leases belong to the event loop's
thread; only the runner and copies run elsewhere.

    take      queue entries, when the role has capacity → role.accept; at the end, give them back
    delete    queue entries that are over
    listen    messages: transfer → links; what gateways ask and acknowledge; cancels → role
    watch     links that come up or go down → gateways; with a connection go the KV links over it
    announce  the node's record, once a beat; the other nodes, for the role to choose from
    compute   steps, while there is work (steps.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable

from common.bus import Bus, Down
from common.config import NodeSettings
from common.engine import Engine
from common.engine.core.step import Chunk, Step
from common.engine.runner import loading
from common.engine.runner.model_runner import ModelRunner
from common.engine.runner.thread_runner import ThreadRunner
from common.errors import PdqError, ServiceUnavailable
from common.logs import get_logger
from common.messages import (
    CacheQuery,
    Cancel,
    Failed,
    HandoffMessage,
    HoldsQuery,
    LinkMessage,
    Message,
    Stage,
    TokenRun,
    TokensAck,
    TookOver,
)
from common.metrics_server import MetricsServer
from common.node.attempt import Attempt
from common.node.cache_feed import CacheFeed
from common.node.entries import Entries
from common.node.gateways import Gateways
from common.node.kv import NodeKV, SharedMemory
from common.node.metrics import NodeMetrics
from common.node.role import NodeRole, load_role
from common.node.steps import Steps
from common.node.token_stream import ChoiceKey
from common.node.transports import make_transports
from common.queue import Entry
from common.redis_client import RedisClient
from common.registry import NodeRecord, NodeState, Registry, Role, Snapshot, new_incarnation
from common.senders import TO_NODES
from common.version import version
from kv_transfer.lease import Leases
from kv_transfer.link import Links
from kv_transfer.ports import Adopted, TransferSettings
from kv_transfer.transports.base import Target

log = get_logger("node")

ANNOUNCE_INTERVAL_S = 0.5
ALONE_WAIT_S, ALONE_PAUSE_S = 0.5, 5.0  # to announce a step of a suspect; until the next try
SLOW_DEATHS = frozenset({Down.SILENT, Down.STALLED, Down.UNREACHABLE})  # found out by waiting


class Node:
    """Build it (this loads the model), then `await run()`; `stop` ends it in order. Of the settings
    the bus's are complete (bus_setup.py)."""

    def __init__(self, settings: NodeSettings) -> None:
        self.settings = settings
        self.name = settings.name or f"{settings.role}-{socket.gethostname().split('.')[0]}"
        self.incarnation = new_incarnation(self.name)
        self.redis = RedisClient(settings.redis, name=self.incarnation)
        self.registry = Registry(self.redis)
        self.entries = Entries(self)
        self.bus = Bus(self.incarnation, settings.bus, progress=self._progress, hears=TO_NODES)
        shared = SharedMemory()
        runner: ThreadRunner | None = None
        try:
            runner = ThreadRunner(lambda: ModelRunner(settings.engine, storage=shared.allocate))
            self.engine = Engine(settings.engine, runner, on_free=shared.freed)
        except BaseException:
            if runner is not None:
                runner.close()
            if shared.memory is not None:
                shared.memory.close()
            raise
        assert shared.memory is not None
        self.memory = shared.memory
        if unread := self.engine.facts.unread_fields:
            log.warning("node.fields_not_read", file="config.json", fields=",".join(unread))
        self.kv = NodeKV(self.engine, self.memory, digests=settings.engine.kv_digests)
        self.leases = Leases(self.engine.pool)
        self.links: Links
        self.metrics: MetricsServer
        self.transports = ""  # what this node has of them, fastest first
        self.cache_feed = CacheFeed(self.incarnation, self.engine.pool)
        self.role: NodeRole = load_role(settings.role, self)
        self.gateways = Gateways(self.incarnation, self.bus, self.role)
        self.state = NodeState.STARTING
        self.peers: Snapshot | None = None
        self.steps = Steps(self, settings.bus.stall_limit_s)
        self._stopping = asyncio.Event()
        self._lost: dict[str, int] = {}  # peer → beats in its record then
        self._started_at = int(time.time() * 1000)
        self._beats = 0
        self._mute_until = 0.0  # no step is announced before
        self._tasks: set[asyncio.Task[None]] = set()

    # For the role.

    def send(self, gateway: str, message: Message) -> None:
        """Send to a gateway, or drop: what matters is repeated by those who wait for it."""
        self.gateways.send(gateway, message)

    def connect(self, peer: str, endpoint: str) -> None:
        """Have a link with a peer, or raise `LinkLost`."""
        if self.bus.link(peer) is None:
            self.bus.connect(peer, endpoint)

    def is_lost(self, peer: str) -> bool:
        """Whether we waited for it in vain, and its record in the registry has not moved since."""
        record = self.peers.records.get(peer) if self.peers is not None else None
        return peer in self._lost and (record is None or record.beats <= self._lost[peer])

    def wake(self) -> None:
        """There may be work for the engine, or room for another entry."""
        self.steps.wake()
        self.entries.room()

    def room_changed(self) -> None:
        """There may be room for another entry."""
        self.entries.room()

    async def say_alone(self) -> None:
        """Write into the node's record whose step of its own comes next, before it is computed: if it
        takes the process with it, that is all there is to know it by. Streams do not wait long for
        Redis: where it does not answer, nobody will be found guilty by that record."""
        if time.monotonic() < self._mute_until:
            return
        try:
            async with asyncio.timeout(ALONE_WAIT_S):
                await self.registry.say_alone(self.incarnation, self.steps.alone)
        except (ServiceUnavailable, TimeoutError) as error:
            log.warning("node.unannounced", error=error)
            self._mute_until = time.monotonic() + ALONE_PAUSE_S

    def push_tokens(self, runs: Iterable[tuple[str, TokenRun]]) -> None:
        self.gateways.tokens.push(runs)

    def stage(
        self, gateway: str, key: ChoiceKey, state: str, seconds: dict[str, float], cached: int = 0
    ) -> None:
        """Tell the gateway that a choice is in this state now."""
        self.send(gateway, Stage(self.incarnation, *key, state, seconds, cached))

    def prompt_begins(self, attempt: Attempt, chunk: Chunk) -> None:
        """Tell the gateway, once, how much of the prompt the prefix cache had."""
        if attempt.cached_tokens is None and chunk.is_prompt:
            attempt.cached_tokens = chunk.start
            waited = {"queue": time.monotonic() - attempt.began}
            key = attempt.key(chunk.sequence.choice)
            self.stage(attempt.gateway, key, "prefilling", waited, attempt.cached_tokens)

    def failed(self, gateway: str, key: ChoiceKey, error: PdqError, *, retryable: bool) -> None:
        """Tell the gateway that this attempt is over here."""
        log.warning("attempt.failed", request=key.request, attempt=key.attempt, error=error)
        word = Failed(self.incarnation, *key, error.code, str(error), retryable)
        self.ended(gateway, word)

    def ended(self, gateway: str, word: Failed | TookOver) -> None:
        """Tell the gateway how a choice ended here."""
        self.gateways.end(gateway, word)

    def done(self, entry: Entry) -> None:
        """The attempt is over here: its queue entry goes."""
        self.entries.done(entry)

    # Life.

    async def run(self, when_warm: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`; then finish what runs, within the grace period, and leave nothing, as
        after an error at any step of the start. `when_warm` is called before anything is served."""
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack, when_warm)
            loops = [
                asyncio.create_task(coroutine, name=name)
                for name, coroutine in (
                    ("take", self.entries.take()),
                    ("delete", self.entries.delete()),
                    ("listen", self._listen()),
                    ("watch", self._watch()),
                    ("announce", self._announce()),
                    ("compute", self.steps.run()),
                )
            ]
            stack.push_async_callback(_end, loops)
            stopping = asyncio.create_task(self._stopping.wait(), name="stopping")
            loops.append(stopping)  # type: ignore[arg-type]
            done, _ = await asyncio.wait(loops, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()  # a loop ends only by an error
            await self._drain()

    async def _start(self, stack: contextlib.AsyncExitStack, when_warm: Callable[[], None]) -> None:
        """What each step needs for its way back is on the stack before the step is taken."""
        stack.callback(lambda: log.info("node.ended", steps=self.engine.num_steps))
        stack.callback(self._end_engine)
        stack.push_async_callback(self.redis.close)
        await self.redis.open()
        stack.push_async_callback(self._leave)
        stack.push_async_callback(self._settle)
        stack.push_async_callback(self.bus.close)
        await self.bus.start()
        self.links = self._make_links()
        stack.push_async_callback(self.links.close)
        self.links.start()
        self.steps.metrics = metrics = NodeMetrics(self)
        self.metrics = MetricsServer(self.settings.metrics, metrics.render)
        stack.push_async_callback(self.metrics.close)
        await self.metrics.start()
        stack.callback(self.gateways.close)
        await asyncio.to_thread(self.engine.warm_up)
        loading.give_back_memory()
        when_warm()
        # Not before: the reaper takes what has a queue and no beat for dead, and a start may take long.
        await self.entries.open()
        self.state = NodeState.READY
        await self.registry.announce(self.record(), self.links.describe())
        log.info("node.ready", **self._summary())

    def _end_engine(self) -> None:
        """A thread that hangs cannot be waited for, and may still write: the process ends with it."""
        if not self.steps.hangs:
            self.engine.runner.close()
            self.memory.close()

    async def _leave(self) -> None:
        try:
            await self.registry.leave(self.incarnation)
        except ServiceUnavailable as error:
            log.warning("node.left_unsaid", error=error)  # the reaper will find it

    async def _settle(self) -> None:
        """Wait for what was begun in the background."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop(self) -> None:
        """Ask `run` to end in order; asked again, at once."""
        if self._stopping.is_set():
            self.settings = dataclasses.replace(self.settings, grace_period_s=0.0)
        self._stopping.set()

    async def _drain(self) -> None:
        """Take nothing new and give back what was not begun; hand over or finish what runs, within
        the grace period."""
        begun = time.monotonic()
        self.state = NodeState.DRAINING
        self.links.drain()
        try:
            await self.registry.announce(self.record(), self.links.describe())
        except ServiceUnavailable as error:
            log.warning("node.unannounced", error=error)
        self.entries.stop()
        while not self.entries.settled:
            if time.monotonic() - begun >= self.settings.grace_period_s:
                break  # Redis does not answer: gateways read of them when they hear our goodbye
            await asyncio.sleep(0.02)
        self.role.drain()
        while self.role.num_open or self.gateways.tokens.num_unacknowledged:
            if time.monotonic() - begun >= self.settings.grace_period_s:
                log.warning("node.grace_over", open=self.role.num_open)
                return
            await asyncio.sleep(0.02)

    def _make_links(self) -> Links:
        layout = self.engine.layout
        sources, openers = make_transports(self.settings, self.memory, layout, self.leases)
        self.transports = ",".join(openers)
        return Links(
            self.bus, self.incarnation, self.engine.fingerprint, Target(self.memory, layout),
            pool=self.kv, leases=self.leases, sources=sources, openers=openers,
            on_arrival=self._arrived, on_intake_ended=lambda _: self.wake(),
            settings=TransferSettings(digests=self.settings.engine.kv_digests),
        )  # fmt: skip

    # Loops.

    def is_alike(self, record: NodeRecord) -> bool:
        """Whether that node computes what this one does, bit for bit; its block size is its own."""
        return self.engine.fingerprint.mismatch(record.fingerprint) is None

    async def _listen(self) -> None:
        while True:
            received = await self.bus.receive()
            message = received.message
            if isinstance(message, (LinkMessage, HandoffMessage)):
                self.links.receive(received.peer, received.link, message)
            elif isinstance(message, TokensAck):
                self.gateways.acknowledged(received.peer, message)
            elif isinstance(message, HoldsQuery):
                self.gateways.asked(received.peer, message)
            elif isinstance(message, CacheQuery):
                self.send(received.peer, self.cache_feed.content())
            elif isinstance(message, Cancel):
                gateway, request, attempt = message.gateway, message.request, message.attempt
                choices = frozenset(message.choices)
                self.gateways.tokens.forget(gateway, request, attempt, choices)
                self.role.cancel(gateway, request, attempt, message.reason, choices)
                self.wake()

    async def _watch(self) -> None:
        while True:
            event = await self.bus.next_event()
            if event.up:
                self._lost.pop(event.peer, None)
                self.gateways.linked(event.peer)
                continue
            if event.reason in SLOW_DEATHS and self.bus.link(event.peer) is None:
                record = self.peers.records.get(event.peer) if self.peers is not None else None
                self._lost[event.peer] = record.beats if record is not None else 0
            self.links.connection_lost(event.link)
            self.gateways.unlinked(event.peer)
            self.wake()

    async def _announce(self) -> None:
        while True:
            try:
                await self.registry.announce(self.record(), self.links.describe())
                self.peers = await self.registry.snapshot()
                for name in self._lost.keys() - self.peers.records.keys():
                    del self._lost[name]  # names are never used again
                self._feed_gateways()
                self.role.peers_changed()
            except ServiceUnavailable as error:
                log.warning("registry.unreachable", error=error)
            await asyncio.sleep(ANNOUNCE_INTERVAL_S)

    # Parts.

    def when_filled(self, step: Step) -> Callable[[frozenset[int]], None] | None:
        """What the engine's thread does once the blocks of a step hold their KV: seal those that
        go to another node, and have the role say so while the step's tokens are chosen."""
        seals = {chunk.sequence.sequence_id: (chunk, self.kv.seals(chunk))
                 for chunk in self.role.handed_over(step)}  # fmt: skip
        if not any(of_one for _, of_one in seals.values()):
            return None
        loop = asyncio.get_running_loop()

        def filled(spoiled: frozenset[int]) -> None:
            sound = [seals[name] for name in seals if name not in spoiled]
            for _, of_one in sound:
                self.kv.seal(of_one)
            loop.call_soon_threadsafe(self.role.step_filled, [chunk for chunk, _ in sound])

        return filled

    def _feed_gateways(self) -> None:
        """Tell every gateway there is what the prefix cache gained and lost."""
        events = self.cache_feed.events()
        if events is None or self.peers is None:
            return
        linked = self.bus.peers()
        for record in self.peers.of_role(Role.GATEWAY):
            if record.incarnation in linked:
                self.send(record.incarnation, events)

    def _arrived(self, adopted: Adopted) -> None:
        self.role.arrived(adopted)
        self.wake()

    def _progress(self) -> tuple[int, bool]:
        return self.engine.num_steps, self.steps.computing

    def spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        """Run something in the background; `run` waits for it at the end."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def record(self) -> NodeRecord:
        """What `pdq nodes` shows of this node."""
        engine, mine = self.engine, self.engine.fingerprint
        self._beats += 1
        return NodeRecord(
            incarnation=self.incarnation, name=self.name, role=Role(self.settings.role),
            state=self.state, endpoint=self.bus.endpoint, url=self.metrics.url(self.bus.endpoint),
            host=socket.gethostname(), pid=os.getpid(), cores=len(os.sched_getaffinity(0)),
            started_at=self._started_at, version=version(),
            model=mine.model, revision=mine.revision, layout=mine.layout, numerics=mine.numerics,
            adapter=mine.adapter, tokenizer=mine.tokenizer, transports=self.transports,
            block_size=mine.block_size, slab_bytes=engine.layout.slab_bytes,
            num_blocks=engine.pool.num_blocks, max_num_seqs=engine.settings.max_num_seqs,
            max_model_len=engine.facts.max_model_len, waiting=engine.scheduler.num_waiting,
            running=engine.scheduler.num_running, free_blocks=engine.pool.num_free,
            open_attempts=self.role.num_open, leases=sum(self.leases.count().values()),
            reserved=self.kv.num_reserved, unacknowledged=self.gateways.tokens.num_unacknowledged,
            steps=engine.num_steps, beats=self._beats, alone=self.steps.alone,
        )  # fmt: skip

    def _summary(self) -> dict[str, object]:
        return {
            "role": self.settings.role, "node": self.incarnation,
            "model": self.engine.fingerprint.model, "blocks": self.engine.pool.num_blocks,
            "numerics": self.engine.fingerprint.numerics, "bus": self.bus.endpoint,
        }  # fmt: skip


async def _end(loops: Iterable[asyncio.Task[None]]) -> None:
    for task in loops:
        task.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
