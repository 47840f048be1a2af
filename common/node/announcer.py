"""A node's record in the registry, and those of the others, read as often.

Owns the beat: what is announced is the assembly's to say, what follows from the others' records is
theirs who asked for `on_read`.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import NoReturn

from common.errors import ServiceUnavailable
from common.logs import get_logger
from common.store.registry import KVLink, NodeRecord, Registry, Snapshot

log = get_logger("node")

INTERVAL_S = 0.5
ALONE_WAIT_S, ALONE_PAUSE_S = 0.5, 5.0  # to announce a step of a suspect; until the next try


class Announcer:
    """`record` and `kv_links` are asked at each beat; `on_read` hears of what was read."""

    def __init__(
        self,
        registry: Registry,
        incarnation: str,
        *,
        record: Callable[[int], NodeRecord],
        kv_links: Callable[[], list[KVLink]],
        on_read: Callable[[Snapshot], None],
    ) -> None:
        self._registry, self._incarnation = registry, incarnation
        self._record, self._kv_links, self._on_read = record, kv_links, on_read
        self._beats = 0
        self._mute_until = 0.0  # no step is announced before

    async def run(self) -> NoReturn:
        """Until cancelled: once a beat."""
        while True:
            try:
                await self.announce()
                self._on_read(await self._registry.snapshot())
            except ServiceUnavailable as error:
                log.warning("registry.unreachable", error=error)
            await asyncio.sleep(INTERVAL_S)

    async def announce(self) -> None:
        """Write the record as it is now. `ServiceUnavailable` if Redis does not answer."""
        self._beats += 1
        await self._registry.announce(self._record(self._beats), self._kv_links())

    async def say_alone(self, alone: str) -> None:
        """Write into the node's record whose step of its own comes next, before it is computed: if it
        takes the process with it, that is all there is to know it by. Streams do not wait long for
        Redis: where it does not answer, nobody will be found guilty by that record."""
        if time.monotonic() < self._mute_until:
            return
        try:
            async with asyncio.timeout(ALONE_WAIT_S):
                await self._registry.say_alone(self._incarnation, alone)
        except (ServiceUnavailable, TimeoutError) as error:
            log.warning("node.unannounced", error=error)
            self._mute_until = time.monotonic() + ALONE_PAUSE_S
