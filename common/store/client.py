"""The one door to Redis: connections, time limits, bounded retries, and typed errors.

Owns: the client library (imported here only) and how its exceptions become ours. Knows nothing of
what is stored. Every operation of `pdq` is written so that repeating it changes nothing, hence a
lost answer is simply asked for again, until `RedisSettings.retry_s` is over.

    connection lost, refused, timed out, LOADING, READONLY,
    BUSY, CLUSTERDOWN, TRYAGAIN, MASTERDOWN                   retried, then ServiceUnavailable
    OOM                                                       ServiceUnavailable at once
    wrong password, no permission, too old, another schema    ConfigError at once
"""

from __future__ import annotations

import asyncio
import dataclasses
import re
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Any

import redis.asyncio
from redis import exceptions
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff

from common.errors import ConfigError, PdqError, ServiceUnavailable
from common.logs import get_logger
from common.settings.config import RedisSettings
from common.store.keys import SCHEMA, Keys
from common.store.lua import Result, Script

log = get_logger("redis")

OLDEST = (6, 2)
FIRST_PAUSE_S = 0.02
LONGEST_PAUSE_S = 0.5
TRANSIENT_REPLY = re.compile(r"\b(LOADING|READONLY|BUSY|CLUSTERDOWN|TRYAGAIN|MASTERDOWN)\b")

Command = Sequence[str | bytes | int | float]


@dataclasses.dataclass(frozen=True, slots=True)
class ServerInfo:
    """What answers at the other end."""

    kind: str  # "redis" or "valkey"
    version: str
    eviction: str  # anything but "noeviction" may lose accepted requests


class RedisClient:
    """A pool of connections to one server, bounded: who finds none free waits for one, as long as for
    an answer. Replies are bytes; `text` decodes them."""

    def __init__(self, settings: RedisSettings, *, name: str = "") -> None:
        if not settings.url:
            raise ConfigError("the address of Redis is needed: --redis-url or PDQ_REDIS_URL")
        self.keys = Keys(settings.prefix)
        self.settings = settings
        try:
            pool = redis.asyncio.BlockingConnectionPool.from_url(
                settings.url,
                max_connections=settings.max_connections,
                timeout=settings.timeout_s,
                socket_timeout=settings.timeout_s,
                socket_connect_timeout=settings.timeout_s,
                retry=Retry(NoBackoff(), 0),
                client_name=name or None,
                protocol=2,
            )
            self._redis: Any = redis.asyncio.Redis.from_pool(pool)
        except ValueError:  # whose text would show a part of a password
            raise ConfigError(
                "the address of Redis is none: redis://[user:password@]host:port/0, rediss://… or "
                "unix://path is needed; in a password / is written %2F, # %23 and ? %3F",
                param="redis.url",
            ) from None

    async def open(self) -> ServerInfo:
        """Check that the server is one we can work with; `ConfigError` if it never will be."""
        info = await self.server_info()
        if tuple(int(part) for part in info.version.split(".")[:2]) < OLDEST:
            raise ConfigError(
                f"{info.kind} {info.version} is too old: Redis {OLDEST[0]}.{OLDEST[1]} or newer, "
                "or Valkey, is needed",
                param="redis.url",
            )
        if info.eviction not in ("noeviction", "unknown"):
            log.warning("redis.evicts", policy=info.eviction)
        schema = self.keys.schema()
        _, found = await self.pipeline(("SET", schema, SCHEMA, "NX"), ("GET", schema))
        if text(found) != SCHEMA:
            raise ConfigError(
                f"Redis holds data of schema {text(found)} under {self.keys.prefix!r}, this is "
                f"schema {SCHEMA}; use another --redis-prefix or the other version of pdq",
                param="redis.prefix",
            )
        return info

    async def close(self) -> None:
        await self._redis.aclose()

    async def command(self, *command: str | bytes | int | float, retry: bool = True) -> Any:
        """One command; its reply in the form the client library gives it."""
        return await self._guarded(lambda: self._redis.execute_command(*command), retry)

    async def pipeline(self, *commands: Command) -> list[Any]:
        """Several commands in one round trip, as one transaction; their replies in order."""
        return await self._together(commands, transaction=True)

    async def read(self, *commands: Command) -> list[Any]:
        """Several commands that only read, in one round trip; their replies in order. No transaction: a Redis
        without memory answers what reads, but not between MULTI and EXEC."""
        return await self._together(commands, transaction=False)

    async def _together(self, commands: Sequence[Command], *, transaction: bool) -> list[Any]:
        async def run() -> list[Any]:
            async with self._redis.pipeline(transaction=transaction) as pipeline:
                for command in commands:
                    pipeline.execute_command(*command)
                return list(await pipeline.execute())

        replies: list[Any] = await self._guarded(run, True)
        return replies

    async def call(self, script: Script[Result]) -> Result:
        """Run `script`, atomically, by its digest; with its text where Redis does not know it yet."""
        keys, arguments = script.encoded()

        async def run() -> Any:
            try:
                return await self._redis.evalsha(script.digest, len(keys), *keys, *arguments)
            except exceptions.NoScriptError:
                return await self._redis.eval(script.text, len(keys), *keys, *arguments)

        return script.result(await self._guarded(run, True))

    async def server_info(self) -> ServerInfo:
        reply: dict[str, Any] = await self.command("INFO")
        valkey = "valkey_version" in reply
        return ServerInfo(
            kind="valkey" if valkey else "redis",
            version=str(reply["valkey_version" if valkey else "redis_version"]),
            eviction=str(reply.get("maxmemory_policy", "unknown")),
        )

    async def generation(self) -> str:
        """A name of the content's life; another one than before means that content was lost: after
        FLUSHALL, a restart, or a fail-over. Gateways then assert their open requests again."""
        epoch = self.keys.epoch()
        found, info = await self.read(("GET", epoch), ("INFO", "server"))
        if found is None:  # no write before it is needed: a Redis without memory refuses it
            _, found = await self.pipeline(("SET", epoch, secrets.token_hex(8), "NX"), ("GET", epoch))
        return f"{info['run_id']}:{text(found)}"

    async def _guarded(self, operation: Callable[[], Awaitable[Any]], retry: bool) -> Any:
        """Run `operation`, again while its failure is transient and time is left."""
        deadline = time.monotonic() + (self.settings.retry_s if retry else 0.0)
        pause = FIRST_PAUSE_S
        task = asyncio.current_task()
        while True:
            cancels = task.cancelling() if task else 0
            try:
                result = await operation()
                # asyncio.wait_for of Python 3.11, inside the library, may swallow a cancel.
                if task and task.cancelling() > cancels:
                    raise asyncio.CancelledError
                return result
            except (exceptions.RedisError, OSError) as error:
                if task and task.cancelling() > cancels:
                    raise asyncio.CancelledError from error
                typed, transient = _translated(error)
                if not transient or time.monotonic() + pause >= deadline:
                    raise typed from error
            await asyncio.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)


def text(reply: Any) -> str:
    """A reply of bytes as text; absent is empty."""
    if reply is None:
        return ""
    return reply.decode("utf-8", "replace") if isinstance(reply, bytes) else str(reply)


def scores(reply: Sequence[Any]) -> dict[str, float]:
    """Member → score from the reply of ZRANGE … WITHSCORES, flat or in pairs."""
    paired = bool(reply) and not isinstance(reply[0], bytes)
    flat = [part for pair in reply for part in pair] if paired else list(reply)
    return {text(name): float(score) for name, score in zip(flat[::2], flat[1::2], strict=True)}


def reply_code(error: BaseException) -> str:
    """First word of the server's error reply behind `error` ("NOGROUP", "OOM", …), or ""."""
    cause = error.__cause__ if isinstance(error, PdqError) else error
    if not isinstance(cause, exceptions.ResponseError):
        return ""
    return str(cause).split(" ", 1)[0]


def _translated(error: Exception) -> tuple[PdqError, bool]:
    """Our error for the library's, and whether trying again can help."""
    if isinstance(error, (exceptions.AuthenticationError, exceptions.AuthorizationError)):
        return ConfigError(f"Redis refuses the credentials: {error}", param="redis.url"), False
    if isinstance(error, exceptions.NoPermissionError):
        return ConfigError(f"Redis refuses permission: {error}", param="redis.url"), False
    if isinstance(error, exceptions.OutOfMemoryError) or "OOM " in str(error):
        return ServiceUnavailable(f"Redis is out of memory: {error}"), False
    if isinstance(error, (exceptions.ConnectionError, exceptions.TimeoutError, OSError)):
        return ServiceUnavailable(
            f"Redis cannot be reached: {error}; --redis-url or PDQ_REDIS_URL says where it is"
        ), True
    known = isinstance(error, (exceptions.ReadOnlyError, exceptions.TryAgainError))
    transient = known or TRANSIENT_REPLY.search(str(error)) is not None
    return ServiceUnavailable(f"Redis refused: {error}"), transient
