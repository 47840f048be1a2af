"""The beat of a node: it writes the node's record into the registry and reads those of the others.

Owns when that happens. The assembly says what the record holds; `on_read` decides what follows from the
records of the others.
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
    """Asks `record` and `kv_links` at each beat, and gives `on_read` what it has read."""

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
        self._mute_until = 0.0  # announces no step before

    async def run(self) -> NoReturn:
        """Beat until cancelled."""
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
        """Write into the node's record which suspect is computed alone next, before the step begins: if
        the step kills the process, nothing else tells who was in it. Streams do not wait long for Redis:
        where it does not answer, nobody is found guilty by that record."""
        if time.monotonic() < self._mute_until:
            return
        try:
            async with asyncio.timeout(ALONE_WAIT_S):
                await self._registry.say_alone(self._incarnation, alone)
        except (ServiceUnavailable, TimeoutError) as error:
            log.warning("node.unannounced", error=error)
            self._mute_until = time.monotonic() + ALONE_PAUSE_S
