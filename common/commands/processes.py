"""What the processes of a deployment on this machine use: memory and processor time.

Owns: finding them (the registry's records of this host, Redis if it runs here, `pdq serve`), and
reading them. A process of another user, or one that has ended, is left out.
"""

from __future__ import annotations

import dataclasses
import socket
import time
from collections.abc import Mapping

import psutil

from common.commands import running
from common.settings.config import RedisSettings
from common.store.client import RedisClient
from common.store.registry import Registry

CLOCK_SLACK_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Use:
    """One process: memory at the end of a period, and the cores it kept busy during it.

    `pss_bytes` shares what several processes map among them, so that a sum means something; None
    where the system does not tell."""

    name: str
    role: str
    pid: int
    rss_bytes: int
    pss_bytes: int | None
    cores_used: float


class Meter:
    """Made at the start of a period; `read` gives the uses at its end."""

    def __init__(self, found: Mapping[int, tuple[str, str]]) -> None:
        """`found`: pid → name and role."""
        self._found = found
        self._since = time.monotonic()
        self._spent = {pid: spent for pid in found if (spent := _spent(pid)) is not None}

    def read(self) -> list[Use]:
        elapsed = max(1e-9, time.monotonic() - self._since)
        uses = []
        for pid, (name, role) in self._found.items():
            after = _spent(pid)
            if pid not in self._spent or after is None:
                continue
            try:
                process = psutil.Process(pid)
                rss = int(process.memory_info().rss)
                pss = _pss(process)
            except psutil.Error:
                continue
            uses.append(Use(name, role, pid, rss, pss, (after - self._spent[pid]) / elapsed))
        return uses


async def local_processes(redis: RedisSettings, environ: Mapping[str, str]) -> dict[int, tuple[str, str]]:
    """pid → name and role of the deployment's processes on this machine. Raises `PdqError` where
    Redis cannot be reached."""
    client = RedisClient(redis, name="pdq-bench")
    try:
        snapshot = await Registry(client).snapshot()
        info = await client.command("INFO", "server")
        loopback = await client.command("CLIENT", "INFO")
    finally:
        await client.close()
    here = socket.gethostname()
    found = {
        record.pid: (record.name, str(record.role))
        for record in snapshot.records.values()
        if record.host in ("", here) and _is(record.pid, record.started_at / 1000)
    }
    redis_pid = int(info.get("process_id", 0))
    if _local(loopback) and _named(redis_pid, ("redis", "valkey")):
        found[redis_pid] = ("redis", "redis")
    note = running.find(environ)
    if note is not None and note.redis_url == redis.url:
        found[note.pid] = ("serve", "serve")
    return found


def _local(client_info: object) -> bool:
    """Whether Redis sees us come from loopback or a socket, so that its pid is one of ours."""
    info = client_info.decode() if isinstance(client_info, bytes) else str(client_info)
    return "127.0.0.1" in info or "::1" in info or "laddr=/" in info


def _is(pid: int, started_at: float) -> bool:
    """Whether `pid` is still the process that said so at `started_at`, and not a later one."""
    try:
        return pid > 0 and psutil.Process(pid).create_time() <= started_at + CLOCK_SLACK_S
    except psutil.Error:
        return False


def _named(pid: int, parts: tuple[str, ...]) -> bool:
    try:
        return pid > 0 and any(part in psutil.Process(pid).name() for part in parts)
    except psutil.Error:
        return False


def _spent(pid: int) -> float | None:
    """Processor seconds so far."""
    try:
        times = psutil.Process(pid).cpu_times()
    except psutil.Error:
        return None
    return float(times.user + times.system)


def _pss(process: psutil.Process) -> int | None:
    try:
        return int(process.memory_full_info().pss)
    except (psutil.AccessDenied, AttributeError):
        return None
