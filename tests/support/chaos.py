"""A system whose nodes take orders to fail, each on a machine of its own; and who must let go of what.

Owns: the orders, the cables, the moment at which a survivor declared another process dead (a line
of its log), and what must be gone after that: everything that belonged to the dead, and, once the
last request has ended, everything beyond what the process had when it was idle.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import signal
import time
from collections.abc import AsyncIterator, Iterable
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.support.checkpoints import STORIES
from tests.support.deployment import Deployment
from tests.support.holdings import Connection, Holdings, Place, holdings, shared_files
from tests.support.load import Load, bodies
from tests.support.network import HUB, Network
from tests.support.redis import wait_until

BEATS = ("--bus-beat-interval-s", "0.25")  # silent for 1.5 s is dead
GONE_S = 5.0  # from a declared death until nothing of it is left: a promise
LOOK_S = 0.02
EVENTFDS_OF_LINK = 3  # that ZeroMQ makes for a link that we open: socket, and monitor with two ends


class Chaotic(Deployment):
    """Two prefill and two decode nodes. Without a network all are on loopback. With one they have a
    key: blocks go encrypted over `tcp`, and as they are over `tcp-plain`."""

    def __init__(self, folder: Path, transport: str, network: Network | None) -> None:
        self.network, self.orders = network, folder / "orders"
        self.orders.mkdir()
        self._sockets: Path | None = None
        name, _, plain = transport.partition("-")
        flags, options = ("--transports", name, *BEATS), ()
        if plain:
            flags = (*flags, "--no-encrypt-blocks")
        gateway_flags: tuple[str, ...] = BEATS
        if network is not None:
            self._sockets = folder / "shm"
            self._sockets.mkdir()
            key = ("--bus-secret-key-file", str(folder / "bus.key"))
            flags = (*flags, *key, "--shm-dir", str(self._sockets))
            gateway_flags = (*BEATS, *key, "--bus-host", HUB)
            options = ("--bind", "127.0.0.1", HUB, "--protected-mode", "no")
        super().__init__(
            STORIES, prefill=2, decode=2, flags=flags, gateway_flags=gateway_flags, redis_options=options
        )
        for name in self.roles if network is not None else ():
            network.add(name)
        self.transport = transport
        self._idle: dict[int, Holdings] = {}  # by pid, when all links were open
        self._shared = shared_files()
        self._rounds = 0

    def command(self, name: str, module: str, *arguments: str) -> list[str]:
        if module != "common.node":
            return super().command(name, module, *arguments)
        command = super().command(name, "tests.support.chaotic_node", *arguments)
        if self.network is not None:
            address = self.network.addresses[name]
            command = [*self.network.at(name), *command, "--bus-host", address]
        return [*command, str(self.orders)]

    def redis_url(self, name: str) -> str:
        url = super().redis_url(name)
        away = self.network is not None and name in self.roles
        return url.replace("127.0.0.1", HUB) if away else url

    # ── Orders ───────────────────────────────────────────────────────────────────────────────────

    def give_order(self, role: str, at: str, fault: str) -> None:
        order: dict[str, Any] = {"fault": fault}
        if fault == "cut":
            assert self.network is not None
            order["commands"] = {name: self.network.pull(name) for name in self.roles}
        path = self.orders / f"{role}.{at}.json"
        unfinished = path.with_suffix(".new")
        unfinished.write_text(json.dumps(order))
        unfinished.rename(path)

    def taken_by(self) -> str | None:
        """The node that has carried the order out."""
        for path in self.orders.glob("taken.*"):
            pid = int(path.suffix[1:])
            for name, process in self.processes.items():
                if process.pid == pid:
                    return name
        return None

    def forget_orders(self) -> None:
        for path in (*self.orders.glob("taken.*"), *self.orders.glob("*.json")):
            if not path.name.startswith("state."):
                path.unlink()

    def make_good(self, victim: str) -> None:
        """Whoever was stopped goes on, and its cable is put back; for others nothing happens."""
        if victim in self.processes:
            self.signal(victim, signal.SIGCONT)
        if self.network is not None:
            self.network.put_back(victim)

    @contextlib.asynccontextmanager
    async def made_good(self) -> AsyncIterator[None]:
        """After a failure the next case begins with new processes."""
        try:
            yield
        except BaseException:
            for name in list(self.processes):
                if name in self.roles:
                    self.make_good(name)
                self.kill(name)
            raise

    # ── The idle state ───────────────────────────────────────────────────────────────────────────

    async def settle(self) -> None:
        """Everybody has a link with everybody he will ever have one with; what a process that is
        new here then holds, idle, is what it may hold at most from now on."""
        self.start_missing()
        await self.wait_ready()
        while not await self._all_linked():
            self._rounds += 1
            assert self._rounds < 1000, "some nodes never hand over to each other"
            async with Load(self.url, bodies(8, max_tokens=(2, 4), seed=5000 + self._rounds)) as load:
                await asyncio.gather(*load.tasks)
        await self.assert_idle()
        for process in self.processes.values():
            if process.pid not in self._idle:
                self._idle[process.pid] = holdings(process.pid)

    async def _all_linked(self) -> bool:
        records = await self.records()
        decode = {r.incarnation for r in records.values() if r.role == "decode"}
        peers = [
            {row["peer"] for row in await self.kv_links(name) if row["transport"]}
            for name, record in records.items()
            if record.role == "prefill"
        ]
        return len(decode) == len(peers) == 2 and all(decode <= found for found in peers)

    # ── What is left of the dead ─────────────────────────────────────────────────────────────────

    async def dead(self, name: str) -> Dead:
        """How `name` is known to the others, while it lives."""
        record = (await self.records())[name]
        host, _, port = record.endpoint.removeprefix("tcp://").rpartition(":")
        memory = self._idle[record.pid].own
        return Dead(self, name, record.incarnation, Place(host, int(port)), memory)

    def declared_at(self, name: str, dead: str, since: float) -> float | None:
        """When `name` said that its link with the incarnation `dead` was down; in UNIX time."""
        for line in (self._logs / f"{name}.log").read_text(errors="replace").splitlines():
            found = re.match(rf"(\S+) \w+ \S+ bus\.down peer={re.escape(dead)} ", line)
            if found and (at := datetime.fromisoformat(found[1]).timestamp()) >= since:
                return at
        return None

    async def wait_all_declared(self, name: str, since: float) -> float:
        """Until `name`, cut off, has declared everybody dead whom it knew; when it did so last."""
        records = await self.records()
        known = [
            records[other].incarnation
            for other in self.processes
            if self.roles.get(other) != self.roles[name]
        ]
        found: list[float | None] = []

        def declared() -> bool:
            found[:] = [self.declared_at(name, incarnation, since) for incarnation in known]
            return None not in found

        await wait_until(declared, f"{name} has declared {known} dead")
        return max(at for at in found if at is not None)

    def noted(self, name: str) -> dict[str, Any]:
        """What a node says that it holds; nothing for a gateway, or one that has just started."""
        path = self.orders / f"state.{self.processes[name].pid}.json"
        with contextlib.suppress(FileNotFoundError):
            found: dict[str, Any] = json.loads(path.read_text())
            return found
        return {"held": {}, "of": {}}

    # ── What is left of anything ─────────────────────────────────────────────────────────────────

    async def wait_idle(self, since: dict[str, float]) -> dict[str, float]:
        """Until these processes are idle, all at once: seconds from each one's moment until then."""
        last = dict(since)
        deadline = time.time() + 3 * GONE_S
        buses = await self._buses()
        while True:
            held = {name: self._left(name, buses) for name in since}
            now = time.time()
            last.update((name, now) for name, left in held.items() if left)
            if not any(held.values()) and shared_files() <= self._shared:
                break
            assert now < deadline, f"not idle: {held} {shared_files()}\n{self.logs()}"
            await asyncio.sleep(LOOK_S)
        elapsed = {name: last[name] - since[name] for name in since}
        assert max(elapsed.values()) <= GONE_S, f"idle only after {elapsed}"
        return elapsed

    def check_sockets(self) -> None:
        """What a killed node left in the folder of sockets is gone when another has started."""
        found = list(self._sockets.glob("*")) if self._sockets is not None else []
        shares = self.network is not None and self.transport == "shm"
        assert len(found) == (len(self.roles) if shares else 0), found

    async def _buses(self) -> set[Place]:
        ends = [r.endpoint.removeprefix("tcp://") for r in (await self.records()).values()]
        return {Place(end.rpartition(":")[0], int(end.rpartition(":")[2])) for end in ends}

    def _left(self, name: str, buses: set[Place]) -> list[str]:
        """Of one process: what it holds for requests, and what it did not hold when it was idle."""
        pid = self.processes[name].pid
        found = [f"{what}: {count}" for what, count in self.noted(name)["held"].items()]
        now, idle = holdings(pid), self._idle[pid]
        opened = self._opened(now, buses) - self._opened(idle, buses)
        for kind, count in now.descriptors.items():
            more = EVENTFDS_OF_LINK * max(0, opened) if kind == "eventfd" else 0
            if count > idle.descriptors[kind] + more:
                found.append(f"{count} of {kind}, {idle.descriptors[kind]} when idle")
        connections = len(self._others(now, buses)), len(self._others(idle, buses))
        if connections[0] > connections[1]:
            found.append(f"{connections[0]} connections, {connections[1]} when idle")
        if len(now.foreign) > len(idle.foreign):
            found.append(f"{len(now.foreign)} mapped pools, {len(idle.foreign)} when idle")
        return found

    def _opened(self, held: Holdings, buses: set[Place]) -> int:
        return sum(connection.peer in buses for connection in held.connections)

    def _others(self, held: Holdings, buses: set[Place]) -> list[Connection]:
        """Neither with Redis, of which the pool keeps as many as were ever needed at once, nor the
        bus's, of which there may be one each way."""
        redis = int(self.redis.url.rpartition(":")[2].partition("/")[0])
        return [
            connection
            for connection in held.connections
            if connection.peer.port != redis and not buses & {connection.own, connection.peer}
        ]


class Dead:
    """A process that others may declare dead. `since` in UNIX time, as the logs have it."""

    def __init__(
        self, system: Chaotic, name: str, incarnation: str, bus: Place, memory: Iterable[int]
    ) -> None:
        self.name, self.incarnation = name, incarnation
        self._system, self._bus, self._memory = system, bus, frozenset(memory)

    def known_to(self, name: str) -> bool:
        """Whether that process has a link with it: gateways with all, nodes with other roles."""
        roles = self._system.roles
        return roles.get(name) != roles[self.name]

    async def wait_declared(self, since: float) -> dict[str, float]:
        """Until every survivor that knew it has declared it dead: when each of them did."""
        names = [n for n in self._system.processes if n != self.name and self.known_to(n)]
        found: dict[str, float] = {}

        def declared() -> bool:
            for name in names:
                at = self._system.declared_at(name, self.incarnation, since)
                found.update({name: at} if at is not None else {})
            return len(found) == len(names)

        await wait_until(declared, f"{names} have declared {self.name} dead")
        return found

    async def wait_gone(self, declared: dict[str, float]) -> dict[str, float]:
        """Until nothing of it is left at these survivors: seconds from each one's declaration."""
        elapsed: dict[str, float] = {}
        while missing := declared.keys() - elapsed.keys():
            for name in missing:
                left, now = self._left(name), time.time()
                if not left:
                    elapsed[name] = now - declared[name]
                else:
                    assert now - declared[name] <= GONE_S, (
                        f"{name} holds {left} of {self.name}\n{self._system.logs()}"
                    )
            await asyncio.sleep(LOOK_S)
        return elapsed

    def _left(self, name: str) -> list[str]:
        system = self._system
        found = []
        if count := system.noted(name)["of"].get(self.incarnation):
            found.append(f"{count} links, handoffs and leases")
        held = holdings(system.processes[name].pid)
        for connection in held.connections:
            alone = system.network is not None and connection.peer.host == self._bus.host
            if alone or connection.peer == self._bus:
                found.append(f"a connection with {connection.peer}")
        if held.foreign & self._memory:
            found.append("a mapping of its memory")
        return found
