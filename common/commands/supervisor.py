"""The processes of `pdq serve`: started together, watched, restarted, and stopped in order.

Owns: the life of each part. Knows nothing of what they compute; whether a part is ready is what its
record in the registry says. Read it from top to bottom: start, main loop, stop.

    dies before all were ready once     nothing of it can be used: `ResourceError`, all is stopped
    dies later                          started again, after a pause that doubles each time
    dies MAX_FAILED_STARTS times in a row before it was ready     `ResourceError`, all is stopped
    first signal                        gateway, then nodes, then Redis; each finishes what runs
    second signal                       all of them are killed
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import functools
import math
import os
import re
import signal
import socket
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import httpx

from common.commands import cores, running
from common.commands.child import Child, ending
from common.commands.settings import Deployment
from common.errors import ResourceError, ServiceUnavailable
from common.processor_share import BESIDE_GATEWAY
from common.settings.config import BusSettings, RedisSettings, child_environment
from common.store.client import RedisClient
from common.store.registry import NodeRecord, NodeState, Registry, Role
from common.store.server import EmbeddedRedis
from common.wire.bus_setup import make_key

MAX_FAILED_STARTS = 3
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 30.0
STEADY_S = 60.0  # a part that lived so long is not restarted more slowly for what was before
START_POLL_S, WATCH_POLL_S = 0.1, 1.0
SLOW_START_S = 15.0
PATIENCE_S = 10.0  # for the gateway to link with its nodes, before it is said that it waits
KERNEL_LINE = re.compile(r" kernels\.(?P<event>compiling|waiting) kernel=(?P<kernel>\w+)")  # of a node's log
OVERTIME_S = 5.0  # beyond the grace period, for a part to end before it is killed

Say = Callable[[str, str, str], None]
"""Called with the name of a part, its state, and what there is to say about it."""


@dataclasses.dataclass(slots=True)
class Part:
    """One process to keep alive, and the life it is in."""

    name: str
    module: str
    argv: Sequence[str]
    environment: Mapping[str, str]
    cores: Sequence[int]
    niceness: int = 0
    child: Child | None = None
    record: NodeRecord | None = None  # once it is ready
    started_at: float = 0.0
    progress_at: float = 0.0  # when it started, or last compiled a kernel
    kernels: int = 0  # that it has begun to compile
    failed_starts: int = 0
    slow: bool = False  # and that has been said

    @property
    def is_gateway(self) -> bool:
        return self.module == "gateway"

    def progress(self, line: str) -> str:
        """What a line of its log tells of the kernels that it compiles before it is ready, or ""."""
        found = KERNEL_LINE.search(line)
        if found is None or self.record is not None:
            return ""
        self.progress_at, self.slow = time.monotonic(), False
        if found["event"] == "waiting":
            return f"{found['kernel']} (in another process, for which it waits)"
        self.kernels += 1
        return f"{found['kernel']} (kernel {self.kernels} of a first start)"


class Supervisor:
    """Runs one deployment. `say` is told of every part's states; `invite` once, when requests can
    be served, with the URL; `show_line` gets what the parts write to stderr."""

    def __init__(
        self,
        deployment: Deployment,
        environ: Mapping[str, str],
        say: Say,
        invite: Callable[[str], None],
        show_line: Callable[[str, str], None],
    ) -> None:
        self._deployment = deployment
        num_nodes = deployment.prefill + deployment.decode + deployment.unified
        self._shares = cores.divide(deployment.cores, num_nodes)
        self._environ = environ
        self._say = say
        self._invite = invite
        self._show_line = show_line
        self._server: EmbeddedRedis | None = None
        self._restarting: asyncio.Task[None] | None = None
        self._parts: list[Part] = []
        self._stop = asyncio.Event()
        self._killed = False
        self._serving = False
        self._stuck = False

    async def run(self) -> int:
        """Until a signal comes: 0, or 1 if a part had to be killed, or 130 after a second signal.
        Raises `PdqError` for what keeps it from starting or going on."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, self._on_signal)
        try:
            async with contextlib.AsyncExitStack() as stack:
                stack.push_async_callback(self._stop_redis)
                redis = await self._start_redis()
                client = RedisClient(redis, name="pdq-serve")
                stack.push_async_callback(client.close)
                await self._greet(client)
                self._parts = self._plan(redis, self._bus(stack))
                stack.push_async_callback(self._stop_parts)
                if not self._stop.is_set():
                    await self._main_loop(stack, client, redis)
        finally:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                loop.remove_signal_handler(number)
        return 130 if self._killed else int(self._stuck)

    def _on_signal(self) -> None:
        if not self._stop.is_set():
            self._stop.set()
            return
        self._killed = True
        for part in self._parts:
            if part.child is not None:
                part.child.signal(signal.SIGKILL)

    # ── Start ────────────────────────────────────────────────────────────────────────────────────

    async def _start_redis(self) -> RedisSettings:
        # We and what we start without cores of its own, which is Redis, keep off those of nodes.
        os.sched_setaffinity(0, self._shares.rest)
        given = self._deployment.node.redis
        if given.url:
            return given
        self._server = EmbeddedRedis()
        await asyncio.to_thread(self._server.start)
        return dataclasses.replace(given, url=self._server.url)

    async def _greet(self, client: RedisClient) -> None:
        info = await client.open()
        if self._server is not None:
            place = f"{self._server.binary}, port {self._server.port}"
            self._say("redis", "ready", place)
        else:
            where = urlsplit(client.settings.url)
            place = where.path if where.scheme == "unix" else f"{where.hostname}:{where.port}"
            self._say("redis", "ready", f"{info.kind} {info.version}, given, at {place}")

    def _bus(self, stack: contextlib.AsyncExitStack) -> BusSettings:
        """With a Redis of its own a deployment is closed: its bus has a key of its own, too, which
        ends with it. Who shares a Redis shares the key that is given, or this user's."""
        given = self._deployment.node.bus
        if self._server is None or given.secret_key or given.secret_key_file:
            return given
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="pdq-serve-"))
        path = Path(folder, "bus.key")
        make_key(path)
        return dataclasses.replace(given, secret_key_file=str(path))

    def _plan(self, redis: RedisSettings, bus: BusSettings) -> list[Part]:
        wanted = self._deployment
        roles = [
            (role, index + 1)
            for role, count in (
                (Role.PREFILL, wanted.prefill),
                (Role.DECODE, wanted.decode),
                (Role.UNIFIED, wanted.unified),
            )
            for index in range(count)
        ]
        if self._shares.note:
            self._say("cores", "shared", self._shares.note)
        # A Redis that others use too: the names of this machine's parts tell it.
        where = "" if self._server is not None else f"-{socket.gethostname().split('.')[0]}"[:40]
        gateway = dataclasses.replace(wanted.gateway, redis=redis, bus=bus)
        environment = child_environment(gateway, self._environ)
        name = f"gateway-1{where}"
        parts = [Part(name, "gateway", ("--name", name), environment, self._shares.rest)]
        for (role, number), own in zip(roles, self._shares.nodes, strict=True):
            engine = dataclasses.replace(wanted.node.engine, cores=own)
            node = dataclasses.replace(wanted.node, engine=engine, redis=redis, bus=bus)
            environment = child_environment(node, self._environ)
            name = f"{role}-{number}{where}"
            argv = ("--role", role.value, "--name", name)
            parts.append(Part(name, "common.node", argv, environment, own, BESIDE_GATEWAY))
        return parts

    # ── Main loop ────────────────────────────────────────────────────────────────────────────────

    async def _main_loop(
        self, stack: contextlib.AsyncExitStack, client: RedisClient, redis: RedisSettings
    ) -> None:
        """Keep everything alive until a signal comes, or something cannot be kept."""
        duties: list[Awaitable[None]] = [self._keep(part) for part in self._parts]
        duties += [self._watch(client, redis, stack), self._keep_redis()]
        tasks = [asyncio.ensure_future(duty) for duty in duties]
        stopping = asyncio.create_task(self._stop.wait())
        try:
            done, _ = await asyncio.wait([*tasks, stopping], return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        finally:
            self._stop.set()
            for task in (*tasks, stopping):
                task.cancel()
            await asyncio.gather(*tasks, stopping, return_exceptions=True)

    async def _keep(self, part: Part) -> None:
        """Start the part, and again when it ends."""
        pause = FIRST_PAUSE_S
        while True:
            part.started_at = part.progress_at = time.monotonic()
            part.record, part.slow, part.kernels = None, False, 0
            part.child = child = await Child.start(
                part.module,
                part.argv,
                part.environment,
                part.cores,
                part.niceness,
                functools.partial(self._take_progress, part),
            )
            self._say(part.name, "starting", f"pid {child.pid}, {cores.shown(part.cores)}")
            # Shielded: its end is awaited again when we stop.
            how = ending(await asyncio.shield(child.ended))
            words = f": {child.last_words}" if child.last_words else ""
            part.failed_starts = 0 if part.record else part.failed_starts + 1
            if not self._serving and part.record is None:
                raise ResourceError(f"{part.name} died at start ({how}){words}")
            if part.failed_starts >= MAX_FAILED_STARTS:
                times = f"{part.failed_starts} times in a row"
                raise ResourceError(f"{part.name} died at start {times} ({how}){words}")
            if time.monotonic() - part.started_at > STEADY_S:
                pause = FIRST_PAUSE_S
            self._say(part.name, "died", f"{how}; starts again in {pause:g} s{words}")
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)

    async def _watch(
        self, client: RedisClient, redis: RedisSettings, stack: contextlib.AsyncExitStack
    ) -> None:
        """See parts become ready, and say so; once, when requests can be served, invite."""
        registry = Registry(client)
        all_ready_at: float | None = None
        async with httpx.AsyncClient(timeout=5.0) as http:
            while True:
                if waiting := [part for part in self._parts if part.record is None]:
                    self._note_slow(waiting)
                    with contextlib.suppress(ServiceUnavailable):
                        self._note_ready(waiting, (await registry.snapshot()).records)
                elif not self._serving:
                    lacking = await self._lacking(http)
                    if not lacking:
                        self._begin(redis, stack)
                    elif all_ready_at is None:
                        all_ready_at = time.monotonic()
                    elif time.monotonic() - all_ready_at > PATIENCE_S:
                        all_ready_at = math.inf
                        self._say("gateway-1", "waiting", lacking)
                await asyncio.sleep(WATCH_POLL_S if self._serving else START_POLL_S)

    def _begin(self, redis: RedisSettings, stack: contextlib.AsyncExitStack) -> None:
        """Requests can be served from now on."""
        self._serving = True
        try:
            stack.enter_context(running.announced(self._url, redis, self._environ))
        except ResourceError as error:
            self._say("pdq", "unlisted", f"{error}: `pdq nodes` needs --redis-url")
        self._invite(self._url)

    def _note_slow(self, waiting: Sequence[Part]) -> None:
        for part in waiting:
            if not part.slow and time.monotonic() - part.progress_at > SLOW_START_S:
                part.slow = True
                took = time.monotonic() - part.started_at
                self._say(part.name, "starting", f"for {took:.0f} s now")

    def _take_progress(self, part: Part, line: str) -> bool:
        if progress := part.progress(line):
            self._say(part.name, "compiling", progress)
        return bool(progress)

    def _note_ready(self, waiting: Sequence[Part], records: Mapping[str, NodeRecord]) -> None:
        for part in waiting:
            for record in records.values():
                mine = part.child is not None and record.pid == part.child.pid
                if not (mine and record.name == part.name and record.state is NodeState.READY):
                    continue
                part.record = record
                self._say(part.name, "ready", _described(part, record))
                assert part.child is not None
                part.child.show(functools.partial(self._show_line, part.name))
                if part.is_gateway:  # after a death, at the same port
                    port = str(urlsplit(record.url).port)
                    part.argv = ("--name", part.name, "--port", port)

    @property
    def _url(self) -> str:
        """Where a client on this machine reaches the gateway."""
        (gateway,) = (part for part in self._parts if part.is_gateway)
        assert gateway.record is not None
        url = gateway.record.url
        return url.replace("//0.0.0.0:", "//127.0.0.1:").replace("//[::]:", "//[::1]:")

    async def _lacking(self, http: httpx.AsyncClient) -> str:
        """What keeps the gateway from serving although all parts are ready, or ""."""
        try:
            reply = await http.get(f"{self._url}/ready")
            return "" if reply.status_code == 200 else str(reply.json()["reason"])
        except (httpx.HTTPError, ValueError, KeyError) as error:
            return f"/ready does not answer: {error}"

    async def _keep_redis(self) -> None:
        """Start our Redis again, empty and at the same port, when it has died."""
        while self._server is not None:
            await asyncio.sleep(WATCH_POLL_S)
            if _has_ended(self._server.pid):
                self._say("redis", "died", "starts again, empty; open requests go on")
                restart = asyncio.to_thread(self._server.restart)
                self._restarting = asyncio.create_task(restart)
                await asyncio.shield(self._restarting)
                self._say("redis", "ready", "again")
        await asyncio.Event().wait()

    # ── Stop ─────────────────────────────────────────────────────────────────────────────────────

    async def _stop_parts(self) -> None:
        """The gateway first, so that what is open finishes on nodes that still run."""
        alive = [p for p in self._parts if p.child is not None and p.child.returncode is None]
        if alive and self._serving:
            self._say("pdq", "stopping", "open requests finish first; Ctrl-C again ends it at once")
        for group in ([p for p in alive if p.is_gateway], [p for p in alive if not p.is_gateway]):
            await asyncio.gather(*(self._end(part) for part in group))

    async def _end(self, part: Part) -> None:
        child = part.child
        assert child is not None
        # Before it is ready there is nothing to finish, nor perhaps a handler of the signal.
        quick = self._killed or part.record is None
        child.signal(signal.SIGKILL if quick else signal.SIGTERM)
        limit = self._deployment.node.grace_period_s + OVERTIME_S  # the gateway's is the same
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(asyncio.shield(child.ended), limit)
        if not child.ended.done():
            self._stuck = True
            self._say(part.name, "killed", f"it did not end within {limit:g} s")
            child.signal(signal.SIGKILL)
        code = await child.ended
        if self._serving:
            self._say(part.name, "stopped", "" if code == 0 else ending(code))

    async def _stop_redis(self) -> None:
        if self._server is None:
            return
        if self._restarting is not None:  # in a thread, which nothing can cancel
            await asyncio.wait([self._restarting])
        if self._killed:
            self._server.kill()
        await asyncio.to_thread(self._server.stop)
        if self._serving:
            self._say("redis", "stopped", "")


def _has_ended(pid: int) -> bool:
    """Whether this child of ours has ended; it stays for its owner to reap."""
    return os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def _described(part: Part, record: NodeRecord) -> str:
    took = f"after {time.monotonic() - part.started_at:.1f} s"
    if part.is_gateway:
        return f"{took}, {record.url}"
    blocks = f"{record.num_blocks} blocks of {record.block_size} tokens"
    return f"{took}, {blocks}" if record.num_blocks else took
