"""What Redis must still be told about this gateway's requests.

Owns: every write about a request that nobody waits for. Each is kept until Redis has taken it, or until
the record it is about has expired. However long Redis is away, memory is bounded: it holds the latest of
each stage of each choice of an open request, and the end of a closed one; when there are too many ends,
no further request is accepted. One task writes, a few requests at a time, oldest first.

The audit finds what this misses, such as an acceptance that Redis served after the gateway gave it up: it
ends what Redis lists as open here and is not.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping

from common.background import report
from common.errors import PdqError, ServiceUnavailable
from common.logs import get_logger
from common.store.keys import WORK_TTL_S
from common.wire.messages import Stage
from gateway.metrics import GatewayMetrics
from gateway.ports import RequestStore

log = get_logger("ledger")

AT_ONCE = 8  # requests that are written about at the same time
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.1, 2.0  # before Redis is asked again, after it refused all

Write = Callable[[], Awaitable[None]]


@dataclasses.dataclass(slots=True)
class _Unwritten:
    """What is unwritten of one request; `stages` by choice and state."""

    since: float
    stages: dict[tuple[int, str], Stage] = dataclasses.field(default_factory=dict)
    letters: list[Write] = dataclasses.field(default_factory=list)
    end: Write | None = None

    def add(self, stage: Stage) -> None:
        """Keep the newer stage; of two in the same attempt, the durations and counts of both."""
        key = (stage.choice, stage.state)
        old = self.stages.get(key)
        if old is not None and old.attempt > stage.attempt:
            return
        if old is not None and old.attempt == stage.attempt:
            stage = dataclasses.replace(
                stage,
                durations={**old.durations, **stage.durations},
                cached_tokens=max(old.cached_tokens, stage.cached_tokens),
            )
        self.stages[key] = stage


class Ledger:
    """All methods run on one event loop."""

    def __init__(
        self,
        gateway: str,
        open_requests: Mapping[str, object],
        store: RequestStore,
        metrics: GatewayMetrics,
        *,
        max_ends: int,
        audit_interval_s: float,
    ) -> None:
        self._gateway = gateway
        self._open = open_requests
        self._store = store
        self._metrics = metrics
        self._max_ends = max_ends
        self._audit_interval_s = audit_interval_s
        self._unwritten: dict[str, _Unwritten] = {}
        self._num_ends = 0
        self._writer: asyncio.Task[None] | None = None
        self._audit: asyncio.Task[None] | None = None
        self._next_audit = 0.0

    def check_room(self) -> None:
        """Raises `ServiceUnavailable` while too many ends are unwritten."""
        if self._num_ends >= self._max_ends:
            raise ServiceUnavailable(
                f"Redis has not heard of the end of {self._num_ends} requests: no more until it has"
            )

    def stage(self, stage: Stage) -> None:
        """Write that a choice is in this state now."""
        self._of(stage.request).add(stage)
        self._write()

    def letter(self, request: str, write: Write) -> None:
        """Keep a choice of the request as a dead letter, by `write`."""
        self._of(request).letters.append(write)
        self._write()

    def end(self, request: str, end: Write) -> None:
        """Write that the request is over. `end` does that; it may be called again, and should hold no more
        than it needs. An end that waits to be written is not replaced."""
        unwritten = self._of(request)
        if unwritten.end is None:
            unwritten.end = end
            self._count(1)
        self._write()

    def audit(self) -> None:
        """Look for requests that Redis lists as open and that are not, unless the last look was recent."""
        if time.monotonic() >= self._next_audit and self._audit is None:
            self._next_audit = time.monotonic() + self._audit_interval_s
            self._audit = asyncio.create_task(self._look_for_strays(), name="audit")
            self._audit.add_done_callback(report)

    async def settle(self, limit_s: float) -> None:
        """Run a last audit and wait until all is written, up to the limit. Nothing is written afterwards."""
        deadline = time.monotonic() + limit_s
        self._next_audit = 0.0
        self.audit()
        while task := self._audit or self._writer:
            _, waiting = await asyncio.wait({task}, timeout=max(0.0, deadline - time.monotonic()))
            if waiting:
                break
        unfinished = [task for task in (self._writer, self._audit) if task is not None]
        for task in unfinished:
            task.cancel()
        await asyncio.gather(*unfinished, return_exceptions=True)
        if self._unwritten:
            log.warning("ledger.unwritten", requests=len(self._unwritten))  # the reaper ends them

    # Writing.

    def _of(self, request: str) -> _Unwritten:
        return self._unwritten.setdefault(request, _Unwritten(time.monotonic()))

    def _count(self, change: int) -> None:
        self._num_ends += change
        self._metrics.unwritten_ends.set(self._num_ends)

    def _write(self) -> None:
        if self._writer is None:
            self._writer = asyncio.create_task(self._write_all(), name="ledger")
            self._writer.add_done_callback(report)

    async def _write_all(self) -> None:
        pause, stalled = FIRST_PAUSE_S, False
        try:
            while self._unwritten:
                requests = list(itertools.islice(self._unwritten, AT_ONCE))
                written = await asyncio.gather(*map(self._write_one, requests))
                if any(written):
                    pause = FIRST_PAUSE_S
                    continue
                if not stalled:
                    log.warning("ledger.stalled", requests=len(self._unwritten))
                stalled = True
                await asyncio.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
        finally:
            self._writer = None
        if stalled:
            log.info("ledger.caught_up")
            self._next_audit = 0.0
            self.audit()

    async def _write_one(self, request: str) -> bool:
        """Write all that there is of a request. False if some of it was refused and goes to the end of the
        line."""
        unwritten = self._unwritten.pop(request)
        operation = "advance"
        try:
            while unwritten.stages:
                key, stage = next(iter(unwritten.stages.items()))
                await self._store.advance(stage)
                del unwritten.stages[key]
            while unwritten.letters:
                operation = "bury"
                await unwritten.letters[0]()
                del unwritten.letters[0]
            if unwritten.end is not None:
                operation = "end"
                await unwritten.end()
                self._count(-1)
        except PdqError as error:
            self._metrics.store_errors.labels(operation).inc()
            log.debug("ledger.refused", request=request, operation=operation, error=error)
            self._keep(request, unwritten)
            return False
        except asyncio.CancelledError:
            self._keep(request, unwritten)
            raise
        except Exception as error:  # nobody thought of it: the reaper ends this one, and the others go on
            log.error("ledger.failed", request=request, operation=operation, exc_info=error)
            if unwritten.end is not None:
                self._count(-1)
        return True

    def _keep(self, request: str, unwritten: _Unwritten) -> None:
        newer = self._unwritten.pop(request, None)
        if newer is not None:
            for stage in newer.stages.values():
                unwritten.add(stage)
            unwritten.letters += newer.letters
            if unwritten.end is None:
                unwritten.end = newer.end
            elif newer.end is not None:
                self._count(-1)
        if time.monotonic() - unwritten.since < WORK_TTL_S:
            self._unwritten[request] = unwritten
        elif unwritten.end is not None:  # its record is gone
            self._count(-1)

    # Auditing.

    async def _look_for_strays(self) -> None:
        try:
            strays = await self._store.open_requests(self._gateway)
        except ServiceUnavailable as error:
            log.warning("ledger.unaudited", error=error)
            return
        finally:
            self._audit = None
        for request in strays - self._open.keys() - self._unwritten.keys():
            log.info("ledger.stray", request=request)
            self.end(request, self._stray(request))

    def _stray(self, request: str) -> Write:
        async def end() -> None:
            await self._store.end(
                request, "failed", ServiceUnavailable.code, "accepted after its gateway gave it up"
            )

        return end
