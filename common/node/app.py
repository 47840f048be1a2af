"""A node, put together: an engine in a thread, and around it the loops that keep it in touch.

Owns the process's parts and their order of start and stop. Read `Node.__init__`, then `run`. Blocks,
sequences and leases belong to the event loop's thread; only the runner and copies run elsewhere.

    take      queue entries, when the role has capacity (entries.py); at the end, give them back
    delete    queue entries that are over
    listen    messages to whoever they are for (loops.py)
    watch     links that come up or go down, likewise
    announce  the node's record, once a beat; the other nodes, for the role to choose from (announcer.py)
    compute   steps, while there is work (steps.py)
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import importlib
import math
import os
import socket
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

from common.background import is_a_failure, report
from common.engine import Engine
from common.engine.interface import Runner
from common.engine.runner import loading
from common.engine.runner.load_runner import load_runner
from common.engine.runner.thread_runner import ThreadRunner
from common.engine.speculation import DraftCounts
from common.errors import ServiceUnavailable
from common.logs import get_logger
from common.metrics_server import MetricsServer
from common.node import loops
from common.node.announcer import Announcer
from common.node.cache_feed import CacheFeed
from common.node.entries import Entries
from common.node.gateways import Gateways
from common.node.gpu_lease import GpuLease
from common.node.gpus import take_gpu
from common.node.kv import NodeKV, SharedMemory
from common.node.leased_runner import LeasedRunner
from common.node.metrics import NodeMetrics
from common.node.peers import Peers
from common.node.ports import NodeRole, NodeServices
from common.node.steps import Steps
from common.node.suspects import Suspects
from common.node.transports import make_transports
from common.settings.config import EngineSettings, NodeSettings
from common.store.client import RedisClient
from common.store.queue import Entry
from common.store.registry import NodeRecord, NodeState, Registry, Role, Snapshot, new_incarnation
from common.version import version
from common.wire.bus import Bus
from common.wire.senders import TO_NODES
from kv_transfer.lease import Leases
from kv_transfer.link import Links
from kv_transfer.ports import Adopted, TransferSettings
from kv_transfer.transports.base import Target

log = get_logger("node")

LAST_STEP_S = 1.0  # for a step that is under way when the grace period is over

ROLE_MODULES = {"prefill": "prefill_node.role", "decode": "decode_node.role", "unified": "decode_node.role"}


def load_role(name: str, node: NodeServices) -> NodeRole:
    """Import a role by its dotted name, so that roles never import each other, and call its
    module's `create(node)`."""
    role: NodeRole = importlib.import_module(ROLE_MODULES[name]).create(node)
    return role


class Node:
    """Build it (this loads the model), then `await run()`; `stop` ends it in order. Of the settings
    the bus's are complete (common/wire/bus_setup.py). Implements `NodeServices`."""

    def __init__(
        self,
        settings: NodeSettings,
        *,
        make_bus: Callable[..., Bus] = Bus,
        make_runner: Callable[..., Runner] = load_runner,
        make_role: Callable[[str, NodeServices], NodeRole] = load_role,
        take_gpu: Callable[[NodeSettings, str], tuple[EngineSettings, GpuLease | None]] = take_gpu,
    ) -> None:
        """`make_bus`, `make_runner`, `make_role` and `take_gpu` make those parts; each gets the same
        arguments as the default."""
        self.settings = settings
        self.name = settings.name or f"{settings.role}-{socket.gethostname().split('.')[0]}"
        self.incarnation = new_incarnation(self.name)
        self.state = NodeState.STARTING
        self._stopping = asyncio.Event()
        self._started_at = int(time.time() * 1000)
        self._tasks: set[asyncio.Task[None]] = set()
        self._failure: BaseException | None = None  # of one of them, or of a callback
        self._ends_at = math.inf

        shared = SharedMemory()
        engine, self.lease = take_gpu(settings, self.incarnation)
        self._runner: ThreadRunner | None = None

        def runner() -> Runner:
            inner = make_runner(engine, storage=shared.allocate)
            return inner if self.lease is None else LeasedRunner(inner, self.lease)

        try:
            self._runner = ThreadRunner(runner)
            self.engine = Engine(engine, self._runner, on_free=shared.freed)
        except BaseException:
            if self._runner is not None:
                self._runner.close()
            if shared.memory is not None:
                shared.memory.close()
            if self.lease is not None:
                self.lease.close()
            raise
        assert shared.memory is not None
        self.memory = shared.memory
        if unread := self.engine.facts.unread_fields:
            log.warning("node.fields_not_read", file="config.json", fields=",".join(unread))

        fingerprint, layout = self.engine.fingerprint, self.engine.layout
        if not fingerprint.is_repeatable:
            log.warning("node.unrepeatable", numerics=fingerprint.numerics)
        self.redis = RedisClient(settings.redis, name=self.incarnation)
        self.registry = Registry(self.redis)
        self.bus = make_bus(self.incarnation, settings.bus, progress=self._progress, hears=TO_NODES)
        self.peers = Peers(self.incarnation, Role(settings.role), fingerprint)
        self.gateways = Gateways(self.incarnation, self.bus)
        self.kv = NodeKV(self.engine, self.memory, digests=settings.engine.kv_digests)
        self.leases = Leases(self.engine.pool)
        self.links = Links(
            self.bus,
            self.incarnation,
            fingerprint,
            Target(self.memory, layout),
            pool=self.kv,
            leases=self.leases,
            settings=TransferSettings(digests=settings.engine.kv_digests),
            make_transports=functools.partial(make_transports, settings, self.memory, layout, self.leases),
            on_arrival=self._arrived,
            on_intake_ended=lambda _: self.wake(),
        )
        self.cache_feed = CacheFeed(self.incarnation, self.engine.pool)
        self.announcer = Announcer(
            self.registry,
            self.incarnation,
            record=self.record,
            kv_links=self.links.describe,
            on_read=self._peers_read,
        )

        self.suspects = Suspects()
        self.role = make_role(settings.role, self)
        self.gateways.attempts = self.role
        self.entries = Entries(self, self.role, self.redis)
        metrics = NodeMetrics(
            self,
            name=Role(settings.role),
            role=self.role,
            bus=self.bus,
            leases=self.leases,
            entries=self.entries,
        )
        self.metrics = MetricsServer(settings.metrics, metrics.render)
        self.steps = Steps(
            self,
            self.role,
            stall_limit_s=settings.bus.stall_limit_s,
            metrics=metrics,
            say_alone=self.announcer.say_alone,
            room_changed=self.entries.room,
        )

    # Services.

    def connect(self, peer: str, endpoint: str) -> None:
        if self.bus.link(peer) is None:
            self.bus.connect(peer, endpoint)

    def wake(self) -> None:
        self.steps.wake()
        self.entries.room()

    def done(self, entry: Entry) -> None:
        self.entries.done(entry)

    def spawn(self, coroutine: Coroutine[object, object, None]) -> None:
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(report)

    def _loop_error(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """A task, a timer or another callback that fails leaves what it was about in an unknown state: the
        node drains and ends."""
        log.error("loop.error", message=context.get("message"), exc_info=context.get("exception"))
        if is_a_failure(context):
            self._failure = self._failure or context["exception"]
            self._stopping.set()

    # Life.

    async def run(self, when_warm: Callable[[], None] = lambda: None) -> None:
        """Serve until `stop`; then finish what runs, within the grace period, and leave nothing behind.
        An error while starting leaves nothing behind either. Calls `when_warm` before it serves."""
        async with contextlib.AsyncExitStack() as stack:
            await self._start(stack, when_warm)
            loops = [
                asyncio.create_task(coroutine, name=name)
                for name, coroutine in (
                    ("take", self.entries.take()),
                    ("delete", self.entries.delete()),
                    ("listen", self._listen()),
                    ("watch", self._watch()),
                    ("announce", self.announcer.run()),
                    ("compute", self.steps.run()),
                    ("hold", self._hold_gpu()),
                )
            ]
            stack.push_async_callback(_end, loops)
            draining = asyncio.create_task(self._drain_when_asked(), name="drain")
            loops.append(draining)
            waiting = set(loops)
            while not draining.done():
                done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()  # a loop ends only by an error, or by the drain
            if self._failure is not None:
                raise self._failure

    async def _start(self, stack: contextlib.AsyncExitStack, when_warm: Callable[[], None]) -> None:
        """Each step puts what undoes it on the stack before it begins."""
        loop = asyncio.get_running_loop()
        stack.callback(loop.set_exception_handler, loop.get_exception_handler())
        loop.set_exception_handler(self._loop_error)
        stack.callback(lambda: log.info("node.ended", steps=self.engine.num_steps))
        stack.push_async_callback(self._end_lease)
        stack.callback(self._end_engine)
        stack.push_async_callback(self.redis.close)
        await self.redis.open()
        stack.push_async_callback(self._leave)
        stack.push_async_callback(self._settle)
        stack.push_async_callback(self.bus.close)
        await self.bus.start()
        # Before the links: while a graph of the device is captured, nobody else should ask it for memory.
        await asyncio.to_thread(self.engine.warm_up)
        stack.push_async_callback(self.links.close)
        self.links.start()
        stack.push_async_callback(self.metrics.close)
        await self.metrics.start()
        stack.callback(self.gateways.close)
        loading.give_back_memory()
        when_warm()
        # Not earlier: the reaper takes a node with a queue and no beat for dead, and a start may take long.
        await self.entries.open()
        self.state = NodeState.READY
        await self.announcer.announce()
        log.info("node.ready", **self._summary())

    def _end_engine(self) -> None:
        """Free the engine and its memory, unless a thread hangs: that may still write, and ends with the
        process. `EngineBroken` if it is still at a step when the grace period is over."""
        if self.steps.hangs:
            return
        assert self._runner is not None
        grace_s = min(self._ends_at - time.monotonic(), self.settings.grace_period_s)
        self._runner.close(max(LAST_STEP_S, grace_s))
        self.memory.close()

    async def _hold_gpu(self) -> None:
        """`EngineBroken` when the GPU is somebody else's."""
        if self.lease is None:
            await asyncio.Event().wait()
        else:
            await self.lease.until_lost()

    async def _end_lease(self) -> None:
        """A thread that hangs may still compute: others get its GPU when the lease is over."""
        if self.lease is not None:
            await asyncio.to_thread(self.lease.close, release=not self.steps.hangs)

    async def _leave(self) -> None:
        try:
            await self.registry.leave(self.incarnation)
        except ServiceUnavailable as error:
            log.warning("node.left_unsaid", error=error)  # the reaper will find it

    async def _settle(self) -> None:
        """Wait for the background tasks."""
        await asyncio.gather(*self._tasks, return_exceptions=True)

    def stop(self) -> None:
        """Ask `run` to drain and end; the second time, to end at once."""
        if self._stopping.is_set():
            self.settings = dataclasses.replace(self.settings, grace_period_s=0.0)
        self._stopping.set()

    async def _drain_when_asked(self) -> None:
        """Take nothing new, give back what was not begun, and move or finish what runs, within the grace
        period."""
        await self._stopping.wait()
        begun = time.monotonic()
        self._ends_at = begun + self.settings.grace_period_s
        self.state = NodeState.DRAINING
        self.links.drain()
        try:
            await self.announcer.announce()
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

    def _listen(self) -> Coroutine[object, object, None]:
        return loops.listen(self.bus, self.links, self.gateways, self.cache_feed, self.role, self.wake)

    def _watch(self) -> Coroutine[object, object, None]:
        return loops.watch(self.bus, self.links, self.gateways, self.peers, self.wake)

    # What its parts say.

    def _arrived(self, adopted: Adopted) -> None:
        self.role.arrived(adopted)
        self.wake()

    def _peers_read(self, snapshot: Snapshot) -> None:
        """Tell every gateway what the prefix cache gained and lost, and the role that records changed."""
        self.peers.read(snapshot)
        linked, events = self.bus.peers(), self.cache_feed.events()
        for gateway in self.peers.gateways():
            if events is not None and gateway.incarnation in linked:
                self.gateways.send(gateway.incarnation, events)
        self.role.peers_changed()

    def _progress(self) -> tuple[int, bool]:
        return self.engine.num_steps, self.steps.computing

    def record(self, beats: int = 0) -> NodeRecord:
        """What `pdq nodes` shows of this node."""
        engine, mine = self.engine, self.engine.fingerprint
        gpu = self.lease.gpu if self.lease is not None else None
        proposer = engine.proposer
        drafts = DraftCounts()
        for of_source in proposer.counts.values() if proposer is not None else ():
            drafts.add(of_source)
        return NodeRecord(
            incarnation=self.incarnation,
            name=self.name,
            role=Role(self.settings.role),
            state=self.state,
            endpoint=self.bus.endpoint,
            url=self.metrics.url(self.bus.endpoint),
            host=socket.gethostname(),
            device=f"cuda:{gpu.index}" if gpu is not None else str(self.memory.slabs.device),
            gpu=gpu.uuid if gpu is not None else "",
            gpu_name=gpu.name if gpu is not None else "",
            pid=os.getpid(),
            cores=len(os.sched_getaffinity(0)),
            started_at=self._started_at,
            version=version(),
            model=mine.model,
            revision=mine.revision,
            layout=mine.layout,
            numerics=mine.numerics,
            adapter=mine.adapter,
            tokenizer=mine.tokenizer,
            draft=mine.draft,
            transports=",".join(self.links.transports),
            block_size=mine.block_size,
            slab_bytes=engine.layout.slab_bytes,
            num_blocks=engine.pool.num_blocks,
            max_num_seqs=engine.facts.max_num_seqs,
            max_model_len=engine.facts.max_model_len,
            speculative=proposer.name if proposer is not None and proposer.is_on else "",
            waiting=engine.scheduler.num_waiting,
            running=engine.scheduler.num_running,
            free_blocks=engine.pool.num_free,
            unfilled_slots=engine.pool.num_unfilled_slots,
            open_attempts=self.role.num_open,
            leases=sum(self.leases.count().values()),
            reserved=self.kv.num_reserved,
            unacknowledged=self.gateways.tokens.num_unacknowledged,
            steps=engine.num_steps,
            drafts=drafts.drafts,
            drafted_tokens=drafts.drafted,
            accepted_tokens=drafts.accepted,
            saved_ms=round(1000 * drafts.saved_s),
            beats=beats,
            alone=self.steps.alone,
        )

    def _summary(self) -> dict[str, object]:
        return {
            "role": self.settings.role,
            "node": self.incarnation,
            "device": self.lease.gpu if self.lease is not None else self.memory.slabs.device,
            "model": self.engine.fingerprint.model,
            "blocks": self.engine.pool.num_blocks,
            "numerics": self.engine.fingerprint.numerics,
            "bus": self.bus.endpoint,
        }


async def _end(loops: Iterable[asyncio.Task[None]]) -> None:
    for task in loops:
        task.cancel()
    await asyncio.gather(*loops, return_exceptions=True)
