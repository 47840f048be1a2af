"""The reaper: deletes what dead incarnations left in Redis. Every gateway runs one; one is at work.

Owns: the conclusion that an incarnation will not come back to clean up. Retries nothing, and kills
nothing: that is for gateways, which see their links. It concludes from its own watching only: an
incarnation is dead once its beat has not moved for `dead_after_s` of uninterrupted contact with
Redis, on this process' monotonic clock. An outage of Redis, or a stop of the reaper, starts all of
that anew (the grace period). A false death is harmless: a node writes its record again with its
next beat, and a gateway's requests may still finish (request_state.RANK).

    of a node      record, index entry, load and stream, as if it had left: what nobody has claimed
                   is given back to its gateway, and what it had claimed its gateway retries
    of a gateway   the same; its open requests are failed, so that nodes and people know

It also counts the loads of all nodes anew from the open requests, now and then: they are kept up to
date by every write, and what a write cannot know (a record that was deleted, a node that was taken
for dead) would stay in them for as long as the node lives.
"""

from __future__ import annotations

import asyncio
import dataclasses
import time
from collections.abc import Callable

from common.errors import ServiceUnavailable
from common.logs import get_logger
from common.store import registry_scripts as scripts
from common.store.client import RedisClient, scores, text
from common.store.keys import REAPER_LOCK_TTL_S
from common.store.registry import Registry
from common.store.request_scripts import RecountLoads
from common.store.requests import Requests

log = get_logger("reaper")

GATEWAY_LOST = "gateway_lost"
RECOUNT_INTERVAL_S = 60.0
RECOUNTED_AT_MOST = 5000  # open requests: Redis does nothing else for about ten milliseconds


@dataclasses.dataclass(frozen=True, slots=True)
class Reaped:
    """What one sweep has deleted."""

    incarnations: tuple[str, ...] = ()
    requests: tuple[str, ...] = ()


@dataclasses.dataclass(slots=True)
class _Seen:
    beat: str  # the last one, as it stands in Redis; "" for a name that is not in the index
    since: float


class Reaper:
    """One reaper, named after its process. Call `sweep` at intervals, or let `run` do it."""

    def __init__(
        self,
        client: RedisClient,
        name: str,
        *,
        dead_after_s: float = 60.0,
        interval_s: float = 10.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client = client
        self._keys = client.keys
        self._requests = Requests(client)
        self._registry = Registry(client)
        self._name = name
        self._dead_after_s = dead_after_s
        self._interval_s = interval_s
        self._clock = clock
        self._seen: dict[str, _Seen] = {}
        self._last_sweep = self._counted_at = clock()

    async def run(self) -> None:
        """Sweep until cancelled."""
        while True:
            try:
                await self.sweep()
            except ServiceUnavailable as error:
                log.warning("reaper.unreachable", error=error)
            await asyncio.sleep(self._interval_s)

    async def sweep(self) -> Reaped:
        """Watch, and delete what is dead; nothing while another reaper holds the lock."""
        now = self._clock()
        if now - self._last_sweep > self._dead_after_s:
            self._seen.clear()  # we were stopped ourselves: what we have not watched does not count
        self._last_sweep = now
        try:
            dead = [
                name
                for name, seen in (await self._watch(now)).items()
                if now - seen.since >= self._dead_after_s
            ]
            recount = now - self._counted_at >= RECOUNT_INTERVAL_S
            if not (dead or recount) or not await self._lock():
                return Reaped()
            try:
                reaped = await self._reap(dead)
                if recount:
                    self._counted_at = now
                    await self._recount()
                return reaped
            finally:
                await self._client.call(scripts.ReleaseLock(lock=self._keys.reaper_lock(), name=self._name))
        except ServiceUnavailable:
            self._seen.clear()
            raise

    async def _watch(self, now: float) -> dict[str, _Seen]:
        """All names there are traces of, with how long each one's beat has not moved."""
        index = await self._client.command("ZRANGE", self._keys.nodes(), 0, -1, "WITHSCORES")
        beats = {name: str(beat) for name, beat in scores(index).items()}
        for stem in (self._keys.stream(""), self._keys.load(""), self._keys.open_requests("")):
            for name in await self._names(stem):
                beats.setdefault(name, "")
        self._seen = {
            name: seen if (seen := self._seen.get(name)) and seen.beat == beat else _Seen(beat, now)
            for name, beat in beats.items()
        }
        return self._seen

    async def _names(self, stem: str) -> set[str]:
        """What stands behind `stem` in keys of its family."""
        names: set[str] = set()
        cursor = 0
        while True:
            cursor, keys = await self._client.command("SCAN", cursor, "MATCH", f"{stem}*", "COUNT", 1000)
            names.update(text(key)[len(stem) :] for key in keys)
            if int(cursor) == 0:
                return names

    async def _lock(self) -> bool:
        return await self._client.call(
            scripts.TakeLock(lock=self._keys.reaper_lock(), name=self._name, ttl_ms=REAPER_LOCK_TTL_S * 1000)
        )

    async def _reap(self, dead: list[str]) -> Reaped:
        failed: list[str] = []
        for name in dead:
            for request in await self._requests.open_requests(name):
                if not await self._lock():  # renewed with each step; lost: another is at work
                    return Reaped((), tuple(failed))
                await self._requests.fail(request, GATEWAY_LOST, f"gateway {name} is gone")
                # Not the whole set: it may live after all, and have accepted another meanwhile.
                await self._client.command("SREM", self._keys.open_requests(name), request)
                failed.append(request)
            await self._registry.leave(name)
            self._seen.pop(name, None)
            log.info("reaper.reaped", incarnation=name)
        await self._forget_expired()
        return Reaped(tuple(dead), tuple(failed))

    async def _recount(self) -> None:
        """The loads are what the open requests count in."""
        keys = self._keys
        sets = [keys.open_requests(name) for name in await self._names(keys.open_requests(""))]
        loads = [keys.load(name) for name in await self._names(keys.load(""))]
        if not loads:
            return
        wrong = await self._client.call(
            RecountLoads(
                open_requests=sets,
                loads=loads,
                record_stem=keys.request(""),
                load_stem=keys.load(""),
                most=RECOUNTED_AT_MOST,
            )
        )
        if wrong > 0:
            log.warning("reaper.recounted", loads=wrong)

    async def _forget_expired(self) -> None:
        """Drop the oldest ids of the list of recent requests whose record has expired."""
        oldest = await self._client.command("ZRANGE", self._keys.requests(), 0, 99)
        if not oldest:
            return
        exists = await self._client.read(
            *(("EXISTS", self._keys.request(text(request))) for request in oldest)
        )
        expired = [name for name, found in zip(oldest, exists, strict=True) if not found]
        if expired:
            await self._client.command("ZREM", self._keys.requests(), *expired)
