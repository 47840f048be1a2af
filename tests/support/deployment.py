"""A whole system of real processes on loopback: Redis, a gateway, nodes; and the proof that it is idle.

Owns starting and ending only what it started. A test takes a `Deployment`, sends HTTP, kills what
it likes, and asks `assert_idle` at the end: every block, lease, reservation and queue entry is back
to its idle value, and no key is without a time to live.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Mapping
from pathlib import Path
from typing import Any

import httpx

from common.child_process import die_with_parent
from common.settings.config import RedisSettings
from common.store.client import RedisClient
from common.store.queue import queue_lengths
from common.store.registry import KVLink, NodeRecord, NodeState, Registry, Role
from common.store.server import EmbeddedRedis
from tests.support.redis import HANGS_S, leaked_keys

ROOT = Path(__file__).resolve().parents[2]
START_LIMIT_S = 120.0  # without any news
IDLE_LIMIT_S = HANGS_S


class Deployment:
    """`with Deployment(model, prefill=1, decode=1) as system`. `flags` go to every node, then its own of
    `node_flags`, by name: nodes are numbered through all roles."""

    def __init__(
        self,
        model: Path,
        *,
        prefill: int = 0,
        decode: int = 0,
        unified: int = 0,
        flags: tuple[str, ...] = (),
        node_flags: Mapping[str, tuple[str, ...]] | None = None,
        gateway_flags: tuple[str, ...] = (),
        redis_options: tuple[str, ...] = (),
    ) -> None:
        self.model = model
        roles = ["prefill"] * prefill + ["decode"] * decode + ["unified"] * unified
        self.roles = {f"{role}-{index}": role for index, role in enumerate(roles)}
        self.flags = flags
        self.node_flags = node_flags or {}
        self.gateway_flags = gateway_flags
        self.redis = EmbeddedRedis(options=redis_options)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.urls: dict[str, str] = {}  # of the gateways, by name
        self._logs = Path(tempfile.mkdtemp(prefix="pdq-test-"))

    @property
    def url(self) -> str:
        return self.urls["gateway"]

    def __enter__(self) -> Deployment:
        self.redis.start()
        try:
            self.start_missing()
            asyncio.run(self.wait_ready())
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start_missing(self) -> None:
        """The gateway and every node of the deployment that does not run (any more)."""
        if "gateway" not in self.processes:
            self.start_gateway("gateway")
        for name, role in self.roles.items():
            if name not in self.processes:
                self.start_node(name, role)

    def start_gateway(self, name: str) -> None:
        self.start(
            name,
            "gateway",
            "--name",
            name,
            "--host",
            "127.0.0.1",
            "--port",
            "0",
            "--model",
            str(self.model),
            "--decode-prompt-tokens",  # every prompt is handed over, unless a test wants other
            "0",
            *self.gateway_flags,
        )

    def start_node(self, name: str, role: str) -> None:
        self.start(
            name,
            "common.node",
            "--role",
            role,
            "--name",
            name,
            "--model",
            str(self.model),
            "--dtype",
            "float32",
            "--threads",
            "1",
            "--num-kv-blocks",
            "256",
            "--max-num-seqs",
            "16",
            "--max-num-batched-tokens",
            "256",
            *self.flags,
            *self.node_flags.get(name, ()),
        )

    def command(self, name: str, module: str, *arguments: str) -> list[str]:
        """What is started under this name."""
        return [sys.executable, "-m", module, *arguments]

    def redis_url(self, name: str) -> str:
        """Where what is started under this name finds Redis."""
        return self.redis.url

    def start(self, name: str, module: str, *arguments: str) -> None:
        log = (self._logs / f"{name}.log").open("ab")
        with log:
            self.processes[name] = subprocess.Popen(
                self.command(name, module, *arguments),
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=os.environ
                | {"OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", "PDQ_REDIS_URL": self.redis_url(name)},
                preexec_fn=die_with_parent(os.getpid()),
            )

    def kill(self, name: str) -> None:
        """As power loss: no goodbye."""
        self.processes[name].kill()
        self.processes.pop(name).wait()

    def signal(self, name: str, number: signal.Signals) -> None:
        self.processes[name].send_signal(number)

    async def terminate(self, name: str, limit_s: float = HANGS_S) -> int:
        """SIGTERM, and the exit code once it has ended by itself."""
        process = self.processes.pop(name)
        process.terminate()
        try:
            return await asyncio.to_thread(process.wait, limit_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGABRT)  # its log says where it hangs
            process.wait()
            raise AssertionError(f"{name} does not end\n{self.logs()}") from None

    def stop(self) -> None:
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(HANGS_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.redis.stop()
        shutil.rmtree(self._logs, ignore_errors=True)

    def _logged_bytes(self) -> int:
        return sum(path.stat().st_size for path in self._logs.iterdir())

    def logs(self) -> str:
        return "\n".join(
            f"== {path.name}\n" + "\n".join(path.read_text().splitlines()[-15:])
            for path in sorted(self._logs.iterdir())
        )

    # Looking in.

    @contextlib.asynccontextmanager
    async def redis_client(self) -> AsyncIterator[RedisClient]:
        client = RedisClient(RedisSettings(url=self.redis.url))
        await client.open()
        try:
            yield client
        finally:
            await client.close()

    async def records(self) -> dict[str, NodeRecord]:
        """What the living say of themselves, gateways too, by name."""
        names = {process.pid: name for name, process in self.processes.items()}
        async with self.redis_client() as client:
            snapshot = await Registry(client).snapshot()
        return {names[r.pid]: r for r in snapshot.records.values() if r.pid in names}

    async def kv_links(self, name: str) -> list[KVLink]:
        """What the node of this name says of its KV links."""
        incarnation = (await self.records())[name].incarnation
        async with self.redis_client() as client:
            return (await Registry(client).kv_links([incarnation]))[incarnation]

    async def wait_ready(self) -> None:
        """Everything that was started is up, and every gateway would take a request. A start has a limit for
        time without news only, since it may compile kernels on a busy machine."""
        said, deadline = 0, 0.0
        while True:
            if (news := self._logged_bytes()) != said or not deadline:
                said, deadline = news, time.monotonic() + START_LIMIT_S
            for name, process in self.processes.items():
                assert process.poll() is None, f"{name} ended at start\n{self.logs()}"
            ready = {n: r for n, r in (await self.records()).items() if r.state is NodeState.READY}
            self.urls = {name: r.url for name, r in ready.items() if r.role is Role.GATEWAY}
            missing = self.processes.keys() - ready.keys()
            if not missing and all([await self._http_ready(url) for url in self.urls.values()]):
                return
            assert time.monotonic() < deadline, f"not ready: {missing}\n{self.logs()}"
            await asyncio.sleep(0.05)

    async def _http_ready(self, url: str) -> bool:
        async with httpx.AsyncClient() as client:
            try:
                return (await client.get(f"{url}/ready")).status_code == 200
            except httpx.TransportError:
                return False

    async def assert_idle(self) -> None:
        """Everything of every living node is back, within the limit; and no key leaks."""
        deadline = time.monotonic() + IDLE_LIMIT_S
        while True:
            held = await self._held()
            if not held:
                return
            assert time.monotonic() < deadline, f"not idle: {held}\n{self.logs()}"
            await asyncio.sleep(0.05)

    async def _held(self) -> list[str]:
        living = {process.pid for process in self.processes.values()}
        async with self.redis_client() as client:
            snapshot = await Registry(client).snapshot()
            nodes = [r for r in snapshot.records.values() if r.pid in living]
            held = [
                f"{r.name}: {field} is {value}"
                for r in nodes
                for field, value in {
                    "used blocks": r.num_blocks - r.free_blocks,
                    "waiting": r.waiting,
                    "running": r.running,
                    "open": r.open_attempts,
                    "leases": r.leases,
                    "reserved": r.reserved,
                    "unacknowledged": r.unacknowledged,
                }.items()
                if value
            ]
            names = [r.incarnation for r in nodes]
            for name, length in zip(names, await queue_lengths(client, names), strict=True):
                if length.waiting or length.at_work:
                    held.append(f"queue of {name}: {length}")
            held += [f"key without time to live: {key}" for key in await leaked_keys(client)]
        return held


@contextlib.contextmanager
def deployed(model: Path, **counts: Any) -> Iterator[Deployment]:
    with Deployment(model, **counts) as system:
        yield system


async def complete(client: httpx.AsyncClient, url: str, **body: Any) -> dict[str, Any]:
    """One completion as JSON; raises for an HTTP error, with its body."""
    response = await client.post(f"{url}/v1/completions", json=body, timeout=120.0)
    assert response.status_code == 200, response.text
    result: dict[str, Any] = response.json()
    return result
